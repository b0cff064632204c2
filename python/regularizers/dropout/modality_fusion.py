"""Heads on the tokens of several modalities, and their accuracy on every subset of these."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from regularizers._shared.checks import check_at_least, check_tensor
from regularizers._shared.transformer import Transformer, sinusoidal_positions
from regularizers.dropout.modality import check_tokens


class SumFusion(nn.Module):
    r"""Add up one linear head a modality.

    .. math:: y = \sum_m (W_m x_m + c_m)

    Args:
        num_modalities: M.
        dim: features D of a token.
        out_features: size of the result, such as the number of classes.

    Shape:
        ``[B, M, D]`` to ``[B, out_features]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> SumFusion(3, 16, 5)(torch.randn(8, 3, 16)).shape
        torch.Size([8, 5])

    Source:
        S. Woo et al., AAAI 2023, arXiv 2211.13916; authors' code read.
    """

    def __init__(self, num_modalities: int, dim: int, out_features: int) -> None:
        super().__init__()
        self.shape = _check_fusion(num_modalities, dim, out_features)
        self.heads = nn.ModuleList(nn.Linear(dim, out_features) for _ in range(num_modalities))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the heads."""
        _check_fused(x, self.shape)
        outputs = [head(token) for head, token in zip(self.heads, x.unbind(1), strict=True)]
        return torch.stack(outputs).sum(0)


class ConcatFusion(nn.Module):
    r"""Run one linear head on the modalities side by side.

    .. math:: y = W [x_1; \dots; x_M] + c

    The same functions as :class:`SumFusion`, with one bias instead of M.

    Args:
        num_modalities: M.
        dim: features D of a token.
        out_features: size of the result, such as the number of classes.

    Shape:
        ``[B, M, D]`` to ``[B, out_features]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> ConcatFusion(3, 16, 5)(torch.randn(8, 3, 16)).shape
        torch.Size([8, 5])

    Source:
        S. Woo et al., AAAI 2023, arXiv 2211.13916; authors' code read.
    """

    def __init__(self, num_modalities: int, dim: int, out_features: int) -> None:
        super().__init__()
        self.shape = _check_fusion(num_modalities, dim, out_features)
        self.head = nn.Linear(num_modalities * dim, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the head."""
        _check_fused(x, self.shape)
        result: Tensor = self.head(x.flatten(1))
        return result


class TransformerFusion(nn.Module):
    r"""Attend over the modalities and read the result off a class token.

    .. math:: y = W\, \mathrm{transformer}([c; x_1 + s_1; \dots; x_M + s_M])_0 + b

    with a learned class token c and sinusoidal positions s.

    Args:
        num_modalities: M.
        dim: features D of a token.
        out_features: size of the result, such as the number of classes.
        depth: number of blocks.
        num_heads: heads of attention; divides ``dim``.

    Shape:
        ``[B, M, D]`` to ``[B, out_features]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> TransformerFusion(3, 16, 5, depth=1)(torch.randn(8, 3, 16)).shape
        torch.Size([8, 5])

    Source:
        S. Woo et al., AAAI 2023, arXiv 2211.13916; authors' code read. The code passes its
        positions on without adding them; here they are added, and a norm ends the blocks.
    """

    positions: Tensor

    def __init__(
        self,
        num_modalities: int,
        dim: int,
        out_features: int,
        *,
        depth: int = 4,
        num_heads: int = 8,
    ) -> None:
        super().__init__()
        self.shape = _check_fusion(num_modalities, dim, out_features)
        self.class_token = nn.Parameter(torch.zeros(dim))
        self.transformer = Transformer(dim, depth, num_heads)
        self.head = nn.Linear(dim, out_features)
        positions = sinusoidal_positions(num_modalities, dim)
        self.register_buffer("positions", positions)

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's output on the class token."""
        _check_fused(x, self.shape)
        first = self.class_token.to(x.dtype).expand(x.shape[0], 1, -1)
        tokens = torch.cat([first, x + self.positions.to(x.dtype)], dim=1)
        result: Tensor = self.head(self.transformer(tokens)[:, 0])
        return result


def _check_fusion(num_modalities: int, dim: int, out_features: int) -> tuple[int, int]:
    check_at_least("num_modalities", num_modalities, 1)
    check_at_least("dim", dim, 1)
    check_at_least("out_features", out_features, 1)
    return num_modalities, dim


def _check_fused(x: Tensor, shape: tuple[int, int]) -> None:
    check_tokens(x)
    if x.shape[1:] != shape:
        raise ValueError(f"x must have shape [batch, {shape[0]}, {shape[1]}], got {list(x.shape)}")


@torch.no_grad()
def evaluate_modality_subsets(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int | None = None,
    metric: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[tuple[int, ...], float]:
    r"""Measure a model on each of the :math:`2^M - 1` subsets of the modalities.

    Args:
        model: ``model(x, present)`` gives logits ``[B, C]`` from ``x`` ``[B, M, ...]`` and
            ``present``, bool ``[B, M]``; a module runs in evaluation mode and is put back.
        x: what all modalities say, ``[n, M, ...]``. The model gets it whole, and is to look at
            nothing that ``present`` says is missing.
        y: classes ``[n]``, or what ``metric`` expects.
        batch_size: samples the model gets at once; all when omitted.
        metric: ``metric(logits, y)`` gives one number a sample ``[n]``, of which the mean is
            returned; whether the largest logit is that of the class when omitted.

    Returns:
        ``{subset: value}``, subsets as sorted tuples of modalities, small ones first.

    Raises:
        TypeError: ``x`` or ``y`` is not a tensor.
        ValueError: ``x`` is of the wrong shape, or ``y`` does not have its length.

    Example:
        >>> x = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [0.0, 1.0]]])
        >>> add_up = lambda x, present: (x * present[..., None]).sum(1)
        >>> evaluate_modality_subsets(add_up, x, torch.tensor([0, 1]))
        {(0,): 1.0, (1,): 0.5, (0, 1): 1.0}

    Source:
        The protocol of S. Woo et al., AAAI 2023, arXiv 2211.13916.
    """
    check_tensor("x", x)
    check_tensor("y", y)
    if x.dim() < 2 or min(x.shape[:2]) < 1:
        raise ValueError(f"x must have shape [samples, modalities, ...], got {list(x.shape)}")
    if y.dim() < 1 or len(y) != len(x):
        raise ValueError(f"y must have the {len(x)} samples of x, got shape {list(y.shape)}")
    size = len(x) if batch_size is None else batch_size
    check_at_least("batch_size", size, 1)
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    modalities = range(x.shape[1])
    subsets = itertools.chain.from_iterable(
        itertools.combinations(modalities, count + 1) for count in modalities
    )
    found = {}
    try:
        for subset in subsets:
            row = torch.tensor([modality in subset for modality in modalities], device=x.device)
            values = []
            for inputs, target in zip(x.split(size), y.split(size), strict=True):
                logits = model(inputs, row.expand(len(inputs), -1))
                hit = (logits.argmax(-1) == target) if metric is None else metric(logits, target)
                values.append(hit.double())
            found[subset] = torch.cat(values).mean().item()
    finally:
        if was_training and isinstance(model, nn.Module):
            model.train()
    return found
