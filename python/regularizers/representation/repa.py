"""REPA: align what a denoiser sees in noisy data with what a frozen encoder sees in clean data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_module,
    check_not_negative,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
)
from regularizers._shared.directions import SHORTEST, cosine, unit
from regularizers._shared.distributed import gather_rows
from regularizers._shared.entries import reduce_entries
from regularizers._shared.flow_path import PATHS, Path, on_path
from regularizers._shared.grid import token_grid
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers._shared.scheduled import ScheduledModule
from regularizers._shared.taps import StandingTap
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.pairwise import pairwise_logsumexp

Similarity = Literal["cosine", "nt_xent"]
_SIMILARITIES: tuple[str, ...] = get_args(Similarity)


def repa_loss(
    hidden: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    similarity: Similarity = "cosine",
    temperature: float = 0.1,
    eps: float = SHORTEST,
    grid: tuple[int, int] | None = None,
    target_grid: tuple[int, int] | None = None,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Compare tokens of a denoiser, projected, with features of a frozen encoder, place by place.

    .. math::
        L_{\cos} = -\frac{1}{K B N} \sum_{k,b,n} \cos(\tilde z_{kbn}, z_{kbn}), \qquad
        L_{\text{nt-xent}} = \frac{1}{K B N} \sum_{k,i} \Big(\log \sum_j
        e^{\cos(\tilde z_{ki}, z_{kj}) / \tau} - \cos(\tilde z_{ki}, z_{ki}) / \tau \Big)

    for K encoders. The cosine form is signed: -1 for tokens that agree, 1 for opposite ones. The
    second (an ablation of the paper) also tells a token from those of all other places and images
    of the batch, i and j running over B N; its matrix is never stored.

    The cosine form is a mean over tokens and needs no ``process_group``. With one, the other form
    sees the tokens of all processes.

    Args:
        hidden: projected tokens :math:`\tilde z`, ``[B, N, Z]``, or one such tensor an encoder.
        target: features z of the clean data, ``[B, N', Z]``, or as many tensors; they get no
            gradient.
        similarity: ``"cosine"`` or ``"nt_xent"``.
        temperature: :math:`\tau` of ``"nt_xent"``, above 0.
        eps: tokens of at most this length have no direction: cosine 0, no gradient.
        grid: rows and columns of the tokens of ``hidden``, in row-major order. Needed where N' is
            not N: the target is then resized to it bilinearly, before it is normalised.
        target_grid: rows and columns of the target; None for a square.
        reduction: over the samples: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B]``.
        process_group: processes whose samples are one batch (of equal sizes for ``"nt_xent"``), and
            whose loss is that of the whole.

    Returns:
        The loss; float32 for half types.

    Raises:
        TypeError: a tensor is not floating-point.
        ValueError: shapes or numbers of tensors do not fit, the numbers of tokens differ and there
            is no ``grid``, or an option is out of range.

    Example:
        >>> hidden, target = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]])
        >>> repa_loss(hidden, target)
        tensor(-0.6000)

    Source:
        S. Yu et al., "Representation Alignment for Generation: Training Diffusion Transformers Is
        Easier Than You Think", ICLR 2025, arXiv 2410.06940, authors' code for the cosine; the
        second form from the paper. A token of length 0 gets no gradient here, one of some 1e12
        there.
    """
    check_one_of("similarity", similarity, _SIMILARITIES)
    check_one_of("reduction", reduction, REDUCTIONS)
    check_positive("temperature", temperature)
    check_positive("eps", eps)
    hiddens = [hidden] if isinstance(hidden, Tensor) else list(hidden)
    targets = [target] if isinstance(target, Tensor) else list(target)
    if len(hiddens) == 0 or len(hiddens) != len(targets):
        raise ValueError(
            "target must have as many tensors as hidden, one at least, "
            f"got {len(targets)} and {len(hiddens)}"
        )
    losses = []
    for h, z in zip(hiddens, targets, strict=True):
        z = _fitting_target(h, z, grid, target_grid)
        if len(h) != len(hiddens[0]):
            raise ValueError(f"hidden must have one batch size, got {len(h)} samples")
        if similarity == "cosine":
            tokens = -cosine(h, z, eps=eps)
        else:
            tokens = _token_contrast(h, z, temperature, eps, process_group)
        losses.append(tokens.mean(1))
    return reduce_entries(torch.stack(losses).mean(0), reduction, group=process_group)


