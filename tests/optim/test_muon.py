"""Muon: torch.optim.Muon's steps on matrices; filters, experts, fused projections; AdamW beside."""

import copy
import math

import pytest
import torch
from torch import nn

from regularizers.optim import Muon, muon_param_groups, newton_schulz

SHAPES = ((12, 7), (7, 12), (12, 7), (9, 9), (1, 5))


def matrices(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def set_gradients(params, t=0):
    generator = torch.Generator().manual_seed(100 + t)
    for p in params:
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = grad.to(p.dtype)


def train(make, steps, dtype=torch.float64, begin=0, params=None, optimizer=None):
    params = matrices(dtype) if params is None else params
    optimizer = make(params) if optimizer is None else optimizer
    for t in range(begin, begin + steps):
        set_gradients(params, t)
        optimizer.step()
    return params, optimizer


def step_of(param, group=None, **options):
    """What one step of learning rate 1 without momentum takes from a parameter."""
    before = param.detach().clone()
    options = {"lr": 1.0, "momentum": 0.0, "ns_dtype": None, **options}
    Muon([{"params": [param], **(group or {})}], **options).step()
    return before - param.detach()


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torch_up_to_bfloat16(rule, nesterov):
    options = {"lr": 0.1, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": rule}
    before = [p.detach().clone() for p in matrices()]
    have, _ = train(lambda p: Muon(p, **options), 3)
    want, _ = train(lambda p: torch.optim.Muon(p, **options), 3)
    for p, q, old in zip(have, want, before, strict=True):
        # Rounding of five steps in bfloat16; torch takes the norm in it too.
        assert (p - q).abs().max() <= 0.05 * (q - old).abs().max()


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_follow_the_formula(nesterov):
    lr, decay, mu = 0.1, 0.3, 0.9
    make = lambda p: Muon(
        p, lr=lr, weight_decay=decay, momentum=mu, nesterov=nesterov, ns_dtype=None
    )
    have, _ = train(make, 4)
    want = matrices()
    momenta = [torch.zeros_like(p) for p in want]
    for t in range(4):
        set_gradients(want, t)
        for p, M in zip(want, momenta, strict=True):
            M += (1 - mu) * (p.grad - M)
            U = (1 - mu) * p.grad + mu * M if nesterov else M
            m, n = p.shape
            s = math.sqrt(max(1, m / n))
            p.data = (1 - lr * decay) * p - lr * s * newton_schulz(U, dtype=None)
    torch.testing.assert_close(have, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "scale"),
    [(None, 2.0), ("original", 2.0), ("match_rms_adamw", 0.2 * math.sqrt(12)), ("none", 1.0)],
)
def test_scale_of_a_step(rule, scale):
    (p,) = matrices(shapes=[(12, 3)])
    set_gradients([p])
    want = scale * newton_schulz(p.grad, dtype=None)
    torch.testing.assert_close(step_of(p, adjust_lr_fn=rule), want)


def test_defaults_are_the_papers():
    group = Muon(matrices()).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.02, 0.95, True)
    assert (group["weight_decay"], group["ns_steps"]) == (0.0, 5)
    aux = Muon([{"params": [nn.Parameter(torch.ones(3))], "use_muon": False}]).param_groups[0]
    assert (aux["lr"], aux["betas"], aux["eps"]) == (3e-4, (0.9, 0.95), 1e-10)


@pytest.mark.parametrize("shape", [(16, 16), (24, 6)])
def test_decay_bounds_the_spectral_norm(shape):
    lr, decay = 0.1, 0.5
    (p,) = matrices(shapes=[shape])
    p.data *= 0.01
    scale = math.sqrt(max(1, shape[0] / shape[1]))
    bound = 1.2024 * scale / decay
    optimizer = Muon([p], lr=lr, weight_decay=decay, ns_dtype=None)
    direction = torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0]
    largest = []
    for _ in range(200):
        p.grad = direction.clone()  # always the same way: the worst case
        before = p.detach().clone()
        optimizer.step()
        change = torch.linalg.matrix_norm(p.detach() - (1 - lr * decay) * before, ord=2)
        assert change <= 1.2024 * lr * scale
        largest.append(torch.linalg.matrix_norm(p.detach(), ord=2).item())
    assert max(largest) <= bound
    assert largest[-1] > 0.5 * bound  # the bound is what holds it


