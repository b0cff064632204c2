"""SoMA: low-rank adaptation that starts from a weight's smallest singular components."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regularizers._shared.checks import check_at_least, check_one_of
from regularizers._shared.modules import Model
from regularizers.ops._operator import accumulate_dtype
from regularizers.optim.decay import WeightDecayScheduler
from regularizers.optim.lowrank import LowRankLinear, check_linear, check_rank, inject_low_rank

COMPONENTS = ("minor", "principal", "random")
SOLVERS = ("full", "lowrank")
TARGETS = ("q", "k", "v", "qkv", "proj", "fc1", "fc2")


class SoMALinear(LowRankLinear):
    r"""A linear layer whose r smallest singular components are trained, and the rest frozen.

    .. math::
        W = U \Sigma V^\top, \qquad B = U_r (\Sigma_r / s)^{1/2}, \quad
        A = (\Sigma_r / s)^{1/2} V_r^\top, \qquad
        y = (W - s BA)\,x + s\,B(Ax) + b

    with the last r triplets, so the layer starts as the one it is made from, and what carries most
    of the pretrained map is out of the factors' reach at the start. ``weight`` is the frozen
    residual W - s BA, a tensor of its own; the base layer keeps W. Load pretrained checkpoints
    before making the layer: a state dict of it has the residual under ``weight``.

    Weight decay on A and B pulls the layer towards the residual: the minor components fade. The
    method means that, and anneals the decay (:class:`WeightDecayAnnealing`).

    Args:
        base: the layer to adapt, its weight ``[m, n]`` in a floating-point type.
        rank: r, from 1 to min(m, n).
        components: ``"minor"``; ``"principal"``, the r largest triplets (PiSSA); or ``"random"``,
            LoRA's start, A uniform and B zero.
        alpha: s = alpha / r; r when omitted, so s = 1.
        svd: ``"full"``, or ``"lowrank"``, randomised and faster, for ``components="principal"``
            only: it finds the largest triplets.
        train_bias: whether the bias is trained.
        skip_null: take the r smallest triplets that are not zero. A and B of a zero singular value
            are zero both and never get a gradient. Where fewer than r are not zero, this warns and
            takes zeros too.

    Shape:
        ``[*, n]`` to ``[*, m]``.

    Raises:
        TypeError: ``base`` is no linear layer, or its weight is quantized.
        ValueError: an option is out of its range.

    Example:
        >>> base = nn.Linear(3, 3, bias=False)
        >>> base.weight.data = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> layer = SoMALinear(base, rank=1)
        >>> layer.lora_A.detach().abs()
        tensor([[0., 0., 1.]])
        >>> layer.weight.diag()
        tensor([3., 2., 0.])

    Source:
        SoMA, CVPR 2025, arXiv 2412.04077; formula as in the authors' code with their configs'
        full decomposition. The class default of that code, a randomised decomposition, adapts the
        principal components; here that combination is an error. ``skip_null`` is the library's.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        *,
        components: Literal["minor", "principal", "random"] = "minor",
        alpha: float | None = None,
        svd: Literal["full", "lowrank"] = "full",
        train_bias: bool = True,
        skip_null: bool = True,
    ) -> None:
        check_linear("base", base)
        check_rank(rank, base.weight)
        check_one_of("components", components, COMPONENTS)
        check_one_of("svd", svd, SOLVERS)
        if svd == "lowrank" and components != "principal":
            raise ValueError(
                "svd must be 'full' unless components is 'principal': 'lowrank' finds the largest "
                f"triplets, got components {components!r}"
            )
        pretrained = base.weight.requires_grad
        super().__init__(base, rank, alpha=alpha, train_bias=train_bias)
        self.components = components
        if components != "random":
            base.weight.requires_grad_(pretrained)  # it is not this layer's
            self._split(svd, skip_null)

    @torch.no_grad()
    def _split(self, svd: str, skip_null: bool) -> None:
        """Move the chosen triplets from the weight into the factors."""
        weight = self.weight.to(accumulate_dtype(self.weight.dtype))
        if svd == "lowrank":
            # A few directions more than asked for: without them the last ones are inaccurate.
            sketch = min(self.rank + 8, *weight.shape)
            u, sigma, v = torch.svd_lowrank(weight, q=sketch, niter=4)
            vh = v.mT
        else:
            u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        first = 0
        if self.components == "minor":
            first = self._first_minor(sigma, max(weight.shape), skip_null)
        taken = slice(first, first + self.rank)
        root = (sigma[taken] / self.scaling).sqrt()
        self.lora_B.copy_(u[:, taken] * root)
        self.lora_A.copy_(root[:, None] * vh[taken])
        # From the factors as they are stored, so that rounding them moves nothing.
        residual = weight - self.delta_weight()
        self.weight = nn.Parameter(residual.to(self.weight.dtype), requires_grad=False)

    def _first_minor(self, sigma: Tensor, size: int, skip_null: bool) -> int:
        """Return where the r smallest triplets begin, zero ones left out."""
        if not skip_null:
            return len(sigma) - self.rank
        null = sigma[0] * size * torch.finfo(sigma.dtype).eps
        alive = int((sigma > null).sum())
        if alive < self.rank:
            warnings.warn(
                f"only {alive} of rank = {self.rank} singular values are not zero: the other "
                "components cannot train",
                stacklevel=4,
            )
        return max(alive - self.rank, 0)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"{super().extra_repr()}, components={self.components!r}"


