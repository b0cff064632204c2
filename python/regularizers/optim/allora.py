"""ALLoRA: low-rank adaptation whose gradients shrink row by row as the adapter grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from regularizers._shared.checks import check_floating, check_one_of, check_positive
from regularizers._shared.modules import Model
from regularizers.ops._operator import accumulate_dtype, transformed
from regularizers.optim.lowrank import LowRankLinear, inject_low_rank

MODES = ("row", "matrix", "output")
PLACES = ("gradient", "update")


class ALLoRALinear(LowRankLinear):
    r"""A LoRA layer without dropout or scaling factor whose gradients are scaled row by row.

    .. math::
        y = Wx + b + B(Ax), \qquad
        s_i = \Big(\|B_{i,:}\|_2 + \frac{1}{\eta^2}\Big)^{-1/2}

    The forward pass is plain LoRA's with :math:`\alpha = r`. On the way back the gradient
    :math:`\delta_i` of output i is multiplied by :math:`s_i` where it enters B(Ax), and only there:
    the gradient to x through W is what it was. B starts at zero, where :math:`s = \eta`, so the
    first steps are large; they shrink as a row grows. The scale itself has no gradient.

    **Under Adam** a constant factor on a row of B cancels: what is left is the change of s over the
    steps that Adam's moments remember. ``apply_to="update"`` leaves gradients alone and, with
    :func:`scale_updates`, scales the step that any optimizer takes.

    Args:
        base: the layer to adapt; see :class:`LowRankLinear`.
        rank: r, from 1 to min(m, n).
        eta: :math:`\eta`, above 0: the factor at the start, in the place of LoRA's alpha.
        mode: what s is taken from: each ``"row"`` of B; the ``"matrix"`` B, one Frobenius norm; the
            ``"output"`` B(Ax), one norm a sample.
        apply_to: ``"gradient"`` or ``"update"`` (not with ``mode="output"``).
        train_bias: whether the bias is trained.

    Shape:
        ``[*, n]`` to ``[*, m]``.

    Raises:
        TypeError: ``base`` is no linear layer, or its weight is quantized.
        ValueError: an option is out of its range.

    Example:
        >>> layer = ALLoRALinear(nn.Linear(8, 2), rank=2, eta=2.0)
        >>> with torch.no_grad():
        ...     layer.lora_B[1] = torch.tensor([0.6, 0.8])
        >>> layer.gradient_scale().squeeze()
        tensor([2.0000, 0.8944])

    Source:
        ALLoRA, 2024, arXiv 2410.09692. Authors' code was not available; the formula is
        reconstructed (no dropout, no scaling factor, gradients scaled inversely to the norm, per
        sample and per parameter). ``eta=2`` and ``rank=8`` are the library's: the paper tunes them.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        *,
        eta: float = 2.0,
        mode: Literal["row", "matrix", "output"] = "row",
        apply_to: Literal["gradient", "update"] = "gradient",
        train_bias: bool = False,
    ) -> None:
        check_positive("eta", eta)
        check_one_of("mode", mode, MODES)
        check_one_of("apply_to", apply_to, PLACES)
        if mode == "output" and apply_to == "update":
            raise ValueError("apply_to must be 'gradient' for the mode 'output', got 'update'")
        super().__init__(base, rank, train_bias=train_bias)
        self.eta = eta
        self.mode = mode
        self.apply_to = apply_to

    def low_rank(self, x: Tensor) -> Tensor:
        """Return B(Ax), with scaled gradients."""
        y = super().low_rank(x)
        if self.apply_to == "update":
            return y
        scale = self.gradient_scale(y)
        return scale_gradient(y, scale.mT if self.mode == "row" else scale)

    @torch.no_grad()
    def gradient_scale(self, output: Tensor | None = None) -> Tensor:
        """Return s: ``[m, 1]``, ``[1, 1]`` for ``"matrix"``, ``[*, 1]`` for ``"output"``.

        Args:
            output: B(Ax) ``[*, m]``, which the mode ``"output"`` takes its norms from.
        """
        dims: int | None = -1
        if self.mode == "output":
            if output is None:
                raise ValueError("output must be given for the mode 'output'")
            source = output
        else:
            source = self.lora_B
            dims = 1 if self.mode == "row" else None
        wide = accumulate_dtype(source.dtype)
        norm = torch.linalg.vector_norm(source, dim=dims, keepdim=True, dtype=wide)
        scale: Tensor = (norm + self.eta**-2).rsqrt()
        return scale

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"{super().extra_repr()}, eta={self.eta:g}, mode={self.mode!r}"