def test_zero_gradient_moves_nothing_and_decay_acts():
    (p,) = matrices(shapes=[(4, 3)])
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), before * 0.95)


def test_missing_gradients_are_skipped_and_given_ones_not_written():
    params = matrices()
    set_gradients(params)
    params[1].grad = None
    kept = params[1].detach().clone()
    grads = [None if p.grad is None else p.grad.clone() for p in params]
    Muon(params, weight_decay=0.5).step()
    assert torch.equal(params[1], kept)
    for p, grad in zip(params, grads, strict=True):
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)


def test_maximize_climbs():
    (p,), (q,) = matrices(shapes=[(4, 3)]), matrices(shapes=[(4, 3)])
    set_gradients([p])
    set_gradients([q])
    torch.testing.assert_close(step_of(p, maximize=True), -step_of(q))


def test_a_filter_is_the_matrix_of_its_outputs():
    (p,) = matrices(shapes=[(40, 3, 3, 3)])
    set_gradients([p])
    want = math.sqrt(40 / 27) * newton_schulz(p.grad.flatten(1), dtype=None)
    torch.testing.assert_close(step_of(p), want.view_as(p))


def test_legacy_scale_is_of_the_kernel():
    (p,) = matrices(shapes=[(40, 3, 5, 2)])
    set_gradients([p])
    want = math.sqrt(5 / 2) * newton_schulz(p.grad.flatten(1), dtype=None)
    torch.testing.assert_close(step_of(p, legacy_conv_scale=True), want.view_as(p))


def test_channels_last_filters_step_as_contiguous_ones():
    p = nn.Parameter(matrices(shapes=[(8, 4, 3, 3)])[0].detach())
    q = nn.Parameter(p.detach().clone(memory_format=torch.channels_last))
    set_gradients([p])
    q.grad = p.grad.clone(memory_format=torch.channels_last)
    torch.testing.assert_close(step_of(q), step_of(p))
    assert q.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_experts_step_each_by_itself(dim):
    experts = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = experts.flip(0) * torch.tensor([1.0, 1e-3, 1e3], dtype=torch.float64)[:, None, None]
    p = nn.Parameter(experts.movedim(0, dim).contiguous())
    p.grad = grads.movedim(0, dim).contiguous()
    have = step_of(p, {"expert_dim": dim}).movedim(dim, 0)
    want = math.sqrt(8 / 5) * newton_schulz(grads, dtype=None)
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("chunks", [3, (4, 4, 4), (6, 4, 2)])
def test_parts_of_a_fused_projection_are_orthogonalised_apart(chunks):
    (p,) = matrices(shapes=[(12, 4)])
    set_gradients([p])
    sizes = [4, 4, 4] if chunks == 3 else list(chunks)
    want = torch.cat(
        [
            math.sqrt(max(1, len(part) / 4)) * newton_schulz(part, dtype=None)
            for part in p.grad.split(sizes)
        ]
    )
    torch.testing.assert_close(step_of(p, {"chunks": chunks}), want)


def test_equal_shapes_share_products(monkeypatch):
    from regularizers.optim import muon

    sizes = []
    original = muon.iterate
    monkeypatch.setattr(
        muon, "iterate", lambda X, *a: sizes.append(tuple(X.shape)) or original(X, *a)
    )
    train(Muon, 1)
    assert sizes == [(3, 7, 12), (1, 9, 9), (1, 1, 5)]  # also the transposed one
    sizes.clear()
    monkeypatch.setitem(muon.STACK_ELEMENTS, "cpu", 2 * 84)
    train(Muon, 1)
    assert sizes == [(2, 7, 12), (1, 7, 12), (1, 9, 9), (1, 1, 5)]


