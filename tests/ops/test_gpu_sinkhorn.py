"""The Sinkhorn operators on a CUDA device: the values of the CPU, CUDA graphs, waiting, memory."""

import pytest
import torch

from regularizers.ops import sinkhorn, sinkhorn_points, transport_apply, transport_plan
from tests.harness import forward_and_gradients

pytestmark = pytest.mark.gpu

COSTS = ("sqeuclidean", "euclidean", "cosine")
# Potentials are divided by epsilon: the digits of float32 less a few. Half types are rounded at the
# input alone, which is the same on both devices.
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
}


def _rand(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


def _assert_as_on_the_cpu(call, *tensors):
    found = []
    for device in ("cuda", "cpu"):
        leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
        result, gradients = forward_and_gradients(call, leaves)
        found.append([result.cpu(), *(gradient.cpu().to(result.dtype) for gradient in gradients)])
    for have, want in zip(*found, strict=True):
        torch.testing.assert_close(have, want, **TOLERANCE[have.dtype])


# Rows in registers, with an odd length; on sixteen warps; gone through twice.
@pytest.mark.parametrize(
    "shape", [(1, 1), (130, 67), (3, 40, 1000), (50, 9000), (20, 20000)], ids=str
)
def test_costs_are_solved_as_on_the_cpu(shape):
    def call(cost):
        found = sinkhorn(cost, epsilon=0.1, tol=1e-4)
        return torch.cat([found.value.flatten(), found.f.flatten(), found.g.flatten()])

    _assert_as_on_the_cpu(call, _rand(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_type_is_solved_as_on_the_cpu(dtype):
    call = lambda cost: sinkhorn(cost, epsilon=0.1, tol=1e-4).value
    cost = _rand(30, 50, dtype=dtype)
    result = call(cost.cuda())
    torch.testing.assert_close(result.cpu(), call(cost), **TOLERANCE[result.dtype])


@pytest.mark.parametrize(
    "options",
    [
        {"eps_init": 10.0, "eps_decay": 0.7},
        {"tau_a": 0.8, "tau_b": 0.9},
        {"momentum": 1.3, "norm_error": "linf"},
        {"symmetric": True},
    ],
    ids=str,
)
def test_options_are_as_on_the_cpu(options):
    cost = _rand(4, 60, 60, dtype=torch.float64)
    cost = cost + cost.mT
    have = sinkhorn(cost.cuda(), epsilon=0.1, tol=1e-5, **options)
    want = sinkhorn(cost, epsilon=0.1, tol=1e-5, **options)
    assert have.n_iter.tolist() == want.n_iter.tolist()
    for left, right in zip(have[:3], want[:3], strict=True):
        torch.testing.assert_close(left.cpu(), right, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("features", [3, 40])
@pytest.mark.parametrize("cost", COSTS)
def test_points_are_solved_as_on_the_cpu(cost, features, dtype):
    def call(x, y):
        found = sinkhorn_points(x, y, cost=cost, epsilon=0.5, tol=1e-4)
        return torch.cat([found.value, found.f.flatten(), found.g.flatten()])

    shapes = (2, 200, features), (2, 333, features)
    _assert_as_on_the_cpu(call, *(_rand(*s, dtype=dtype, seed=k) for k, s in enumerate(shapes)))


@pytest.mark.parametrize("width", [1, 7, 200])
def test_plans_and_products_are_as_on_the_cpu(width):
    x, y, v = _rand(100, 20), _rand(150, 20, seed=1), _rand(150, width, seed=2)
    f, g = _rand(100, seed=3), _rand(150, seed=4)
    call = lambda *sides: transport_apply(*sides, epsilon=0.9)
    _assert_as_on_the_cpu(call, x, y, f, g, v)
    _assert_as_on_the_cpu(
        lambda c, f, g: transport_plan(c, f, g, epsilon=0.9), _rand(100, 150), f, g
    )


@pytest.mark.parametrize("features", [None, 40])
def test_results_repeat_bit_by_bit(features):
    call = (
        (lambda: sinkhorn(_rand(500, 3000).cuda(), epsilon=0.05))
        if features is None
        else (lambda: sinkhorn_points(_rand(500, 40).cuda(), _rand(600, 40).cuda(), epsilon=0.5))
    )
    for first, second in zip(call(), call(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_a_cuda_graph_solves_new_costs(tol):
    cost = _rand(2, 64, 80).cuda()
    options = {"epsilon": 0.1, "tol": tol, "max_iter": 40}
    sinkhorn(cost, **options)  # compiles whatever compiles at first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sinkhorn(cost, **options)
    cost.copy_(_rand(2, 64, 80, seed=1))
    graph.replay()
    fresh = sinkhorn(cost, **options)
    for have, want in zip(captured, fresh, strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize(("tol", "max_iter"), [(0.0, 50), (1e-3, 32)])
def test_nothing_waits_for_the_device(tol, max_iter):
    cost, x = _rand(64, 80).cuda().requires_grad_(), _rand(64, 20).cuda().requires_grad_()
    options = {"epsilon": 0.3, "tol": tol, "max_iter": max_iter}

    def step():
        sinkhorn(cost, **options).value.backward()
        sinkhorn_points(x, x.detach() + 1, **options).value.backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cost.grad.isfinite().all()


@pytest.mark.slow
def test_memory_of_points_grows_with_their_number_alone():
    def peak(count):
        x = torch.randn(count, 64, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sinkhorn_points(x, x.detach() + 1, epsilon=50.0, max_iter=4).value.backward()
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    assert peak(65536) < 2.5 * peak(32768)
    assert peak(65536) < 65536**2 / 4  # bytes: a sixteenth of the matrix of costs
