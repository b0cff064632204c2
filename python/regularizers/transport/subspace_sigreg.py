"""Sub-JEPA: SIGReg inside a few fixed subspaces instead of the whole embedding space."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
)
from regularizers.ops._operator import accumulate_dtype, full_precision, loss_dtype
from regularizers.transport.sketching import EppsPulley, slices_for

InitMode = Literal["orthogonal_frozen", "random_frozen", "random_trainable_soft"]
INIT_MODES = ("orthogonal_frozen", "random_frozen", "random_trainable_soft")


def subspace_sigreg(
    emb: Tensor,
    projections: Tensor,
    *,
    num_slices: int = 1024,
    slices: Tensor | None = None,
    num_knots: int = 17,
    t_max: float = 3.0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Compute SIGReg of a batch of sequences inside subspaces, for each time step by itself.

    .. math::
        L = \frac{1}{K T S} \sum_{k,t,s} \mathrm{EppsPulley}
        \big( \{ \langle A_k\, \mathrm{emb}_{bt}, u_{ks} \rangle \}_{b} \big)

    with projections :math:`A_k` and own random unit slices :math:`u_{ks}` for each subspace, new at
    every call. The statistic is that of :func:`~regularizers.transport.sigreg`, over the batch.

    Where it costs less, :math:`A_k^\top u_{ks}` is made first and the subspaces are never visited;
    only with projections that do not require grad.

    Args:
        emb: embeddings ``[B, T, D]`` (batch x time x dim), B at least 2.
        projections: ``[K, d, D]``, dtype of ``emb`` (float32 beside a half type); they get a
            gradient where they require one.
        num_slices: S, slices of each subspace; at least 1.
        slices: ``[K, d, S]`` with columns of norm 1, in place of random ones.
        num_knots: L, at least 2, the knot 0 included.
        t_max: last knot, above 0.
        seed: of the slices, int or int64 tensor with no dimensions; drawn from the default
            generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.
        process_group: processes whose batches are one, as in
            :func:`~regularizers.transport.sigreg`.

    Returns:
        The loss, a tensor with no dimensions; dtype of ``emb``, float32 under autocast.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range or of the wrong shape. NaN in ``emb`` gives NaN.

    Example:
        >>> emb = torch.randn(32, 5, 8, requires_grad=True)
        >>> projections = torch.eye(8).view(4, 2, 8)  # the first two coordinates, the next two, ...
        >>> subspace_sigreg(emb, projections, num_slices=16).backward()

    Source:
        "Sub-JEPA: Subspace Gaussian Regularization for Stable End-to-End World Models", 2026, arXiv
        2605.09241, authors' code read.
    """
    statistic = EppsPulley(num_knots, t_max)
    check_at_least("num_slices", num_slices, 1)
    _check_embeddings(emb)
    check_floating("projections", projections)
    dim = emb.shape[2]
    check_shape("projections", projections, (None, None, dim), "[subspaces, subspace_dim, dim]")
    check_same_device("projections", projections, "emb", emb)
    subspaces, subspace_dim, _ = projections.shape
    slices = slices_for(
        emb.new_empty(subspace_dim),  # stands for the projected embeddings
        num_slices,
        slices=slices,
        groups=subspaces,
        seed=seed,
        generator=generator,
        process_group=process_group,
    )
    check_shape(
        "slices", slices, (subspaces, subspace_dim, None), "[subspaces, subspace_dim, slices]"
    )
    count = slices.shape[2]
    stages = dim * subspace_dim * subspaces + subspace_dim * subspaces * count
    if not projections.requires_grad and dim * subspaces * count < stages:
        wide = accumulate_dtype(emb.dtype)
        with full_precision(emb.device):
            folded = torch.einsum("kcd,kcs->dks", projections.to(wide), slices.to(wide))
        return statistic(emb.transpose(0, 1), folded.flatten(1), process_group=process_group)
    views = _project(emb, projections).flatten(0, 1)
    loss = statistic(views, slices.to(views.dtype), process_group=process_group)
    return loss.to(loss_dtype(emb))


def _check_embeddings(emb: Tensor) -> None:
    check_floating("emb", emb)
    check_shape("emb", emb, (None, None, None), "[batch, time, dim]")
    if emb.shape[0] < 2:
        raise ValueError(f"emb must have a batch of at least 2, got {emb.shape[0]}")
    if emb.shape[1] < 1:
        raise ValueError("emb must have at least one time step, got none")


def _project(emb: Tensor, projections: Tensor) -> Tensor:
    """Return e_k = A_k emb [K, T, B, d] in the accumulation type, autocast or not."""
    wide = accumulate_dtype(emb.dtype)
    with full_precision(emb.device):
        return torch.einsum("btd,kcd->ktbc", emb.to(wide), projections.to(wide))


