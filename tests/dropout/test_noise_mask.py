"""The policy-gradient noise mask: the method contract and the facts of the sheet of paper 73."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Beta
from torch.nn import functional as F

from regularizers.dropout import (
    BetaNoisePolicy,
    EMABaseline,
    apply_noise_mask,
    noise_mask_step,
    reinforce_loss,
    sample_noise_mask,
)
from tests.harness import MethodContract


class TestBetaNoisePolicy(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        policy = BetaNoisePolicy(3, hidden=4).to(dtype)
        nn.init.normal_(policy.head.weight)  # zeros would leave the layers below without gradient
        return policy

    def call(self, module, dtype):
        law = module(torch.linspace(-1, 1, 2 * 3 * 256, dtype=dtype).reshape(2, 3, 16, 16))
        return (law.concentration1 + law.concentration0).to(dtype)

    def bad_inputs(self):
        return [
            (ValueError, "in_channels must", lambda: BetaNoisePolicy(0)),
            (ValueError, "hidden must", lambda: BetaNoisePolicy(1, hidden=0)),
            (ValueError, "mask_size must", lambda: BetaNoisePolicy(1, mask_size=0)),
            (ValueError, "min_concentration", lambda: BetaNoisePolicy(1, min_concentration=0.0)),
            (TypeError, "x must", lambda: BetaNoisePolicy(1)(torch.ones(1, 1, 8, 8).int())),
            (ValueError, "x must", lambda: BetaNoisePolicy(1)(torch.ones(1, 2, 8, 8))),
        ]


class TestEMABaseline(MethodContract):
    def build(self, dtype):
        return EMABaseline().to(dtype)

    def call(self, module, dtype):
        rewards = torch.ones(3, dtype=dtype, requires_grad=True)  # the baseline has no parameters
        module.started.fill_(False)  # a call changes the state: begin from the same one
        module(rewards)
        return module(rewards * 2) + 0 * rewards.sum()

    def bad_inputs(self):
        return [
            (ValueError, "momentum must", lambda: EMABaseline(1.0)),
            (ValueError, "momentum must", lambda: EMABaseline(-0.1)),
        ]


def law(alpha, beta, shape=(1, 1, 1, 1)):
    return Beta(torch.full(shape, alpha), torch.full(shape, beta))


def networks(batch=6, size=16):
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 5))
    return (
        classifier,
        BetaNoisePolicy(3, hidden=4),
        torch.randn(batch, 3, size, size),
        torch.randint(5, (batch,)),
    )


def test_policy_starts_with_symmetric_laws_of_an_eighth_of_the_image():
    dist = BetaNoisePolicy(3)(torch.randn(2, 3, 33, 48))
    expected = torch.full((2, 1, 5, 6), 1 + math.log(2))
    torch.testing.assert_close(dist.concentration1, expected)
    torch.testing.assert_close(dist.concentration0, expected)


def test_mask_size_sets_the_resolution():
    dist = BetaNoisePolicy(3, mask_size=2)(torch.randn(1, 3, 32, 32))
    assert dist.mean.shape == (1, 1, 2, 2)


def test_concentrations_stay_above_the_least():
    policy = BetaNoisePolicy(1, min_concentration=0.5)
    nn.init.constant_(policy.head.bias, -200.0)
    assert policy(torch.ones(1, 1, 8, 8)).concentration1.item() == 0.5


def test_log_probability_is_that_of_the_law_summed_over_the_drawn_elements():
    # Beta(2, 5): log(0.3 * 0.7^4 / B(2, 5)) = 0.770525, mean 2 / 7.
    assert abs(law(2.0, 5.0).log_prob(torch.tensor(0.3)).item() - 0.770525) < 1e-6
    assert abs(law(2.0, 5.0).mean.item() - 0.285714) < 1e-6
    dist = law(2.0, 5.0, (3, 1, 2, 2))
    mask, log_prob = sample_noise_mask(dist, 4, generator=torch.Generator().manual_seed(0))
    drawn = mask[:, :, ::2, ::2]  # log_prob counts an element once, however large it becomes
    torch.testing.assert_close(log_prob, dist.log_prob(drawn).flatten(1).sum(1))


def test_uniform_law_has_log_probability_zero():
    _, log_prob = sample_noise_mask(law(1.0, 1.0, (4, 1, 3, 3)), 9)
    torch.testing.assert_close(log_prob, torch.zeros(4), rtol=0, atol=1e-5)


def test_drawn_masks_follow_the_law():
    # 4 sigma of mean and variance of 40000 draws of Beta(2, 5): std 0.16, kurtosis below 3.
    mask, _ = sample_noise_mask(law(2.0, 5.0, (1, 1, 200, 200)), 200)
    assert abs(mask.mean() - 2 / 7) < 4 * 0.16 / 200
    variance = 2 * 5 / (49 * 8)
    assert abs(mask.var() - variance) < 4 * variance * math.sqrt(2) / 200


def test_tiny_concentrations_give_masks_between_zero_and_one():
    mask, log_prob = sample_noise_mask(law(1e-3, 1e-3, (1, 1, 50, 50)), 50)
    assert ((mask >= 0) & (mask <= 1)).all()
    assert log_prob.isfinite().all()


def test_equal_generators_give_equal_masks():
    first, second = (
        sample_noise_mask(law(2.0, 3.0), 4, generator=torch.Generator().manual_seed(1))[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_modes_enlarge_the_mask():
    dist = law(2.0, 2.0, (1, 1, 2, 3))
    draw = lambda mode, size: sample_noise_mask(
        dist, size, mode=mode, generator=torch.Generator().manual_seed(2)
    )[0]
    small = draw("nearest", (2, 3))
    assert torch.equal(draw("block", (4, 9)), small.repeat_interleave(2, 2).repeat_interleave(3, 3))
    assert draw("nearest", (5, 7)).shape == (1, 1, 5, 7)
    assert torch.equal(draw("bilinear", (4, 6)), F.interpolate(small, (4, 6), mode="bilinear"))


def test_multiplied_mask_and_added_mask():
    x, mask = torch.randn(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
    assert torch.equal(apply_noise_mask(x, mask), x * mask)
    added = apply_noise_mask(x, mask, kind="add", scale=0.5)
    torch.testing.assert_close(added, x + 0.5 * (2 * mask - 1))
    assert apply_noise_mask(x.bfloat16(), mask).dtype == torch.bfloat16


@pytest.mark.parametrize("estimator", ["reinforce", "pathwise"])
def test_each_loss_has_gradients_in_its_own_network_alone(estimator):
    classifier, policy, x, y = networks()
    classifier_loss, policy_loss, _ = noise_mask_step(classifier, policy, x, y, estimator=estimator)
    policy_loss.backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert policy.head.bias.grad.abs().sum() > 0
    policy.zero_grad()
    classifier_loss.backward()
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(parameter.grad is not None for parameter in classifier.parameters())


def test_score_function_estimates_the_gradient_of_the_expected_reward():
    # a = b = 0, R = -(n - 0.8)^2. E[R] = -(Var + (mean - 0.8)^2) has gradient (0.05079, -0.03780).
    raw = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    alpha, beta = 1 + F.softplus(raw)
    total = alpha + beta
    mean, variance = alpha / total, alpha * beta / (total**2 * (total + 1))
    (exact,) = torch.autograd.grad(-(variance + (mean - 0.8) ** 2), raw)
    torch.testing.assert_close(
        exact, torch.tensor([0.05079, -0.03780], dtype=torch.float64), rtol=0, atol=1e-5
    )
    draws = 200_000
    alpha, beta = 1 + F.softplus(raw)
    dist = Beta(alpha.expand(draws, 1, 1, 1), beta.expand(draws, 1, 1, 1))
    mask, log_prob = sample_noise_mask(dist, 1, generator=torch.Generator().manual_seed(0))
    reward = -((mask.flatten() - 0.8) ** 2)
    (estimate,) = torch.autograd.grad(-reinforce_loss(log_prob, reward), raw)
    # One draw's estimate has a standard deviation below 0.2; 4 sigma of the mean: 0.0018.
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.0018)


def test_pathwise_estimates_the_same_gradient():
    raw = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    alpha, beta = 1 + F.softplus(raw)
    dist = Beta(alpha.expand(100_000, 1, 1, 1), beta.expand(100_000, 1, 1, 1))
    mask, _ = sample_noise_mask(dist, 1, pathwise=True, generator=torch.Generator().manual_seed(0))
    (estimate,) = torch.autograd.grad(-((mask - 0.8) ** 2).mean(), raw)
    expected = torch.tensor([0.05079, -0.03780], dtype=torch.float64)
    torch.testing.assert_close(estimate, expected, rtol=0, atol=0.001)


def test_pathwise_policy_loss_is_the_cross_entropy_and_its_gradient_the_chain_rule():
    classifier, policy, x, y = networks()
    generator = lambda: torch.Generator().manual_seed(5)
    loss, policy_loss, _ = noise_mask_step(
        classifier, policy, x, y, estimator="pathwise", generator=generator()
    )
    torch.testing.assert_close(policy_loss, loss)
    mask, _ = sample_noise_mask(policy(x), 16, pathwise=True, generator=generator())
    direct = F.cross_entropy(classifier(x * mask), y)
    parameters = list(policy.head.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(policy_loss, parameters, retain_graph=True),
        torch.autograd.grad(direct, parameters),
    )


def test_constant_reward_has_no_gradient_with_a_batch_baseline():
    log_prob = torch.randn(8, requires_grad=True)
    for baseline in ("batch_mean", "leave_one_out"):
        reinforce_loss(log_prob, torch.full((8,), 0.5), baseline=baseline).backward()
        assert (log_prob.grad == 0).all()


def test_constant_reward_has_no_expected_gradient_without_baseline():
    raw = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    alpha, beta = 1 + F.softplus(raw)
    dist = Beta(alpha.expand(100_000, 1, 1, 1), beta.expand(100_000, 1, 1, 1))
    _, log_prob = sample_noise_mask(dist, 1, generator=torch.Generator().manual_seed(0))
    reward = torch.ones(100_000, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(reinforce_loss(log_prob, reward, baseline=None), raw)
    # d log pi / d raw has a standard deviation of 0.4: 4 sigma of the mean are 0.005.
    assert gradient.abs().max() < 0.005


def test_leave_one_out_subtracts_the_mean_of_the_others():
    log_prob, reward = torch.randn(4, requires_grad=True), torch.tensor([1.0, 2.0, 3.0, 6.0])
    reinforce_loss(log_prob, reward, baseline="leave_one_out").backward()
    others = torch.stack([reward[torch.arange(4) != b].mean() for b in range(4)])
    torch.testing.assert_close(log_prob.grad, -(reward - others) / 4)


def test_a_callable_and_a_tensor_serve_as_baseline():
    log_prob, reward = torch.randn(4, requires_grad=True), torch.randn(4)
    ours = reinforce_loss(log_prob, reward, baseline=torch.tensor(0.5))
    torch.testing.assert_close(ours, -((reward - 0.5) * log_prob).mean())
    again = reinforce_loss(log_prob, reward, baseline=lambda r: r.max())
    torch.testing.assert_close(again, -((reward - reward.max()) * log_prob).mean())


def test_ema_baseline_returns_the_past_and_keeps_it_in_the_state_dict():
    baseline = EMABaseline(0.75)
    baseline(torch.tensor([1.0, 3.0]))
    assert baseline(torch.tensor([10.0])).item() == 2.0
    other = EMABaseline(0.75)
    other.load_state_dict(baseline.state_dict())
    assert other(torch.tensor([0.0])).item() == 0.75 * 2 + 0.25 * 10


def test_entropy_lowers_the_loss_by_its_weighted_mean():
    log_prob, reward, entropy = torch.randn(4), torch.randn(4), torch.randn(4)
    plain = reinforce_loss(log_prob, reward)
    torch.testing.assert_close(
        reinforce_loss(log_prob, reward, entropy=entropy, entropy_weight=0.1),
        plain - 0.1 * entropy.mean(),
    )


def test_mask_of_a_bandit_moves_to_where_the_reward_is():
    # Sheet of paper 73, fact 7: R = -(n - 0.8)^2 and Adam(0.05) on the two raw parameters.
    torch.set_num_threads(1)  # many small calls
    raw = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        alpha, beta = 1 + F.softplus(raw)
        dist = Beta(alpha.expand(256, 1, 1, 1), beta.expand(256, 1, 1, 1), validate_args=False)
        mask, log_prob = sample_noise_mask(dist, 1, generator=generator)
        optimizer.zero_grad()
        reinforce_loss(log_prob, -((mask.flatten() - 0.8) ** 2)).backward()
        optimizer.step()
    alpha, beta = 1 + F.softplus(raw.detach())
    assert alpha / (alpha + beta) > 0.75


@pytest.mark.parametrize("resting", [0, 1])
def test_evaluation_leaves_the_images_alone_and_the_policy_out(resting):
    classifier, policy, x, y = networks()
    (classifier, policy)[resting].eval()
    seen = []
    classifier.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    policy.register_forward_hook(lambda *_: pytest.fail("the policy was called"))
    loss, policy_loss, info = noise_mask_step(classifier, policy, x, y)
    assert seen[0] is x
    assert policy_loss.item() == 0
    torch.testing.assert_close(loss, F.cross_entropy(info["logits"], y))


@pytest.mark.parametrize("reward", ["neg_ce", "prob"])
def test_step_reports_what_it_drew(reward):
    classifier, policy, x, y = networks()
    loss, policy_loss, info = noise_mask_step(
        classifier, policy, x, y, reward=reward, kind="add", scale=0.3, entropy_weight=0.01
    )
    losses = F.cross_entropy(classifier(x + 0.3 * (2 * info["mask"] - 1)), y, reduction="none")
    torch.testing.assert_close(loss, losses.mean())
    gain = -losses if reward == "neg_ce" else (-losses).exp()
    torch.testing.assert_close(info["reward"], gain.detach())
    advantage = info["reward"] - info["reward"].mean()
    expected = -(advantage * info["log_prob"]).mean() - 0.01 * info["entropy"].mean()
    torch.testing.assert_close(policy_loss, expected)
    assert not any(value.requires_grad for value in info.values())


def test_bad_input_names_the_argument():
    dist, x, y = law(2.0, 2.0, (2, 1, 2, 2)), torch.ones(2, 3, 8, 8), torch.zeros(2).long()
    vector = torch.zeros(2)
    bad = Beta(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), validate_args=False)
    classifier, policy = nn.Flatten(), BetaNoisePolicy(3)
    cases = [
        (TypeError, "dist must", lambda: sample_noise_mask(torch.ones(1), 4)),
        (ValueError, "dist must", lambda: sample_noise_mask(Beta(vector + 1, vector + 1), 4)),
        (ValueError, "dist must have positive", lambda: sample_noise_mask(bad, 4)),
        (ValueError, "size must", lambda: sample_noise_mask(dist, (4, 5), mode="block")),
        (ValueError, "size must", lambda: sample_noise_mask(dist, 0)),
        (ValueError, "mode must", lambda: sample_noise_mask(dist, 4, mode="cubic")),
        (TypeError, "mask must", lambda: apply_noise_mask(x, x.int())),
        (ValueError, "mask must", lambda: apply_noise_mask(x, torch.ones(2, 1, 4, 8))),
        (ValueError, "mask must", lambda: apply_noise_mask(x, torch.ones(2, 2, 8, 8))),
        (ValueError, "kind must", lambda: apply_noise_mask(x, x, kind="divide")),
        (ValueError, "scale must", lambda: apply_noise_mask(x, x, scale=-1.0)),
        (ValueError, "log_prob must", lambda: reinforce_loss(x, vector)),
        (ValueError, "reward must", lambda: reinforce_loss(vector, torch.zeros(3))),
        (
            ValueError,
            "reward must not require",
            lambda: reinforce_loss(vector, torch.zeros(2, requires_grad=True)),
        ),
        (ValueError, "reward must not hold NaN", lambda: reinforce_loss(vector, vector / 0)),
        (ValueError, "baseline must", lambda: reinforce_loss(vector, vector, baseline="mean")),
        (
            ValueError,
            "leave_one_out",
            lambda: reinforce_loss(vector[:1], vector[:1], baseline="leave_one_out"),
        ),
        (ValueError, "entropy must", lambda: reinforce_loss(vector, vector, entropy_weight=0.1)),
        (ValueError, "entropy_weight", lambda: reinforce_loss(vector, vector, entropy_weight=-1)),
        (
            ValueError,
            "reward must be",
            lambda: noise_mask_step(classifier, policy, x, y, reward="accuracy"),
        ),
        (
            ValueError,
            "estimator must",
            lambda: noise_mask_step(classifier, policy, x, y, estimator="score"),
        ),
    ]
    for exception, message, call in cases:
        with pytest.raises(exception, match=message):
            call()
