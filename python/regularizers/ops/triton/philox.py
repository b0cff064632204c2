"""Philox words and the Bernoulli rule inside Triton kernels; the same bits as csrc/philox.h.

Key = seed; counter = (call low, call high, stream, step 0); element e of a stream takes word e % 4
of call e // 4.
"""

import triton
import triton.language as tl

WORDS_PER_CALL = tl.constexpr(4)


@triton.jit
def drop_rule(p):
    """Return the rule "drop iff word < round(p 2^32)"; ``p`` points to a float64.

    It comes as the largest dropped word and whether any word is dropped: at p = 1 the threshold
    2^32 needs 33 bits, the largest dropped word does not.
    """
    threshold = (tl.load(p) * 4294967296.0 + 0.5).to(tl.uint64)
    return (threshold - 1).to(tl.uint32), threshold > 0


@triton.jit
def keep_scale(p):
    """Return 1 / (1 - p) in float64; at p = 1 nothing is kept, and any finite factor will do."""
    rate = tl.load(p)
    return 1.0 / tl.where(rate < 1.0, 1.0 - rate, 1.0)


@triton.jit
def call_words(seed, call, stream):
    """Return the four words of each call (int64) of a stream, which broadcasts to the calls."""
    # tl.philox picks Philox 4x32 or 4x64 by the width of the first counter word.
    low, high = call.to(tl.uint32), (call >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, tl.cast(stream, tl.uint32), 0)


@triton.jit
def keep_calls(seed, rule, call, stream):
    """Return which elements of whole calls are kept: calls [..., n] give [..., 4 n] in order."""
    last_dropped, drops = rule
    word0, word1, word2, word3 = call_words(seed, call, stream)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return (words > last_dropped) | (drops == 0)


@triton.jit
def keep_elements(seed, rule, element, stream):
    """Return which elements (int64, any) are kept, for four times the work of ``keep_calls``."""
    last_dropped, drops = rule
    word0, word1, word2, word3 = call_words(seed, element // WORDS_PER_CALL, stream)
    place = element % WORDS_PER_CALL
    even = tl.where(place == 0, word0, word2)
    odd = tl.where(place == 1, word1, word3)
    words = tl.where(place % 2 == 0, even, odd)
    return (words > last_dropped) | (drops == 0)
