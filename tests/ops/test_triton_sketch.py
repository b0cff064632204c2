"""Triton kernels of the sliced statistics against the references: on a GPU or interpreted."""

import pytest
import torch

import regularizers
from regularizers.ops import sliced_characteristic, sliced_epps_pulley, sliced_quantile
from regularizers.ops.sketch import (
    CHARACTERISTIC,
    CHARACTERISTIC_BACKWARD,
    EPPS_PULLEY,
    EPPS_PULLEY_BACKWARD,
    QUANTILE,
    QUANTILE_BACKWARD,
)
from tests.harness import DTYPES, TOLERANCES, forward_and_gradients
from tests.triton_harness import DEVICE

# Without Triton the line above skips this file.
# isort: split
from regularizers.ops.triton import sketch as kernels

pytestmark = pytest.mark.interpreter


def _problem(views, rows, features, count, dtype=torch.float32, groups=None):
    """Return z and slices; the slices have the type that the kernels compute in."""
    generator = torch.Generator().manual_seed(views + rows + features + count)
    z = torch.randn(views, rows, features, generator=generator, dtype=torch.float64)
    shape = (features, count) if groups is None else (groups, features, count)
    slices = torch.randn(shape, generator=generator, dtype=torch.float64)
    slices /= max(features, 1) ** 0.5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return z.to(DEVICE, dtype), slices.to(DEVICE, wide)


def _calls(rows, slices, knots=5):
    quantiles = torch.linspace(-2, 2, rows, dtype=slices.dtype, device=DEVICE)
    return {
        "epps_pulley": lambda z: sliced_epps_pulley(z, slices, num_knots=knots),
        "characteristic": lambda z: sliced_characteristic(z, slices, num_knots=knots),
        "quantile": lambda z: sliced_quantile(z, slices, quantiles),
    }


def assert_agree(call, z, **tolerance):
    found = []
    for backend in ("triton", "reference"):
        with regularizers.use_backend(backend):
            found.append(forward_and_gradients(call, (z.detach().requires_grad_(),)))
    torch.testing.assert_close(*found, equal_nan=True, **(tolerance or TOLERANCES[z.dtype]))


STATISTICS = ["epps_pulley", "characteristic", "quantile"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STATISTICS)
def test_results_and_gradients_agree(name, dtype):
    z, slices = _problem(2, 19, 7, 11, dtype)
    assert_agree(_calls(19, slices)[name], z)


@pytest.mark.parametrize(
    ("views", "rows", "features", "count", "groups"),
    [(1, 1, 1, 1, None), (4, 5, 3, 2, 2), (1, 70, 40, 17, None), (2, 33, 3, 5, 1)],
)
@pytest.mark.parametrize("name", STATISTICS)
def test_odd_sizes_agree(name, views, rows, features, count, groups):
    z, slices = _problem(views, rows, features, count, groups=groups)
    assert_agree(_calls(rows, slices)[name], z, rtol=1e-5, atol=5e-5)  # sums of up to 70


@pytest.mark.parametrize("knots", [2, 17])
def test_numbers_of_knots_agree(knots):
    z, slices = _problem(1, 20, 4, 6)
    assert_agree(_calls(20, slices, knots)["characteristic"], z, rtol=1e-5, atol=5e-5)


def test_small_tiles_and_splits_agree(monkeypatch):
    for name in ("TILE_ROWS", "TILE_SLICES", "TILE_FEATURES", "DEPTH"):
        monkeypatch.setattr(kernels, name, 16)
    z, slices = _problem(2, 35, 20, 19)
    for name in ("epps_pulley", "characteristic"):
        assert_agree(_calls(35, slices)[name], z, rtol=1e-5, atol=5e-5)
    monkeypatch.setattr(kernels, "FILLING_PROGRAMS", 1)
    assert_agree(_calls(35, slices)["characteristic"], z, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(("attribute", "value"), [("CHUNK_BYTES", 1), ("LONGEST_COLUMN", 8)])
def test_chunks_of_slices_and_long_columns_agree(monkeypatch, attribute, value):
    monkeypatch.setattr(kernels, attribute, value)
    z, slices = _problem(2, 20, 4, 3)
    assert_agree(_calls(20, slices)["quantile"], z)


def test_equal_projections_take_quantiles_in_the_order_of_rows():
    z = torch.zeros(1, 10, 1, device=DEVICE)
    assert_agree(_calls(10, torch.ones(1, 1, device=DEVICE))["quantile"], z)


def test_what_is_not_finite_propagates():
    z, slices = _problem(1, 10, 2, 2)
    z[0, 3] = torch.nan
    with regularizers.use_backend("triton"):
        for call in _calls(10, slices).values():
            assert call(z).isnan().any()


def test_gradients_pass_gradcheck():
    z, slices = _problem(1, 5, 3, 2, torch.float64)
    for call in _calls(5, slices, 3).values():

        def on_triton(z, call=call):
            with regularizers.use_backend("triton"):
                return call(z)

        assert torch.autograd.gradcheck(on_triton, z.requires_grad_(), fast_mode=True)
        assert torch.autograd.gradgradcheck(on_triton, z, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_shaped_as_the_fake_rules_say(dtype):
    z, slices = _problem(2, 6, 3, 4, dtype, groups=1)
    quantiles = torch.linspace(-1, 1, 6, device=DEVICE)
    for wanted in (True, False):
        for forward, backward, call in (
            (EPPS_PULLEY, EPPS_PULLEY_BACKWARD, (z, slices, 0.5, 4, wanted)),
            (QUANTILE, QUANTILE_BACKWARD, (z, slices, quantiles, wanted)),
        ):
            loss, unit = forward.kernel("triton")(*call)
            _check(forward, call)
            if wanted:
                _check(backward, (loss, unit, *call))
    sums = CHARACTERISTIC.kernel("triton")(z, slices, 0.5, 4)
    _check(CHARACTERISTIC, (z, slices, 0.5, 4))
    _check(CHARACTERISTIC_BACKWARD, (sums, z, slices, 0.5, 4))


def _check(operator, arguments):
    torch.library.opcheck(
        operator.kernel("triton"), arguments, test_utils=("test_schema", "test_faketensor")
    )
