"""Sliced statistics: the operator contract, and facts of the sums, the statistic and the sort."""

import math

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
from regularizers.transport import random_slices
from tests.harness import RandomOperatorContract, Sample, forward_and_gradients


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _batch(views, rows, features, dtype=torch.float32):
    generator = torch.Generator().manual_seed(views + rows + features)
    z = torch.randn(views, rows, features, generator=generator, dtype=torch.float64)
    return z.to(dtype)


def _slices(z, num_slices, groups=None, **source):
    """Random slices as the methods draw them: a seed serves as in other operators."""
    dtype = _wide(z.dtype)
    return random_slices(
        z.shape[-1], num_slices, groups=groups, device=z.device, dtype=dtype, **source
    )


class _SketchContract(RandomOperatorContract):
    """Seeds and generators choose the slices."""

    bitwise_across_threads = False
    autocast_dtype = torch.float32
    scheduled = {}

    def call(self, z, slices, **options):
        raise AssertionError("a subclass defines this")

    def sample(self, name, z, num_slices=5, groups=None, **options):
        def call(z, seed=1, generator=None, **more):
            slices = _slices(z, num_slices, groups, seed=seed, generator=generator)
            return self.call(z, slices, **more)

        return Sample(name, (z,), call, {"seed": 4, **options})

    def samples(self, dtype):
        z = _batch(2, 9, 7, dtype)
        return [
            self.sample("odd sizes", z),
            self.sample("one of each", _batch(1, 1, 1, dtype), num_slices=1),
            self.sample("groups", _batch(4, 6, 3, dtype), groups=2),
            self.sample("transposed", z.transpose(0, 2)),
            self.sample("expanded", z[:, :, :1].expand(2, 9, 3)),
        ]

    def bad_inputs(self):
        z = _batch(2, 4, 3)
        slices = torch.eye(3)
        return [
            (TypeError, "z must", lambda: self.call([1.0], slices)),
            (TypeError, "z must", lambda: self.call(z.long(), slices)),
            (ValueError, "z must", lambda: self.call(z[0], slices)),
            (ValueError, "z must", lambda: self.call(z[:, :0], slices)),
            (TypeError, "slices must", lambda: self.call(z, None)),
            (TypeError, "slices must", lambda: self.call(z, slices.double())),
            (ValueError, "slices must", lambda: self.call(z, slices[:2])),
            (ValueError, "slices must", lambda: self.call(z, slices[:, :0])),
            (ValueError, "slices must", lambda: self.call(z, slices.expand(3, 3, 3))),
            (ValueError, "slices must", lambda: self.call(z, slices.to("meta"))),
            (ValueError, "slices must", lambda: self.call(z, torch.eye(3).requires_grad_())),
        ]


class TestEppsPulley(_SketchContract):
    def call(self, z, slices, **options):
        return sliced_epps_pulley(z, slices, **options)

    def samples(self, dtype):
        more = self.sample("few knots", _batch(1, 5, 2, dtype), num_knots=4, t_max=1.5)
        return [*super().samples(dtype), more]

    def operator_calls(self):
        z = _batch(2, 5, 3).requires_grad_()
        call = (z, torch.eye(3)[None], 0.5, 4, True)
        loss, unit = (tensor.detach() for tensor in EPPS_PULLEY.kernel(None)(*call))
        return [(EPPS_PULLEY, call), (EPPS_PULLEY_BACKWARD, (loss.requires_grad_(), unit, *call))]

    def bad_inputs(self):
        z, slices = _batch(2, 4, 3), torch.eye(3)
        return [
            *super().bad_inputs(),
            (ValueError, "num_knots must", lambda: self.call(z, slices, num_knots=1)),
            (TypeError, "num_knots must", lambda: self.call(z, slices, num_knots=2.0)),
            (ValueError, "t_max must", lambda: self.call(z, slices, t_max=0.0)),
            (ValueError, "t_max must", lambda: self.call(z, slices, t_max=float("nan"))),
            (TypeError, "t_max must", lambda: self.call(z, slices, t_max="3")),
        ]


class TestCharacteristic(_SketchContract):
    def call(self, z, slices, **options):
        return sliced_characteristic(z, slices, **{"num_knots": 4, **options})

    def operator_calls(self):
        z = _batch(2, 5, 3).requires_grad_()
        call = (z, torch.eye(3)[None], 0.5, 4)
        sums = torch.randn(2, 2, 4, 3, requires_grad=True)
        return [(CHARACTERISTIC, call), (CHARACTERISTIC_BACKWARD, (sums, *call))]


class TestQuantile(_SketchContract):
    def call(self, z, slices, **options):
        rows = z.shape[1]
        return sliced_quantile(z, slices, torch.linspace(-2, 2, rows, dtype=slices.dtype))

    def operator_calls(self):
        z = _batch(2, 5, 3).requires_grad_()
        call = (z, torch.eye(3)[None], torch.linspace(-1, 1, 5), True)
        loss, unit = (tensor.detach() for tensor in QUANTILE.kernel(None)(*call))
        return [(QUANTILE, call), (QUANTILE_BACKWARD, (loss.requires_grad_(), unit, *call))]

    def bad_inputs(self):
        z, slices = _batch(2, 4, 3), torch.eye(3)
        quantiles = torch.linspace(-1, 1, 4)
        call = lambda q: lambda: sliced_quantile(z, slices, q)
        return [
            (ValueError, "z must", lambda: sliced_quantile(z[0], slices, quantiles)),
            (TypeError, "quantiles must", call([1.0])),
            (TypeError, "quantiles must", call(quantiles.double())),
            (ValueError, "quantiles must", call(quantiles[:3])),
            (ValueError, "quantiles must", call(quantiles.to("meta"))),
            (ValueError, "quantiles must", call(torch.zeros(4, requires_grad=True))),
        ]