def scale_gradient(x: Tensor, scale: float | Tensor) -> Tensor:
    r"""Return x unchanged, with the gradient on its way back multiplied by a scale.

    .. math:: y = x, \qquad \frac{\partial L}{\partial x} := s \odot \frac{\partial L}{\partial y}

    Args:
        x: ``[*]``, a floating-point tensor.
        scale: s, a number or a tensor that broadcasts to ``[*]``; no gradient flows into it.

    Returns:
        ``[*]``, the values of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``scale`` does not broadcast to the shape of ``x``.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> y = scale_gradient(x, torch.tensor([0.5, 2.0]))
        >>> y.sum().backward()
        >>> x.grad
        tensor([0.5000, 2.0000])

    Source:
        The backward pass of ALLoRA, arXiv 2410.09692, alone.
    """
    check_floating("x", x)
    if isinstance(scale, Tensor):
        scale = scale.detach()
        sizes = zip(reversed(scale.shape), reversed(x.shape), strict=False)
        if scale.dim() > x.dim() or any(have not in (1, want) for have, want in sizes):
            raise ValueError("scale must broadcast to the shape of x")
    if transformed():  # right under every transform, but it rounds and reads memory
        part = (x * scale).to(x.dtype)
        return part + (x - part).detach()
    scaled: Tensor = _ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: float | Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.number = None if isinstance(inputs[1], Tensor) else inputs[1]
        if ctx.number is None:
            ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scale = ctx.saved_tensors[0] if ctx.number is None else ctx.number
        return (grad * scale).to(grad.dtype), None


def inject_allora(
    model: Model,
    target: str | Sequence[str],
    *,
    trainable: str | Sequence[str] = (),
    **options: Any,
) -> Model:
    """Put :class:`ALLoRALinear` in the place of linear layers, and freeze everything else.

    Args:
        model: any module; changed in place.
        target: names of linear layers, as for :func:`inject_low_rank`.
        trainable: names of modules that stay trainable.
        **options: of :class:`ALLoRALinear`.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is no module, or a layer is quantized.
        ValueError: no linear layer matches, or an option is out of its range.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = inject_allora(model, ["0", "2"], rank=2, eta=1.0)
        >>> type(model[2]).__name__
        'ALLoRALinear'

    Source:
        ALLoRA, 2024, arXiv 2410.09692.
    """
    return inject_low_rank(
        model, target, lambda base: ALLoRALinear(base, **options), trainable=trainable
    )


def scale_updates(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    r"""Scale the steps that an optimizer takes on layers with ``apply_to="update"``.

    .. math:: B_{i,:} \leftarrow B_{i,:} + s_i\,(B^+_{i,:} - B_{i,:})

    with :math:`B^+` what the optimizer's step (decay included) gives, and s from B before it. With
    ``mode="matrix"`` A is treated likewise; with ``"row"`` the step of A stays as it is.

    Args:
        optimizer: any optimizer over the factors.
        model: where the layers are.

    Returns:
        A handle whose ``remove()`` ends the scaling.

    Raises:
        ValueError: no layer of the model has ``apply_to="update"``.

    Example:
        >>> layer = ALLoRALinear(nn.Linear(4, 2), rank=1, eta=2.0, apply_to="update")
        >>> optimizer = torch.optim.Adam([layer.lora_B], lr=0.1, eps=0.0)
        >>> handle = scale_updates(optimizer, layer)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> layer.lora_B.detach().abs()  # twice Adam's first step
        tensor([[0.2000],
                [0.2000]])

    Source:
        The library's form of ALLoRA for Adam, which cancels a scale of the gradient.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, ALLoRALinear) and module.apply_to == "update"
    ]
    if not layers:
        raise ValueError("model must have layers with apply_to='update', it has none")
    before: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    @torch.no_grad()
    def remember(*_: Any) -> None:
        before.clear()
        for layer in layers:
            scale = layer.gradient_scale()
            before.append((layer.lora_B, layer.lora_B.clone(), scale))
            if layer.mode == "matrix":
                before.append((layer.lora_A, layer.lora_A.clone(), scale))

    @torch.no_grad()
    def scale_steps(*_: Any) -> None:
        for parameter, old, scale in before:
            parameter.copy_(old + scale * (parameter - old))
        before.clear()

    first = optimizer.register_step_pre_hook(remember)
    second = optimizer.register_step_post_hook(scale_steps)
    return _Both(first, second)


class _Both(RemovableHandle):
    """Two handles removed as one."""

    def __init__(self, first: RemovableHandle, second: RemovableHandle) -> None:
        self.handles = (first, second)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
