"""A linear layer with a frozen weight and two trained low-rank factors; putting it into a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import check_at_least, check_floating, check_module, check_positive
from regularizers._shared.modules import Model, replace_modules
from regularizers.ops._operator import accumulate_dtype


class LowRankLinear(nn.Module):
    r"""A linear layer whose weight is frozen and corrected by a product of two thin factors.

    .. math:: y = W x + b + s\,B(Ax), \qquad A\ [r, n],\quad B\ [m, r],\quad s = \alpha / r

    As in LoRA, A starts uniform and B at zero, so the layer starts as the one it is made from. The
    weight keeps its name, so checkpoints of the plain model load (``strict=False``: the factors are
    new). It is the base layer's own parameter, frozen; the bias too, unless ``train_bias``.

    :meth:`merge` adds the product up once for inference. The frozen weight stays as it is and what
    is saved stays the same; :meth:`unmerge`, ``train()`` or loading a checkpoint undo it exactly.

    Args:
        base: the layer to adapt, its weight ``[m, n]`` in a floating-point type.
        rank: r, from 1 to min(m, n).
        alpha: :math:`\alpha`, above 0; r when omitted, so s = 1.
        train_bias: whether the bias is trained.

    Shape:
        ``[*, n]`` to ``[*, m]``.

    Raises:
        TypeError: ``base`` is no linear layer, or its weight is quantized.
        ValueError: ``rank`` or ``alpha`` is out of range, or ``base`` sits in an attention module
            that reads its weight without calling it.

    Example:
        >>> base = nn.Linear(8, 4)
        >>> layer, x = LowRankLinear(base, rank=2), torch.randn(3, 8)
        >>> torch.equal(layer(x), base(x))
        True
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['lora_A', 'lora_B']

    Source:
        LoRA, E. Hu et al., 2021, arXiv 2106.09685; names of parameters as in the authors' code.
    """

    bias: nn.Parameter | None
    _merged: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        *,
        alpha: float | None = None,
        train_bias: bool = False,
    ) -> None:
        super().__init__()
        check_linear("base", base)
        check_rank(rank, base.weight)
        if alpha is not None:
            check_positive("alpha", alpha)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.rank = rank
        self.scaling = 1.0 if alpha is None else alpha / rank
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias
        if base.bias is not None:
            base.bias.requires_grad_(train_bias)
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.register_buffer("_merged", None, persistent=False)
        self.training = base.training
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the factors as LoRA does: A uniform, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output ``[*, m]``."""
        if self._merged is not None:
            return F.linear(x, self._merged, self.bias)
        return F.linear(x, self.weight, self.bias) + self.low_rank(x)

    def low_rank(self, x: Tensor) -> Tensor:
        """Return s B(Ax), what the factors add to the output."""
        y = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return y if self.scaling == 1.0 else y * self.scaling

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return s BA ``[m, n]``, in float32 for half types."""
        wide = accumulate_dtype(self.weight.dtype)
        return (self.lora_B.to(wide) @ self.lora_A.to(wide)) * self.scaling

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return W + s BA ``[m, n]``, rounded once."""
        return (self.weight + self.delta_weight()).to(self.weight.dtype)

    @property
    def merged(self) -> bool:
        """Whether the layer runs on the merged weight."""
        return self._merged is not None

    def merge(self) -> None:
        """Run on one matrix from now on; the factors get no gradients until :meth:`unmerge`."""
        self._merged = self.merged_weight()

    def unmerge(self) -> None:
        """Run on the frozen weight and the factors again."""
        self._merged = None

    def train(self, mode: bool = True) -> LowRankLinear:
        """Switch between training, which unmerges, and evaluation."""
        if mode:
            self.unmerge()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def to_linear(self) -> nn.Linear:
        """Return a plain linear layer with the merged weight, for deployment."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device="meta",
            dtype=self.weight.dtype,
        )
        linear.weight = nn.Parameter(self.merged_weight())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scaling={self.scaling:g}, bias={self.bias is not None}"
        )


def check_linear(name: str, value: object) -> None:
    """Raise unless ``value`` is a linear layer that a low-rank layer can stand for."""
    if not isinstance(value, nn.Linear):
        raise TypeError(f"{name} must be a torch.nn.Linear, got {type(value).__name__}")
    check_floating(f"weight of {name}", value.weight)
    # torch.nn.MultiheadAttention reads the weight of its out_proj and never calls it.
    if isinstance(value, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"{name} must be a layer that is called; {type(value).__name__} is the output "
            "projection of torch.nn.MultiheadAttention, which reads its weight instead"
        )


def check_rank(rank: int, weight: Tensor) -> None:
    """Raise unless a matrix has this many singular values."""
    check_at_least("rank", rank, 1)
    if rank > min(weight.shape):
        raise ValueError(
            f"rank must be at most min(m, n) = {min(weight.shape)} of a {list(weight.shape)} "
            f"weight, got {rank}"
        )


def inject_low_rank(
    model: Model,
    target: str | Sequence[str],
    make: Callable[[nn.Linear], LowRankLinear] | None = None,
    *,
    trainable: str | Sequence[str] = (),
    where: Callable[[str], bool] | None = None,
) -> Model:
    r"""Put low-rank layers in the place of a model's linear layers, and freeze everything else.

    Args:
        model: any module with linear layers below it; changed in place.
        target: which linear layers: names or regular expressions. Each must match the qualified
            name in full or from some dot on, so ``"fc1"`` is every ``...fc1``.
        make: the low-rank layer for a linear one; :class:`LowRankLinear` when omitted.
        trainable: what else stays trainable, such as a new head: parameters in modules of these
            names, matched likewise.
        where: called with the qualified names of layers that match; False leaves one out.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is no module, or a layer is quantized.
        ValueError: no linear layer matches, or one does that is not called by its module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = inject_low_rank(model, "0", trainable="2")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B', '2.weight', '2.bias']

    Source:
        LoRA, 2021, arXiv 2106.09685; ``target`` as in the library PEFT, with both of its forms at
        once.
    """
    check_module("model", model)
    make = LowRankLinear if make is None else make
    chosen = {
        module: name
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear) and matches(target, name)
        if where is None or where(name)
    }
    if not chosen:
        raise ValueError(f"target must match a linear layer that may be adapted, got {target!r}")
    for layer, name in chosen.items():
        check_linear(name, layer)
    # All layers are made before the model is touched: one may refuse its rank.
    kept = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        layers: dict[nn.Module, nn.Module] = {module: make(module) for module in chosen}
    except Exception:
        for parameter, flag in kept.items():
            parameter.requires_grad_(flag)
        raise
    stays = {
        parameter
        for name, parameter in model.named_parameters()
        if kept[parameter] and matches(trainable, name.rpartition(".")[0], inside=True)
    }
    adapted = {parameter for layer in layers.values() for parameter in layer.parameters()}
    for parameter in model.parameters():
        if parameter not in adapted:
            parameter.requires_grad_(parameter in stays)
    for module in model.modules():
        # Its fast path in evaluation reads the weights of its linear layers and never calls them.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
    replace_modules(model, lambda _, module: layers.get(module))
    return model


def merge_low_rank(model: Model) -> Model:
    """Replace the low-rank layers of a model by plain linear ones with merged weights, in place.

    Returns:
        The model (the new layer, where the model is itself a low-rank layer).

    Example:
        >>> model = inject_low_rank(nn.Sequential(nn.Linear(8, 9)), "0")
        >>> merge_low_rank(model)
        Sequential(
          (0): Linear(in_features=8, out_features=9, bias=True)
        )

    Source:
        LoRA, 2021, arXiv 2106.09685.
    """
    check_module("model", model)

    def plain(_: str, module: nn.Module) -> nn.Module | None:
        return module.to_linear() if isinstance(module, LowRankLinear) else None

    return replace_modules(model, plain)  # type: ignore[return-value]


def matches(patterns: str | Sequence[str], name: str, *, inside: bool = False) -> bool:
    """Whether a pattern is the end of a dotted name, or, ``inside``, any run of its parts."""
    tail = r"(\..*)?" if inside else ""
    every = (patterns,) if isinstance(patterns, str) else patterns
    return any(re.fullmatch(rf"(.*\.)?({pattern}){tail}", name) for pattern in every)
