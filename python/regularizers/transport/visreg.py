"""VISReg: scale, shape and centre of an embedding batch; sliced Wasserstein, VICReg beside it."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularizers._shared.checks import check_at_least, check_not_negative
from regularizers._shared.distributed import gather_batch
from regularizers._shared.moments import covariance, off_diagonal
from regularizers.ops._operator import accumulate_dtype, loss_dtype
from regularizers.transport.sketching import GaussianQuantile, as_views, slices_for


@overload
def visreg(
    z: Tensor,
    *,
    num_slices: int = ...,
    slices: Tensor | None = ...,
    eps: float = ...,
    scale_weight: float = ...,
    shape_weight: float = ...,
    center_weight: float = ...,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...
@overload
def visreg(
    z: Tensor,
    *,
    num_slices: int = ...,
    slices: Tensor | None = ...,
    eps: float = ...,
    scale_weight: float = ...,
    shape_weight: float = ...,
    center_weight: float = ...,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...
def visreg(
    z: Tensor,
    *,
    num_slices: int = 256,
    slices: Tensor | None = None,
    eps: float = 1e-6,
    scale_weight: float = 1.0,
    shape_weight: float = 1.0,
    center_weight: float = 1.0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    process_group: dist.ProcessGroup | None = None,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Compute the VISReg regularizer: scale, shape and centre of an embedding batch.

    .. math::
        \mathrm{center} = \operatorname{mean}_{v,d} \mu_{vd}^2, \qquad
        \mathrm{scale} = \operatorname{mean}_{v,d} (\sigma_{vd} - 1)^2, \qquad
        \mathrm{shape} = \operatorname{mean}_{v,i,k} (p_{v(i)k} - q_i)^2

    with :math:`\mu` the mean over the batch, :math:`\sigma = \|z - \mu\| / \sqrt B +
    \varepsilon`, sorted projections :math:`p = \tilde z W` of :math:`\tilde z = (z - \mu) /
    \mathrm{sg}(\sigma)` on random unit columns W and :math:`q_i = \Phi^{-1}(i / (B + 1))`. No
    gradient flows through :math:`\sigma` in the shape term, so that term also pushes a collapsed
    batch apart: its gradient grows as the spread shrinks.

    Over a process group the batch is gathered and every process sorts its share of the slices;
    the loss is that of the concatenated batch, as in :func:`~regularizers.transport.sigreg`. Local
    batches must have one size.

    Args:
        z: embeddings ``[V, B, D]`` (views x batch x dim) or ``[B, D]``, B at least 2; statistics
            are of every view by itself.
        num_slices: K; the paper trains with 4096.
        slices: ``[D, K]`` with columns of norm 1, in place of random ones.
        eps: added to :math:`\sigma`, at least 0.
        scale_weight: factor of the scale term, at least 0.
        shape_weight: factor of the shape term, at least 0.
        center_weight: factor of the centre term, at least 0.
        seed: of the slices, int or int64 tensor with no dimensions; drawn from the default
            generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.
        process_group: processes whose batches are one; the loss is that of the whole.
        return_terms: return the three terms, too.

    Returns:
        The loss, a tensor with no dimensions, dtype of ``z`` (float32 under autocast); with
        ``return_terms`` a pair of it and ``{"scale", "shape", "center"}``, without the weights.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range or of the wrong shape. NaN in ``z`` gives NaN.

    Example:
        >>> z = torch.tensor([[0.0], [3.0]])
        >>> loss, terms = visreg(z, slices=torch.ones(1, 1), eps=0.0, return_terms=True)
        >>> {name: round(term.item(), 6) for name, term in terms.items()}
        {'scale': 0.25, 'shape': 0.324071, 'center': 2.25}

    Source:
        "VISReg: Variance-Invariance-Sketching Regularization for JEPA training", 2026, arXiv
        2606.02572, authors' code read. The abstract names scale and shape only; the centre term is
        in the code and is followed.
    """
    check_at_least("num_slices", num_slices, 1)
    check_not_negative("eps", eps)
    weights = {"scale": scale_weight, "shape": shape_weight, "center": center_weight}
    for name, weight in weights.items():
        check_not_negative(f"{name}_weight", weight)
    z = as_views(z)
    dtype = loss_dtype(z)
    slices = slices_for(
        z,
        num_slices,
        slices=slices,
        seed=seed,
        generator=generator,
        process_group=process_group,
    )
    wide = z.to(accumulate_dtype(z.dtype))
    whole = gather_batch(wide, process_group)
    mu = whole.mean(1, keepdim=True)
    deviation = torch.linalg.vector_norm(whole - mu, dim=1, keepdim=True)
    sigma = deviation / whole.shape[1] ** 0.5 + eps
    terms = {
        "scale": ((sigma - 1) ** 2).mean(),
        "shape": GaussianQuantile()(
            (wide - mu) / sigma.detach(), slices.to(wide.dtype), process_group=process_group
        ),
        "center": (mu**2).mean(),
    }
    loss = sum((weights[name] * term for name, term in terms.items()), wide.new_zeros(()))
    if not return_terms:
        return loss.to(dtype)
    return loss.to(dtype), {name: term.to(dtype) for name, term in terms.items()}


