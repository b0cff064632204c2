"""MSBReg: embeddings as particles that meet at a centroid, are kicked at random, and fill space."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_probability,
    check_same_device,
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import add_up, gather_batch
from regularizers._shared.moments import gram
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers._shared.scheduled import ScheduledModule

Centroid = Literal["target", "both"]
CentroidForm = Literal["sq", "cosine"]
SingularForm = Literal["eig_sq", "smooth_l1"]


def multiview_centroid_loss(
    online: Tensor,
    target: Tensor,
    *,
    centroid: Centroid = "target",
    form: CentroidForm = "sq",
    renormalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pull the views of an image towards the centroid of their targets.

    .. math::
        c_i = \frac{\bar t_i}{\|\bar t_i\|}, \quad \bar t_i = \operatorname{mean}_v t_{iv}, \qquad
        L = \operatorname{mean}_{iv} \|z_{iv} - c_i\|^2 = \operatorname{mean}_{iv}
        (2 - 2 \cos(z_{iv}, c_i))

    on rows of length 1. The centroid is a constant: no gradient reaches the targets.

    Args:
        online: z, embeddings ``[B, V, D]`` of V views of each image; normalised here.
        target: t, of the lagged (EMA) network, ``[B, V, D]``; normalised here.
        centroid: ``"target"`` compares each view with the centroid, ``"both"`` the online views'
            own centroid with it, one term an image.
        form: ``"sq"`` for the squared distance, ``"cosine"`` for half of it, 1 - cos.
        renormalize: give the centroid length 1; for ``"target"`` with ``"sq"`` only may it keep its
            own, shorter where the targets disagree.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B, V]`` (``[B]`` for ``"both"``).

    Returns:
        The loss; float64 for float64, else float32.

    Raises:
        TypeError: a tensor is not floating-point.
        ValueError: shapes do not fit, or a word is unknown. Rows of zeros stay 0.

    Example:
        >>> views = torch.eye(2).unsqueeze(0)  # two orthogonal views of one image
        >>> multiview_centroid_loss(views, views)
        tensor(0.5858)

    Source:
        S. Moon, D. Buracas, S. Park, J. Kim, J. Canny, "An Embedding-Dynamic Approach to
        Self-supervised Learning", 2022, arXiv 2207.03552; formula of the paper, compared with a
        public centroid loss of the same line of work.
    """
    check_one_of("centroid", centroid, ("target", "both"))
    check_one_of("form", form, ("sq", "cosine"))
    check_one_of("reduction", reduction, REDUCTIONS)
    _check_views("online", online)
    _check_views("target", target)
    check_same_device("target", target, "online", online)
    if target.shape != online.shape:
        raise ValueError(
            f"target must have the shape of online ({list(online.shape)}), got {list(target.shape)}"
        )
    if not renormalize and (centroid, form) != ("target", "sq"):
        raise ValueError("renormalize must be True unless centroid is 'target' and form is 'sq'")
    z = unit(online)
    with torch.no_grad():
        center = unit(target).mean(1, keepdim=True)
        center = unit(center) if renormalize else center
    if centroid == "both":
        z = unit(z.mean(1, keepdim=True))
    terms = (z - center).square().sum(-1)  # keeps the digits that 2 - 2 cos loses near 0
    terms = terms / 2 if form == "cosine" else terms
    return reduce_rows(terms.squeeze(1) if centroid == "both" else terms, reduction)


