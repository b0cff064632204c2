"""Triton kernels that mix rows: one launch reads a row and its partner and writes the result.

Rows are blocks of memory. Gradients gather through the inverse permutation, so that no two programs
write to one place. Values of permutations, weights and boxes are not checked on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops.mix import (
    MOST_BOX_SIDES,
    _check_box,
    _check_perm,
    _check_weights,
    _mix_backward_fake,
    _mix_fake,
    _paste_adjoint_fake,
    _paste_fake,
    _paste_reference,
)
from regularizers.ops.triton.dropout import accumulate_type

# Elements of one program: four warps, eight each, which is one 16-byte access of a half type.
BLOCK = 1024
# What a selection copies without looking at it, by size in bytes.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _inverse(perm: Tensor, rows: int) -> Tensor:
    """Return for every row of x the row of the result whose partner it is, or -1."""
    _check_perm(perm, rows)
    places = torch.arange(perm.shape[0], device=perm.device)
    return torch.full((rows,), -1, device=perm.device).scatter_(0, perm, places)


def mix(x: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    """Blend rows with their partners."""
    _check_perm(perm, x.shape[0])
    _check_weights(lam)
    out = _mix_fake(x, perm, lam)
    if out.numel() == 0:
        return out
    elements = out[0].numel()
    with torch.cuda.device_of(x):
        _mix[(out.shape[0] * triton.cdiv(elements, BLOCK),)](
            x, perm.contiguous(), lam.contiguous(), out, elements, BLOCK
        )
    return out


def mix_backward(
    grad: Tensor, x: Tensor, perm: Tensor, lam: Tensor, want_x: bool, want_lam: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and weights; what is not wanted is empty."""
    _check_weights(lam)
    inverse = _inverse(perm, x.shape[0])
    grad_x, grad_lam = _mix_backward_fake(grad, x, perm, lam, want_x, want_lam)
    mixed = perm.shape[0]
    elements = x[0].numel() if x.shape[0] else 0
    if elements == 0 or mixed == 0:
        return grad_x.zero_(), grad_lam.zero_()
    blocks = triton.cdiv(elements, BLOCK)
    products = lam.new_empty(mixed if want_lam else 0, blocks)
    with torch.cuda.device_of(x):
        _mix_backward[((x.shape[0] if want_x else mixed) * blocks,)](
            grad, x, perm.contiguous(), inverse, lam.contiguous(), grad_x, products,
            elements, mixed, want_x, want_lam, BLOCK,
        )  # fmt: skip
    return grad_x, products.sum(1) if want_lam else grad_lam


