"""The small floating-point formats: the operator contract, and the exact codes of the kernels."""

import itertools
import math

import pytest
import torch

import regularizers
from regularizers.ops import mini_float_bias, mini_float_pack, mini_float_unpack
from regularizers.ops.mini_float import BIAS, PACK, UNPACK, all_values
from tests.harness import DTYPES, OperatorContract, Sample, needs_kernels

# exp_bits, man_bits, signed, has_inf_nan; every width, no mantissa, the widest exponent.
FORMATS = [
    (4, 3, True, False),
    (5, 2, True, True),
    (2, 1, True, False),
    (3, 1, True, True),
    (1, 0, True, False),
    (3, 4, False, True),
    (2, 4, True, False),
    (1, 1, True, False),
    (3, 0, False, False),
    (7, 0, True, False),
    (8, 0, False, False),
]


def int32(value):
    return torch.tensor(value, dtype=torch.int32)


def numbers_around(form, bias, dtype):
    """Numbers of the format, their middles, what lies near both, and numbers of all sizes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = all_values(bias, *form, dtype=torch.float64)
    values = values[values.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    exact = torch.cat([values, middles]).to(wide)
    near = [exact.nextafter(torch.tensor(side, dtype=wide)) for side in (math.inf, -math.inf)]
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(199, generator=generator) * 2.0 ** torch.randint(
        -40, 40, (199,), generator=generator
    )
    special = [0.0, -0.0, 1.0, -1.5, 1e-40, -1e-40]
    if form[3]:
        special += [math.inf, -math.inf, math.nan, -math.nan]
    x = torch.cat([exact, *near, random.to(wide), torch.tensor(special, dtype=wide)]).to(dtype)
    return x if form[3] else x[x.isfinite()]


def rounded(x, exp_bits=4, man_bits=3, dense=True, **options):
    """A code has no derivative: the contract gets the numbers beside the input."""
    bias = mini_float_bias(x, exp_bits, has_inf_nan=options.get("has_inf_nan", False))
    codes = mini_float_pack(x, bias, exp_bits, man_bits, dense=dense, **options)
    back = mini_float_unpack(
        codes, bias, exp_bits, man_bits, shape=tuple(x.shape), dense=dense, dtype=x.dtype, **options
    )
    return x + back


class TestContract(OperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32  # elementwise, as a cast
    scheduled = {}

    def samples(self, dtype):
        x = torch.randn(5, 3, 7, dtype=dtype)
        large = torch.randn(40_001, dtype=dtype)
        image = torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
        return [
            Sample("eight bits", (x,), rounded),
            Sample("five bits", (x,), rounded, {"exp_bits": 3, "man_bits": 1}),
            Sample("a byte a code", (x,), rounded, {"exp_bits": 2, "man_bits": 1, "dense": False}),
            Sample("infinities", (x,), rounded, {"exp_bits": 3, "has_inf_nan": True}),
            Sample("unsigned", (x,), rounded, {"signed": False}),
            Sample("wide exponent", (x,), rounded, {"exp_bits": 7, "man_bits": 0}),
            Sample("a number", (x[0, 0, 0],), rounded),
            Sample("transposed", (x.transpose(0, 2),), rounded),
            Sample("expanded", (x[:, :1].expand(5, 3, 7),), rounded),
            Sample("channels last", (image,), rounded),
            *([] if dtype == torch.float64 else [Sample("two tasks", (large,), rounded)]),
        ]

    def empty(self, dtype):
        zeros = torch.zeros(3, 5, dtype=dtype)  # its bias jumps when one moves: no derivative
        return [Sample("nothing", (zeros[:0],), rounded), Sample("zeros", (zeros,), rounded)]

    def operator_calls(self):
        x, bias = torch.randn(5, 3), int32(7)
        codes = torch.arange(12, dtype=torch.uint8)
        return [
            (PACK, (x, bias, 4, 3, True, False, True)),
            (PACK, (x.double(), bias, 2, 1, True, False, False)),
            (UNPACK, (codes, bias, 24, 2, 1, True, False, True, 0)),
            (UNPACK, (codes, bias, 12, 4, 3, True, True, False, 2)),
            (BIAS, (x, 4, False)),
        ]

    def bad_inputs(self):
        x, bias, byte = torch.ones(3), int32(7), torch.zeros(3, dtype=torch.uint8)
        pack, unpack = mini_float_pack, mini_float_unpack
        nan, inf = torch.tensor([1.0, math.nan]), torch.tensor([[math.inf]])
        return [
            (TypeError, "x must", lambda: pack([1.0], bias, 4, 3)),
            (TypeError, "x must", lambda: pack(x.long(), bias, 4, 3)),
            (TypeError, "x must", lambda: mini_float_bias(x.long(), 4)),
            (ValueError, "x must be finite", lambda: pack(nan, bias, 4, 3)),
            (ValueError, "x must be finite", lambda: pack(inf.double(), bias, 2, 1)),
            (ValueError, "x must be finite", lambda: pack(nan, bias, 8, 0, signed=False)),
            (TypeError, "bias must", lambda: pack(x, 7, 4, 3)),
            (TypeError, "bias must", lambda: pack(x, bias.long(), 4, 3)),
            (ValueError, "bias must", lambda: pack(x, bias[None], 4, 3)),
            (ValueError, "bias must", lambda: pack(x, bias.to("meta"), 4, 3)),
            (ValueError, "bias must lie", lambda: pack(x, int32(501), 4, 3)),
            (ValueError, "bias must lie", lambda: unpack(byte, int32(-501), 4, 3, shape=(3,))),
            (TypeError, "exp_bits must", lambda: pack(x, bias, 4.0, 3)),
            (ValueError, "exp_bits must", lambda: pack(x, bias, 0, 3)),
            (ValueError, "exp_bits must", lambda: mini_float_bias(x, 9)),
            (ValueError, "exp_bits and man_bits", lambda: pack(x, bias, 5, 3)),
            (ValueError, "man_bits must", lambda: pack(x, bias, 4, -1)),
            (ValueError, "man_bits must", lambda: pack(x, bias, 4, 0, has_inf_nan=True)),
            (TypeError, "packed must", lambda: unpack(byte.int(), bias, 4, 3, shape=(3,))),
            (ValueError, "packed must", lambda: unpack(byte, bias, 4, 3, shape=(4,))),
            (ValueError, "packed must", lambda: unpack(byte, bias, 4, 3, shape=(4,), dense=False)),
            (ValueError, "codes below 16", lambda: unpack(byte + 16, bias, 2, 1, dense=False)),
            (ValueError, "shape must", lambda: unpack(byte, bias, 4, 3)),
            (TypeError, "dtype must", lambda: unpack(byte, bias, 4, 3, shape=(3,), dtype=int)),
        ]

    def test_backward_stays_on_the_backend_of_forward(self):
        # There is no backward pass: neither codes nor the numbers made of them require grad.
        x = torch.randn(5).requires_grad_()
        for backend in ("cpp", "reference"):
            with regularizers.use_backend(backend):
                codes = mini_float_pack(x, int32(7), 4, 3)
                assert not codes.requires_grad
                assert not mini_float_unpack(codes, int32(7), 4, 3, shape=(5,)).requires_grad


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_codes_and_numbers_are_those_of_the_reference_bit_for_bit(form, dtype):
    (exp_bits, man_bits), options = form[:2], {"signed": form[2], "has_inf_nan": form[3]}
    for value, dense in itertools.product((-500, -120, 7, 127, 500), (True, False)):
        bias, found = int32(value), []
        x = numbers_around(form, bias, dtype)
        for backend in ("cpp", "reference"):
            with regularizers.use_backend(backend):
                codes = mini_float_pack(x, bias, exp_bits, man_bits, dense=dense, **options)
                back = mini_float_unpack(
                    codes, bias, exp_bits, man_bits,
                    shape=tuple(x.shape), dense=dense, dtype=dtype, **options,
                )  # fmt: skip
                found.append((codes, back))
        (codes, back), (expected_codes, expected) = found
        assert torch.equal(codes, expected_codes)
        torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)
        number = ~back.isnan()  # conversions drop or keep the sign of a NaN as they like
        assert torch.equal(back.signbit()[number], expected.signbit()[number])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_number_of_a_format_has_its_code(form):
    exp_bits, man_bits, signed, has_inf_nan = form
    values = all_values(int32(3), *form, dtype=torch.float64)
    codes = mini_float_pack(
        values, int32(3), exp_bits, man_bits, signed=signed, has_inf_nan=has_inf_nan, dense=False
    )
    number = ~values.isnan()
    assert torch.equal(codes[number].long(), torch.arange(values.numel())[number])


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("signed", [True, False])
def test_nan_stays_nan_whatever_its_sign_bit(signed, negative):
    nan = torch.tensor([-math.nan if negative else math.nan])
    codes = mini_float_pack(nan, int32(3), 3, 2, signed=signed, has_inf_nan=True)
    back = mini_float_unpack(codes, int32(3), 3, 2, shape=(1,), signed=signed, has_inf_nan=True)
    assert back.isnan().all()


def test_five_bit_codes_of_two_tasks_meet_without_a_gap():
    torch.manual_seed(0)
    x = torch.randn(3 * (1 << 15) + 5)
    whole = mini_float_pack(x, int32(3), 3, 1)
    codes = mini_float_pack(x, int32(3), 3, 1, dense=False)
    stream = int.from_bytes(bytes(whole.tolist()), "little")
    for i in [*range(0, x.numel(), 4097), (1 << 15) - 1, 1 << 15, x.numel() - 1]:
        assert stream >> (5 * i) & 31 == codes[i]


def test_float64_numbers_are_not_rounded_to_float32():
    x = torch.tensor([1e-60, -3e-61], dtype=torch.float64)
    bias = mini_float_bias(x, 4)
    codes = mini_float_pack(x, bias, 4, 3)
    back = mini_float_unpack(codes, bias, 4, 3, shape=(2,), dtype=torch.float64)
    assert ((back - x).abs() <= x.abs() / 16).all()


def test_the_widest_exponent_has_a_fitted_bias_too():
    x = torch.tensor([3.0])
    assert mini_float_bias(x, 8).item() == 255 - 1


def test_a_fitted_bias_ignores_infinity_and_nan():
    x = torch.tensor([0.3, math.inf, math.nan])
    assert mini_float_bias(x, 4).item() == mini_float_bias(x[:1], 4).item() == 15 + 2
