"""Random subsets and orders of a few items a sample, from Philox words of one seed."""

from __future__ import annotations

from torch import Tensor

from regularizers.ops.philox import PHILOX_WORDS, WORDS_PER_CALL


def random_words(seed: Tensor, rows: int, columns: int, *, stream: int = 0) -> Tensor:
    """Return words ``[rows, columns]`` in [0, 2^32) of one stream, elements in row-major order."""
    calls = -(-rows * columns // WORDS_PER_CALL)
    # The automatic kernel whatever is forced: the bits are the same.
    words: Tensor = PHILOX_WORDS.kernel(None)(seed, 0, calls, stream, 0)
    return (words.long() & 0xFFFFFFFF)[: rows * columns].view(rows, columns)


def random_order(seed: Tensor, rows: int, columns: int, *, stream: int = 0) -> Tensor:
    """Return a uniformly random permutation of 0 .. columns - 1 for each row, ``[rows, columns]``.

    The order in which a stable sort puts the words; ties go by the index.
    """
    return random_words(seed, rows, columns, stream=stream).argsort(dim=1, stable=True)


def uniform_integer(words: Tensor, low: int, high: int) -> Tensor:
    """Return integers in [low, high], uniform to one part in 2^32 / (high - low + 1)."""
    return low + ((words * (high - low + 1)) >> 32)