def _fitting_target(
    hidden: Tensor,
    target: Tensor,
    grid: tuple[int, int] | None,
    target_grid: tuple[int, int] | None,
) -> Tensor:
    """Return the target without gradient, on the grid of the hidden tokens."""
    check_floating("hidden", hidden)
    check_floating("target", target)
    check_shape("hidden", hidden, (None, None, None), "[batch, tokens, features]")
    shape = (len(hidden), None, hidden.shape[2])
    check_shape("target", target, shape, "[batch, tokens, features] as hidden")
    check_same_device("target", target, "hidden", hidden)
    if hidden.shape[1] == 0 or target.shape[1] == 0:
        raise ValueError(
            f"hidden and target must have tokens, got {hidden.shape[1]} and {target.shape[1]}"
        )
    # Features of a half type beside wide tokens are common: the encoder is frozen.
    wide = torch.promote_types(hidden.dtype, target.dtype)
    target = target.detach().to(accumulate_dtype(wide))
    if hidden.shape[1] == target.shape[1]:
        return target
    if grid is None:
        raise ValueError(
            "target must have as many tokens as hidden, or grid be given, "
            f"got {target.shape[1]} and {hidden.shape[1]}"
        )
    rows, columns = token_grid("grid", grid, hidden.shape[1])
    image = target.mT.unflatten(2, token_grid("target_grid", target_grid, target.shape[1]))
    resized = F.interpolate(image, size=(rows, columns), mode="bilinear", align_corners=False)
    return resized.flatten(2).mT