def inject_soma(
    model: Model,
    *,
    target: str | Sequence[str] = TARGETS,
    rank: int = 16,
    start_block: int = 8,
    block_pattern: str = r"blocks\.(\d+)\.",
    trainable: str | Sequence[str] = (),
    **options: Any,
) -> Model:
    """Put :class:`SoMALinear` into the later blocks of a model, and freeze everything else.

    Args:
        model: any module; changed in place. Load its pretrained weights first.
        target: names of linear layers, as for :func:`inject_low_rank`; by default those of timm's
            and DINOv2's vision transformers.
        rank: r of every layer.
        start_block: blocks before this one stay frozen; 8 of 24 in the paper.
        block_pattern: regular expression whose first group is a block's number in a qualified name.
            Layers outside all blocks stay frozen.
        trainable: names of modules that stay trainable besides, such as a head.
        **options: of :class:`SoMALinear`.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is no module, or a layer is quantized.
        ValueError: no linear layer of a late enough block matches, or an option is out of range.

    Example:
        >>> block = lambda: nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})
        >>> model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])})
        >>> model = inject_soma(model, rank=2, start_block=1)
        >>> [name for name, p in model.named_parameters() if p.requires_grad][:3]
        ['blocks.1.fc1.bias', 'blocks.1.fc1.lora_A', 'blocks.1.fc1.lora_B']

    Source:
        SoMA, CVPR 2025, arXiv 2412.04077; defaults as in the authors' configs.
    """
    check_at_least("start_block", start_block, 0)

    def late(name: str) -> bool:
        found = re.search(block_pattern, name)
        return found is not None and int(found.group(1)) >= start_block

    return inject_low_rank(
        model,
        target,
        lambda base: SoMALinear(base, rank, **options),
        trainable=trainable,
        where=late,
    )


class WeightDecayAnnealing(WeightDecayScheduler):
    r"""Lower the weight decay of an optimizer's groups along a cosine, as SoMA does.

    .. math:: \lambda_t = \lambda_{\min} + \tfrac12 (\lambda_0 - \lambda_{\min})
        \Big(1 + \cos \frac{\pi t}{T}\Big)

    :class:`WeightDecayScheduler` under the paper's names. Groups without decay (norms) stay so.

    Args:
        optimizer: any optimizer whose groups have a ``weight_decay``; 0.05 in the paper.
        total_steps: T, at least 1; 40000 in the paper.
        eta_min: :math:`\lambda_{\min}`, at least 0.
        kind: ``"cosine"``, ``"linear"`` or ``"poly"``.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: a group has no ``weight_decay``, or an option is out of its range.

    Example:
        >>> optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], weight_decay=0.05)
        >>> scheduler = WeightDecayAnnealing(optimizer, total_steps=2)
        >>> for _ in range(2):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["weight_decay"]
        1e-05

    Source:
        SoMA, CVPR 2025, arXiv 2412.04077. The released scheduler stops one step before T and
        raises the decay of groups that have none; this one does neither.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        eta_min: float = 1e-5,
        kind: Literal["cosine", "linear", "poly"] = "cosine",
    ) -> None:
        super().__init__(optimizer, total_steps, final=eta_min, kind=kind)
