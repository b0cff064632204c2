"""Losses of intrinsic normal prototypes: coherence, soft mining; and the map of anomalies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_same_device,
    check_shape,
)
from regularizers._shared.directions import cosine, unit
from regularizers._shared.distributed import add_up
from regularizers._shared.entries import reduce_entries
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers.ops._operator import accumulate_dtype, full_precision


class PrototypeAssignment(NamedTuple):
    """What :func:`coherence_loss` finds for every token.

    Attributes:
        loss: the reduced loss.
        distance: one less the cosine to the nearest prototype, ``[B, N]``.
        nearest: the nearest prototype, int64 ``[B, N]``.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> coherence_loss(x, x.flip(1), return_assignment=True).nearest
        tensor([[1, 0]])
    """

    loss: Tensor
    distance: Tensor
    nearest: Tensor


@overload
def coherence_loss(
    tokens: Tensor,
    prototypes: Tensor,
    *,
    return_assignment: Literal[False] = False,
    reduction: Reduction = "mean",
) -> Tensor: ...
@overload
def coherence_loss(
    tokens: Tensor,
    prototypes: Tensor,
    *,
    return_assignment: Literal[True],
    reduction: Reduction = "mean",
) -> PrototypeAssignment: ...
def coherence_loss(
    tokens: Tensor,
    prototypes: Tensor,
    *,
    return_assignment: bool = False,
    reduction: Reduction = "mean",
) -> Tensor | PrototypeAssignment:
    r"""Compute how far tokens are from the nearest prototype of their image.

    .. math:: L = \frac{1}{B N} \sum_{b,n} \min_m (1 - \cos(x_{bn}, p_{bm}))

    It keeps the prototypes to what is frequent in the image. Gradients reach the nearest prototype
    of each token, and the tokens where they require it (the paper freezes their encoder). A token
    or a prototype of length 0 has cosine 0 with everything.

    A mean over tokens: over processes it needs no collective beyond the mean of gradients that
    ``DistributedDataParallel`` takes.

    Args:
        tokens: x, ``[B, N, D]``.
        prototypes: p, ``[B, M, D]``.
        return_assignment: return distances and indices as well.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B, N]``.

    Returns:
        The loss, float32 for half types; with ``return_assignment`` a
        :class:`PrototypeAssignment`.

    Raises:
        TypeError: a tensor is not floating-point.
        ValueError: a shape does not fit, or ``reduction`` is unknown.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
        >>> coherence_loss(x, torch.tensor([[[2.0, 0.0]]]))
        tensor(0.4310)

    Source:
        W. Luo et al., CVPR 2025, arXiv 2503.02424, authors' code; weight 0.2 beside
        :func:`soft_mining_cosine_loss`.
    """
    check_tokens("tokens", tokens, None)
    check_tokens("prototypes", prototypes, tokens.shape[2], len(tokens))
    check_same_device("prototypes", prototypes, "tokens", tokens)
    check_one_of("reduction", reduction, REDUCTIONS)
    dtype = accumulate_dtype(torch.promote_types(tokens.dtype, prototypes.dtype))
    x = tokens.to(dtype)
    # The length of a token is the same for all prototypes: divide the largest product, and make no
    # normalised copy of the tokens, which are all of the memory here.
    with full_precision(x.device):
        nearest, index = (x @ unit(prototypes.to(dtype)).mT).max(-1)
    length = torch.linalg.vector_norm(x, dim=-1)
    none = length == 0
    distance = 1 - torch.where(none, 0, nearest / torch.where(none, 1, length))
    loss = reduce_entries(distance, reduction)
    return PrototypeAssignment(loss, distance, index) if return_assignment else loss


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a constant tensor.

    A hook on the tensor would stay there and count twice where the tensor is used twice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None


def soft_mining_cosine_loss(
    encoder_feats: Sequence[Tensor],
    decoder_feats: Sequence[Tensor],
    *,
    power: float = 3.0,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Compare feature maps with their reconstructions; places that are hard to rebuild pull more.

    .. math::
        L = \frac{1}{K B} \sum_{k,b} \big(1 - \cos(\mathrm{vec}\, e_{kb}, \mathrm{vec}\, d_{kb})
        \big), \qquad
        \frac{\partial L}{\partial d_{kbhw}} \leftarrow w_{kbhw} \frac{\partial L}
        {\partial d_{kbhw}}, \qquad
        w = \Big(\frac{M}{\operatorname{mean} M}\Big)^{\gamma}

    with :math:`M_{kbhw} = 1 - \cos(e_{kbhw}, d_{kbhw})` over the channels of one place, its mean
    over places and batch, and w constant. The factors are in the gradient only: the value is that
    of the plain cosine loss, and finite differences of it disagree with its gradient on purpose.

    Args:
        encoder_feats: e, K maps ``[B, D, H, W]``; they get no gradient.
        decoder_feats: d, K maps of the same shapes.
        power: :math:`\gamma`, at least 0. 0 gives the plain gradient.
        reduction: over the images: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B]``.
        process_group: processes whose images are one batch: the mean of M and the loss are those of
            the whole.

    Returns:
        The loss; float32 for half types.

    Raises:
        TypeError: a map is not floating-point.
        ValueError: the sequences are empty or differ in length, shapes do not fit, ``power`` is
            negative, or ``reduction`` is unknown.

    Example:
        >>> e = [torch.randn(2, 8, 7, 7) for _ in range(2)]
        >>> d = [torch.randn(2, 8, 7, 7, requires_grad=True) for _ in range(2)]
        >>> soft_mining_cosine_loss(e, d).backward()

    Source:
        W. Luo et al., CVPR 2025, arXiv 2503.02424; the authors' code
        (``global_cosine_hm_adaptive``) with a hook on the tensor, here a function of its own.
    """
    pairs = _check_maps(encoder_feats, decoder_feats)
    check_not_negative("power", power)
    check_one_of("reduction", reduction, REDUCTIONS)
    losses = []
    for e, d in pairs:
        factor = _mining_factor(e, d, power, process_group)
        pulled: Tensor = _ScaleGradient.apply(d, factor.to(d.dtype))  # type: ignore[no-untyped-call]
        losses.append(1 - cosine(e.flatten(1), pulled.flatten(1)))
    return reduce_entries(torch.stack(losses).mean(0), reduction, group=process_group)