@pytest.mark.parametrize(
    ("views", "rows", "features", "num_slices"),
    [(1, 300, 33, 70), (3, 65, 16, 129), (1, 2, 64, 300), (2, 700, 5, 40)],
)
@pytest.mark.parametrize("statistic", ["epps_pulley", "characteristic", "quantile"])
def test_kernels_agree_at_sizes_of_several_blocks(statistic, views, rows, features, num_slices):
    z = _batch(views, rows, features)
    slices = _slices(z, num_slices, seed=3)
    call = {
        "epps_pulley": lambda z: sliced_epps_pulley(z, slices),
        "characteristic": lambda z: sliced_characteristic(z, slices),
        "quantile": lambda z: sliced_quantile(z, slices, torch.linspace(-3, 3, rows)),
    }[statistic]
    with regularizers.use_backend("cpp"):
        found = forward_and_gradients(call, (z.detach().requires_grad_(),))
    with regularizers.use_backend("reference"):
        expected = forward_and_gradients(call, (z.detach().requires_grad_(),))
    # Sums of up to 700 numbers below 1, each with a rounding error near 1e-7 of its phase.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_statistic_follows_from_the_sums():
    z = _batch(2, 40, 6, torch.float64)
    slices = _slices(z, 9, seed=2)
    t = torch.linspace(0, 3, 17, dtype=torch.float64)
    phi = torch.exp(-(t**2) / 2)
    phase = t * (z @ slices)[..., None]
    distance = (phase.cos().mean(1) - phi) ** 2 + phase.sin().mean(1) ** 2
    expected = 40 * 2 * torch.trapezoid(distance * phi, t)
    torch.testing.assert_close(sliced_epps_pulley(z, slices), expected.mean())


def test_gradient_is_the_formula_of_the_sheet():
    z = _batch(1, 12, 4, torch.float64).requires_grad_()
    slices = _slices(z, 5, seed=2)
    t = torch.linspace(0, 3, 17, dtype=torch.float64)[1:, None, None]
    phi = torch.exp(-(t**2) / 2)
    weight = phi * 2 * 3 / 16
    weight[-1] /= 2
    p = (z.detach()[0] @ slices)[None]
    c, s = (t * p).cos().mean(1, keepdim=True), (t * p).sin().mean(1, keepdim=True)
    g = (2 * weight * t * (s * (t * p).cos() - (c - phi) * (t * p).sin())).sum(0)
    (found,) = torch.autograd.grad(sliced_epps_pulley(z, slices), z)
    torch.testing.assert_close(found[0], g @ slices.T / 5)


@pytest.mark.parametrize("rows", [3, 47, 48, 49, 1000])
def test_sort_puts_every_quantile_to_its_row(rows):
    # Both sorts of the kernel: insertion up to 48 rows, by bytes beyond.
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    z = (order - rows / 2).float()[None, :, None].requires_grad_()
    loss = sliced_quantile(z, torch.ones(1, 1), torch.arange(rows) - rows / 2 + 0.25)
    assert loss.item() == 0.0625
    loss.backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, -0.5 / rows))


def test_equal_projections_take_quantiles_in_the_order_of_rows():
    z = torch.zeros(1, 100, 1, requires_grad=True)
    quantiles = torch.linspace(-1, 1, 100)
    sliced_quantile(z, torch.ones(1, 1), quantiles).backward()
    torch.testing.assert_close(z.grad[0, :, 0], -2 * quantiles / 100)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [4, 100])
def test_what_is_not_finite_propagates(value, rows):
    z = _batch(1, rows, 2)
    z[0, 1, 0] = value
    slices = torch.eye(2)
    assert sliced_epps_pulley(z, slices).isnan()
    assert not sliced_quantile(z, slices, torch.linspace(-1, 1, rows)).isfinite()


def test_large_projections_keep_their_phase():
    # Up to |t p| = 3000: the phase is known to 3000 * 6e-8 = 2e-4 in float32.
    z = torch.linspace(-1000, 1000, 501)[None, :, None]
    found = sliced_characteristic(z, torch.ones(1, 1), num_knots=2, t_max=3.0)
    exact = sliced_characteristic(z.double(), torch.ones(1, 1).double(), num_knots=2, t_max=3.0)
    torch.testing.assert_close(found.double() / 501, exact / 501, rtol=0, atol=2e-4)


def test_huge_projections_give_bounded_sums():
    z = torch.tensor([1e7, -1e20, 1e38])[None, :, None]
    assert sliced_characteristic(z, torch.ones(1, 1)).abs().max() < 3.001


def test_sums_of_many_rows_stay_exact():
    # 2^17 equal rows; added up one by one in float32 they would be off by 1e-3.
    z = torch.full((1, 2**17, 1), 0.7)
    found = sliced_characteristic(z, torch.ones(1, 1), num_knots=2, t_max=1.0) / 2**17
    expected = torch.tensor([math.cos(0.7), math.sin(0.7)])
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-5, atol=0)


def test_peak_memory_is_below_a_tenth_of_eager():
    # Issue 3: no array of batch x slices x knots. The profiler sees PyTorch's allocations.
    z = torch.randn(1, 512, 128, requires_grad=True)
    slices = _slices(z, 1024, seed=1)

    def peak(step):
        with torch.profiler.profile(profile_memory=True) as profile:
            step()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        total = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            total += event.nbytes()
            most = max(most, total)
        return most

    fused = peak(lambda: sliced_epps_pulley(z, slices).backward())
    with regularizers.use_backend("reference"):
        eager = peak(lambda: sliced_epps_pulley(z, slices).backward())
    assert fused < eager / 10
    assert fused < 512 * 1024 * 4 * 2  # two arrays of batch x slices
