"""Triton kernel of the gate of gradient dropout: a program a block of entries."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops.gradient_gate import check_strength
from regularizers.ops.triton.dropout import accumulate_type
from regularizers.ops.triton.philox import WORDS_PER_CALL, call_words

BLOCK = 1024


def gradient_gate(
    value: Tensor,
    g_task: Tensor,
    g_reg: Tensor,
    drop_strength: Tensor,
    seed: Tensor,
    eps: float,
    stream: int,
) -> Tensor:
    """Return ``value`` where the gradients agree, weakened elsewhere."""
    check_strength(drop_strength)
    out = value.new_empty(value.shape)
    count = value.numel()
    if count:
        with torch.cuda.device_of(value):
            _gate[(triton.cdiv(count, BLOCK),)](
                value.contiguous(),
                g_task.contiguous(),
                g_reg.contiguous(),
                out,
                drop_strength,
                seed,
                stream,
                count,
                eps,
                BLOCK,
            )
    return out


@triton.jit(do_not_specialize=["stream", "count"])
def _gate(
    value,
    g_task,
    g_reg,
    y,
    drop_strength,
    seed,
    stream,
    count,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = accumulate_type(y.dtype.element_ty)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    inside = element < count
    call = first // WORDS_PER_CALL + tl.arange(0, BLOCK // WORDS_PER_CALL)
    word0, word1, word2, word3 = call_words(tl.load(seed), call, stream)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    uniform = (words >> 8).to(tl.int32).to(A) * 5.9604644775390625e-08
    v = tl.load(value + element, inside, 0.0).to(A)
    a = tl.load(g_task + element, inside, 0.0).to(A)
    b = tl.load(g_reg + element, inside, 0.0).to(A)
    toward = tl.where(a > 0, b, tl.where(a < 0, -b, a * b))
    size = tl.abs(a)
    share = (toward + size) / (size + tl.abs(b) + EPS)
    keep = tl.where(share == share, share, 1.0) * 0.5 + 0.5
    strength = tl.load(drop_strength)
    rest = tl.where(strength < 1.0, v * (1.0 - strength).to(A), 0.0)
    found = tl.where(uniform < keep, v, rest)
    tl.store(y + element, found.to(y.dtype.element_ty), inside)
