"""Gradient dropout and its distillation loss (sheet of paper 51)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers import use_backend
from regularizers.ops import philox_words
from regularizers.optim import GradientDropout, gradient_dropout, keep_probability, soft_kl


@pytest.mark.parametrize(
    ("task", "reg", "expected"),
    [
        (1.0, 1.0, 1.0),
        (1.0, 0.0, 1.0),
        (1.0, -1.0, 0.5),
        (1.0, -3.0, 0.25),
        (1.0, -1e6, 1e-6),
        (-2.0, 1.0, 2 / 3),
        (0.0, 1.0, 0.5),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_keep_probability_has_the_values_of_the_sheet_and_is_symmetric(task, reg, expected, sign):
    pair = (sign * torch.tensor(value, dtype=torch.float64) for value in (task, reg))
    # eps moves a probability by at most eps / |g| and 1 / (1 + 1e6) is 1e-6 to 1e-12.
    assert abs(keep_probability(*pair).item() - expected) < 1e-8


def test_without_eps_tiny_agreeing_gradients_are_sure_to_stay():
    tiny = torch.tensor([1e-9, -1e-12, 0.0])
    assert keep_probability(tiny, torch.zeros(3), eps=0.0).tolist() == [1.0, 1.0, 1.0]
    assert keep_probability(tiny, torch.zeros(3))[0] < 0.6


def test_mean_gradient_and_keep_rate_are_those_of_the_law():
    task = torch.full((100_000,), 2.0, dtype=torch.float64)
    for reg, keep in ((-2.0, 0.5), (-6.0, 0.25), (-1.0, 2 / 3)):
        for strength in (1.0, 0.4):
            g = gradient_dropout(task, torch.full_like(task, reg), drop_strength=strength, seed=3)
            expected = 2 * ((1 - strength) + strength * keep)
            # Three standard errors of a keep rate over 1e5 draws are below .005.
            assert abs(g.mean().item() - expected) < 2 * 0.005 * strength
            rate = (g == 2).double().mean().item()
            assert abs(rate - keep) < 0.005


def test_entries_are_kept_where_the_upper_bits_of_their_word_fall_below_the_probability():
    task, reg = torch.ones(999), torch.full((999,), -2.0)
    words = philox_words(torch.tensor(5), 999, stream=7)
    kept = (words >> 8).double() / 2**24 < keep_probability(task, reg)
    assert torch.equal(gradient_dropout(task, reg, stream=7, seed=5) == 1, kept)


def test_every_word_keeps_an_agreeing_entry():
    g = torch.ones(1 << 16)
    assert torch.equal(gradient_dropout(g, g, seed=0), g)


def test_strength_zero_returns_the_task_gradient_itself():
    g = torch.randn(8)
    assert gradient_dropout(g, -g, drop_strength=0.0) is g


def test_second_gradient_only_gates():
    task, reg = torch.randn(4096), 100 * torch.randn(4096)
    g = gradient_dropout(task, reg, seed=1)
    assert torch.all((g == 0) | (g == task))
    assert 0 < (g == 0).sum() < 4096


def test_entries_of_one_neuron_are_dropped_independently():
    task = torch.ones(64, 64)
    kept = gradient_dropout(task, -task, seed=2)
    assert not torch.all((kept == kept[:, :1]).all(1))


def test_overflow_of_either_gradient_is_not_hidden():
    bad = torch.tensor([float("inf"), -float("inf"), float("nan")])
    task = torch.cat([bad, torch.ones(3)])
    reg = torch.cat([-bad.sign(), -bad])
    for strength in (1.0, 0.5):
        g = gradient_dropout(task, reg, drop_strength=strength, seed=0)
        torch.testing.assert_close(g, task, rtol=0, atol=0, equal_nan=True)


def test_strength_in_a_tensor_drops_as_a_number_does():
    task, reg = torch.randn(64), torch.randn(64)
    for strength in (0.0, 0.3, 1.0):
        number = gradient_dropout(task, reg, drop_strength=strength, seed=0)
        value = torch.tensor(strength, dtype=torch.float64)
        assert torch.equal(gradient_dropout(task, reg, drop_strength=value, seed=0), number)


def test_gate_is_a_constant_to_differentiation():
    task = torch.randn(64, dtype=torch.float64, requires_grad=True)
    reg = torch.randn(64, dtype=torch.float64, requires_grad=True)
    g = gradient_dropout(task, reg, drop_strength=0.7, seed=4)
    by_task, by_reg = torch.autograd.grad(g.sum(), [task, reg], allow_unused=True)
    torch.testing.assert_close(by_task, g.detach() / task.detach())
    assert by_reg is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gates_as_float32(dtype):
    task, reg = torch.randn(256).to(dtype), torch.randn(256).to(dtype)
    half = gradient_dropout(task, reg, seed=6)
    assert half.dtype == dtype
    assert torch.equal(half.float(), gradient_dropout(task.float(), reg.float(), seed=6))


def test_compiles_to_one_graph_for_all_strengths(fresh_dynamo):
    task, reg = torch.randn(32), torch.randn(32)
    compiled = torch.compile(gradient_dropout, fullgraph=True, backend="aot_eager")
    for strength in (0.0, 0.3, 1.0):
        value = torch.tensor(strength)
        result = compiled(task, reg, drop_strength=value, seed=torch.tensor(1))
        assert torch.equal(result, gradient_dropout(task, reg, drop_strength=value, seed=1))


def test_vmapped_gradients_draw_the_reference_words():
    task, reg = torch.randn(3, 16), torch.randn(3, 16)
    seed = torch.tensor(1)
    rows = torch.func.vmap(lambda a, b: gradient_dropout(a, b, seed=seed))(task, reg)
    for row, a, b in zip(rows, task, reg, strict=True):
        assert torch.equal(row, gradient_dropout(a, b, seed=1))


def test_memory_layout_and_backend_change_no_entry():
    task, reg = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = gradient_dropout(task, reg, seed=1)
    last = task.to(memory_format=torch.channels_last)
    assert torch.equal(gradient_dropout(last, reg, seed=1), expected)
    with use_backend("reference"):
        assert torch.equal(gradient_dropout(task, reg, seed=1), expected)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5,)])
def test_sizes_that_are_no_multiple_of_a_philox_call(shape):
    g = torch.ones(shape)
    assert torch.equal(gradient_dropout(g, g, seed=1), g)


def test_generators_of_one_state_drop_the_same():
    task = torch.ones(64)
    draws = [
        gradient_dropout(task, -task, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("exception", "match", "call"),
    [
        (ValueError, "drop_strength", lambda g: gradient_dropout(g, g, drop_strength=1.1)),
        (ValueError, "drop_strength", lambda g: gradient_dropout(g, g, drop_strength=-0.1)),
        (ValueError, "g_reg must have the shape", lambda g: gradient_dropout(g, g[:1])),
        (TypeError, "g_reg", lambda g: gradient_dropout(g, g.double())),
        (TypeError, "g_task", lambda g: gradient_dropout(g.long(), g)),
        (ValueError, "eps", lambda g: keep_probability(g, g, eps=-1.0)),
        (ValueError, "stream", lambda g: gradient_dropout(g, g, stream=-1)),
        (ValueError, "drop_strength", lambda g: GradientDropout(drop_strength=2.0)),
        (ValueError, "eps", lambda g: GradientDropout(eps=-1.0)),
        (ValueError, "one shape", lambda g: soft_kl(g, g[:1])),
        (ValueError, "T must", lambda g: soft_kl(g, g, T=0.0)),
        (ValueError, "mix must", lambda g: soft_kl(g, g, mix=1.5)),
        (TypeError, "student_logits", lambda g: soft_kl(g.long(), g)),
    ],
)
def test_bad_input_names_the_argument(exception, match, call):
    with pytest.raises(exception, match=match):
        call(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("task_loss must have one", lambda d, w: d.backward(w * 1, w.sum(), [w])),
        ("reg_loss must have one", lambda d, w: d.backward(w.sum(), w * 1, [w])),
        ("params must hold", lambda d, w: d.backward(w.sum(), w.sum(), [])),
        ("params must be leaves", lambda d, w: d.backward(w.sum(), w.sum(), [w * 2])),
        ("task_loss must depend", lambda d, w: d.backward(torch.ones(()), w.sum(), [w])),
    ],
)
def test_bad_input_of_the_backward_pass_leaves_no_gradient(match, call):
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=match):
        call(GradientDropout(), w)
    assert w.grad is None


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def test_teacher_equal_to_the_student_drops_nothing():
    model, x, y = _model(), torch.randn(16, 6), torch.arange(16) % 3
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    GradientDropout().backward(loss, soft_kl(logits, logits.detach()), model.parameters(), seed=0)
    for parameter, grad in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0)


def test_teacher_of_another_mind_drops_some_and_adds_nothing():
    model, x, y = _model(), torch.randn(16, 6), torch.arange(16) % 3
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    logits = model(x)
    reg = soft_kl(logits, torch.randn(16, 3))
    GradientDropout().backward(F.cross_entropy(logits, y), reg, model.parameters(), seed=0)
    dropped = 0
    for parameter, grad in zip(model.parameters(), plain, strict=True):
        assert torch.all((parameter.grad == 0) | (parameter.grad == grad))
        dropped += int((parameter.grad == 0).sum())
    assert dropped > 0


def test_strength_zero_is_a_plain_backward_pass():
    model, x = _model(), torch.randn(4, 6)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    logits = model(x)
    dropout = GradientDropout(drop_strength=0.0)
    dropout.backward(logits.square().sum(), -logits.square().sum(), model.parameters())
    for parameter, grad in zip(model.parameters(), plain, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_parameter_without_regularizer_gradient_passes_unchanged():
    a, b, c = (nn.Parameter(torch.ones(64)) for _ in range(3))
    GradientDropout().backward((a + b).sum(), -1e9 * (a + c).sum(), [a, b, c], seed=0)
    assert a.grad.sum() == 0
    assert torch.equal(b.grad, torch.ones(64))
    assert c.grad is None


def test_constant_regularizer_gates_nothing():
    a = nn.Parameter(torch.ones(8))
    GradientDropout().backward(a.sum(), torch.zeros(()), [a])
    assert torch.equal(a.grad, torch.ones(8))


def test_gradients_accumulate_and_parameters_draw_apart():
    a, b = (nn.Parameter(torch.ones(256)) for _ in range(2))
    for _ in range(2):
        GradientDropout().backward((a + b).sum(), -(a + b).sum(), [a, b], seed=0)
    assert set(a.grad.tolist()) == {0.0, 2.0}
    assert not torch.equal(a.grad, b.grad)
    expected = gradient_dropout(torch.ones(256), -torch.ones(256), stream=1, seed=0)
    assert torch.equal(b.grad, 2 * expected)


@pytest.mark.parametrize(("T", "mix"), [(1.0, 1.0), (2.0, 1.0), (3.0, 0.4)])
def test_soft_kl_is_the_cross_entropy_of_the_formula(T, mix):
    torch.manual_seed(0)
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64)
    target = ((mix * teacher + (1 - mix) * student.detach()) / T).softmax(-1)
    expected = -(T**2) * (target * (student / T).log_softmax(-1)).sum(-1).mean()
    loss = soft_kl(student, teacher, T=T, mix=mix)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, student)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mix", [1.0, 0.3])
@pytest.mark.parametrize("T", [1.0, 3.0])
def test_soft_kl_to_itself_has_a_gradient_of_exact_zeros(T, mix):
    logits = torch.randn(32, 11, requires_grad=True)
    (grad,) = torch.autograd.grad(soft_kl(logits, logits.detach().clone(), T=T, mix=mix), logits)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_soft_kl_sends_no_gradient_to_the_teacher():
    student, teacher = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    soft_kl(student, teacher).backward()
    assert teacher.grad is None


def test_soft_kl_of_large_logits_stays_exact():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    # Adding 1e4 rounds the logits to 2^-10: an error of 1e-3 in each.
    torch.testing.assert_close(
        soft_kl(student + 1e4, teacher + 1e4), soft_kl(student, teacher), rtol=0, atol=3e-3
    )
