"""AdamR: the global scale, the pull to the reference, its limits, checkpoints."""

import copy

import pytest
import torch
from torch import nn

from regularizers.optim import AdamR

SHAPES = ((5,), (3, 4), (), (0,), (20, 30))


def parameters(dtype=torch.float64):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in SHAPES]


def set_gradients(params, t):
    generator = torch.Generator().manual_seed(100 + t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(params, optimizer, steps, begin=0):
    for t in range(begin, begin + steps):
        set_gradients(params, t)
        optimizer.step()
    return [p.detach() for p in params]


def by_hand(params, reference, steps, lr, betas, eps, decay, l1):
    """The formula, one number at a time in its order."""
    x = [p.detach().clone() for p in params]
    m, v = [torch.zeros_like(p) for p in x], [torch.zeros_like(p) for p in x]
    for t in range(steps):
        set_gradients(params, t)
        for i, p in enumerate(params):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * p.grad
            v[i] = betas[1] * v[i] + (1 - betas[1]) * p.grad**2
        hats = [a / (1 - betas[1] ** (t + 1)) for a in v]
        sigma = (sum(h.sum() for h in hats) / sum(h.numel() for h in hats)).sqrt()
        for i, hat in enumerate(hats):
            difference = x[i] - reference[i]
            x[i] = x[i] - decay * lr / sigma * (difference.sign() if l1 else difference)
            x[i] = x[i] - lr * m[i] / (1 - betas[0] ** (t + 1)) / (hat.sqrt() + eps)
    return x


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("l1", [False, True])
def test_steps_are_those_of_the_formula(l1, fused):
    params = parameters()
    reference = [torch.zeros_like(p) + 0.3 for p in params]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    want = by_hand(params, reference, 20, **options, decay=0.5, l1=l1)
    optimizer = AdamR(params, reference, **options, weight_decay=0.5, l1=l1, fused=fused)
    # Sums of v by recursion or over v: roundings of float64.
    torch.testing.assert_close(train(params, optimizer, 20), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_without_decay_it_is_adam(amsgrad, fused):
    params, others = parameters(), parameters()
    optimizer = AdamR(params, weight_decay=0.0, amsgrad=amsgrad, lr=0.01, fused=fused)
    adam = torch.optim.Adam(others, amsgrad=amsgrad, lr=0.01)
    torch.testing.assert_close(
        train(params, optimizer, 100), train(others, adam, 100), rtol=0, atol=1e-14
    )


def test_reference_of_zero_without_gradients_shrinks_to_zero():
    p = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = AdamR([p], [torch.zeros(50)], lr=0.1, weight_decay=1.0)
    start = p.detach().clone()
    for _ in range(100):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(p.detach(), start * 0.9**100)  # sigma = 0 counts as 1


def test_decay_is_weaker_where_gradients_are_larger():
    def pulled(size):
        p, q = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
        optimizer = AdamR([p, q], [torch.zeros(3), torch.zeros(3)], lr=0.1, weight_decay=1.0)
        p.grad = torch.zeros(3, dtype=torch.float64)
        q.grad = torch.full((3,), size, dtype=torch.float64)  # of another tensor
        optimizer.step()
        return 1 - p[0].item()

    assert pulled(1.0) == pytest.approx(0.1 * 2**0.5)
    assert pulled(10.0) == pytest.approx(0.1 * 2**0.5 / 10)


def test_omitted_reference_is_the_value_before_the_first_step():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = AdamR(params, lr=0.1)
    train(params, optimizer, 3)
    torch.testing.assert_close([optimizer.state[p]["reference"] for p in params], before)


def test_reference_is_a_copy():
    params = parameters()
    reference = [p.detach().clone() for p in params]
    optimizer = AdamR(params, reference)
    reference[0].zero_()
    assert optimizer.state[params[0]]["reference"].abs().sum() > 0


def test_a_group_without_decay_is_adams():
    params, others = parameters(), parameters()
    zeros = [torch.zeros_like(p) for p in params]
    groups = [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.0}]
    train(params, AdamR(groups, zeros, lr=0.01, weight_decay=1.0), 5)
    train(others, torch.optim.Adam(others, lr=0.01), 5)
    torch.testing.assert_close(params[4], others[4], rtol=0, atol=1e-14)
    assert (params[0] - others[0]).abs().min() > 1e-4


def test_proximal_l1_stops_at_the_reference():
    p = nn.Parameter(torch.tensor([1.0, 1.04]))
    optimizer = AdamR([p], [torch.ones(2)], lr=0.1, weight_decay=1.0, l1=True, decay_mode="prox")
    p.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_killed_run_goes_on_bit_for_bit(dtype):
    def fresh():
        params = parameters(dtype)
        return params, AdamR(params, [torch.zeros_like(p) for p in params], weight_decay=0.1)

    params, optimizer = fresh()
    whole = train(params, optimizer, 10)
    params, optimizer = fresh()
    train(params, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = AdamR(copies)
    resumed.load_state_dict(saved)
    torch.testing.assert_close(train(copies, resumed, 5, begin=5), whole, rtol=0, atol=0)


def test_a_checkpoint_of_adam_loads_and_keeps_the_reference():
    params = parameters()
    adam = torch.optim.AdamW(params, lr=0.01, weight_decay=0.0)
    train(params, adam, 5)
    reference = [torch.zeros_like(p) for p in params]
    optimizer = AdamR(params, reference, lr=0.01, weight_decay=0.3)
    optimizer.load_state_dict(adam.state_dict())
    optimizer.param_groups[0]["weight_decay"] = 0.3
    torch.testing.assert_close(optimizer.state[params[1]]["reference"], reference[1])
    want = [nn.Parameter(p.detach().clone()) for p in parameters()]
    ends = by_hand(want, reference, 6, 0.01, (0.9, 0.999), 1e-8, 0.0, l1=False)
    v = [optimizer.state[p]["exp_avg_sq"] for p in params]
    before = [p.detach().clone() for p in params]
    set_gradients(params, 5)
    v = [0.999 * a + 0.001 * p.grad**2 for a, p in zip(v, params, strict=True)]
    sigma = (sum(a.sum() for a in v) / sum(a.numel() for a in v) / (1 - 0.999**6)).sqrt()
    optimizer.step()
    for p, end, old in zip(params, ends, before, strict=True):
        torch.testing.assert_close(p.detach(), end - 0.3 * 0.01 / sigma * old)


def test_overflow_leaves_everything_as_it_was():
    params = parameters(torch.float32)
    optimizer = AdamR(params, [torch.zeros_like(p) for p in params], weight_decay=0.1)
    train(params, optimizer, 2)
    before = [p.detach().clone() for p in params]
    sums = [optimizer.state[p]["exp_avg_sq_sum"].item() for p in params]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    set_gradients(params, 2)
    params[0].grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)
    assert [optimizer.state[p]["exp_avg_sq_sum"].item() for p in params] == sums


def test_scaled_gradients_give_the_unscaled_step():
    plain, scaled = parameters(torch.float32), parameters(torch.float32)
    zeros = [torch.zeros_like(p) for p in plain]
    train(plain, AdamR(plain, zeros, weight_decay=0.5, lr=0.01), 1)
    optimizer = AdamR(scaled, zeros, weight_decay=0.5, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    set_gradients(scaled, 0)
    for p in scaled:
        p.grad *= 1024.0
    scaler.step(optimizer)
    torch.testing.assert_close(scaled, plain)


def test_bad_input_names_the_argument():
    params = parameters()
    for name, reference, options in [
        ("reference must have a tensor", [torch.zeros(5)], {}),
        ("reference must have the shapes", [torch.zeros(2)] * 5, {}),
        ("lr", None, {"lr": -1.0}),
        ("eps", None, {"eps": -1.0}),
        ("weight_decay", None, {"weight_decay": -1.0}),
        (r"betas\[1\]", None, {"betas": (0.9, 1.0)}),
        ("decay_mode", None, {"decay_mode": "proximal"}),
    ]:
        with pytest.raises(ValueError, match=name):
            AdamR(params, reference, **options)
    with pytest.raises(TypeError, match="params"):
        AdamR([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
