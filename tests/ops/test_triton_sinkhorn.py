"""Triton kernels of the Sinkhorn operators against the references; see test_triton.py.

The interpreter takes milliseconds an operation, hence few programs, small problems, loose tol.
"""

import pytest
import torch

import regularizers
from regularizers.backend import interpreting
from regularizers.ops import sinkhorn, sinkhorn_points, transport_apply, transport_plan
from regularizers.ops.sinkhorn import SINKHORN, TRANSPORT_PLAN
from regularizers.ops.sinkhorn_points import SINKHORN_POINTS
from regularizers.ops.transport_apply import APPLY
from tests.harness import DTYPES, TOLERANCES, forward_and_gradients
from tests.triton_harness import DEVICE

# Without Triton the line above skips this file.
# isort: split
from regularizers.ops.triton import sinkhorn as dense_kernels
from regularizers.ops.triton import sinkhorn_control as control
from regularizers.ops.triton import sinkhorn_iteration as iteration
from regularizers.ops.triton import sinkhorn_points as points_kernels

pytestmark = pytest.mark.interpreter
COSTS = ("sqeuclidean", "euclidean", "cosine")
# Half of the digits: errors of rounding pass through a division by epsilon and many iterations.
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 2e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    if interpreting():
        monkeypatch.setattr(iteration, "FILLING_PROGRAMS", 2)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs, stripes and blocks of columns, each gone through twice."""
    monkeypatch.setattr(iteration, "FILLING_PROGRAMS", 4)
    monkeypatch.setattr(iteration, "MERGED_COLUMNS", 16)
    monkeypatch.setattr(dense_kernels, "LONGEST_ROW", 8)
    monkeypatch.setattr(dense_kernels, "WARP_ELEMENTS", 8)
    monkeypatch.setattr(points_kernels, "TILE_COLUMNS", 16)
    monkeypatch.setattr(points_kernels, "TILE_ROWS", 16)


def _rand(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def _points(n, m, d, dtype=torch.float32):
    x = _rand(1, n, d, dtype=dtype, seed=1)
    return x, _rand(1, m, d, dtype=dtype, seed=2) + 0.3


def _both(call):
    found = []
    for backend in ("triton", "reference"):
        with regularizers.use_backend(backend):
            found.append(call())
    return found


def assert_solved_alike(call):
    have, want = _both(call)
    assert have.n_iter.tolist() == want.n_iter.tolist()
    assert have.converged.tolist() == want.converged.tolist()
    for name in ("f", "g", "value", "marginal_error"):
        left, right = getattr(have, name), getattr(want, name)
        torch.testing.assert_close(
            left, right, msg=lambda text, name=name: f"{name}: {text}", **CLOSE[left.dtype]
        )
    return have


def assert_gradients_agree(call, *tensors):
    def run():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return forward_and_gradients(call, leaves)

    (have, have_gradients), (want, want_gradients) = _both(run)
    torch.testing.assert_close(have, want, **CLOSE[have.dtype])
    for left, right in zip(have_gradients, want_gradients, strict=True):
        torch.testing.assert_close(left, right, **CLOSE[left.dtype])


# sinkhorn.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_error": "linf", "tol": 1e-4},
        {"eps_init": 8.0, "eps_decay": 0.6},
        {"momentum": 1.3},
        {"tau_a": 0.8, "tau_b": 0.9},
        {"tau_b": 0.7, "momentum": 1.2},
        {"min_iter": 7, "inner_iter": 3},
        {"tol": 0.0, "max_iter": 4},
        {"max_iter": 2},
        {"eps_init": 50.0, "eps_decay": 0.9, "max_iter": 3},
    ],
    ids=str,
)
def test_iterations_are_those_of_the_reference(options):
    cost = _rand(13, 21, dtype=torch.float64)
    assert_solved_alike(lambda: sinkhorn(cost, **{"epsilon": 0.05, **options}))


def test_over_relaxation_adapts_as_in_the_reference():
    # Equal counts and errors in float64 say that every omega was equal.
    cost = _rand(9, 8, dtype=torch.float64)
    found = assert_solved_alike(lambda: sinkhorn(cost, epsilon=0.02, tol=1e-6))
    assert found.n_iter > 20


def test_a_rounding_floor_ends_the_iteration():
    # tol is out of reach, and the error stops falling after about 10 iterations.
    with regularizers.use_backend("triton"):
        found = sinkhorn(_rand(3, 4, dtype=torch.float64), epsilon=0.5, tol=1e-30, max_iter=80)
    assert found.n_iter < 80
    assert found.marginal_error < 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_solved(dtype):
    assert_solved_alike(lambda: sinkhorn(_rand(6, 9, dtype=dtype), epsilon=0.1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (17, 1), (3, 2, 5, 4)], ids=str)
def test_odd_sizes_are_solved(shape):
    assert_solved_alike(lambda: sinkhorn(_rand(*shape), epsilon=0.1, tol=1e-2))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_problems_are_solved(shape):
    assert_solved_alike(lambda: sinkhorn(_rand(*shape), epsilon=0.1))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("symmetric", [False, True])
def test_long_rows_are_gone_through_twice(symmetric):
    cost = _rand(21, 21)
    cost = cost + cost.T
    options = {"epsilon": 0.3, "symmetric": symmetric, "tol": 1e-2}
    assert_solved_alike(lambda: sinkhorn(cost, **options))


@pytest.mark.usefixtures("small_tiles")
def test_a_long_row_is_solved_with_taus():
    assert_solved_alike(
        lambda: sinkhorn(_rand(19, 23), epsilon=0.2, tau_a=0.8, tau_b=0.9, tol=1e-2)
    )


def test_items_of_a_batch_end_by_themselves():
    cost = _rand(3, 6, 7)
    epsilon = torch.tensor([1.0, 0.1, 0.05], device=DEVICE)
    found = assert_solved_alike(lambda: sinkhorn(cost, epsilon=epsilon))
    assert len(set(found.n_iter.tolist())) > 1


@pytest.mark.parametrize("tiles", ["whole", "small"])
def test_ragged_batches_leave_zeros_beyond(tiles, request):
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    cost = _rand(3, 9, 18)
    sizes = [torch.tensor(s, device=DEVICE) for s in ([9, 4, 0], [11, 18, 0])]
    cost[1, 4:] = torch.nan
    cost[0, :, 11:] = torch.nan
    starts = {"f0": torch.ones(3, 9, device=DEVICE), "g0": torch.ones(3, 18, device=DEVICE)}
    found = assert_solved_alike(
        lambda: sinkhorn(
            cost, epsilon=0.2, tol=1e-2, row_sizes=sizes[0], column_sizes=sizes[1], **starts
        )
    )
    assert not found.f[1, 4:].any()
    assert not found.g[0, 11:].any()


def test_starting_potentials_are_used():
    cost = _rand(6, 8, dtype=torch.float64)
    f0, g0 = _rand(6, dtype=torch.float64, seed=3), _rand(8, dtype=torch.float64, seed=4)
    for start in ({"f0": f0}, {"g0": g0}, {"f0": f0, "g0": g0}):
        assert_solved_alike(lambda start=start: sinkhorn(cost, epsilon=0.1, tol=1e-2, **start))


@pytest.mark.parametrize("symmetric", [False, True])
def test_points_without_mass_take_no_part_and_get_a_potential(symmetric):
    cost = _rand(8, 8)
    cost = cost + cost.T
    a = _rand(8, seed=5)
    a[2] = a[6] = 0
    cost[2, :] = cost[:, 2] = torch.nan
    a /= a.sum()
    assert_solved_alike(lambda: sinkhorn(cost, a, a, epsilon=0.2, tol=1e-2, symmetric=symmetric))


def test_an_infinite_cost_forbids():
    cost = _rand(5, 6)
    cost[1, 2] = cost[3, 0] = torch.inf
    found = assert_solved_alike(lambda: sinkhorn(cost, epsilon=0.1))
    with regularizers.use_backend("triton"):
        assert transport_plan(cost, found.f, found.g, epsilon=0.1)[1, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_columns_that_underflow_are_computed_again(dtype):
    # From f = 0 no row's nearest column is the far one: its sum is exp(-500) and less at once.
    cost = _rand(6, 7, dtype=dtype)
    cost[:, 3] += 4 if dtype == torch.float32 else 20
    g0 = torch.zeros(7, dtype=dtype, device=DEVICE)
    options = {"epsilon": 0.01, "tol": 0.0, "max_iter": 3, "g0": g0}
    found = assert_solved_alike(lambda: sinkhorn(cost, **options))
    assert found.g[3] > 1


def test_nan_under_mass_ends_its_item_alone():
    cost = _rand(2, 4, 5)
    cost[0, 1, 1] = torch.nan
    with regularizers.use_backend("triton"):
        found = sinkhorn(cost, epsilon=0.2)
        alone = sinkhorn(cost[1], epsilon=0.2)
    assert found.n_iter[0] == 1
    assert found.marginal_error[0].isnan()
    assert found.converged.tolist() == [False, True]
    torch.testing.assert_close(found.f[1], alone.f)


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_a_row_without_an_open_entry_does_not_converge(norm):
    cost = _rand(4, 5)
    cost[2] = torch.inf
    with regularizers.use_backend("triton"):
        found = sinkhorn(cost, epsilon=0.2, norm_error=norm)
    assert not found.converged
    assert found.n_iter == 1


def test_value_and_potentials_have_the_gradients_of_the_reference():
    a, b = (weight / weight.sum() for weight in (_rand(5, seed=6), _rand(7, seed=7)))
    cost = _rand(5, 7)

    def call(cost, a, b):
        found = sinkhorn(cost, a / a.sum(), b / b.sum(), epsilon=0.2, tol=1e-5)
        return torch.cat([found.f, found.g.square(), found.value[None]])

    assert_gradients_agree(call, cost, a, b)


def test_gradients_run_on_triton_also_inside_the_block():
    cost = _rand(4, 5).requires_grad_()
    with regularizers.use_backend("triton"):
        found = sinkhorn(cost, epsilon=0.3, tol=1e-2)
        (found.f.square().sum() + found.value).backward()
    assert cost.grad.isfinite().all()


def test_the_plan_agrees_and_has_the_gradients_of_the_reference():
    cost, f, g = _rand(2, 5, 7), _rand(2, 5, seed=3) - 0.5, _rand(2, 7, seed=4) - 0.5
    assert_gradients_agree(lambda *sides: transport_plan(*sides, epsilon=0.7), cost, f, g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_plan_keeps_the_type_of_the_cost(dtype):
    cost, f, g = _rand(9, 300, dtype=dtype), _rand(9, seed=3), _rand(300, seed=4)
    a = torch.full((9,), 1 / 8, device=DEVICE)
    a[4] = 0
    cost[4] = torch.nan
    have, want = _both(lambda: transport_plan(cost, f, g, a, epsilon=0.7))
    assert have.dtype == dtype
    torch.testing.assert_close(have, want, **TOLERANCES[dtype])


# When the host asks.


def _questions(monkeypatch):
    asked = []
    question = control.Question

    def ask(state):
        asked.append(state)
        return question(state)

    monkeypatch.setattr(control, "Question", ask)
    return asked


def _steps(monkeypatch):
    taken = []
    step = control.step

    def count(*arguments):
        taken.append(arguments[4])
        step(*arguments)

    monkeypatch.setattr(control, "step", count)
    return taken


def test_the_host_stops_launching_soon_after_all_items_have_ended(monkeypatch):
    monkeypatch.setattr(iteration, "ASK_EVERY", 2)
    taken = _steps(monkeypatch)
    with regularizers.use_backend("triton"):
        found = sinkhorn(_rand(4, 5), epsilon=0.5, max_iter=500)
    assert found.converged
    assert found.n_iter <= len(taken) <= found.n_iter + 4


def test_the_host_asks_nothing_where_tol_is_0(monkeypatch):
    monkeypatch.setattr(iteration, "ASK_EVERY", 2)
    asked, taken = _questions(monkeypatch), _steps(monkeypatch)
    with regularizers.use_backend("triton"):
        sinkhorn(_rand(4, 5), epsilon=0.5, tol=0.0, max_iter=5)
    assert not asked
    assert len(taken) == 5


# sinkhorn_points.


@pytest.mark.parametrize("features", [2, 21])
@pytest.mark.parametrize("cost", COSTS)
def test_points_are_solved_as_by_the_reference(cost, features):
    x, y = _points(11, 18, features)
    options = {"cost": cost, "scale": 0.7, "epsilon": 0.2, "tol": 1e-2}
    assert_solved_alike(lambda: sinkhorn_points(x, y, **options))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("features", "dtype"),
    [(3, torch.float16), (3, torch.float64), (18, torch.float32), (18, torch.bfloat16)],
    ids=str,
)
def test_many_points_are_gone_through_twice(features, dtype):
    x, y = _points(19, 35, features, dtype)
    options = {"epsilon": 0.5, "tol": 1e-2, "tau_a": 0.9}
    assert_solved_alike(lambda: sinkhorn_points(x, y, **options))


@pytest.mark.parametrize("features", [3, 18])
def test_symmetric_points_are_solved(features):
    x, _ = _points(12, 1, features, torch.float64)
    options = {"epsilon": 0.3, "tol": 1e-2, "symmetric": True}
    assert_solved_alike(lambda: sinkhorn_points(x, x, **options))


@pytest.mark.parametrize("features", [3, 18])
@pytest.mark.parametrize("cost", COSTS)
def test_points_without_mass_may_hold_anything(cost, features):
    x, y = _points(7, 9, features)
    a, b = _rand(7, seed=5), _rand(9, seed=6)
    a[1] = a[5] = b[8] = 0
    x[0, 1] = y[0, 8] = torch.nan
    a, b = a / a.sum(), b / b.sum()
    options = {"cost": cost, "epsilon": 0.2, "tol": 1e-2}
    assert_solved_alike(lambda: sinkhorn_points(x, y, a, b, **options))


@pytest.mark.parametrize("cost", COSTS)
def test_gradients_do_not_see_points_without_mass(cost):
    x, y = _points(5, 6, 3)
    a = torch.tensor([0.3, 0.3, 0.4, 0.0, 0.0], device=DEVICE)
    x[0, 3:] = torch.nan
    leaves = [side.requires_grad_() for side in (x, y)]
    with regularizers.use_backend("triton"):
        found = sinkhorn_points(*leaves, a, cost=cost, epsilon=0.2, tol=1e-2)
    by_x, by_y = torch.autograd.grad(found.value.sum(), leaves)
    assert not by_x[0, 3:].any()
    assert by_x.isfinite().all()
    assert by_y.isfinite().all()


def test_points_far_from_the_origin_lose_no_digits():
    x, y = _points(8, 9, 20)
    options = {"epsilon": 0.2, "tol": 0.0, "max_iter": 3}
    with regularizers.use_backend("triton"):
        near = sinkhorn_points(x, y, **options)
        far = sinkhorn_points(x + 64, y + 64, **options)
    # 64 + x rounds x to 2^-18; without centring |x|^2 = 8e4 would be rounded to 8e-3.
    torch.testing.assert_close(far.value, near.value, rtol=1e-4, atol=0)


def test_a_zero_vector_has_cosine_cost_1():
    x, y = _points(5, 6, 3)
    x[0, 2] = 0
    assert_solved_alike(lambda: sinkhorn_points(x, y, cost="cosine", epsilon=0.2, tol=1e-2))


def test_ragged_points_leave_zeros_beyond():
    x, y = (side.expand(3, -1, -1).clone() for side in _points(7, 18, 3))
    sizes = [torch.tensor(s, device=DEVICE) for s in ([7, 4, 0], [11, 18, 0])]
    x[1, 4:] = torch.nan
    y[0, 11:] = torch.nan
    found = assert_solved_alike(
        lambda: sinkhorn_points(
            x, y, epsilon=0.2, tol=1e-2, row_sizes=sizes[0], column_sizes=sizes[1]
        )
    )
    assert not found.f[1, 4:].any()
    assert not found.g[0, 11:].any()


@pytest.mark.parametrize("cost", COSTS)
def test_points_and_masses_have_the_gradients_of_the_reference(cost):
    x, y = _points(5, 6, 3)
    a = _rand(5, seed=5)

    def call(x, y, a):
        found = sinkhorn_points(x, y, a / a.sum(), cost=cost, epsilon=0.2, tol=1e-5)
        return torch.cat([found.f[0], found.g[0].square(), found.value])

    assert_gradients_agree(call, x, y, a)


# transport_apply.


def _apply_arguments(features, width, dtype=torch.float32):
    x, y = _points(9, 20, features, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    f, g = _rand(9, dtype=wide, seed=3) - 0.5, _rand(20, dtype=wide, seed=4) - 0.5
    return x, y, f, g, _rand(1, 20, width, dtype=wide, seed=7)


@pytest.mark.parametrize(("features", "width"), [(2, 1), (2, 5), (21, 1), (21, 40)])
@pytest.mark.parametrize("cost", COSTS)
def test_products_with_the_plan_agree(cost, features, width):
    x, y, f, g, v = _apply_arguments(features, width)
    options = {"cost": cost, "scale": 1.3, "epsilon": 0.7}
    have, want = _both(lambda: transport_apply(x, y, f, g, v, **options))
    torch.testing.assert_close(have, want, **CLOSE[torch.float32])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_by_tiles_agree(dtype, monkeypatch):
    monkeypatch.setattr(points_kernels, "MOST_VALUES", 16)
    x, y, f, g, v = _apply_arguments(9, 18, dtype)
    a = torch.full((9,), 0.1, device=DEVICE)
    a[3] = 0
    sizes = {"column_sizes": torch.tensor([17], device=DEVICE)}
    have, want = _both(lambda: transport_apply(x, y, f, g, v, a, epsilon=0.7, **sizes))
    assert not have[0, 3].any()
    torch.testing.assert_close(have, want, **CLOSE[have.dtype])


@pytest.mark.parametrize("features", [3, 12])
def test_products_over_distances_agree_also_at_distance_0(features):
    x, y, f, g, v = _apply_arguments(features, 3, torch.float64)
    if features == 3:  # products leave a distance of 1e-8 where it is 0
        y[0, 4] = x[0, 2]
    uniform = [torch.full((1, k), 1 / k, dtype=x.dtype, device=DEVICE) for k in (9, 20)]
    epsilon = torch.tensor([0.7], dtype=torch.float64, device=DEVICE)
    call = (x, y, *uniform, epsilon, f[None], g[None], v, None, None, 1, 1.3, True)
    results = [APPLY.kernel(which)(*call) for which in ("triton", "reference")]
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want, **CLOSE[torch.float64])


def test_products_have_the_gradients_of_the_reference():
    x, y, f, g, v = _apply_arguments(3, 2)
    assert_gradients_agree(lambda *sides: transport_apply(*sides, epsilon=0.7), x, y, f, g, v)


@pytest.mark.parametrize("width", [0, 3])
def test_products_without_columns_or_values_are_empty_or_zero(width):
    x, y, f, g, v = _apply_arguments(3, width)
    columns = 20 if width == 0 else 0
    call = lambda: transport_apply(x, y[:, :columns], f, g[:columns], v[:, :columns], epsilon=0.7)
    have, want = _both(call)
    assert torch.equal(have, want)


# All.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_shaped_as_the_fake_rules_say(dtype):
    wide = torch.float32
    a, b = torch.full((2, 4), 0.25, device=DEVICE), torch.full((2, 5), 0.2, device=DEVICE)
    epsilon = torch.tensor([0.5, 0.7], dtype=torch.float64, device=DEVICE)
    x, y, v = _rand(2, 4, 3, dtype=dtype), _rand(2, 5, 3, dtype=dtype), _rand(2, 5, 6, dtype=wide)
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    options = (1e-2, 3, 0, 1, 1.0, 1.0, 0.0, 1.0, 1.0, False, False)
    sizes = (None, torch.tensor([5, 3], device=DEVICE))
    b_inside = torch.where(torch.arange(5, device=DEVICE) < sizes[1][:, None], b, 0)
    b_inside /= b_inside.sum(-1, keepdim=True)
    cost = _rand(2, 4, 5, dtype=dtype)
    masses = (a, b_inside, epsilon)
    calls = [
        (SINKHORN, (cost, *masses, None, None, *sizes, *options)),
        (TRANSPORT_PLAN, (cost, *masses, f, g, torch.ones_like(f[:, 0]), *sizes)),
        (SINKHORN_POINTS, (x, y, *masses, None, None, *sizes, 0, 1.0, *options)),
        (APPLY, (x, y, *masses, f, g, v, *sizes, 1, 1.0, True)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(
            operator.kernel("triton"), arguments, test_utils=("test_schema", "test_faketensor")
        )