def brownian_diffusive_loss(
    z: Tensor,
    *,
    shared_views: bool = True,
    directions: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Kick embeddings along random directions: a loss whose gradient is the noise.

    .. math:: L = \operatorname{mean}_{iv} \langle z_{iv}, r_i \rangle, \qquad
        r_i = g / \|g\|, \quad g \sim N(0, I_D)

    on rows of length 1. Its value is 0 on average; its gradient is the part of r that is tangent to
    the sphere, so embeddings walk at random on it and do not stay piled up. Directions are new in
    each call. The views of an image share theirs: a kick for each would tear positives apart.

    Args:
        z: embeddings ``[B, V, D]``; normalised here.
        shared_views: one direction for all views of an image; otherwise one for each view.
        directions: r to use instead of drawing, ``[B, 1, D]`` or ``[B, V, D]``.
        generator: to draw from, on the device of ``z``; not inside ``torch.compile``.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B, V]``.

    Returns:
        The loss; float64 for float64, else float32.

    Raises:
        TypeError: a tensor is not floating-point.
        ValueError: a shape is wrong or a word is unknown.

    Example:
        >>> z = torch.randn(64, 4, 16)
        >>> brownian_diffusive_loss(z, reduction="none").shape
        torch.Size([64, 4])

    Source:
        S. Moon et al., 2022, arXiv 2207.03552; formula of the paper, compared with public code of
        the same line of work.
    """
    check_one_of("reduction", reduction, REDUCTIONS)
    _check_views("z", z)
    rows = unit(z)
    if directions is None:
        if generator is not None and torch.compiler.is_compiling():
            raise RuntimeError("generator must not be given inside torch.compile; give directions")
        shape = (len(z), 1 if shared_views else z.shape[1], z.shape[2])
        directions = unit(
            torch.randn(shape, dtype=rows.dtype, device=z.device, generator=generator)
        )
    elif directions.shape not in ((len(z), 1, z.shape[2]), z.shape):
        raise ValueError(
            f"directions must have shape [{len(z)}, 1 or {z.shape[1]}, {z.shape[2]}], "
            f"got {list(directions.shape)}"
        )
    return reduce_rows((rows * directions.detach().to(rows.dtype)).sum(-1), reduction)


def singular_value_loss(
    z: Tensor,
    *,
    form: SingularForm = "eig_sq",
    center: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Even out the singular values of a batch of embeddings, so that they use every dimension.

    .. math::
        L = \operatorname{mean}_k (m p_k - 1)^2 = \tfrac1m \| \tfrac mB G - I \|_F^2, \qquad
        p_k = \sigma_k^2 / B, \quad m = \min(B, D)

    on rows of length 1, with the singular values :math:`\sigma` of the batch and the smaller of its
    two Gram matrices, G: one matrix product and no decomposition. 0 for a batch that fills all m
    directions evenly, m - 1 for one that has collapsed to a point.

    Args:
        z: embeddings ``[B, D]``, or sets of them ``[*, B, D]``, over which the mean is taken;
            normalised here.
        form: ``"eig_sq"``, above, or ``"smooth_l1"``, the mean of
            ``smooth_l1(sqrt(m p_k), 1)``, which takes a singular value decomposition.
        center: subtract the mean of the normalised rows first.
        process_group: processes whose batches are one; the loss is that of the whole. Local
            batches must have one size.

    Returns:
        The loss, a tensor with no dimensions; float64 for float64, else float32.

    Raises:
        TypeError: ``z`` is not floating-point.
        ValueError: ``z`` is empty or has fewer than two dimensions, or ``form`` is unknown.

    Example:
        >>> singular_value_loss(torch.eye(4))
        tensor(0.)
        >>> singular_value_loss(torch.ones(4, 4))
        tensor(3.)

    Source:
        S. Moon et al., 2022, arXiv 2207.03552; the shape of the penalty is reconstructed from the
        paper's text.
    """
    check_one_of("form", form, ("eig_sq", "smooth_l1"))
    check_floating("z", z)
    if z.dim() < 2 or z.numel() == 0:
        raise ValueError(f"z must have shape [..., B >= 1, D >= 1], got {list(z.shape)}")
    rows = gather_batch(unit(z), process_group)
    if center:
        rows = rows - rows.mean(-2, keepdim=True)
    batch, dim = rows.shape[-2:]
    least = min(batch, dim)
    if form == "smooth_l1":
        # The derivative of values alone has no 1 / (sigma_i - sigma_j): it is finite at the optimum
        scaled = torch.linalg.svdvals(rows) * math.sqrt(least / batch)
        return F.smooth_l1_loss(scaled, torch.ones_like(scaled))
    smaller = gram(rows if dim <= batch else rows.mT) * (least / batch)
    identity = torch.eye(least, dtype=rows.dtype, device=rows.device)
    return (smaller - identity).square().sum((-2, -1)).mean() / least


class MSBLoss(NamedTuple):
    """The loss of :class:`MSBReg`, and its terms before they are weighted.

    Attributes:
        total: the loss.
        centroid: attraction to the centroid.
        brownian: the random kick.
        singular: unevenness of the singular values.

    Example:
        >>> views = torch.eye(4).expand(4, 4, 4).transpose(0, 1)  # four images, views all alike
        >>> loss = MSBReg(lambda_brownian=0.0)(views, views)
        >>> loss.total, loss.centroid, loss.singular
        (tensor(0.), tensor(0.), tensor(0.))
    """

    total: Tensor
    centroid: Tensor
    brownian: Tensor
    singular: Tensor


