"""Two processes with sharded or replicated parameters step as one process does."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from regularizers.optim import (
    AdamHD,
    AdamR,
    BackSlash,
    HuberDecay,
    Muon,
    nlm_alignment,
    orthogonalize_grad_,
    rate_penalty,
)
from tests.harness import found_by_processes

WORLD = 2
STEPS = 4
# Even, uneven, with an empty shard, one number.
SHAPES = ((4, 3), (5, 2), (1, 6), ())


def _full():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def _gradients(t):
    generator = torch.Generator().manual_seed(10 + t)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def _make(params, **options):
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    return AdamHD(groups, lr=0.1, weight_decay=0.5, delta_beta=0.8, **options)


def _train(place, **options):
    """Parameters and thresholds, gathered, after some steps; and the collectives of a step."""
    params = [nn.Parameter(place(x)) for x in _full()]
    optimizer = _make(params, **options)
    calls = []
    for t in range(STEPS):
        for p, grad in zip(params, _gradients(t), strict=True):
            p.grad = place(grad)
        calls.clear()
        original = dist.all_reduce

        def counted(*args, original=original, **kwargs):
            calls.append(args[0].numel())
            return original(*args, **kwargs)

        dist.all_reduce = counted
        try:
            optimizer.step()
        finally:
            dist.all_reduce = original
    gathered = [p.full_tensor() if isinstance(p, DTensor) else p for p in params]
    deltas = torch.stack([optimizer.state[p]["delta"] for p in params])
    return [p.detach() for p in gathered], deltas, list(calls), optimizer


def _wrapped(place):
    """Parameters after decay alone, with thresholds from whole tensors."""
    params = [nn.Parameter(place(x)) for x in _full()]
    optimizer = HuberDecay(torch.optim.SGD(params, lr=0.1), weight_decay=2.0)
    for p in params:
        p.grad = place(torch.zeros(p.shape, dtype=torch.float64))
    optimizer.step()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in params]


# A matrix in even, in uneven and in empty shards; experts by themselves, a fused projection.
MATRICES = ((4, 3), (5, 2), (1, 6), (3, 4, 2), (6, 2))


def _train_muon(place):
    """Parameters after some steps of Muon, and gradients projected by OrthoGrad."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    params = [nn.Parameter(place(draw(shape))) for shape in MATRICES]
    groups = [
        {"params": params[:3]},
        {"params": params[3:4], "expert_dim": 0},
        {"params": params[4:], "chunks": 3},
    ]
    optimizer = Muon(groups, lr=0.1, weight_decay=0.5, ns_dtype=None)
    for _ in range(STEPS):
        for p, shape in zip(params, MATRICES, strict=True):
            p.grad = place(draw(shape))
        optimizer.step()
    found = [p.detach() for p in params]
    alignment = nlm_alignment(params)
    for per in ("row", "tensor", "global"):
        orthogonalize_grad_(params, per=per)
        found += [p.grad.clone() for p in params]
    found = [x.full_tensor() if isinstance(x, DTensor) else x for x in found]
    return [*found, alignment]


def _towards_zero(place):
    """Parameters after steps of AdamR, whose scale is that of all gradients of all processes."""
    params = [nn.Parameter(place(x)) for x in _full()]
    reference = [place(torch.zeros_like(x)) for x in _full()]
    optimizer = AdamR(params, reference, lr=0.1, weight_decay=0.5)
    for t in range(STEPS):
        for p, grad in zip(params, _gradients(t), strict=True):
            p.grad = place(grad)
        optimizer.step()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in params]


LAWS = [(shape, form) for shape in ("estimate", 0.7) for form in ("power", "nll")]


def _coded(place):
    """Parameters after a step of BackSlash of every kind, and what they cost before it."""
    found = []
    for shape, form in LAWS:
        params = [nn.Parameter(place(x)) for x in _full()]
        cost = rate_penalty(params, shape=shape, form=form)
        BackSlash(params, strength=3.0, shape=shape, form=form).step(0.1)
        found += [p.detach() for p in params] + [cost.detach()]
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in found]


def _refuses_nan_of_another_process(place):
    """Whether BackSlash raises, and writes nothing, where only the last shard holds a NaN."""
    whole = torch.ones(4, 3)
    whole[3, 2] = torch.nan
    param = nn.Parameter(place(whole))
    try:
        BackSlash(param, strength=1.0).step(0.1)
    except ValueError:
        return torch.equal(param.full_tensor().nan_to_num(1.0), torch.ones(4, 3))
    return False


GRID = ((4, 3), (5, 2), (2, 6))


def _train_on_a_grid(place):
    """Parameters and thresholds after steps of AdamHD and of AdamR."""
    found = []
    for make in (
        lambda params: AdamHD(params, lr=0.1, weight_decay=0.5, delta_beta=0.8),
        lambda params: AdamR(params, lr=0.1, weight_decay=0.5),
    ):
        generator = torch.Generator().manual_seed(6)
        draw = lambda s, g=generator: torch.randn(s, generator=g, dtype=torch.float64)
        params = [nn.Parameter(place(draw(shape))) for shape in GRID]
        optimizer = make(params)
        for _ in range(STEPS):
            for p, shape in zip(params, GRID, strict=True):
                p.grad = place(draw(shape))
            optimizer.step()
        found += [p.detach() for p in params]
        if isinstance(optimizer, AdamHD):
            found += [optimizer.state[p]["delta"] for p in params]
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in found]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 1)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def _model():
    torch.manual_seed(3)
    return Model().double()


