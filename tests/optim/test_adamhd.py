"""AdamHD: a drop-in for AdamW; the facts of the Huber decay; checkpoints, scalers, half types."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import regularizers
from regularizers.optim import AdamHD, HuberDecay, huber_decay_, huber_penalty

SHAPES = ((5,), (3, 4), (), (0,), (20, 30))


def parameters(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def set_gradients(params, t):
    generator = torch.Generator().manual_seed(100 + t)
    for p in params:
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = grad.to(p.dtype)


def train(make, steps=100, dtype=torch.float64, begin=0, params=None, optimizer=None):
    """Parameters and optimizer after steps with gradients that depend on the step alone."""
    params = parameters(dtype) if params is None else params
    optimizer = make(params) if optimizer is None else optimizer
    for t in range(begin, begin + steps):
        set_gradients(params, t)
        optimizer.step()
    return params, optimizer


def as_adamw(params, **options):
    """The limit in which AdamHD is AdamW."""
    return AdamHD(params, delta=math.inf, decay_mode="gradient", decay_order="before", **options)


VARIANTS = [{}, {"amsgrad": True}, {"maximize": True}, {"eps": 1e-3, "betas": (0.5, 0.7)}]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_without_threshold_in_gradient_form_it_is_adamw(variant, fused):
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), **variant}
    have, _ = train(lambda p: as_adamw(p, fused=fused, **options))
    want, _ = train(lambda p: torch.optim.AdamW(p, **options))
    # theta - tau theta against theta (1 - tau): a rounding a step.
    torch.testing.assert_close(have, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("order", ["after", "before"])
def test_without_decay_it_is_adam(order):
    make = lambda p: AdamHD(p, lr=0.01, weight_decay=0.0, decay_order=order)
    have, optimizer = train(make)
    want, _ = train(lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.95)))
    torch.testing.assert_close(have, want, rtol=0, atol=1e-14)
    assert all("delta" not in state for state in optimizer.state.values())


def test_infinite_threshold_in_prox_form_divides_by_one_plus_tau():
    params = parameters()
    expected = [p.detach() / 1.1 for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    AdamHD(params, lr=1.0, weight_decay=0.1, delta=math.inf).step()
    torch.testing.assert_close([p.detach() for p in params], expected)


def test_small_threshold_with_strong_decay_is_soft_thresholding():
    params, kappa, delta = parameters(), 0.3, 1e-9
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    AdamHD(params, lr=0.5, weight_decay=kappa / delta, delta=delta).step()
    for p, x in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), x - x.clamp(-0.15, 0.15), rtol=0, atol=1e-8)


def test_fused_pass_and_hooks_agree():
    for options in ({}, {"delta": 0.5, "decay_mode": "gradient"}, {"bias_correction": False}):
        have, _ = train(lambda p, o=options: AdamHD(p, lr=0.01, **o))
        want, _ = train(lambda p, o=options: AdamHD(p, lr=0.01, fused=False, **o))
        torch.testing.assert_close(have, want, rtol=0, atol=1e-13)


def test_every_backend_takes_the_same_steps():
    results = []
    for backend in ("cpp", "reference"):
        with regularizers.use_backend(backend):
            results.append(train(lambda p: AdamHD(p, lr=0.01), steps=10)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)


def test_persistent_gradient_is_bounded_by_adamw_and_not_by_a_small_threshold():
    ends = []
    make = (
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: AdamHD(p, lr=0.01, weight_decay=0.1, delta=0.1),
    )
    for build in make:
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        p.grad = torch.ones_like(p)
        optimizer = build([p])
        for _ in range(30_000 if optimizer.defaults.get("delta") is None else 3000):
            optimizer.step()
        ends.append(p.item())
    assert ends[0] == pytest.approx(-10.0, abs=1e-3)  # 1 / weight_decay
    # -lr (1 - weight_decay delta) n, up to the first ten or so steps, which are inside delta
    assert ends[1] == pytest.approx(-0.01 * 0.99 * 3000, abs=0.01)


def test_large_weights_keep_their_value_and_small_ones_shrink_alike():
    target = torch.tensor([5.0, 0.02], dtype=torch.float64)
    ends = []
    for decay in ("l2", "huber"):
        p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        sgd = torch.optim.SGD([p], lr=0.05)
        delta = math.inf if decay == "l2" else 0.1
        optimizer = HuberDecay(sgd, weight_decay=0.1, delta=delta)
        for _ in range(2000):
            p.grad = p.detach() - target
            optimizer.step()
        ends.append(p.detach())
    expected = torch.tensor([[4.545, 0.0182], [4.990, 0.0182]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(ends), expected, rtol=0, atol=1e-3)


def test_scale_of_gradients_does_not_change_the_decay():
    ends = []
    for factor in (1.0, 1000.0):
        decays = []
        for strength in (0.1, 0.0):
            params = parameters()
            optimizer = AdamHD(params, lr=0.1, weight_decay=strength, delta=0.3, eps=0.0)
            set_gradients(params, 0)
            for p in params:
                p.grad *= factor
            optimizer.step()
            decays.append([p.detach() for p in params])
        ends.append([a - b for a, b in zip(*decays, strict=True)])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_threshold_is_the_moving_average_of_absolute_values_one_step_late():
    (p,) = parameters(shapes=((20, 30),))
    optimizer = AdamHD([p], lr=0.1, weight_decay=2.0, delta_scale=0.5, delta_beta=0.9, eps=0.0)
    other, delta = nn.Parameter(p.detach().clone()), 0.5 * p.detach().abs().mean()
    adam = torch.optim.Adam([other], lr=0.1, betas=(0.9, 0.95), eps=0.0)
    for t in range(5):
        set_gradients([p], t)
        set_gradients([other], t)
        optimizer.step()
        adam.step()
        huber_decay_(other, 0.2, delta)
        delta = 0.9 * delta + 0.1 * 0.5 * other.detach().abs().mean()
        torch.testing.assert_close(p, other)
        torch.testing.assert_close(optimizer.state[p]["delta"], delta)


def test_learning_rate_of_zero_freezes_weights_and_the_threshold_still_tracks():
    params, optimizer = train(lambda p: AdamHD(p, lr=0.1, delta_beta=0.5), steps=3)
    optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy([p.detach() for p in params])
    deltas = [optimizer.state[p]["delta"].item() for p in params]
    train(None, 1, params=params, optimizer=optimizer)
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)
    assert optimizer.state[params[4]]["delta"].item() != deltas[4]


def test_a_tensor_that_starts_at_zero_has_a_threshold_above_zero():
    p = nn.Parameter(torch.zeros(4))
    optimizer = AdamHD([p], lr=0.0)
    p.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.state[p]["delta"] > 0


def _saved(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["master", "nearest"])
def test_a_killed_run_goes_on_bit_for_bit(dtype, rounding):
    make = lambda p: AdamHD(p, lr=0.01, amsgrad=True, rounding=rounding)
    whole, _ = train(make, 10, dtype)
    first, optimizer = train(make, 5, dtype)
    params = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = make(params)
    resumed.load_state_dict(_saved(optimizer))
    train(make, 5, begin=5, params=params, optimizer=resumed)
    torch.testing.assert_close(params, whole, rtol=0, atol=0)


def test_loaded_state_is_of_its_own_and_in_full_precision():
    params, optimizer = train(AdamHD, 3, torch.bfloat16)
    other = AdamHD(parameters(torch.bfloat16))
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        have, want = other.state[q], optimizer.state[p]
        assert have.keys() == want.keys()
        for name in have:
            assert have[name].dtype == want[name].dtype
            assert torch.equal(have[name], want[name])
        assert have["exp_avg"].dtype == torch.float32
    train(None, 1, params=other.param_groups[0]["params"], optimizer=other)
    assert optimizer.state[params[0]]["step"] == 3


def test_a_checkpoint_of_adamw_loads_and_goes_on_as_adamw():
    options = {"lr": 0.01, "weight_decay": 0.1}
    want, adamw = train(lambda p: torch.optim.AdamW(p, **options), 5)
    params = [nn.Parameter(p.detach().clone()) for p in want]
    optimizer = as_adamw(params)
    optimizer.load_state_dict(_saved(adamw))
    assert optimizer.param_groups[0]["delta"] == math.inf  # which the checkpoint does not know
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    train(None, 5, begin=5, params=params, optimizer=optimizer)
    train(None, 5, begin=5, params=want, optimizer=adamw)
    torch.testing.assert_close(params, want, rtol=0, atol=1e-14)


def test_a_checkpoint_loads_into_adamw_and_goes_on():
    want, optimizer = train(lambda p: as_adamw(p, lr=0.01), 5)
    params = [nn.Parameter(p.detach().clone()) for p in want]
    adamw = torch.optim.AdamW(params)
    adamw.load_state_dict(_saved(optimizer))
    train(None, 5, begin=5, params=params, optimizer=adamw)
    train(None, 5, begin=5, params=want, optimizer=optimizer)
    torch.testing.assert_close(params, want, rtol=0, atol=1e-14)


def test_copies_and_pickles_step_on_their_own():
    params, optimizer = train(AdamHD, 2)
    twin_params, twin = copy.deepcopy((params, optimizer))
    train(None, 1, begin=2, params=params, optimizer=optimizer)
    train(None, 1, begin=2, params=twin_params, optimizer=twin)
    torch.testing.assert_close(twin_params, params, rtol=0, atol=0)


def test_learning_rate_may_be_a_tensor_and_scheduled():
    ends = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        params = parameters()
        optimizer = AdamHD(params, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for t in range(5):
            set_gradients(params, t)
            optimizer.step()
            schedule.step()
        ends.append(params)
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("fused", [None, False])
def test_grad_scaler_unscales_and_skips_overflow(fused):
    plain = parameters(torch.float32)
    scaled = copy.deepcopy(plain)
    plain_optimizer, optimizer = AdamHD(plain, fused=fused), AdamHD(scaled, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(4):
        set_gradients(plain, t)
        set_gradients(scaled, t)
        scaler.scale(torch.ones(()))
        for p in scaled:
            p.grad *= 1024.0 if t < 2 else 512.0
        if t == 1:
            scaled[0].grad[0] = math.inf
            deltas = [optimizer.state[p]["delta"].item() for p in scaled]
            before = copy.deepcopy([p.detach() for p in scaled])
            scaler.step(optimizer)
            torch.testing.assert_close([p.detach() for p in scaled], before, rtol=0, atol=0)
            assert [optimizer.state[p]["delta"].item() for p in scaled] == deltas
            assert optimizer.state[scaled[0]]["step"] == 1
        else:
            scaler.step(optimizer)
            plain_optimizer.step()
        scaler.update()
    torch.testing.assert_close(scaled, plain)


def test_parameters_without_gradient_are_left_alone_and_join_later():
    params = parameters()
    optimizer = AdamHD(params)
    set_gradients(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state or not optimizer.state[params[1]]
    set_gradients(params, 1)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1, 2, 2, 2]


def test_new_gradients_parameters_and_states_are_noticed():
    params, optimizer = train(AdamHD, 2)
    expected_params, expected = copy.deepcopy((params, optimizer))
    expected_optimizer = expected
    expected_optimizer._batches = {}
    for p in params:  # new memory everywhere, as after moving a model and its state
        p.data = p.data.clone()
        for name, value in optimizer.state[p].items():
            optimizer.state[p][name] = value.clone()
        optimizer.state[p]["exp_avg"].data = optimizer.state[p]["exp_avg"].data.clone()
    train(None, 2, begin=2, params=params, optimizer=optimizer)
    train(None, 2, begin=2, params=expected_params, optimizer=expected_optimizer)
    torch.testing.assert_close(params, expected_params, rtol=0, atol=0)
    optimizer.state.clear()
    train(None, 1, begin=4, params=params, optimizer=optimizer)
    assert optimizer.state[params[0]]["step"] == 1


def test_groups_have_their_options_and_may_mix_dtypes():
    params = [*parameters(torch.float32), *parameters(torch.bfloat16)]
    optimizer = AdamHD([{"params": params[:3], "weight_decay": 0.0}, {"params": params[3:]}])
    set_gradients(params, 0)
    optimizer.step()
    assert "delta" not in optimizer.state[params[0]]
    assert "delta" in optimizer.state[params[3]]
    assert "master" in optimizer.state[params[9]]
    assert "master" not in optimizer.state[params[3]]


def test_closure_is_evaluated_with_gradients_and_its_loss_returned():
    p = nn.Parameter(torch.ones(2))
    optimizer = AdamHD([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert (p < 1).all()


def test_compiled_step_equals_the_plain_one(fresh_dynamo):
    params, optimizer = parameters(), None
    optimizer = AdamHD(params, lr=0.01)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for t in range(3):
        set_gradients(params, t)
        step()
    torch.testing.assert_close(params, train(lambda p: AdamHD(p, lr=0.01), 3)[0])


def test_two_steps_lower_a_loss_whose_graph_was_saved_before():
    p = nn.Parameter(torch.ones(2))
    loss = (p * p).sum()
    p.grad = torch.ones(2)
    AdamHD([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fused", [None, False])
def test_bfloat16_with_master_follows_float32_within_an_ulp(fused):
    params = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, reference = AdamHD(params, lr=1e-3, fused=fused), AdamHD(wide, lr=1e-3)
    for t in range(50):
        set_gradients(params, t)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for p, w in zip(params, wide, strict=True):
        torch.testing.assert_close(p.float(), w.detach(), rtol=2**-8, atol=0)


def test_stochastic_rounding_takes_steps_that_nearest_loses():
    ends = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = AdamHD([p], lr=1e-4, weight_decay=0.0, rounding=rounding)
        p.grad = torch.ones_like(p)
        for _ in range(50):
            optimizer.step()
        ends[rounding] = p.detach().float().mean().item()
        assert "master" not in optimizer.state[p]
    assert ends["nearest"] == 1.0
    # 50 steps of 1e-4. Steps of 2^-8 with chance 0.026: deviation of the mean 7e-5, four of them.
    assert ends["stochastic"] == pytest.approx(0.995, abs=3e-4)


def test_penalty_is_quadratic_then_linear_and_its_prox_is_the_decay():
    delta, tau = 0.1, 0.1
    x = torch.tensor([0.5, 0.05, 0.11, -0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(
        huber_penalty(x, delta, reduction="none"),
        torch.where(x.abs() <= delta, x * x / 2, delta * x.abs() - delta**2 / 2),
    )
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    cost = (grid - x[:, None]).square() / 2 + tau * huber_penalty(grid, delta, reduction="none")
    best = grid[cost.argmin(-1)]
    torch.testing.assert_close(huber_decay_(x.clone(), tau, delta), best, rtol=0, atol=1e-5)


def test_penalty_has_derivatives_and_reductions():
    x = torch.tensor([0.5, -0.05, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: huber_penalty(z, 0.3), x)
    every = huber_penalty(x, 0.3, reduction="none")
    torch.testing.assert_close(huber_penalty(x, 0.3), every.sum())
    torch.testing.assert_close(huber_penalty(x, 0.3, reduction="mean"), every.mean())


def test_wrapper_passes_on_what_is_the_optimizers():
    p = nn.Parameter(torch.ones(2))
    optimizer = HuberDecay(torch.optim.SGD([p], lr=0.1), weight_decay=1.0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    p.grad = torch.zeros(2)
    optimizer.param_groups[0]["huber_decay"] = 0.0
    optimizer.step()
    assert torch.equal(p, torch.ones(2))
    optimizer.zero_grad()
    assert p.grad is None


BAD = [
    (ValueError, "lr", {"lr": -1.0}),
    (ValueError, "lr", {"lr": torch.ones(2)}),
    (ValueError, "eps", {"eps": -1e-8}),
    (ValueError, r"betas\[0\]", {"betas": (1.0, 0.9)}),
    (ValueError, r"betas\[1\]", {"betas": (0.9, -0.1)}),
    (ValueError, "weight_decay", {"weight_decay": -0.1}),
    (ValueError, "delta must", {"delta": 0.0}),
    (ValueError, "delta must", {"delta": math.nan}),
    (ValueError, "delta_scale", {"delta_scale": 0.0}),
    (ValueError, "delta_beta", {"delta_beta": 1.0}),
    (ValueError, "decay_mode", {"decay_mode": "proximal"}),
    (ValueError, "decay_order", {"decay_order": "during"}),
    (ValueError, "rounding", {"rounding": "up"}),
    (ValueError, "differentiable", {"differentiable": True}),
    (ValueError, "foreach and fused", {"foreach": True, "fused": True}),
]


@pytest.mark.parametrize(("exception", "name", "options"), BAD, ids=str)
def test_bad_options_are_named(exception, name, options):
    with pytest.raises(exception, match=name):
        AdamHD(parameters(), **options)


def test_bad_parameters_are_named():
    with pytest.raises(TypeError, match="params must be"):
        AdamHD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="rounding must be"):
        AdamHD([nn.Parameter(torch.zeros(2).half())], rounding="stochastic")
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(TypeError, match="sparse"):
        AdamHD(embedding.parameters()).step()
    assert torch.equal(embedding.weight, before)
