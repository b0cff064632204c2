"""Attacks that measure what predictions reveal: linear reconstruction, and gradient inversion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_module,
    check_not_negative,
    check_positive,
    check_same_dtype,
)
from regularizers.ops._operator import accumulate_dtype, full_precision


@torch.no_grad()
def linear_inversion_attack(
    pred: Tensor,
    x: Tensor,
    *,
    fraction: float = 0.5,
    ridge: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Measure how much of the inputs a linear map finds in the predictions.

    .. math:: R^2 = 1 - \frac{\sum \|x - \hat x(\text{pred})\|^2}{\sum \|x - \bar x\|^2}

    A part of the samples fits the map :math:`\hat x` by least squares, the rest measures it. 1 is
    a full reconstruction; 0, or below by the error of the fit, none.

    Args:
        pred: what is released, ``[N, ...]``: logits or probabilities, noise and all.
        x: the inputs ``[N, ...]``, floating point.
        fraction: share of the samples that fit the map, in (0, 1); at least two samples remain on
            either side.
        ridge: of the least squares, in units of the mean variance of the predictions, at least 0.
        generator: CPU generator of the division.

    Returns:
        :math:`R^2`, no dimensions; float32 for half types.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: an argument is out of range or the numbers of samples differ.

    Example:
        >>> x = torch.randn(200, 4)
        >>> r2 = linear_inversion_attack(x @ torch.randn(4, 4), x)  # an invertible map
        >>> f"{r2:.3f}"
        '1.000'

    Source:
        The evaluation idea of T. Wang, Y. Zhang, R. Jia, 2021, arXiv 2009.05241, in its simplest
        form; chosen here.
    """
    check_floating("pred", pred)
    check_floating("x", x)
    check_same_dtype("x", x, "pred", pred)
    check_not_negative("ridge", ridge)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
    if pred.dim() == 0 or x.dim() == 0 or len(pred) != len(x) or len(x) < 4:
        raise ValueError(
            "pred and x must have shapes [N, ...] and [N, ...], N >= 4, "
            f"got {list(pred.shape)} and {list(x.shape)}"
        )
    wide = accumulate_dtype(x.dtype)
    place = torch.randperm(len(x), generator=generator).to(x.device)
    count = min(max(2, round(fraction * len(x))), len(x) - 2)
    known, hidden = place[:count], place[count:]
    released, inputs = pred.to(wide).reshape(len(x), -1), x.to(wide).reshape(len(x), -1)
    a, b = released[known], inputs[known]
    center, mean = a.mean(0), b.mean(0)
    a = a - center
    with full_precision(x.device):
        gram = a.T @ a
        # Constant predictions leave a gram of zeros, whose pseudo-inverse is the mean prediction.
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        weight = torch.linalg.pinv(gram, hermitian=True) @ (a.T @ (b - mean))
        guess = (released[hidden] - center) @ weight + mean
    truth = inputs[hidden]
    r2: Tensor = 1 - (truth - guess).square().sum() / (truth - truth.mean(0)).square().sum()
    return r2


def gradient_inversion_attack(
    model: nn.Module,
    target_class: int | Tensor,
    *,
    shape: Sequence[int],
    steps: int = 300,
    lr: float = 0.1,
    prior: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Look for inputs that the model takes for given classes, by gradient descent on the input.

    .. math:: \min_x \ \mathrm{CE}(\text{model}(x), c) + \text{prior}(x)

    from standard normal starts, with Adam. The model runs in the mode it is in, with its noise, as
    an attacker would query it; its parameters get no gradient. To search the latent space of a
    generator G, attack ``nn.Sequential(G, model)``.

    Args:
        model: returns logits ``[B, C]``, or something with an attribute ``logits``.
        target_class: c, one class or one an input, int64 ``[B]``.
        shape: of one input, without the batch.
        steps: at least 1.
        lr: Adam's learning rate, above 0, in units of the input.
        prior: ``[B, *shape] -> [B]``, what makes an input implausible, such as minus a log density;
            None for none.
        generator: of the starts, on the CPU.

    Returns:
        Inputs ``[B, *shape]`` (B = 1 for an int), of the model's dtype and device; no gradient.

    Raises:
        TypeError: ``model`` is not a module or ``target_class`` not an int or an int64 tensor.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> found = gradient_inversion_attack(model, 0, shape=(2,), steps=50)
        >>> bool(found[0, 0] > 1)  # far on the side of class 0
        True

    Source:
        M. Fredrikson, S. Jha, T. Ristenpart, 2015, with a prior as of Y. Zhang et al., 2020, arXiv
        1911.07135; the attacks that arXiv 2009.05241 defends against. Reconstructed.
    """
    check_module("model", model)
    check_at_least("steps", steps, 1)
    check_positive("lr", lr)
    target = _target(target_class)
    like = next(model.parameters(), torch.empty(0))
    start = torch.randn(len(target), *shape, generator=generator)
    x = start.to(like).requires_grad_()
    target = target.to(like.device)
    optimizer = torch.optim.Adam([x], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            output = model(x)
            logits = getattr(output, "logits", output)
            losses = F.cross_entropy(logits, target, reduction="none")
            if prior is not None:
                losses = losses + prior(x)
            (x.grad,) = torch.autograd.grad(losses.sum(), x)
            optimizer.step()
    return x.detach()


def _target(target_class: int | Tensor) -> Tensor:
    if isinstance(target_class, Tensor):
        if target_class.dtype != torch.int64:
            raise TypeError(f"target_class must be int64, got {target_class.dtype}")
        if target_class.dim() != 1 or len(target_class) == 0:
            raise ValueError(f"target_class must have shape [B], got {list(target_class.shape)}")
        return target_class
    check_at_least("target_class", target_class, 0)
    return torch.tensor([target_class])