@pytest.mark.parametrize("fused", [None, False])
def test_other_parameters_step_as_adamw(fused):
    params = matrices(shapes=[(3,), (4, 2), ()])
    twins = copy.deepcopy(params)
    matrix, twin = matrices(shapes=[(5, 4)])[0], matrices(shapes=[(5, 4)])[0]
    aux = {"lr": 0.01, "weight_decay": 0.1, "fused": fused}
    both = Muon(
        [{"params": [matrix]}, {"params": params, "use_muon": False, "betas": (0.8, 0.9)}], aux=aux
    )
    adamw = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-10)
    alone = Muon([twin])
    for t in range(5):
        set_gradients([*params, matrix], t)
        set_gradients([*twins, twin], t)
        both.step()
        adamw.step()
        alone.step()
    torch.testing.assert_close(params, twins, rtol=0, atol=1e-13)
    assert torch.equal(matrix, twin)
    assert "exp_avg" not in both.state[matrix]
    assert "momentum_buffer" not in both.state[params[0]]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.multi_head = nn.Linear(8, 8, bias=False)
        self.experts = nn.Module()
        self.experts.w1 = nn.Parameter(torch.zeros(4, 8, 16))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(10, 8)
        self.pos_embed = nn.Parameter(torch.zeros(5, 8))
        self.conv = nn.Conv2d(3, 8, 3)
        self.block = Attention()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.kv = nn.Linear(16, 8, bias=False)
        self.lm_head = nn.Linear(8, 10)


def test_groups_of_a_model():
    groups = muon_param_groups(Model(), expert_dim={"experts.w1": 0}, chunks={"kv.weight": [6, 2]})
    have = {
        tuple(g["param_names"]): {k: v for k, v in g.items() if k not in ("params", "param_names")}
        for g in groups
    }
    assert have == {
        ("conv.weight", "block.multi_head.weight"): {"use_muon": True},
        ("block.qkv.weight",): {"use_muon": True, "chunks": 3},
        ("block.experts.w1",): {"use_muon": True, "expert_dim": 0},
        ("kv.weight",): {"use_muon": True, "chunks": [6, 2]},
        (
            "pos_embed",
            "wte.weight",
            "conv.bias",
            "block.qkv.bias",
            "lm_head.weight",
            "lm_head.bias",
        ): {"use_muon": False},
    }
    assert groups[-1]["use_muon"] is False
    optimizer = Muon(groups)
    set_gradients([p for g in groups for p in g["params"]])
    optimizer.step()
    for group in groups:
        for p in group["params"]:
            assert ("momentum_buffer" in optimizer.state[p]) == group["use_muon"]


def test_a_tied_embedding_is_an_embedding():
    model = nn.ModuleDict({"a": nn.Linear(8, 10, bias=False), "z": nn.Embedding(10, 8)})
    model["z"].weight = model["a"].weight
    (group,) = muon_param_groups(model)
    assert group["use_muon"] is False


