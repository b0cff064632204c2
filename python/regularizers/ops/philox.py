"""Philox 4x32-10 in PyTorch: the reference of the random bits, and how words become masks.

Key = seed; counter = (call low, call high, stream, step); element e of a stream takes word e % 4 of
call e // 4. The same words come from csrc/philox.h and from Triton's ``tl.philox``;
docs/operators.md promises them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers.ops._operator import Operator

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_BUMPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
WORDS_PER_CALL = 4


def philox_4x32(
    counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, ...]:
    """Return the four words of Philox 4x32-10.

    Args:
        counter: four words in [0, 2^32), int64 tensors that broadcast, or ints.
        key: two words likewise.

    Returns:
        Four int64 tensors with values in [0, 2^32).

    Example:
        >>> zero = torch.tensor(0)
        >>> [hex(int(word)) for word in philox_4x32((zero, 0, 0, 0), (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']

    Source:
        J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
        2011; checked against the authors' known answers.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, and an arithmetic shift keeps the upper word's bits:
        # masking restores both.
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product2 >> 32) & _LOW) ^ c1 ^ key0,
            product2 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ key1,
            product0 & _LOW,
        )
        key0, key1 = (key0 + _KEY_BUMPS[0]) & _LOW, (key1 + _KEY_BUMPS[1]) & _LOW
    return tuple(torch.as_tensor(word) for word in (c0, c1, c2, c3))


def philox_words(
    seed: Tensor, num_elements: int, *, stream: int | Tensor = 0, step: int = 0, first_call: int = 0
) -> Tensor:
    """Return the words of consecutive elements of one stream, or of several.

    Args:
        seed: int64 tensor with no dimensions.
        num_elements: number of words, counted from element ``4 * first_call``.
        stream: which stream; a tensor ``[s]`` of several gives ``[s, num_elements]``.
        step: the draw within an element, for operators that need several.
        first_call: the Philox call to begin with.

    Returns:
        int64 tensor ``[num_elements]`` or ``[s, num_elements]``, values in [0, 2^32).

    Example:
        >>> [hex(word) for word in philox_words(torch.tensor(42), 2).tolist()]
        ['0x9ceaf053', '0x77f5493b']
    """
    calls = -(-num_elements // WORDS_PER_CALL)
    call = torch.arange(first_call, first_call + calls, device=seed.device)
    if isinstance(stream, Tensor):
        stream = stream[:, None]
    counter = (call & _LOW, (call >> 32) & _LOW, stream, step)
    words = philox_4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :num_elements]


def dropout_mask(shape: tuple[int, ...], p: Tensor, seed: Tensor, num_samples: int) -> Tensor:
    """Return which elements dropout keeps; sample s is stream s, elements count in row-major order.

    The rule is "drop iff word < round(p 2^32)", so p = 1 drops everything.

    Args:
        shape: the shape ``[*]`` of one sample.
        p: float64 tensor with no dimensions, in [0, 1].
        seed: int64 tensor with no dimensions.
        num_samples: number of samples.

    Returns:
        bool tensor ``[num_samples, *]``, True where the element is kept.

    Example:
        >>> dropout_mask((2, 4), torch.tensor(0.5).double(), torch.tensor(42), 1).int().tolist()
        [[[1, 0, 0, 0], [1, 0, 1, 0]]]
    """
    num_elements = 1
    for size in shape:
        num_elements *= size
    threshold = (p * 2.0**32 + 0.5).to(torch.int64)
    streams = torch.arange(num_samples, device=seed.device)
    words = philox_words(seed, num_elements, stream=streams)
    return (words >= threshold).reshape(num_samples, *shape)


def rademacher(
    shape: tuple[int, ...], seed: Tensor, num_samples: int, dtype: torch.dtype
) -> Tensor:
    """Return random signs, the probes of trace estimators; laid out as :func:`dropout_mask`.

    Args:
        shape: the shape ``[*]`` of one sample.
        seed: int64 tensor with no dimensions.
        num_samples: number of samples.
        dtype: of the result.

    Returns:
        ``[num_samples, *]`` of -1 and 1, equally likely and independent.

    Example:
        >>> rademacher((2, 4), torch.tensor(42), 1, torch.float32).tolist()
        [[[1.0, -1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]]]
    """
    half = torch.full((), 0.5, device=seed.device)
    return dropout_mask(shape, half, seed, num_samples).to(dtype) * 2 - 1


def _word_tensor(seed: Tensor, first_call: int, calls: int, stream: int, step: int) -> Tensor:
    words = philox_words(
        seed, calls * WORDS_PER_CALL, stream=stream, step=step, first_call=first_call
    )
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _word_tensor_fake(seed: Tensor, first_call: int, calls: int, stream: int, step: int) -> Tensor:
    return seed.new_empty(calls * WORDS_PER_CALL, dtype=torch.int32)


# The generator alone, as int32 bit patterns: what the tests hold against the reference and the
# benchmarks time as a floor.
PHILOX_WORDS = Operator(
    "philox_words",
    "(Tensor seed, SymInt first_call, SymInt calls, SymInt stream, SymInt step) -> Tensor",
    fake=_word_tensor_fake,
    reference=_word_tensor,
)