@torch.no_grad()
def _mining_factor(
    e: Tensor, d: Tensor, power: float, process_group: dist.ProcessGroup | None
) -> Tensor:
    """Return w, ``[B, 1, H, W]``."""
    error = (1 - cosine(e, d, dim=1)).clamp_min(0)[:, None]
    sums = torch.stack([error.sum(), error.new_full((), error.numel())])
    if process_group is not None:
        sums = add_up(sums, process_group)
    mean = sums[0] / sums[1]
    # Where everything is rebuilt, every place is as hard as the mean one.
    return torch.where(mean == 0, 1, error / torch.where(mean == 0, 1, mean)) ** power


def anomaly_map(
    encoder_feats: Sequence[Tensor],
    decoder_feats: Sequence[Tensor],
    *,
    size: int | tuple[int, int],
    align_corners: bool = True,
) -> Tensor:
    r"""Score each pixel by how badly the features there were rebuilt.

    .. math:: S = \frac{1}{K} \sum_k \mathrm{resize}(1 - \cos(e_k, d_k))

    with the cosine over the channels of each place and bilinear resizing. Features e within the
    span that the decoder knows score 0, opposite ones 2.

    Args:
        encoder_feats: e, K maps ``[B, D, h, w]``; the maps of a pair have one shape.
        decoder_feats: d, K maps of the same shapes.
        size: of the result, ``(H, W)`` or one number for both.
        align_corners: as for ``torch.nn.functional.interpolate``.

    Returns:
        Scores ``[B, 1, H, W]``, float32 for half types.

    Raises:
        TypeError: a map is not floating-point.
        ValueError: the sequences are empty or differ in length, or a shape does not fit.

    Example:
        >>> e, d = torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
        >>> d[:, :, 0, 0] = -1.0
        >>> anomaly_map([e], [d], size=2)
        tensor([[[[2., 0.],
                  [0., 0.]]]])

    Source:
        W. Luo et al., CVPR 2025, arXiv 2503.02424, authors' code.
    """
    pairs = _check_maps(encoder_feats, decoder_feats)
    height, width = (size, size) if isinstance(size, int) else size
    check_at_least("size", height, 1)
    check_at_least("size", width, 1)
    maps = [
        F.interpolate(
            (1 - cosine(e, d, dim=1))[:, None],
            size=(height, width),
            mode="bilinear",
            align_corners=align_corners,
        )
        for e, d in pairs
    ]
    return torch.stack(maps).mean(0)


def _check_maps(
    encoder_feats: Sequence[Tensor], decoder_feats: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs, those of the encoder detached."""
    if len(encoder_feats) == 0 or len(encoder_feats) != len(decoder_feats):
        raise ValueError(
            "decoder_feats must have as many maps as encoder_feats, one at least, "
            f"got {len(decoder_feats)} and {len(encoder_feats)}"
        )
    pairs = []
    for e, d in zip(encoder_feats, decoder_feats, strict=True):
        check_floating("encoder_feats", e)
        check_floating("decoder_feats", d)
        check_shape("encoder_feats", e, (None, None, None, None), "[batch, channels, H, W] each")
        check_shape("decoder_feats", d, tuple(e.shape), "that of the map of encoder_feats")
        check_same_device("decoder_feats", d, "encoder_feats", e)
        if len(e) != len(encoder_feats[0]):
            raise ValueError(f"encoder_feats must have one batch size, got {len(e)} images")
        pairs.append((e.detach(), d))
    return pairs


def check_tokens(name: str, x: Tensor, dim: int | None, batch: int | None = None) -> None:
    """Raise unless ``x`` holds tokens ``[B, N, D]``, one at least an image."""
    check_floating(name, x)
    features = "features" if dim is None else dim
    check_shape(name, x, (batch, None, dim), f"[images, tokens, {features}]")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have tokens, got shape {list(x.shape)}")
