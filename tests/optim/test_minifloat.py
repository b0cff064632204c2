"""Small floating-point formats: rounding, codes and packed bytes (paper 4)."""

import math

import pytest
import torch

from regularizers.optim import RF8, MiniFloat, estimate_shape, gg_init_

FORMATS = [
    MiniFloat(1, 0, bias=7),
    MiniFloat(2, 0, signed=False),
    MiniFloat(2, 1, bias=1),
    MiniFloat(3, 0),
    MiniFloat(1, 3, bias=-3, signed=False),
    MiniFloat(3, 2, has_inf_nan=True),
    MiniFloat(5, 1, bias=15),
    MiniFloat(4, 3),
    MiniFloat(4, 3, bias=7, has_inf_nan=True),
    MiniFloat(5, 3, bias=-3, signed=False, has_inf_nan=True),
    MiniFloat(7, 0),
]


def inputs(n=2000):
    torch.manual_seed(0)
    x = torch.randn(n) * torch.exp2(torch.randint(-20, 8, (n,)))
    return torch.cat([x, torch.tensor([0.0, -0.0, 1.0, -1.0, 0.75, 3e38, 1e-40])])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_number_of_the_format_is_a_fixed_point(fmt):
    bias = 5 if fmt.bias is None else fmt.bias
    values = fmt.values(bias)
    codes = fmt.encode(values[~values.isnan()], torch.tensor(bias))
    assert torch.equal(codes.long(), torch.arange(2**fmt.bits)[~values.isnan()])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rounding_is_to_the_nearest_number_and_to_the_even_code_at_ties(fmt):
    bias = torch.tensor(7)
    values = fmt.values(bias).double()
    finite = values[values.isfinite() & ~values.signbit()]
    middles = (finite[1:] + finite[:-1]) / 2
    x = torch.cat([inputs().double().abs(), middles, finite * 1.01])
    x = x[x <= finite[-1]]
    distance = (x[:, None] - finite).abs()
    nearest = distance.amin(1, keepdim=True)
    tied = distance == nearest
    code = torch.arange(finite.numel()).expand_as(tied)
    expected = torch.where(tied, code + 1000 * (code % 2), 10_000).argmin(1)
    assert torch.equal(fmt.encode(x, bias).long(), expected)


@pytest.mark.skipif(not hasattr(torch, "float8_e5m2"), reason="needs torch with float8")
def test_five_two_with_infinities_is_torch_s_float8_bit_for_bit():
    fmt = MiniFloat(5, 2, bias=15, has_inf_nan=True)
    x = torch.cat([inputs(), torch.tensor([math.inf, -math.inf, 57344.0, 61439.0, 61440.0, 1e30])])
    assert torch.equal(fmt.encode(x), x.to(torch.float8_e5m2).view(torch.uint8))
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(
        fmt.decode(codes), codes.view(torch.float8_e5m2).float(), rtol=0, atol=0, equal_nan=True
    )


def test_four_three_is_torch_s_float8_up_to_its_nan():
    fmt = MiniFloat(4, 3, bias=7)
    x = inputs()
    x = x[x.abs() <= 448]
    assert torch.equal(fmt.encode(x), x.to(torch.float8_e4m3fn).view(torch.uint8))
    assert fmt.values()[127] == 480  # where float8_e4m3fn has NaN


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_all_types_give_the_codes_of_their_values(dtype):
    x = torch.randn(500).to(dtype)
    fmt = MiniFloat(4, 3, bias=7)
    assert torch.equal(fmt.encode(x), fmt.encode(x.double().float()))
    assert fmt.quantize(x).dtype == dtype


def test_float64_is_rounded_once():
    fmt = MiniFloat(2, 1, bias=1)
    above = torch.tensor([2.5 + 1e-12], dtype=torch.float64)  # 2.5 in float32, a tie
    assert fmt.quantize(above).item() == 3
    assert fmt.quantize(above.float()).item() == 2


def test_float64_weights_beyond_float32_come_back_as_float64():
    w = 1e-60 * torch.rand(100, dtype=torch.float64) + 1e-61
    assert ((RF8().quantize(w) - w).abs() <= w / 16).all()


def test_denormals_are_kept():
    fmt = MiniFloat(4, 3, bias=7)
    least = 2.0**-9
    assert fmt.quantize(torch.tensor([least, 3 * least, 0.5 * least, 0.51 * least])).tolist() == [
        least,
        3 * least,
        0.0,
        least,
    ]


def test_beyond_the_largest_number_is_the_largest_or_infinity():
    x = torch.tensor([1e9, -1e9])
    assert MiniFloat(4, 3, bias=7).quantize(x).tolist() == [480.0, -480.0]
    assert MiniFloat(4, 3, bias=7, has_inf_nan=True).quantize(x).tolist() == [math.inf, -math.inf]
    assert MiniFloat(4, 3, bias=7, signed=False).quantize(x).tolist() == [480.0, 0.0]


