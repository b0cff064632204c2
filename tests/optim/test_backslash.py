"""The rate penalty and BackSlash (paper 4)."""

import math

import pytest
import torch

from regularizers.optim import BackSlash, GeneralizedGaussian, estimate_shape, rate_penalty

F64 = torch.float64


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_power_is_the_mean_over_all_entries_of_all_tensors(shape):
    torch.manual_seed(0)
    tensors = [torch.randn(4, 3, dtype=F64), torch.randn(5, dtype=F64)]
    expected = torch.cat([t.flatten() for t in tensors]).abs().pow(shape).mean()
    # At shape 0.5 the offset changes each term by at most sqrt(eps) = 1e-4.
    atol = 1e-4 if shape < 1 else 1e-14
    torch.testing.assert_close(rate_penalty(tensors, shape=shape), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [0.5, 0.9])
def test_gradient_is_offset_below_shape_one_and_zero_at_zero(shape):
    w = torch.tensor([0.0, 1e-9, -0.04, 2.0], dtype=F64, requires_grad=True)
    rate_penalty(w, shape=shape, eps=1e-4).backward()
    size = w.detach().abs()
    expected = shape * (size + 1e-4) ** (shape - 1) * w.detach().sign() / 4
    torch.testing.assert_close(w.grad, expected)
    assert w.grad[0] == 0


@pytest.mark.parametrize("shape", [1.0, 1.5, 2.0])
def test_gradient_is_not_offset_from_shape_one_on(shape):
    w = torch.tensor([0.0, -0.04, 2.0], dtype=F64, requires_grad=True)
    rate_penalty(w, shape=shape, eps=0.1).backward()
    expected = shape * w.detach().abs() ** (shape - 1) * w.detach().sign() / 3
    torch.testing.assert_close(w.grad, expected)