def test_a_killed_run_goes_on_bit_for_bit():
    whole, _ = train(Muon, 6, torch.float32)
    first, optimizer = train(Muon, 3, torch.float32)
    params = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = Muon(params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(None, 3, begin=3, params=params, optimizer=resumed)
    torch.testing.assert_close(params, whole, rtol=0, atol=0)


@pytest.mark.parametrize("ways", [(torch.optim.Muon, Muon), (Muon, torch.optim.Muon)], ids=str)
def test_checkpoints_go_to_torch_and_back(ways):
    options = {"lr": 0.1, "weight_decay": 0.1}
    first, second = ways
    old, optimizer = train(lambda p: first(p, **options), 3)
    params = [nn.Parameter(p.detach().clone()) for p in old]
    resumed = second(params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    start = [p.detach().clone() for p in params]
    train(None, 1, begin=3, params=params, optimizer=resumed)
    train(None, 1, begin=3, params=old, optimizer=optimizer)
    for p, q, at in zip(params, old, start, strict=True):
        have, want = resumed.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"]
        torch.testing.assert_close(have, want, rtol=0, atol=1e-15)
        # Steps differ by roundings in bfloat16.
        assert (p - q).abs().max() <= 0.08 * (q - at).abs().max()


def test_learning_rate_may_be_a_tensor_and_scheduled():
    ends = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        params = matrices()
        optimizer = Muon(params, lr=lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for t in range(3):
            set_gradients(params, t)
            optimizer.step()
            schedule.step()
        ends.append(params)
    torch.testing.assert_close(*ends)


def test_grad_scaler_unscales_and_skips_overflow():
    plain = matrices(torch.float32)
    scaled = copy.deepcopy(plain)
    plain_optimizer, optimizer = Muon(plain), Muon(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for t in range(2):
        set_gradients(plain, t)
        set_gradients(scaled, t)
        for p in scaled:
            p.grad *= 1024.0
        if t == 1:
            scaled[0].grad[0, 0] = math.inf
        scaler.step(optimizer)
        if t == 0:
            plain_optimizer.step()
        scaler.update()
    torch.testing.assert_close(scaled, plain)


def test_bfloat16_with_master_follows_float32():
    params = matrices(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, reference = Muon(params, lr=1e-3), Muon(wide, lr=1e-3)
    for t in range(10):
        set_gradients(params, t)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for p, w in zip(params, wide, strict=True):
        torch.testing.assert_close(p.float(), w.detach(), rtol=2**-8, atol=0)


def test_stochastic_rounding_takes_steps_that_nearest_loses():
    moved = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        # One singular value, 0.7: a step of 0.7 / 64 lr, far below the spacing 2^-8.
        optimizer = Muon([p], lr=0.02, rounding=rounding)
        for _ in range(20):
            optimizer.step()
        moved[rounding] = 1 - p.detach().float().mean().item()
        assert "master" not in optimizer.state[p]
    assert moved["nearest"] == 0.0
    # 20 steps of 2.2e-4; the mean of 4096 deviates by 7e-5, four of them.
    assert moved["stochastic"] == pytest.approx(20 * 0.02 * 0.6964 / 64, abs=3e-4)


def test_muon_beats_tuned_momentum_on_badly_scaled_least_squares():
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 24, dtype=torch.float64)
    X = torch.randn(128, 24, generator=generator, dtype=torch.float64) * scales
    target = X @ torch.randn(24, 32, generator=generator, dtype=torch.float64)

    def loss_after(make, steps=300):
        W = nn.Parameter(torch.zeros(32, 24, dtype=torch.float64))
        optimizer = make(W)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (X @ W.mT - target).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        return (X @ W.detach().mT - target).square().mean().item()

    muon = loss_after(lambda W: Muon([W], lr=0.2))
    momentum = min(
        loss_after(lambda W, lr=lr: torch.optim.SGD([W], lr=lr, momentum=0.95))
        for lr in (0.1, 0.3, 1.0, 3.0)
    )
    # A factor of 9000 on the sheet's data.
    assert muon < momentum / 100


BAD = [
    (ValueError, "lr", {"lr": -1.0}),
    (ValueError, "weight_decay", {"weight_decay": -1.0}),
    (ValueError, "momentum", {"momentum": 1.0}),
    (ValueError, "ns_steps", {"ns_steps": 0}),
    (ValueError, "ns_coefficients", {"ns_coefficients": (1.0,)}),
    (ValueError, "eps", {"eps": -1.0}),
    (ValueError, "adjust_lr_fn", {"adjust_lr_fn": "rms"}),
    (ValueError, "rounding", {"rounding": "up"}),
    (TypeError, "aux", {"aux": {"learning_rate": 1.0}}),
]


@pytest.mark.parametrize(("exception", "name", "options"), BAD, ids=str)
def test_bad_options_are_named(exception, name, options):
    with pytest.raises(exception, match=name):
        Muon(matrices(), **options)


BAD_GROUPS = [
    (ValueError, "two dimensions", torch.zeros(3), {}),
    (ValueError, "three dimensions", torch.zeros(3, 4), {"expert_dim": 0}),
    (ValueError, "expert_dim", torch.zeros(3, 4, 5), {"expert_dim": 3}),
    (ValueError, "empty", torch.zeros(3, 0), {}),
    (ValueError, "chunks", torch.zeros(4, 3), {"chunks": 3}),
    (ValueError, "chunks", torch.zeros(4, 3), {"chunks": 0}),
    (ValueError, "chunks", torch.zeros(4, 3), {"chunks": (3, 2)}),
    (TypeError, "params must be", torch.zeros(3, 3, dtype=torch.complex64), {}),
]


@pytest.mark.parametrize(("exception", "message", "value", "options"), BAD_GROUPS)
def test_bad_parameters_are_named(exception, message, value, options):
    with pytest.raises(exception, match=message):
        Muon([{"params": [nn.Parameter(value)], **options}])


def test_sparse_gradients_and_unknown_names_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        Muon(embedding.parameters()).step()
    with pytest.raises(ValueError, match="nowhere"):
        muon_param_groups(Model(), expert_dim={"nowhere": 0})
    with pytest.raises(TypeError, match="model"):
        muon_param_groups([nn.Linear(2, 2)])