class MSBReg(ScheduledModule):
    r"""Self-supervision from three forces on embeddings: attraction, random kicks, homogeneity.

    .. math:: L = L_{\mathrm{centroid}} + \lambda_B L_{\mathrm{brownian}}
        + \lambda_S L_{\mathrm{singular}}

    of :func:`multiview_centroid_loss`, :func:`brownian_diffusive_loss` and
    :func:`singular_value_loss`, the last as the mean over the views, each a batch of its own.
    Without the singular term, and with targets that are the online network's own, everything falls
    into one point. The paper's targets are a lagged copy:
    :func:`~regularizers.representation.ema_update_` with :func:`byol_momentum` after each step.

    Args:
        lambda_brownian: :math:`\lambda_B`, at least 0. Both weights may be assigned later, as a
            schedule does.
        lambda_singular: :math:`\lambda_S`, at least 0; 1.0 is our choice, the paper's is not known.
        centroid: of :func:`multiview_centroid_loss`.
        form: likewise.
        shared_views: of :func:`brownian_diffusive_loss`.
        singular_form: ``form`` of :func:`singular_value_loss`.
        center: likewise.
        process_group: processes whose batches are one; every process gets the loss of the whole.
            Local batches must have one size.

    Shape:
        Embeddings online and target ``[B, V, D]`` to :class:`MSBLoss` of tensors with no
        dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> regularizer = MSBReg()
        >>> online = torch.randn(32, 4, 8, requires_grad=True)
        >>> loss = regularizer(online, online.detach())
        >>> loss.total.backward()

    Source:
        S. Moon et al., 2022, arXiv 2207.03552; :math:`\lambda_B` from public code of the same line
        of work. Predictor, projector and momentum are those of BYOL, arXiv 2006.07733.
    """

    lambda_brownian: Tensor
    lambda_singular: Tensor

    def __init__(
        self,
        *,
        lambda_brownian: float = 0.1,
        lambda_singular: float = 1.0,
        centroid: Centroid = "target",
        form: CentroidForm = "sq",
        shared_views: bool = True,
        singular_form: SingularForm = "eig_sq",
        center: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.schedule("lambda_brownian", lambda_brownian, check_not_negative)
        self.schedule("lambda_singular", lambda_singular, check_not_negative)
        check_one_of("centroid", centroid, ("target", "both"))
        check_one_of("form", form, ("sq", "cosine"))
        check_one_of("singular_form", singular_form, ("eig_sq", "smooth_l1"))
        self.centroid: Centroid = centroid
        self.form: CentroidForm = form
        self.shared_views = shared_views
        self.singular_form: SingularForm = singular_form
        self.center = center
        self.process_group = process_group

    def forward(
        self,
        online: Tensor,
        target: Tensor,
        *,
        directions: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MSBLoss:
        """Return the loss and its terms; ``directions`` or ``generator`` decide the kicks."""
        centroid = multiview_centroid_loss(online, target, centroid=self.centroid, form=self.form)
        brownian = brownian_diffusive_loss(
            online, shared_views=self.shared_views, directions=directions, generator=generator
        )
        singular = singular_value_loss(
            online.transpose(0, 1),
            form=self.singular_form,
            center=self.center,
            process_group=self.process_group,
        )
        if self.process_group is not None:  # means over equal local batches
            means = add_up(torch.stack([centroid, brownian]), self.process_group)
            centroid, brownian = means / dist.get_world_size(self.process_group)
        kick, evening = (
            weight.to(singular.dtype) for weight in (self.lambda_brownian, self.lambda_singular)
        )
        total = centroid + kick * brownian + evening * singular
        return MSBLoss(total, centroid, brownian, singular)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"lambda_brownian={self.lambda_brownian:.6g}, "
            f"lambda_singular={self.lambda_singular:.6g}, "
            f"centroid={self.centroid!r}, form={self.form!r}"
        )


def byol_momentum(step: int, total_steps: int, *, base: float = 0.996) -> float:
    r"""Return the momentum of a lagged copy: from ``base`` to 1 along half a cosine.

    .. math:: m_s = 1 - (1 - m_0) \frac{\cos(\pi s / S) + 1}{2}

    Args:
        step: s, from 0; from S on the momentum is 1.
        total_steps: S, at least 1.
        base: :math:`m_0`, in [0, 1].

    Returns:
        The momentum, for :func:`~regularizers.representation.ema_update_`.

    Raises:
        TypeError: a number of steps is not an int.
        ValueError: an argument is out of range.

    Example:
        >>> [round(byol_momentum(step, 100), 4) for step in (0, 50, 100)]
        [0.996, 0.998, 1.0]

    Source:
        J.-B. Grill et al., "Bootstrap Your Own Latent", 2020, arXiv 2006.07733, whose schedule
        MSBReg (arXiv 2207.03552) takes over.
    """
    check_at_least("step", step, 0)
    check_at_least("total_steps", total_steps, 1)
    check_probability("base", base)
    return 1 - (1 - base) * (math.cos(math.pi * min(step / total_steps, 1.0)) + 1) / 2


def _check_views(name: str, tensor: Tensor) -> None:
    check_floating(name, tensor)
    if tensor.dim() != 3 or tensor.numel() == 0:
        raise ValueError(
            f"{name} must have shape [B >= 1, V >= 1, D >= 1], got {list(tensor.shape)}"
        )
