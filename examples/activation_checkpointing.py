"""Activation checkpointing: a block that runs again in the backward pass draws the same masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regularizers.dropout import DropBlock2d, ScheduledDropPath


class Block(nn.Module):
    """A residual block with stochastic depth, and dropped blocks of its feature map."""

    def __init__(self, channels: int, index: int, count: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            DropBlock2d(0.2, block_size=3),
        )
        self.drop_path = ScheduledDropPath(0.4, index, count)  # 0.1, 0.2, 0.3, 0.4

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the block of x, or x alone."""
        dropped: Tensor = self.drop_path(self.body(x))
        return x + dropped


def gradients(blocks: nn.ModuleList, images: Tensor, *, recompute: bool) -> list[Tensor]:
    """Return the gradients of one pass from one seed."""
    torch.manual_seed(0)
    x = images
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    loss = x.square().mean()
    return list(torch.autograd.grad(loss, list(blocks.parameters())))


def main() -> float:
    """Return the largest difference between gradients with and without checkpointing."""
    torch.manual_seed(1)
    blocks = nn.ModuleList(Block(16, index, 4) for index in range(4))
    images = torch.randn(8, 16, 14, 14)
    pairs = zip(
        gradients(blocks, images, recompute=False),
        gradients(blocks, images, recompute=True),
        strict=True,
    )
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"largest difference of a gradient {difference}")
    return difference


if __name__ == "__main__":
    assert main() == 0