@pytest.mark.parametrize("form", ["power", "nll"])
def test_no_gradient_flows_through_the_estimate(form):
    torch.manual_seed(0)
    w = torch.randn(500, dtype=F64, requires_grad=True)
    rate_penalty(w, form=form).backward()
    nu, alpha = estimate_shape(w)
    scale = alpha**nu * math.log(2) if form == "nll" else 1
    expected = nu * w.detach().abs() ** (nu - 1) * w.detach().sign() / (500 * scale)
    torch.testing.assert_close(w.grad, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", ["estimate", 0.7, 2.0])
def test_nll_is_the_code_length_in_bits_a_weight(shape):
    torch.manual_seed(0)
    w = 0.3 * torch.randn(1000, dtype=F64)
    if shape == "estimate":
        nu, alpha = estimate_shape(w)
    else:
        nu = torch.tensor(shape, dtype=F64)
        alpha = (nu * (w.abs() ** nu).mean()) ** (1 / nu)
    expected = -GeneralizedGaussian(0.0, alpha, nu).log_prob(w).mean() / math.log(2)
    # The offset adds at most (eps / alpha)^nu.
    torch.testing.assert_close(
        rate_penalty(w, shape=shape, form="nll", eps=1e-12), expected, rtol=0, atol=1e-7
    )


def test_every_tensor_has_its_own_shape():
    torch.manual_seed(0)
    laws = [GeneralizedGaussian(0.0, 0.1, torch.tensor(s, dtype=F64)) for s in (0.6, 2.0)]
    a, b = (law.sample((1000,)) for law in laws)
    both = rate_penalty([a, b])
    torch.testing.assert_close(both, (rate_penalty(a) + rate_penalty(b)) / 2)
    assert (both - rate_penalty(torch.cat([a, b]))).abs() > 0.01


def test_gradient_agrees_with_finite_differences():
    w = torch.tensor([0.3, -0.1, 1.2], dtype=F64, requires_grad=True)
    for shape in (0.5, 1.0, 1.7):
        for form in ("power",):
            torch.autograd.gradcheck(lambda w, s=shape, f=form: rate_penalty(w, shape=s, form=f), w)


@pytest.mark.parametrize("form", ["power", "nll"])
@pytest.mark.parametrize("shape", ["estimate", 0.5, 1.0, 2.0])
def test_step_is_the_gradient_step_of_the_penalty(shape, form):
    torch.manual_seed(0)
    tensors = [torch.randn(4, 3, dtype=F64), 0.1 * torch.randn(5, dtype=F64)]
    leaves = [t.clone().requires_grad_() for t in tensors]
    rate_penalty(leaves, shape=shape, form=form).backward()
    BackSlash(tensors, strength=0.01, shape=shape, form=form).step(0.1)
    for stepped, leaf in zip(tensors, leaves, strict=True):
        torch.testing.assert_close(stepped, leaf.detach() - 0.001 * leaf.grad)


def test_step_stops_at_zero():
    w = torch.tensor([1e-3, -1e-3, 0.0, 5.0], dtype=F64)
    BackSlash(w, strength=1.0, shape=0.5).step(1.0)
    assert w[:3].tolist() == [0, 0, 0]
    assert 4 < w[3] < 5


def test_step_takes_a_tensor_as_learning_rate_and_rounds_half_types_once():
    w = torch.randn(100).bfloat16()
    expected = (w.float() - 0.05 * w.float().sign().clamp(-1, 1)).bfloat16()
    far = w.float().abs() > 0.06
    BackSlash(w, strength=100.0, shape=1.0).step(torch.tensor(0.05))
    assert torch.equal(w[far], expected[far])


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_zero_strength_or_rate_changes_nothing(strength):
    w = torch.randn(10)
    before = w.clone()
    BackSlash(w, strength=strength).step(1.0 - strength)
    assert torch.equal(w, before)


def test_sparse_regression_finds_the_true_coefficients_below_shape_two():
    def run(shape):
        torch.manual_seed(0)
        x, true = torch.randn(100, 50), torch.zeros(50)
        true[:5] = torch.tensor([1.0, -1.0, 0.5, -0.5, 1.0])
        y = x @ true + 0.1 * torch.randn(100)
        w = 0.1 * torch.randn(50)
        gram, moment = x.T @ x / 100, x.T @ y / 100
        decay = BackSlash(w, strength=2.5, shape=shape)  # 0.05 an entry
        for _ in range(3000):
            w -= 0.01 * (gram @ w - moment)
            decay.step(0.01)
        return (w[5:].abs() < 0.02).double().mean().item(), (w - true).norm().item()

    nulls, errors = zip(*(run(shape) for shape in (2.0, 1.0, 0.5)), strict=True)
    assert nulls[0] < 0.7
    assert nulls[1:] == (1.0, 1.0)
    assert errors[0] > 2 * errors[1]
    assert errors[1] > errors[2]


def test_empty_and_zero_tensors_are_skipped_with_a_warning():
    w = torch.tensor([1.0, 2.0])
    for nothing in (torch.zeros(2), torch.ones(0)):
        with pytest.warns(UserWarning, match="skipped"):
            found = rate_penalty([w, nothing], shape=1.0)
        assert found.item() == pytest.approx(3 / (2 + nothing.numel()))
        with pytest.warns(UserWarning, match="skipped"):
            BackSlash([w.clone(), nothing], strength=1.0, form="nll").step(0.1)
        assert not nothing.any()


@pytest.mark.parametrize("form", ["power", "nll"])
def test_penalty_compiles_to_one_graph(form):
    w = torch.randn(64, requires_grad=True)
    compiled = torch.compile(
        lambda w: rate_penalty(w, form=form), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(w), rate_penalty(w, form=form))


def test_bad_input_names_the_argument():
    w, bad = torch.ones(3), torch.tensor([1.0, math.nan])
    for call in (rate_penalty, lambda p, **kw: BackSlash(p, strength=1.0, **kw)):
        for exception, name, params, options in (
            (ValueError, "params must hold", [], {}),
            (TypeError, "params must", [torch.ones(3, dtype=torch.int64)], {}),
            (TypeError, "params must", ["weight"], {}),
            (ValueError, "shape must", w, {"shape": 0.0}),
            (ValueError, "shape must", w, {"shape": 10.5}),
            (ValueError, "shape must", w, {"shape": "fit"}),
            (ValueError, "form must", w, {"form": "bits"}),
            (ValueError, "eps must", w, {"eps": 0.0}),
        ):
            with pytest.raises(exception, match=name):
                call(params, **options)
    with pytest.raises(ValueError, match="params must be finite"):
        rate_penalty([w, bad])
    with pytest.raises(ValueError, match="params must be finite"):
        BackSlash([w, bad], strength=1.0).step(0.1)
    with pytest.raises(ValueError, match="strength must"):
        BackSlash(w, strength=-1.0)
    with pytest.raises(ValueError, match="lr must"):
        BackSlash(w, strength=1.0).step(-0.1)
    assert torch.equal(w, torch.ones(3))
