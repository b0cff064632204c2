"""Triton kernels of dropout_samples and its adjoint: x is read once, masks are made in registers.

The fallback of csrc/cuda/dropout.cu. Contiguous tensors go straight through, others as a copy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops.dropout import _adjoint_fake, _check_rate, _fake
from regularizers.ops.triton.philox import WORDS_PER_CALL, drop_rule, keep_calls, keep_scale

# Philox calls of one program: 1024 elements on four warps, eight a thread, which is one 16-byte
# access of a half type.
BLOCK_CALLS = 256
# A small x is spread over more programs by its samples, until there are about as many as a large
# GPU runs at once.
FILLING_PROGRAMS = 1024


def dropout_samples(x: Tensor, p: Tensor, seed: Tensor, num_samples: int) -> Tensor:
    """Return ``num_samples`` dropout samples of ``x``, each laid out as ``torch.empty_like(x)``."""
    _check_rate(p)
    out = _fake(x, p, seed, num_samples)
    elements = x.numel()
    if elements == 0:
        return out
    dense = out if out.is_contiguous() else out.new_empty(out.shape)
    blocks = triton.cdiv(elements, WORDS_PER_CALL.value * BLOCK_CALLS)
    groups = min(num_samples, triton.cdiv(FILLING_PROGRAMS, blocks))
    with torch.cuda.device_of(x):
        _samples[(blocks, groups)](
            x.contiguous(),
            dense,
            p,
            seed,
            elements,
            num_samples,
            triton.cdiv(num_samples, groups),
            BLOCK_CALLS,
        )
    return out if dense is out else out.copy_(dense)


def dropout_samples_adjoint(y: Tensor, p: Tensor, seed: Tensor) -> Tensor:
    """Return the transposed map of ``dropout_samples``: [samples, *] -> [*]."""
    _check_rate(p)
    out = _adjoint_fake(y, p, seed)
    elements = out.numel()
    if elements == 0:
        return out
    dense = out if out.is_contiguous() else out.new_empty(out.shape)
    y = y if y[0].is_contiguous() else y.contiguous()
    blocks = triton.cdiv(elements, WORDS_PER_CALL.value * BLOCK_CALLS)
    with torch.cuda.device_of(y):
        _adjoint[(blocks,)](y, dense, p, seed, elements, y.shape[0], y.stride(0), BLOCK_CALLS)
    return out if dense is out else out.copy_(dense)


@triton.constexpr_function
def accumulate_type(dtype):
    """Return what sums of a type are made in: float64 for float64, else float32."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def _block(elements, BLOCK: tl.constexpr):
    """Return the calls of this program, their elements, and which of these exist."""
    first_call = tl.program_id(0).to(tl.int64) * BLOCK
    call = first_call + tl.arange(0, BLOCK)
    element = first_call * WORDS_PER_CALL + tl.arange(0, WORDS_PER_CALL * BLOCK)
    return call, element, element < elements


# y_se = r x_e where m_se, else 0; r = 1 / (1 - p). Selected, never multiplied: a NaN under a
# dropped element stays there.
@triton.jit(do_not_specialize=["num_samples", "samples_per_program"])
def _samples(x, y, p, seed, elements, num_samples, samples_per_program, BLOCK: tl.constexpr):
    call, element, inside = _block(elements, BLOCK)
    rule, bits = drop_rule(p), tl.load(seed)
    kept = tl.load(x + element, inside).to(accumulate_type(x.dtype.element_ty))
    kept = (kept * keep_scale(p).to(kept.dtype)).to(x.dtype.element_ty)
    first = tl.program_id(1) * samples_per_program
    for sample in range(first, min(first + samples_per_program, num_samples)):
        keep = keep_calls(bits, rule, call, sample)
        place = tl.cast(sample, tl.int64) * elements + element
        tl.store(y + place, tl.where(keep, kept, 0.0), inside)


# dx_e = r sum_s (dy_se where m_se, else 0), added up in the order of samples.
@triton.jit(do_not_specialize=["num_samples"])
def _adjoint(y, x, p, seed, elements, num_samples, sample_stride, BLOCK: tl.constexpr):
    call, element, inside = _block(elements, BLOCK)
    rule, bits = drop_rule(p), tl.load(seed)
    total = tl.zeros_like(element).to(accumulate_type(y.dtype.element_ty))
    for sample in range(num_samples):
        keep = keep_calls(bits, rule, call, sample)
        place = tl.cast(sample, tl.int64) * sample_stride + element
        total += tl.where(keep, tl.load(y + place, inside).to(total.dtype), 0.0)
    total *= keep_scale(p).to(total.dtype)
    tl.store(x + element, total.to(x.dtype.element_ty), inside)
