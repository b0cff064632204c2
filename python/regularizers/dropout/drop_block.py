"""Progressive DropBlock: squares of a feature map are dropped, more of them in later stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_fraction,
    check_one_of,
    check_tensor,
)
from regularizers._shared.modules import run_after
from regularizers._shared.scheduled import ScheduledModule, known_zero
from regularizers.ops.drop_block import Gamma, Normalize, check_block_size, drop_block


def drop_block2d(
    x: Tensor,
    p: float | Tensor,
    block_size: int = 7,
    *,
    gamma: Gamma = "simple",
    normalize: Normalize = "batch",
    shared_channels: bool = True,
    training: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Drop squares of b x b pixels of a feature map and scale up what is left.

    .. math::
        s \sim \mathrm{Bernoulli}(\gamma), \qquad
        m = 1 - \mathrm{maxpool}_{b \times b}(s), \qquad
        y = \frac{\mathrm{numel}(m)}{\sum m}\, m \odot x

    :math:`\gamma = p / b^2` for ``"simple"``: 1 - (1 - p / b^2)^(b^2) of the pixels far from the
    border are dropped, a little less than p.

    ``torchvision.ops.drop_block2d(x, p, block_size)`` is ``gamma="exact", shared_channels=False``
    here. It also shrinks a block that is larger than the image, where this raises, adds 1e-6 to the
    sum of the mask, and multiplies by the mask, so that a NaN under a block stays.

    Args:
        x: ``[B, C, H, W]``.
        p: rate of dropped pixels, in [0, 1); a number or a tensor with no dimensions.
        block_size: side b of a block, odd; for ``"exact"`` at most H and W.
        gamma: ``"simple"``, blocks may stick out of the image; ``"exact"``, they are centred where
            they fit, more often by H W / ((H - b + 1) (W - b + 1)).
        normalize: whether the factor counts over the whole ``"batch"`` or over each ``"sample"``.
        shared_channels: one mask for all channels of a sample; otherwise one for each.
        training: whether anything is dropped.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        The shape and dtype of ``x``; ``x`` itself with p = 0 or outside of training.

    Raises:
        TypeError: as :func:`regularizers.ops.drop_block`.
        ValueError: likewise.

    Example:
        >>> y = drop_block2d(torch.ones(16, 4, 32, 32), 0.2)
        >>> y.mean().isclose(torch.tensor(1.0)), 0.1 < (y == 0).float().mean() < 0.2
        (tensor(True), tensor(True))

    Source:
        "Balanced Multi-Task Attention for Satellite Image Classification", 2025, arXiv 2510.15527;
        formulas from the public model file. ``"exact"`` is that of DropBlock, 2018, arXiv
        1810.12890.
    """
    if not training or known_zero(p):
        check_tensor("x", x)
        return x
    return drop_block(
        x,
        p,
        block_size,
        gamma=gamma,
        normalize=normalize,
        shared_channels=shared_channels,
        seed=seed,
        generator=generator,
    )