class VISReg(nn.Module):
    r"""The module of :func:`visreg`: new random slices at every call.

    .. math:: L = \alpha\, \mathrm{scale} + \beta\, \mathrm{shape} + \gamma\, \mathrm{center}

    The module has no parameters and does the same in ``eval()``.

    Args:
        num_slices: K, at least 1.
        eps: added to the standard deviation, at least 0.
        scale_weight: :math:`\alpha`, at least 0.
        shape_weight: :math:`\beta`, at least 0.
        center_weight: :math:`\gamma`, at least 0.
        process_group: processes whose batches are one, or None.

    Shape:
        ``[V, B, D]`` or ``[B, D]`` to a loss with no dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> regularizer = VISReg(num_slices=64)
        >>> z = torch.randn(128, 16, requires_grad=True)
        >>> regularizer(z).backward()

    Source:
        "VISReg", 2026, arXiv 2606.02572, authors' code read.
    """

    def __init__(
        self,
        *,
        num_slices: int = 256,
        eps: float = 1e-6,
        scale_weight: float = 1.0,
        shape_weight: float = 1.0,
        center_weight: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_at_least("num_slices", num_slices, 1)
        check_not_negative("eps", eps)
        for name, weight in (
            ("scale", scale_weight),
            ("shape", shape_weight),
            ("center", center_weight),
        ):
            check_not_negative(f"{name}_weight", weight)
        self.num_slices = num_slices
        self.eps = eps
        self.scale_weight = scale_weight
        self.shape_weight = shape_weight
        self.center_weight = center_weight
        self.process_group = process_group

    def forward(self, z: Tensor) -> Tensor:
        """Return the loss."""
        return visreg(
            z,
            num_slices=self.num_slices,
            eps=self.eps,
            scale_weight=self.scale_weight,
            shape_weight=self.shape_weight,
            center_weight=self.center_weight,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"num_slices={self.num_slices}, eps={self.eps:g}, scale_weight={self.scale_weight:g}, "
            f"shape_weight={self.shape_weight:g}, center_weight={self.center_weight:g}"
        )


def sliced_gaussian_wasserstein(
    z: Tensor,
    *,
    num_slices: int = 256,
    slices: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Compute the sliced squared 2-Wasserstein distance of an embedding batch to N(0, I).

    .. math::
        L = \operatorname{mean}_{v,i,k} (p_{v(i)k} - q_i)^2, \qquad p = z W, \qquad
        q_i = \Phi^{-1}\big(\tfrac{i}{B + 1}\big)

    Nothing is centred or scaled, unlike in :func:`visreg`; the probabilities are kept in
    [1e-4, 1 - 1e-4].

    Args:
        z: embeddings ``[V, B, D]`` (views x batch x dim) or ``[B, D]``, B at least 2.
        num_slices: K, at least 1.
        slices: ``[D, K]`` with columns of norm 1, in place of random ones.
        seed: of the slices, int or int64 tensor with no dimensions; drawn from the default
            generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.
        process_group: processes whose batches are one; the loss is that of the whole.

    Returns:
        The loss, a tensor with no dimensions; dtype of ``z``, float32 under autocast.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range or of the wrong shape. NaN in ``z`` gives NaN.

    Example:
        >>> loss = sliced_gaussian_wasserstein(torch.tensor([[-1.0], [1.0]]), num_slices=8)
        >>> print(f"{loss.item():.6f}")
        0.324071

    Source:
        Baseline of VISReg (2026, arXiv 2606.02572), authors' code read.
    """
    check_at_least("num_slices", num_slices, 1)
    z = as_views(z)
    slices = slices_for(
        z,
        num_slices,
        slices=slices,
        seed=seed,
        generator=generator,
        process_group=process_group,
    )
    return GaussianQuantile(clamp=1e-4)(z, slices, process_group=process_group)


def vicreg_loss(
    z: Tensor,
    *,
    var_weight: float = 25.0,
    cov_weight: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Compute the variance and covariance terms of VICReg, as VISReg's baseline has them.

    .. math::
        L = \alpha \operatorname{mean}_d \max(0, 1 - \sigma_d)^2
        + \beta \frac1D \sum_{i \ne j} C_{ij}^2

    with the unbiased standard deviation :math:`\sigma` (plus 1e-6) and covariance C of all views
    and rows together. The hinge is squared here; in the original it is not. The invariance term is
    :func:`~regularizers.transport.invariance_loss`.

    Args:
        z: embeddings ``[V, B, D]`` (views x batch x dim) or ``[B, D]``, B at least 2.
        var_weight: :math:`\alpha`, at least 0.
        cov_weight: :math:`\beta`, at least 0.
        process_group: processes whose batches are one; the loss is that of the whole. Local
            batches must have one size.

    Returns:
        The loss, a tensor with no dimensions; dtype of ``z``, float32 under autocast.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range or of the wrong shape. NaN in ``z`` gives NaN.

    Example:
        >>> print(f"{vicreg_loss(torch.zeros(4, 3)).item():.3f}")
        25.000

    Source:
        A. Bardes, J. Ponce, Y. LeCun, "VICReg", 2021, arXiv 2105.04906, in the form of the baseline
        of VISReg (2026, arXiv 2606.02572), whose code was read.
    """
    check_not_negative("var_weight", var_weight)
    check_not_negative("cov_weight", cov_weight)
    z = as_views(z)
    rows = gather_batch(z.to(accumulate_dtype(z.dtype)), process_group).flatten(0, 1)
    sigma = rows.std(0) + 1e-6
    variance = torch.relu(1 - sigma).square().mean()
    mixed = off_diagonal(covariance(rows)).square().sum() / rows.shape[1]
    return (var_weight * variance + cov_weight * mixed).to(loss_dtype(z))
