"""A small pre-norm transformer over sets of tokens, some of which may be missing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import check_at_least, check_positive


def sinusoidal_positions(count: int, dim: int, *, base: float = 10000.0) -> Tensor:
    r"""Return sines and cosines of positions 0, 1, ... at geometrically falling frequencies.

    .. math:: s_{j,2i} = \sin(j\, \mathrm{base}^{-2i/d}), \quad
        s_{j,2i+1} = \cos(j\, \mathrm{base}^{-2i/d})

    Args:
        count: number of positions.
        dim: features d of a position; an odd one ends with a sine.
        base: ratio of the largest wavelength to the smallest.

    Returns:
        float32 ``[count, dim]``.
    """
    check_at_least("count", count, 1)
    check_at_least("dim", dim, 1)
    check_positive("base", base)
    position = torch.arange(count, dtype=torch.float64)[:, None]
    angle = position * base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return waves[:, :dim].float()


class Transformer(nn.Module):
    """Pre-norm blocks of self-attention and an MLP with GELU, and a norm at the end.

    Args:
        dim: features of a token.
        depth: number of blocks, at least 0.
        num_heads: heads of attention; divides ``dim``.
        mlp_ratio: width of the MLP in units of ``dim``.

    Shape:
        ``[B, N, dim]`` to the same.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, *, mlp_ratio: int = 4) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("depth", depth, 0)
        check_at_least("num_heads", num_heads, 1)
        check_at_least("mlp_ratio", mlp_ratio, 1)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
        self.blocks = nn.ModuleList(_Block(dim, num_heads, mlp_ratio * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the tokens; those where ``present`` ``[B, N]`` is False are attended by none."""
        visible = None if present is None else present[:, None, None, :]
        for block in self.blocks:
            x = block(x, visible)
        result: Tensor = self.norm(x)
        return result


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, hidden)
        self.narrow = nn.Linear(hidden, dim)
        for layer in (self.qkv, self.out, self.widen, self.narrow):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        result: Tensor = x + self.narrow(F.gelu(self.widen(self.mlp_norm(x))))
        return result