class DropBlock2d(ScheduledModule):
    r"""DropBlock as a layer, for after the first convolution, norm and ReLU of a residual block.

    .. math:: y = \frac{\mathrm{numel}(m)}{\sum m}\, m \odot x

    as :func:`drop_block2d` has it. Inert in ``eval()``. ``layer.p = 0.1`` changes the rate.

    Args:
        p: rate of dropped pixels, in [0, 1).
        block_size: side of a block, odd.
        gamma: ``"simple"`` or ``"exact"``.
        normalize: ``"batch"`` or ``"sample"``.
        shared_channels: one mask for all channels.

    Shape:
        ``[B, C, H, W]`` to the same.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is of the wrong type.

    Example:
        >>> layer = DropBlock2d(0.1, block_size=5)
        >>> layer(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])

    Source:
        As :func:`drop_block2d`.
    """

    p: Tensor

    def __init__(
        self,
        p: float,
        block_size: int = 7,
        *,
        gamma: Gamma = "simple",
        normalize: Normalize = "batch",
        shared_channels: bool = True,
    ) -> None:
        super().__init__()
        check_block_size(block_size)
        check_one_of("gamma", gamma, ("simple", "exact"))
        check_one_of("normalize", normalize, ("batch", "sample"))
        self.block_size = block_size
        self.gamma: Gamma = gamma
        self.normalize: Normalize = normalize
        self.shared_channels = shared_channels
        self.schedule("p", p, check_fraction)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with squares dropped."""
        return drop_block2d(
            x,
            self.p,
            self.block_size,
            gamma=self.gamma,
            normalize=self.normalize,
            shared_channels=self.shared_channels,
            training=self.training,
        )

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"p={self.p.item():g}, block_size={self.block_size}, gamma={self.gamma!r}, "
            f"normalize={self.normalize!r}, shared_channels={self.shared_channels}"
        )


def progressive_rates(start: float = 0.05, end: float = 0.20, num_stages: int = 4) -> list[float]:
    r"""Return the rates of a network's stages, rising evenly.

    .. math:: p_k = start + (end - start) \frac{k}{n - 1}, \qquad k = 0, \dots, n - 1

    Args:
        start: rate of the first stage, in [0, 1).
        end: rate of the last stage, in [0, 1).
        num_stages: n, at least 1; a single stage has ``end``.

    Returns:
        ``num_stages`` rates.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [round(rate, 3) for rate in progressive_rates()]
        [0.05, 0.1, 0.15, 0.2]

    Source:
        arXiv 2510.15527; the rates 0.05, 0.10, 0.15, 0.20 stand in the public model file.
    """
    check_fraction("start", start)
    check_fraction("end", end)
    check_at_least("num_stages", num_stages, 1)
    if num_stages == 1:
        return [end]
    return [start + (end - start) * stage / (num_stages - 1) for stage in range(num_stages)]


def apply_progressive_drop_block(
    model: nn.Module,
    modules: Sequence[str | Sequence[str]],
    rates: Sequence[float] | None = None,
    *,
    block_size: int = 7,
    gamma: Gamma = "simple",
    normalize: Normalize = "batch",
    shared_channels: bool = True,
) -> nn.Module:
    """Put :class:`DropBlock2d` behind modules of a model, with a rate a stage, in place.

    Names of parameters and keys of the state dict stay as they are. The paper's place is after the
    first convolution, norm and ReLU of every residual block, and Dropout(0.5) before the
    classifier besides.

    Args:
        model: any module.
        modules: one entry a stage: a qualified name, or several. Each module must return one
            tensor ``[B, C, H, W]``. One that is a :class:`DropBlock2d` is given the rate instead,
            and keeps its options.
        rates: a rate a stage; :func:`progressive_rates` when omitted.
        block_size: as for :class:`DropBlock2d`.
        gamma: likewise.
        normalize: likewise.
        shared_channels: likewise.

    Returns:
        ``model``.

    Raises:
        ValueError: a name is unknown or comes twice, ``rates`` is not one a stage, or an option is
            out of range.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> model = apply_progressive_drop_block(model, ["1", "3"], [0.05, 0.2], block_size=5)
        >>> [m.p.item() for m in model.modules() if isinstance(m, DropBlock2d)]
        [0.05, 0.2]

    Source:
        arXiv 2510.15527; walking a model is this library's.
    """
    stages = [[entry] if isinstance(entry, str) else list(entry) for entry in modules]
    if rates is None:
        rates = progressive_rates(num_stages=len(stages)) if stages else []
    if len(rates) != len(stages):
        raise ValueError(f"rates must have one entry for each of {len(stages)} stages, got {rates}")
    for rate in rates:
        check_fraction("rates", rate)
    known = dict(model.named_modules())
    names = [name for stage in stages for name in stage]
    unknown = [name for name in names if name not in known or not name]
    if unknown or not names:
        raise ValueError(f"modules must name modules of the model, got {unknown or 'no name'}")
    if len({id(known[name]) for name in names}) < len(names):
        raise ValueError("modules must name every module once")

    def layer(rate: float) -> DropBlock2d:
        return DropBlock2d(
            rate, block_size, gamma=gamma, normalize=normalize, shared_channels=shared_channels
        )

    layer(0.0)  # raises on a bad option before anything changes
    for stage, rate in zip(stages, rates, strict=True):
        for name in stage:
            module = known[name]
            if isinstance(module, DropBlock2d):
                module.p = torch.tensor(rate, dtype=torch.float64)
            else:
                run_after(module, layer(rate), "drop_block")
    return model