class SubspaceSIGReg(nn.Module):
    r"""Gaussian regularization of embeddings inside K fixed subspaces of dimension d.

    .. math::
        L = \operatorname{mean}_{k,t} \mathrm{SIGReg}\big( \{ A_k\, \mathrm{emb}_{bt} \}_b \big),
        \qquad A_k \in \mathbb{R}^{d \times D}

    The subspaces are drawn once and kept, which is the relaxation: only K marginals are asked to be
    Gaussian. Drawn again at every step they would give the whole SIGReg in expectation. Each is
    drawn by itself; they are not orthogonal to each other.

    Args:
        embed_dim: D.
        num_subspaces: K; the paper uses 16 or 32 with D = 192.
        subspace_dim: d; D / K when omitted.
        init_mode: ``"orthogonal_frozen"`` (orthonormal rows, uniformly drawn),
            ``"random_frozen"`` (entries N(0, 1), not scaled: a projected variance is near D) or
            ``"random_trainable_soft"`` (likewise, a parameter; use :meth:`orthogonality_loss`).
        num_slices: slices of each subspace, new at every call.
        num_knots: L, at least 2.
        t_max: last knot, above 0.
        projections: ``[K, d, D]`` to start from, in place of drawn ones.
        generator: generator to draw the projections from, on the CPU.
        process_group: processes whose batches are one, or None.
        device: where the projections go.
        dtype: their dtype.

    Shape:
        ``[B, T, D]`` to a loss with no dimensions, B at least 2.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, D is not a multiple of K while ``subspace_dim`` is
            omitted, d is above D in the orthogonal mode, or ``init_mode`` is unknown.

    Example:
        >>> regularizer = SubspaceSIGReg(embed_dim=8, num_subspaces=2, num_slices=32)
        >>> emb = torch.randn(16, 5, 8, requires_grad=True)
        >>> regularizer(emb).backward()
        >>> regularizer.project(emb).shape
        torch.Size([2, 5, 16, 4])

    Source:
        "Sub-JEPA", 2026, arXiv 2605.09241, authors' code read.
    """

    projections: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_subspaces: int = 4,
        subspace_dim: int | None = None,
        *,
        init_mode: InitMode = "orthogonal_frozen",
        num_slices: int = 1024,
        num_knots: int = 17,
        t_max: float = 3.0,
        projections: Tensor | None = None,
        generator: torch.Generator | None = None,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("embed_dim", embed_dim, 1)
        check_at_least("num_subspaces", num_subspaces, 1)
        check_one_of("init_mode", init_mode, INIT_MODES)
        check_at_least("num_slices", num_slices, 1)
        check_at_least("num_knots", num_knots, 2)
        check_positive("t_max", t_max)
        if subspace_dim is None:
            if embed_dim % num_subspaces != 0:
                raise ValueError(
                    f"subspace_dim must be given where num_subspaces = {num_subspaces} does not "
                    f"divide embed_dim = {embed_dim}"
                )
            subspace_dim = embed_dim // num_subspaces
        check_at_least("subspace_dim", subspace_dim, 1)
        shape = (num_subspaces, subspace_dim, embed_dim)
        if init_mode == "orthogonal_frozen" and subspace_dim > embed_dim:
            raise ValueError(
                f"subspace_dim must be at most embed_dim = {embed_dim} in the orthogonal mode, "
                f"got {subspace_dim}"
            )
        if projections is None:
            projections = _draw_projections(shape, init_mode, generator)
        check_floating("projections", projections)
        check_shape("projections", projections, shape, f"{list(shape)}")
        projections = projections.detach().to(device=device, dtype=dtype, copy=True)
        if init_mode == "random_trainable_soft":
            self.projections = nn.Parameter(projections)
        else:
            self.register_buffer("projections", projections)
        self.init_mode = init_mode
        self.num_slices = num_slices
        self.num_knots = num_knots
        self.t_max = t_max
        self.process_group = process_group

    def project(self, emb: Tensor) -> Tensor:
        """Return the embeddings in every subspace: ``[B, T, D]`` to ``[K, T, B, d]``.

        They come in float32 for half types, float64 for float64.
        """
        _check_embeddings(emb)
        return _project(emb, self.projections)

    def forward(self, emb: Tensor) -> Tensor:
        """Return the loss."""
        return subspace_sigreg(
            emb,
            self.projections,
            num_slices=self.num_slices,
            num_knots=self.num_knots,
            t_max=self.t_max,
            process_group=self.process_group,
        )

    def orthogonality_loss(self) -> Tensor:
        r"""Return :math:`\operatorname{mean}_k \|A_k A_k^\top - I\|_F`, 0 unless trainable.

        Computed in float32 at least. At orthonormal rows, where the norm has no gradient, it is 0.
        """
        if not isinstance(self.projections, nn.Parameter):
            return self.projections.new_zeros(())
        a = self.projections.to(accumulate_dtype(self.projections.dtype))
        with full_precision(a.device):
            excess = a @ a.mT - torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        norms: Tensor = torch.linalg.vector_norm(excess, dim=(1, 2))
        return norms.mean()

    def extra_repr(self) -> str:
        """Describe the configuration."""
        subspaces, subspace_dim, embed_dim = self.projections.shape
        return (
            f"embed_dim={embed_dim}, num_subspaces={subspaces}, subspace_dim={subspace_dim}, "
            f"init_mode={self.init_mode!r}, num_slices={self.num_slices}, "
            f"num_knots={self.num_knots}, t_max={self.t_max:g}"
        )


def _draw_projections(
    shape: tuple[int, int, int], init_mode: InitMode, generator: torch.Generator | None
) -> Tensor:
    projections = torch.empty(shape)
    if init_mode != "orthogonal_frozen":
        return projections.normal_(generator=generator)
    for subspace in projections:
        nn.init.orthogonal_(subspace, generator=generator)
    return projections