def test_nan_and_infinity_survive_where_the_format_has_them():
    fmt = MiniFloat(3, 2, has_inf_nan=True)
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    torch.testing.assert_close(fmt.quantize(x), x, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1.9999, 1e30])
def test_fitted_bias_puts_the_largest_weight_into_the_top_binade(scale):
    torch.manual_seed(0)
    w = scale * torch.rand(1000)
    w[0] = scale
    fmt = RF8()
    codes = fmt.encode(w)
    assert codes.max() >> 3 == 15
    # Half a unit of 2^-3, and one where the top of the range cuts.
    normal = codes >= 8
    relative = ((fmt.quantize(w) - w).abs() / w)[normal]
    assert relative.max() <= 1 / 16
    smaller = MiniFloat(4, 3, bias=int(fmt.bias_for(w)) + 1)
    assert smaller.values().max() < w.max()


def test_fitted_bias_of_zeros_is_the_usual_one():
    assert RF8().bias_for(torch.zeros(3)).item() == 7
    assert RF8().bias_for(torch.zeros(0)).item() == 7
    assert RF8().quantize(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 8, 61])
def test_packed_bytes_hold_exactly_the_rounded_numbers(fmt, n):
    torch.manual_seed(n)
    x = torch.randn(n)
    packed, bias = fmt.pack(x)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(n * fmt.bits / 8)
    assert torch.equal(fmt.unpack(packed, bias, (n,)), fmt.quantize(x))


def test_bits_lie_in_the_bytes_from_the_lowest_up():
    fmt = MiniFloat(3, 1, bias=0)  # 5 bits
    torch.manual_seed(0)
    x = torch.randn(13)
    packed, _ = fmt.pack(x)
    stream = sum(byte << (8 * i) for i, byte in enumerate(packed.tolist()))
    assert [stream >> (5 * i) & 31 for i in range(13)] == fmt.encode(x).tolist()


def test_shape_and_type_come_back():
    w = torch.randn(3, 4, 5).transpose(0, 1)
    packed, bias = RF8().pack(w)
    found = RF8().unpack(packed, bias, w.shape, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), RF8().quantize(w))


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_rf8_keeps_the_law_of_weights(shape):
    torch.manual_seed(0)
    w = gg_init_(torch.empty(200, 500), shape=shape)
    q = RF8().quantize(w)
    # Uniform within a binade: a relative error of 1/16 at most has an rms near 0.03.
    assert (q - w).norm() < 0.035 * w.norm()
    assert estimate_shape(q)[0].item() == pytest.approx(estimate_shape(w)[0].item(), rel=0.01)


@pytest.mark.parametrize(
    "fmt", [RF8(), MiniFloat(2, 1), MiniFloat(5, 2, has_inf_nan=True)], ids=str
)
def test_rounding_compiles_to_one_graph(fmt):
    x = torch.randn(64)
    compiled = torch.compile(fmt.quantize, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), fmt.quantize(x))


def test_bad_input_names_the_argument():
    fmt, byte = RF8(), torch.zeros(3, dtype=torch.uint8)
    for exception, name, call in (
        (ValueError, "exp_bits", lambda: MiniFloat(0, 3)),
        (ValueError, "exp_bits", lambda: MiniFloat(5, 3)),
        (ValueError, "exp_bits", lambda: MiniFloat(1, 0, signed=False)),
        (ValueError, "exp_bits", lambda: MiniFloat(1, 3, has_inf_nan=True)),
        (ValueError, "man_bits", lambda: MiniFloat(4, -1)),
        (ValueError, "man_bits", lambda: MiniFloat(4, 0, has_inf_nan=True)),
        (TypeError, "exp_bits", lambda: MiniFloat(4.0, 3)),
        (ValueError, "bias must", lambda: MiniFloat(4, 3, bias=501)),
        (TypeError, "bias must", lambda: MiniFloat(4, 3, bias=7.0)),
        (TypeError, "x must", lambda: fmt.encode(torch.ones(3, dtype=torch.int32))),
        (ValueError, "x must be finite", lambda: fmt.encode(torch.tensor([math.nan]))),
        (ValueError, "x must be finite", lambda: fmt.pack(torch.tensor([math.inf]))),
        (TypeError, "codes must", lambda: fmt.decode(byte.long(), 7)),
        (ValueError, "codes below 16", lambda: MiniFloat(2, 1, bias=1).decode(byte + 16)),
        (ValueError, "bias must", lambda: fmt.decode(byte)),
        (ValueError, "packed must", lambda: fmt.unpack(byte, 7, (4,))),
        (TypeError, "packed must", lambda: fmt.unpack(byte.int(), 7, (3,))),
    ):
        with pytest.raises(exception, match=name):
            call()
