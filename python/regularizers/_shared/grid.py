"""The grid that the tokens of an image stand on."""

from __future__ import annotations

import math


def token_grid(name: str, grid: tuple[int, int] | None, tokens: int) -> tuple[int, int]:
    """Return rows and columns of ``tokens`` in row-major order; None asks for a square.

    Raises:
        ValueError: the grid has another number of places, or there is no such square.
    """
    if grid is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"{name} must be given for {tokens} tokens, which make no square")
        return side, side
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != tokens:
        raise ValueError(
            f"{name} must have a place for each of {tokens} tokens, got {rows} x {columns}"
        )
    return rows, columns
