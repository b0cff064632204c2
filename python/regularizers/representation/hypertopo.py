"""Tokens on a product of hyperbolic, flat and spherical space, with a contrast in the ball."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_labels,
    check_not_negative,
    check_one_of,
    check_positive,
    check_same_dtype,
    check_values,
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import gather_batch, gather_rows
from regularizers._shared.entries import reduce_entries
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers.ops._operator import accumulate_dtype

# Differences [rows, N, D] that one step of the contrast may hold.
_BLOCK = 1 << 20


def poincare_expmap0(v: Tensor, *, c: float | Tensor = 1.0) -> Tensor:
    r"""Map tangent vectors at the origin to the Poincare ball of curvature :math:`-c`.

    .. math:: \exp_0(v) = \tanh(\sqrt c\, \|v\|)\, \frac{v}{\sqrt c\, \|v\|}

    The distance of the result from the origin is :math:`2 \|v\|`. Its norm is kept below
    :math:`(1 - \delta) / \sqrt c`, with :math:`\delta` 4e-3 in float32 and 1e-5 in float64: nearer
    the edge, :math:`1 - c \|x\|^2` has no digits left.

    Args:
        v: ``[..., D]``, floating point.
        c: above 0, a number or a tensor with no dimensions, which may require a gradient.

    Returns:
        Points of the ball, ``[..., D]``; float32 for half types, which could not hold a point near
        the edge.

    Raises:
        TypeError: ``v`` is not floating point, or ``c`` is no number.
        ValueError: ``c`` is not above 0.

    Example:
        >>> poincare_expmap0(torch.tensor([1.0, 0.0]), c=1.0)
        tensor([0.7616, 0.0000])

    Source:
        HyperTopo-Adapters, authors' code read. There, without an optional package, the map is an
        elementwise tanh, which can leave the ball; here it never does. In the released code the
        ball has curvature -1 whatever curvature is learned.
    """
    check_floating("v", v)
    wide = v.to(accumulate_dtype(v.dtype))
    root = _curvature("c", c, wide).sqrt()
    # A gradient of 0 at the origin is that of the norm; the quotient below tends to 1.
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    length = (root * norm).clamp_min(1e-15)
    return wide * (length.tanh().clamp_max(1 - _edge(wide.dtype)) / length)


def poincare_distance(x: Tensor, y: Tensor, *, c: float | Tensor = 1.0) -> Tensor:
    r"""Compute geodesic distances between points of the Poincare ball of curvature :math:`-c`.

    .. math::
        d_c(x, y) = \frac{1}{\sqrt c} \operatorname{arccosh} \left( 1 +
        \frac{2 c \|x - y\|^2}{(1 - c \|x\|^2)(1 - c \|y\|^2)} \right)
        = \frac{2}{\sqrt c} \operatorname{arsinh}
        \frac{\sqrt c\, \|x - y\|}{\sqrt{(1 - c \|x\|^2)(1 - c \|y\|^2)}}

    The second form is computed: it keeps its digits where points are near each other, is 0 for
    equal ones and has a finite gradient there (0), so that no argument needs to be clamped. As
    :math:`c \to 0` the distance becomes :math:`2 \|x - y\|`.

    Args:
        x: ``[..., D]``, inside the ball, :math:`c \|x\|^2 < 1`.
        y: of the same type, broadcastable with ``x``.
        c: above 0, a number or a tensor with no dimensions, which may require a gradient.

    Returns:
        ``[...]``; float32 for half types.

    Raises:
        TypeError: tensors are not floating point or differ in type.
        ValueError: a point is outside of the ball, or ``c`` is not above 0.

    Example:
        >>> poincare_distance(torch.zeros(2), torch.tensor([0.5, 0.0]))
        tensor(1.0986)

    Source:
        HyperTopo-Adapters, authors' code read, which takes the first form with its argument
        clamped to 1 + 1e-7, and falls back to the Euclidean distance without an optional package.
    """
    check_floating("x", x)
    check_floating("y", y)
    check_same_dtype("y", y, "x", x)
    dtype = accumulate_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    curvature = _curvature("c", c, x)
    _check_inside("x", x, curvature)
    _check_inside("y", y, curvature)
    return _distance(x, y, curvature)


def hyperbolic_info_nce(
    z: Tensor,
    ids: Tensor,
    *,
    c: float | Tensor = 1.0,
    temperature: float = 0.1,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Contrast points of the Poincare ball: near those of their own image, far from the others.

    .. math::
        \ell_i = \log \sum_{j \ne i} e^{-d_c(z_i, z_j) / T}
        - \log \frac{1}{|P_i|} \sum_{j \in P_i} e^{-d_c(z_i, z_j) / T}, \qquad
        P_i = \{ j \ne i : \mathrm{id}_j = \mathrm{id}_i \}

    The mean is over the rows with a positive. Distances are found block by block and again in the
    backward pass, so that memory grows with N and not with its square.

    Args:
        z: ``[N, D]``, inside the ball of curvature :math:`-c`.
        ids: ``[N]``, integers: the image of each token.
        c: above 0, a number or a tensor with no dimensions, which may require a gradient.
        temperature: T, in units of the distance, above 0.
        reduction: ``"mean"`` or ``"sum"`` over the rows with a positive, or ``"none"``.
        process_group: processes whose batches are one; the loss is that of the whole. Local
            batches must have one size.

    Returns:
        The loss, with no dimensions, or ``[N]`` with 0 for rows without a positive; 0 with a graph
        where there is none at all. float32 for half types.

    Raises:
        TypeError: ``z`` is not floating point, or ``ids`` are not integers.
        ValueError: a shape or an option is out of range, or a point is outside of the ball.

    Example:
        >>> z = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.0], [0.5, 0.0]])
        >>> hyperbolic_info_nce(z, torch.tensor([0, 0, 1, 1]), temperature=0.5)
        tensor(0.2007)

    Source:
        HyperTopo-Adapters, authors' code read; see :func:`poincare_distance` for the distance.
    """
    check_floating("z", z)
    check_positive("temperature", temperature)
    check_one_of("reduction", reduction, REDUCTIONS)
    if z.dim() != 2:
        raise ValueError(f"z must have shape [N, D], got {list(z.shape)}")
    check_labels("ids", ids, z.shape[0])
    wide = z.to(accumulate_dtype(z.dtype))
    curvature = _curvature("c", c, wide)
    _check_inside("z", wide, curvature)
    wide, ids = gather_batch(wide, process_group), gather_rows(ids, process_group)
    rows = max(1, _BLOCK // max(1, wide.numel()))
    if rows >= len(wide):
        parts = [_losses(wide, ids, curvature, temperature, 0, len(wide))]
    else:
        parts = [
            checkpoint(
                _losses,
                wide,
                ids,
                curvature,
                temperature,
                start,
                min(start + rows, len(wide)),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for start in range(0, len(wide), rows)
        ]
    losses, positives = (torch.cat(column) for column in zip(*parts, strict=True))
    # NaN comes out also where no row counts.
    return reduce_entries(losses, reduction, valid=positives > 0) + 0 * wide.sum()


def _losses(
    z: Tensor, ids: Tensor, c: Tensor, temperature: float, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Return the losses of the rows ``start`` to ``stop``, and how many positives each has."""
    logits = -_distance(z[start:stop, None], z, c) / temperature
    index = torch.arange(len(z), device=z.device)
    other = index[start:stop, None] != index
    positive = other & (ids[start:stop, None] == ids)
    count = positive.sum(1)
    # A row without a positive counts nothing; it gets finite values, so that its gradient is 0.
    absent = (count == 0)[:, None]
    every = logits.masked_fill(~(other | absent), -torch.inf).logsumexp(1)
    near = logits.masked_fill(~(positive | absent), -torch.inf).logsumexp(1)
    return every - near + count.clamp_min(1).log(), count


def _distance(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    root = c.sqrt()
    room = (1 - c * x.square().sum(-1)) * (1 - c * y.square().sum(-1))
    return 2 / root * torch.asinh(root * torch.linalg.vector_norm(x - y, dim=-1) * room.rsqrt())


def _edge(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float64 else 4e-3


def _curvature(name: str, c: float | Tensor, like: Tensor) -> Tensor:
    """Return a curvature beside ``like``, checked; gradients reach a tensor."""
    if not isinstance(c, Tensor):
        check_positive(name, c)
        return torch.full((), c, dtype=like.dtype, device=like.device)
    if c.dim() != 0 or not c.is_floating_point():
        raise ValueError(
            f"{name} must be a number or a floating-point tensor with no dimensions, "
            f"got {c.dtype} of shape {list(c.shape)}"
        )
    check_values(c.detach() > 0, lambda: f"{name} must be above 0, got {c.item()}")
    return c.to(like)


def _check_inside(name: str, x: Tensor, c: Tensor) -> None:
    squares = (c * x.square().sum(-1)).detach()
    check_values(
        ~(squares >= 1).any(),  # NaN passes, and comes out as NaN
        lambda: (
            f"{name} must lie inside the ball, c ||{name}||^2 < 1, got {squares.max().item():g}"
        ),
    )


class ManifoldOutput(NamedTuple):
    r"""What :class:`ProductManifoldHead` gives.

    Attributes:
        h: points of the Poincare ball, ``[B, N, dim_h]``.
        e: flat features, ``[B, N, dim_e]``.
        s: points of the sphere of radius :math:`1 / \sqrt{c_s}`, ``[B, N, dim_s]``.
        tangent: for a decoder, ``[B, N, dim_h + dim_e + dim_s]``: what h, e and s were made of.
        c_h: minus the curvature of the ball, with no dimensions.
        c_s: the curvature of the sphere, with no dimensions.

    Example:
        >>> output = ProductManifoldHead(16, 2, 4, 3)(torch.zeros(1, 5, 16))
        >>> output.tangent.shape
        torch.Size([1, 5, 9])
    """

    h: Tensor
    e: Tensor
    s: Tensor
    tangent: Tensor
    c_h: Tensor
    c_s: Tensor


class ProductManifoldHead(nn.Module):
    r"""Project tokens to hyperbolic, flat and spherical factors.

    .. math::
        v_h = W_h x, \quad e = W_e x, \quad v_s = W_s x, \qquad h = \exp_0(v_h), \quad
        s = \frac{v_s}{\sqrt{c_s}\, \|v_s\|}, \quad \mathrm{tangent} = [v_h, e, v_s]

    with biases. A learned curvature is softplus of a parameter plus 1e-6, and starts at the value
    given; losses that are to teach it take ``c=output.c_h``.

    Args:
        in_dim: features C of a token.
        dim_h: dimensions of the hyperbolic factor.
        dim_e: of the flat one.
        dim_s: of the spherical one.
        curvature_h: c of :func:`poincare_expmap0`, above 0; the ball has curvature -c.
        curvature_s: of the sphere, above 0.
        learn_curvature: whether both are parameters.

    Shape:
        ``[..., C]`` to a :class:`ManifoldOutput`; h and s are float32 for half types.

    Raises:
        TypeError: an argument is of the wrong type, or tokens are not floating point.
        ValueError: an argument is out of range.

    Example:
        >>> head = ProductManifoldHead(64, 8, 32, 8)
        >>> output = head(torch.randn(2, 49, 64))
        >>> ids = torch.arange(2).repeat_interleave(49)
        >>> hyperbolic_info_nce(output.h.flatten(0, 1), ids, c=output.c_h).backward()

    Source:
        HyperTopo-Adapters, authors' code read; dimensions 8, 32 and 8 in its configuration. There
        learned curvatures exist, and nothing uses them; here they shape h and s.
    """

    def __init__(
        self,
        in_dim: int,
        dim_h: int = 8,
        dim_e: int = 32,
        dim_s: int = 8,
        *,
        curvature_h: float = 1.0,
        curvature_s: float = 1.0,
        learn_curvature: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (
            ("in_dim", in_dim),
            ("dim_h", dim_h),
            ("dim_e", dim_e),
            ("dim_s", dim_s),
        ):
            check_at_least(name, size, 1)
        self.project_h = nn.Linear(in_dim, dim_h)
        self.project_e = nn.Linear(in_dim, dim_e)
        self.project_s = nn.Linear(in_dim, dim_s)
        self.learn_curvature = learn_curvature
        for name, value in (("curvature_h", curvature_h), ("curvature_s", curvature_s)):
            check_positive(name, value)
            if learn_curvature:
                raw = math.log(math.expm1(max(value - 1e-6, 1e-6))) if value < 20 else value
                self.register_parameter(f"raw_{name}", nn.Parameter(torch.tensor(raw)))
            else:
                self.register_buffer(f"_{name}", torch.tensor(value), persistent=False)

    def curvatures(self) -> tuple[Tensor, Tensor]:
        """Return c_h and c_s, with no dimensions."""
        if not self.learn_curvature:
            return self.get_buffer("_curvature_h"), self.get_buffer("_curvature_s")
        raw = (self.get_parameter("raw_curvature_h"), self.get_parameter("raw_curvature_s"))
        c_h, c_s = (F.softplus(x.to(accumulate_dtype(x.dtype))) + 1e-6 for x in raw)
        return c_h, c_s

    def forward(self, x: Tensor) -> ManifoldOutput:
        """Return the three factors of tokens, and their tangent vectors."""
        check_floating("x", x)
        c_h, c_s = self.curvatures()
        v_h, e, v_s = self.project_h(x), self.project_e(x), self.project_s(x)
        wide = v_s.to(accumulate_dtype(v_s.dtype))
        s = unit(wide) / c_s.to(wide).sqrt()
        h = poincare_expmap0(v_h, c=c_h)
        return ManifoldOutput(h, e, s, torch.cat([v_h, e, v_s], -1), c_h, c_s)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        c_h, c_s = self.curvatures()
        return (
            f"curvature_h={c_h.item():g}, curvature_s={c_s.item():g}, "
            f"learn_curvature={self.learn_curvature}"
        )


def select_checkpoint(records: Sequence[Mapping[str, float]], *, k: int = 5) -> int:
    """Pick a checkpoint: the lowest persistence-diagram distance among the k highest Dice scores.

    ``argmin over the k largest dice of pd``. The lowest distance overall may belong to a model
    that segments badly.

    Args:
        records: one mapping a checkpoint, with the entries ``"dice"`` and ``"pd"``.
        k: how many of the highest Dice scores are looked at, at least 1.

    Returns:
        The index of the record; the earliest of equals.

    Raises:
        ValueError: there is no record, one lacks an entry or holds a NaN, or k is below 1.

    Example:
        >>> scores = [(0.9, 0.3), (0.8, 0.2), (0.1, 0.0)]
        >>> select_checkpoint([{"dice": dice, "pd": pd} for dice, pd in scores], k=2)
        1

    Source:
        HyperTopo-Adapters, authors' code read.
    """
    check_at_least("k", k, 1)
    if not records:
        raise ValueError("records must hold a checkpoint, got none")
    for record in records:
        if "dice" not in record or "pd" not in record:
            raise ValueError(f"records must have the entries dice and pd, got {sorted(record)}")
        if math.isnan(record["dice"]) or math.isnan(record["pd"]):
            raise ValueError(f"records must not hold NaN, got {dict(record)}")
    best = sorted(range(len(records)), key=lambda i: -records[i]["dice"])[:k]
    return min(sorted(best), key=lambda i: records[i]["pd"])


def linear_warmup(epoch: int, epochs: int) -> float:
    r"""Return the factor of a loss that grows linearly over the first epochs.

    .. math:: \min(1, (\mathrm{epoch} + 1) / \mathrm{epochs})

    Args:
        epoch: counted from 0.
        epochs: how many epochs the growth takes; 0 for none.

    Returns:
        In (0, 1].

    Raises:
        ValueError: an argument is negative.

    Example:
        >>> [linear_warmup(epoch, 4) for epoch in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]

    Source:
        HyperTopo-Adapters, authors' code read, where a warm-up of 0 epochs squares the weight.
    """
    check_not_negative("epoch", epoch)
    check_not_negative("epochs", epochs)
    return 1.0 if epochs == 0 else min(1.0, (epoch + 1) / epochs)
