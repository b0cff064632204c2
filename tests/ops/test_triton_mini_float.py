"""Triton kernels of the small floating-point formats against the references."""

import math

import pytest
import torch

import regularizers
from regularizers.ops import mini_float_bias, mini_float_pack, mini_float_unpack
from tests.harness import DTYPES
from tests.ops.test_mini_float import FORMATS, int32, numbers_around
from tests.triton_harness import DEVICE

# Without Triton the line above skips this file.
# isort: split
from regularizers.ops.triton import mini_float as kernels

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _short_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 256)


def on_both(call):
    found = []
    for backend in ("triton", "reference"):
        with regularizers.use_backend(backend):
            found.append(call())
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_codes_and_numbers_agree_bit_for_bit(form, dtype):
    (exp_bits, man_bits), options = form[:2], {"signed": form[2], "has_inf_nan": form[3]}
    for value in (-500, 1, 7, 60, 100 if dtype == torch.bfloat16 else 140):
        bias = int32(value).to(DEVICE)
        x = numbers_around(form, bias.cpu(), dtype).to(DEVICE)
        if dtype == torch.bfloat16:  # the interpreter takes subnormal numbers of this type for 0
            x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)
        for dense in (True, False):
            call = lambda t, d=dense, b=bias: mini_float_pack(
                t, b, exp_bits, man_bits, dense=d, **options
            )
            have, want = on_both(lambda c=call, t=x: c(t))
            assert torch.equal(have, want)
            shape = tuple(x.shape)
            back = lambda w=want, d=dense, b=bias, s=shape: mini_float_unpack(
                w, b, exp_bits, man_bits, shape=s, dense=d, dtype=dtype, **options
            )
            have, want = on_both(back)
            torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fitted_biases_agree(dtype):
    x = torch.randn(700, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    nan = torch.cat([x, torch.tensor([math.nan, -math.inf], device=DEVICE, dtype=dtype)])
    for t in (x, nan, x[:1], 1e-3 * x.T, torch.zeros_like(x), x[:0]):
        for exp_bits, has_inf_nan in ((4, False), (5, True), (1, False)):
            have, want = on_both(
                lambda t=t, e=exp_bits, h=has_inf_nan: mini_float_bias(t, e, has_inf_nan=h)
            )
            assert have.dtype == torch.int32
            assert torch.equal(have, want)


@pytest.mark.parametrize("count", [0, 1, 8, 255, 257])
def test_no_byte_is_written_beyond_the_codes(count):
    bias = int32(3).to(DEVICE)
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for man_bits in (0, 1, 2, 3, 4):
        have, want = on_both(lambda m=man_bits: mini_float_pack(x, bias, 3, m))
        assert torch.equal(have, want)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU these are assertions of the device")
def test_bad_values_raise():
    bias = int32(3)
    with regularizers.use_backend("triton"):
        with pytest.raises(ValueError, match="x must be finite"):
            mini_float_pack(torch.tensor([1.0, math.nan]), bias, 4, 3)
        with pytest.raises(ValueError, match="packed must hold codes below 16"):
            mini_float_unpack(torch.tensor([16], dtype=torch.uint8), bias, 2, 1, dense=False)
        with pytest.raises(ValueError, match="bias must lie"):
            mini_float_pack(torch.ones(1), int32(501), 4, 3)