def _rows():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(STEPS, 6, 3, generator=generator, dtype=torch.float64)


def _train_model(model, rows):
    optimizer = AdamHD(model.parameters(), lr=0.1, weight_decay=0.5, delta_beta=0.8)
    for x in rows:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


def _weights(model):
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in model.parameters()]


def _process(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    shard = lambda x: distribute_tensor(x, mesh, [Shard(0) if x.dim() else Replicate()])

    found = {}
    for name, place, options in (
        ("fused", shard, {}),
        ("hooks", shard, {"fused": False}),
        ("partly plain", lambda x: shard(x) if x.dim() else x, {}),
        ("plain first", lambda x: x.clone() if len(x.shape) and len(x) == 4 else shard(x), {}),
    ):
        found[name] = _train(place, **options)[:3]
    found["wrapper"] = _wrapped(shard)
    found["muon"] = _train_muon(shard)
    found["AdamR"] = _towards_zero(shard)
    found["BackSlash"] = _coded(shard)
    found["NaN"] = _refuses_nan_of_another_process(shard)
    # Meshes of two dimensions: sharded along one and replicated along the other, or sharded twice.
    for sides in ((1, WORLD), (WORLD, 1)):
        grid = init_device_mesh("cpu", sides)
        for name, placements in (
            ("replicated, then sharded", [Replicate(), Shard(0)]),
            ("sharded, then replicated", [Shard(0), Replicate()]),
            ("sharded twice", [Shard(0), Shard(1)]),
            ("replicated", [Replicate(), Replicate()]),
        ):
            place = lambda x, g=grid, p=placements: distribute_tensor(x, g, p)
            found[name, sides] = _train_on_a_grid(place)
    own = slice(3 * rank, 3 * (rank + 1))
    wrapped = DistributedDataParallel(_model())
    _train_model(wrapped, _rows()[:, own])
    found["DDP"] = _weights(wrapped)
    sharded = _model()
    fully_shard(sharded.first, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizer = _train_model(sharded, _rows()[:, own])
    found["FSDP2"] = _weights(sharded)
    moments = [optimizer.state[p]["exp_avg"] for p in sharded.parameters()]
    found["state is sharded"] = all(isinstance(m, DTensor) for m in moments)
    # A checkpoint in memory, loaded by another optimizer over the same shards.
    again = AdamHD(sharded.parameters(), lr=0.1, weight_decay=0.5, delta_beta=0.8)
    again.load_state_dict(optimizer.state_dict())
    found["loaded"] = all(
        torch.equal(again.state[p]["exp_avg"].to_local(), m.to_local())
        for p, m in zip(sharded.parameters(), moments, strict=True)
    )
    return found


@pytest.fixture(scope="module")
def processes():
    """What every process found; one spawn for the family."""
    return found_by_processes(_process, WORLD)


@pytest.mark.parametrize("name", ["fused", "hooks", "partly plain", "plain first"])
def test_shards_step_as_the_whole_with_global_thresholds(processes, name):
    params, deltas, _, _ = _train(lambda x: x.clone())
    for found in processes:
        # Sums of absolute values are added up in another order.
        torch.testing.assert_close(found[name][0], params, rtol=0, atol=1e-13)
        torch.testing.assert_close(found[name][1], deltas, rtol=0, atol=1e-13)


def test_a_step_makes_one_all_reduce_of_one_vector(processes):
    for found in processes:
        assert found["fused"][2] == [len(SHAPES)]


def test_wrapper_takes_its_thresholds_from_whole_tensors(processes):
    for found in processes:
        torch.testing.assert_close(found["wrapper"], _wrapped(lambda x: x.clone()))


def test_sharded_matrices_are_orthogonalised_and_projected_as_whole_ones(processes):
    want = _train_muon(lambda x: x.clone())
    for found in processes:
        torch.testing.assert_close(found["muon"], want, rtol=0, atol=1e-12)


def test_scale_of_adamr_is_that_of_all_shards(processes):
    for found in processes:
        torch.testing.assert_close(found["AdamR"], _towards_zero(lambda x: x.clone()))


def test_backslash_takes_the_law_of_whole_tensors(processes):
    want = _coded(lambda x: x.clone())
    for found in processes:
        # float64 but for the fitted shape, whose table is interpolated.
        torch.testing.assert_close(found["BackSlash"], want, rtol=0, atol=1e-12)


def test_every_process_refuses_the_nan_of_one(processes):
    assert all(found["NaN"] for found in processes)


@pytest.mark.parametrize("sides", [(1, WORLD), (WORLD, 1)], ids=str)
@pytest.mark.parametrize(
    "name",
    ["replicated, then sharded", "sharded, then replicated", "sharded twice", "replicated"],
)
def test_meshes_of_two_dimensions_step_as_one_process(processes, name, sides):
    want = _train_on_a_grid(lambda x: x.clone())
    for found in processes:
        torch.testing.assert_close(found[name, sides], want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_a_wrapped_model_trains_as_one_process_on_the_whole_batch(processes, name):
    model = _model()
    _train_model(model, _rows())
    for found in processes:
        torch.testing.assert_close(found[name], _weights(model), rtol=0, atol=1e-12)


def test_states_of_shards_are_shards_and_load(processes):
    for found in processes:
        assert found["state is sharded"]
        assert found["loaded"]