def paste_boxes(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    """Copy every element from the row it comes from."""
    bits = INTEGERS.get(x.element_size())
    if bits is None:
        return _paste_reference(x, perm, box)
    _check_perm(perm, x.shape[0])
    _check_box(box, tuple(x.shape[x.dim() - box.shape[1] :]))
    out = _paste_fake(x, perm, box)
    _launch(_paste, x.view(bits), perm.contiguous(), box, out.view(bits))
    return out


def paste_boxes_adjoint(y: Tensor, perm: Tensor, box: Tensor, rows: int) -> Tensor:
    """Return the transposed map of ``paste_boxes``: [B, *] -> [rows, *]."""
    out = _paste_adjoint_fake(y, perm, box, rows)
    inverse = _inverse(perm, rows)
    _check_box(box, tuple(y.shape[y.dim() - box.shape[1] :]))
    if y.numel() == 0:
        return out.zero_()
    _launch(_paste_adjoint, y, inverse, box, out)
    return out


# A row is lines of consecutive elements; a line has its place on the other sides of the box.
# Dividing lines instead of elements into places spares the integer divisions.
def _launch(kernel, source: Tensor, partner: Tensor, box: Tensor, out: Tensor) -> None:
    """Run a kernel over the lines of all rows of ``out``."""
    if out.numel() == 0:
        return
    sides = box.shape[1]
    planes, lines, line = [1] * (MOST_BOX_SIDES - sides) + list(out.shape[out.dim() - sides :])
    # In channels_last the channels stand innermost and belong to the line.
    unit = 1 if out.is_contiguous() else out.shape[1]
    width = line * unit
    count = out[0].numel() // width
    columns = min(triton.next_power_of_2(width), BLOCK)
    tall = BLOCK // columns
    bounds = box.new_zeros(box.shape[0], MOST_BOX_SIDES, 2)
    bounds[:, : MOST_BOX_SIDES - sides, 1] = 1
    bounds[:, MOST_BOX_SIDES - sides :] = box
    with torch.cuda.device_of(out):
        kernel[(out.shape[0] * triton.cdiv(count, tall), triton.cdiv(width, columns))](
            source, partner, bounds, out, box.shape[0], count, lines, planes, width, unit,
            tall, columns,
        )  # fmt: skip


# Rows and their blocks share the first axis of the grid: the others end at 65535.
@triton.jit
def _row_and_block(blocks):
    program = tl.program_id(0).to(tl.int64)
    return program // blocks, program % blocks


# y_i = lam_i x_i + (1 - lam_i) x_p(i)
@triton.jit
def _mix(x, perm, lam, y, elements, SIZE: tl.constexpr):
    row, block = _row_and_block(tl.cdiv(elements, SIZE))
    place = block * SIZE + tl.arange(0, SIZE)
    inside = place < elements
    partner, weight = tl.load(perm + row), tl.load(lam + row)
    own = tl.load(x + row * elements + place, inside).to(weight.dtype)
    other = tl.load(x + partner * elements + place, inside).to(weight.dtype)
    mixed = weight * own + (1 - weight) * other
    tl.store(y + row * elements + place, mixed.to(y.dtype.element_ty), inside)


# dx_j = lam_j g_j + (1 - lam_i) g_i with j = p(i), and a part of dlam_j = <x_j - x_p(j), g_j>: g_j
# is read once for both.
@triton.jit(do_not_specialize=["mixed"])
def _mix_backward(
    grad, x, perm, inverse, lam, grad_x, products, elements, mixed,
    WANT_X: tl.constexpr, WANT_LAM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(elements, SIZE)
    row, block = _row_and_block(blocks)
    place = block * SIZE + tl.arange(0, SIZE)
    inside = place < elements
    has_own = row < mixed
    weight = tl.load(lam + row, has_own, 0.0)
    own = tl.load(grad + row * elements + place, inside & has_own, 0.0).to(weight.dtype)
    if WANT_LAM:  # noqa: SIM102 (decided while compiling)
        if has_own:
            partner = tl.load(perm + row)
            first = tl.load(x + row * elements + place, inside, 0.0).to(weight.dtype)
            second = tl.load(x + partner * elements + place, inside, 0.0).to(weight.dtype)
            product = tl.sum((first - second) * own, 0)
            tl.store(products + row * blocks + block, product)
    if WANT_X:
        user = tl.load(inverse + row)
        is_used = user >= 0
        rest = 1 - tl.load(lam + user, is_used, 1.0)
        other = tl.load(grad + user * elements + place, inside & is_used, 0.0)
        total = weight * own + rest * other.to(weight.dtype)
        tl.store(grad_x + row * elements + place, total.to(grad_x.dtype.element_ty), inside)


@triton.jit
def _places(block, count, lines, planes, width, TALL: tl.constexpr, COLUMNS: tl.constexpr):
    """Return plane and line [TALL, 1], column [1, COLUMNS], offset in the row, and what exists."""
    index = block * TALL + tl.arange(0, TALL)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    plane = index // lines % planes
    return plane, index % lines, column, index * width + column, (index < count) & (column < width)


@triton.jit
def _in_box(bounds, row, plane, line, column, unit):
    """Return which places lie in the box of a row."""
    box = bounds + 6 * row
    here = (plane >= tl.load(box)) & (plane < tl.load(box + 1))
    here = here & (line >= tl.load(box + 2)) & (line < tl.load(box + 3))
    return here & (column >= tl.load(box + 4) * unit) & (column < tl.load(box + 5) * unit)


@triton.jit(do_not_specialize=["mixed", "count"])
def _paste(
    x, perm, bounds, y, mixed, count, lines, planes, width, unit,
    TALL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, block = _row_and_block(tl.cdiv(count, TALL))
    plane, line, column, offset, inside = _places(block, count, lines, planes, width, TALL, COLUMNS)
    pasted = _in_box(bounds, row, plane, line, column, unit)
    elements = tl.cast(count, tl.int64) * width
    own = tl.load(x + row * elements + offset, inside & ~pasted)
    other = tl.load(x + tl.load(perm + row) * elements + offset, inside & pasted)
    tl.store(y + row * elements + offset, tl.where(pasted, other, own), inside)


@triton.jit(do_not_specialize=["mixed", "count"])
def _paste_adjoint(
    y, inverse, bounds, x, mixed, count, lines, planes, width, unit,
    TALL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, block = _row_and_block(tl.cdiv(count, TALL))
    plane, line, column, offset, inside = _places(block, count, lines, planes, width, TALL, COLUMNS)
    elements = tl.cast(count, tl.int64) * width
    total = tl.zeros([TALL, COLUMNS], accumulate_type(y.dtype.element_ty))
    if row < mixed:
        kept = inside & ~_in_box(bounds, row, plane, line, column, unit)
        total += tl.load(y + row * elements + offset, kept, 0.0).to(total.dtype)
    user = tl.load(inverse + row)
    if user >= 0:
        given = inside & _in_box(bounds, user, plane, line, column, unit)
        total += tl.load(y + user * elements + offset, given, 0.0).to(total.dtype)
    tl.store(x + row * elements + offset, total.to(x.dtype.element_ty), inside)