def _token_contrast(
    hidden: Tensor, target: Tensor, temperature: float, eps: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Return the cross-entropy ``[B, N]`` of each token's own place among all tokens."""
    h = unit(hidden, eps=eps).to(target.dtype).flatten(0, 1)
    z = unit(target, eps=eps).flatten(0, 1)
    every = gather_rows(z, group)
    among = pairwise_logsumexp(h, every, scale=1 / temperature).logsumexp
    return (among - (h * z).sum(-1) / temperature).view(hidden.shape[:2])


class REPAProjector(nn.Module):
    r"""The MLP between the tokens of a denoiser and the features of an encoder.

    .. math:: \tilde z = W_3\, \mathrm{SiLU}(W_2\, \mathrm{SiLU}(W_1 h))

    with biases, token by token.

    Args:
        hidden_dim: features of a token of the denoiser.
        target_dim: features of the encoder.
        projector_dim: width of both hidden layers.

    Shape:
        ``[*, hidden_dim]`` to ``[*, target_dim]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> REPAProjector(32, 768, projector_dim=64)(torch.randn(2, 16, 32)).shape
        torch.Size([2, 16, 768])

    Source:
        S. Yu et al., ICLR 2025, arXiv 2410.06940, authors' code.
    """

    def __init__(self, hidden_dim: int, target_dim: int, *, projector_dim: int = 2048) -> None:
        super().__init__()
        check_at_least("hidden_dim", hidden_dim, 1)
        check_at_least("target_dim", target_dim, 1)
        check_at_least("projector_dim", projector_dim, 1)
        self.layers = nn.Sequential(
            nn.Linear(hidden_dim, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, target_dim),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the projected tokens."""
        projected: Tensor = self.layers(hidden)
        return projected


class REPA(ScheduledModule):
    r"""Run a denoiser and align one of its blocks with the features of frozen encoders.

    .. math:: L = L_{\text{velocity}} + \lambda\, L_{\text{align}}, \qquad
        L_{\text{align}} = \mathrm{repa\_loss}(\mathrm{projector}_k(h), z_k)

    with h the tokens that the tapped block returns for the noisy input, and z the features of the
    clean one. One projector an encoder. ``repa.model`` is the denoiser itself, for sampling;
    ``repa.weight = 0.25`` changes the weight.

    Args:
        model: any module.
        tap: name of the block in ``model.named_modules()``; it returns ``[B, N, hidden_dim]``. The
            paper taps the 8th of 28 blocks (the 4th in the smallest models): blocks after it are
            left to generation.
        hidden_dim: features of the tapped tokens.
        target_dims: features of each encoder.
        weight: :math:`\lambda`, at least 0.
        projector_dim: width of the projectors.
        similarity: as for :func:`repa_loss`.
        temperature: as for :func:`repa_loss`.
        process_group: as for :func:`repa_loss`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``tap`` names no submodule, there is no encoder, or an argument is out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))
        >>> repa = REPA(model, "0", 32, [24], projector_dim=64)
        >>> x, noise = torch.randn(2, 4, 16, 8)
        >>> features = torch.randn(4, 16, 24)  # of the encoder, for x
        >>> x_t, velocity = sample_interpolant(x, noise, torch.rand(4))
        >>> predicted, aligned = repa(x_t, targets=features)
        >>> ((predicted - velocity).square().mean() + aligned).backward()

    Source:
        S. Yu et al., ICLR 2025, arXiv 2410.06940, authors' code; DINOv2-B features, weight 0.5.
    """

    weight: Tensor

    def __init__(
        self,
        model: nn.Module,
        tap: str,
        hidden_dim: int,
        target_dims: Sequence[int],
        *,
        weight: float = 0.5,
        projector_dim: int = 2048,
        similarity: Similarity = "cosine",
        temperature: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_module("model", model)
        if len(target_dims) == 0:
            raise ValueError("target_dims must name one encoder at least, got none")
        check_one_of("similarity", similarity, _SIMILARITIES)
        check_positive("temperature", temperature)
        self.model = model
        self.tap = tap
        self._listener = StandingTap(model, [tap])
        self.hidden_dim = hidden_dim
        self.projectors = nn.ModuleList(
            REPAProjector(hidden_dim, dim, projector_dim=projector_dim) for dim in target_dims
        )
        self.similarity: Similarity = similarity
        self.temperature = temperature
        self.process_group = process_group
        self.schedule("weight", weight, check_not_negative)

    def forward(
        self,
        *args: Any,
        targets: Tensor | Sequence[Tensor],
        grid: tuple[int, int] | None = None,
        target_grid: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tensor]:
        r"""Return what the model returns, and :math:`\lambda L_{\text{align}}` to add to its loss.

        Args:
            args: of the model: the noisy data, the times.
            targets: features of the clean data, ``[B, N, dim]``, one tensor an encoder.
            grid: as for :func:`repa_loss`.
            target_grid: as for :func:`repa_loss`.
            kwargs: of the model.
        """
        output, (hidden,) = self._listener.run(self.model, *args, **kwargs)
        check_shape("tap", hidden, (None, None, self.hidden_dim), "[batch, tokens, hidden_dim]")
        align = repa_loss(
            [projector(hidden) for projector in self.projectors],
            targets,
            similarity=self.similarity,
            temperature=self.temperature,
            grid=grid,
            target_grid=target_grid,
            process_group=self.process_group,
        )
        return output, self.weight.to(align.dtype) * align


def sample_interpolant(
    x: Tensor, noise: Tensor, t: Tensor, *, path: Path = "linear"
) -> tuple[Tensor, Tensor]:
    r"""Return points on the path between data and noise, and the velocities there.

    .. math::
        x_t = (1 - t) x + t \epsilon, \quad v = \epsilon - x \qquad \text{or} \qquad
        x_t = \cos\tfrac{\pi t}{2} x + \sin\tfrac{\pi t}{2} \epsilon, \quad
        v = \tfrac{\pi}{2} (\cos\tfrac{\pi t}{2} \epsilon - \sin\tfrac{\pi t}{2} x)

    Data stand at t = 0. :func:`regularizers.generative.flow_matching_loss` goes the same paths and
    draws noise and times; use this where the model is called otherwise.

    Args:
        x: data, ``[B, *]``.
        noise: :math:`\epsilon`, of the same shape.
        t: times ``[B]`` in [0, 1]; the paper draws them uniformly.
        path: ``"linear"`` or ``"cosine"``.

    Returns:
        :math:`x_t` and v, of the shape of ``x``.

    Raises:
        TypeError: a tensor is not floating-point or of another dtype than ``x``.
        ValueError: shapes do not fit, a time is outside [0, 1] (checked on CPU tensors outside of
            ``torch.compile``), or ``path`` is unknown.

    Example:
        >>> x, noise = torch.zeros(1, 2), torch.ones(1, 2)
        >>> sample_interpolant(x, noise, torch.tensor([0.25]))
        (tensor([[0.2500, 0.2500]]), tensor([[1., 1.]]))

    Source:
        S. Yu et al., ICLR 2025, arXiv 2410.06940, authors' code; after N. Ma et al., "SiT", 2024,
        arXiv 2401.08740.
    """
    check_floating("x", x)
    check_one_of("path", path, PATHS)
    if x.dim() < 1:
        raise ValueError("x must have shape [batch, ...], got no dimensions")
    return on_path(x, noise, t, path)
