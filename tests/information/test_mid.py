"""Mutual-information defence of networks and regression: the facts of the sheet of paper 167."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.information import (
    NoisyRegressor,
    VIBHead,
    gaussian_output_information,
    kde_information,
    linear_inversion_attack,
    mid_loss,
)
from tests.harness import GraphRecorder, MethodContract


class TestVIBHead(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return VIBHead(6, 3, dtype=dtype)

    def call(self, module, dtype):
        output = module(torch.linspace(-1, 1, 30, dtype=dtype).reshape(5, 6))
        return output.logits + output.mu.sum() + output.std.sum()

    def bad_inputs(self):
        head = VIBHead(6, 3)
        logits, mu = torch.zeros(2, 3), torch.zeros(2, 4)
        target = torch.tensor([0, 1])
        loss = lambda **changed: mid_loss(
            **{"logits": logits, "target": target, "mu": mu, "std": mu + 1} | changed
        )
        return [
            (ValueError, "in_dim must", lambda: VIBHead(0, 3)),
            (ValueError, "num_classes must", lambda: VIBHead(6, 1)),
            (ValueError, "latent_dim must", lambda: VIBHead(6, 3, latent_dim=0)),
            (ValueError, "std_floor must", lambda: VIBHead(6, 3, std_floor=-1.0)),
            (ValueError, "h must", lambda: head(torch.zeros(2, 5))),
            (TypeError, "h must", lambda: head(torch.zeros(2, 6).int())),
            (ValueError, "beta must", lambda: loss(beta=-1.0)),
            (ValueError, "reduction must", lambda: loss(reduction="max")),
            (ValueError, "logits, mu and std must", lambda: loss(std=mu[:1])),
            (TypeError, "mu must", lambda: loss(mu=mu.int())),
        ]


class TestNoisyRegressor(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return NoisyRegressor(nn.Linear(4, 1, dtype=dtype), noise_std=0.5)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 20, dtype=dtype).reshape(5, 4))

    def bad_inputs(self):
        regressor = self.build(torch.float32)
        x = torch.zeros(5, 4)
        return [
            (TypeError, "model must", lambda: NoisyRegressor(lambda x: x, noise_std=1.0)),
            (ValueError, "noise_std must", lambda: NoisyRegressor(nn.Identity(), noise_std=0.0)),
            (ValueError, "target must", lambda: regressor.loss(x, torch.zeros(5), lambda_mi=1.0)),
            (
                ValueError,
                "lambda_mi must",
                lambda: regressor.loss(x, torch.zeros(5, 1), lambda_mi=-1.0),
            ),
        ]


def _known(mu, std):
    """The bound alone: the loss at beta 1 less that at beta 0."""
    logits, target = torch.zeros(len(mu), 2, dtype=mu.dtype), torch.zeros(len(mu)).long()
    losses = [mid_loss(logits, target, mu, std, beta=beta) for beta in (1.0, 0.0)]
    return losses[0] - losses[1]


def test_code_at_the_prior_knows_nothing():
    assert _known(torch.zeros(3, 4), torch.ones(3, 4)) == 0


def test_bound_of_a_fresh_component_is_that_of_the_shifted_softplus():
    head = VIBHead(6, 2, latent_dim=1, dtype=torch.float64)
    for parameter in head.encoder.parameters():
        nn.init.zeros_(parameter)
    output = head(torch.zeros(3, 6, dtype=torch.float64))
    assert output.std[0, 0].item() == pytest.approx(0.00671535, abs=1e-8)
    assert _known(output.mu, output.std).item() == pytest.approx(4.503382, abs=1e-6)


def test_bound_is_summed_over_components_and_averaged_over_inputs():
    mu = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert _known(mu, torch.ones(2, 3)) == pytest.approx(0.75)


def test_reductions_agree():
    logits, mu, std = torch.randn(5, 3), torch.randn(5, 4), torch.rand(5, 4)
    target = torch.randint(3, (5,))
    each = mid_loss(logits, target, mu, std, reduction="none")
    torch.testing.assert_close(mid_loss(logits, target, mu, std), each.mean())
    torch.testing.assert_close(mid_loss(logits, target, mu, std, reduction="sum"), each.sum())


def test_beta_may_be_a_tensor_and_the_types_half():
    logits, mu, std = torch.randn(5, 3), torch.randn(5, 4), torch.rand(5, 4)
    half = [x.bfloat16() for x in (logits, mu, std)]
    target = torch.randint(3, (5,))
    found = mid_loss(half[0], target, *half[1:], beta=torch.tensor(0.1))
    assert found.dtype == torch.float32
    wide = [x.float() for x in half]
    torch.testing.assert_close(found, mid_loss(wide[0], target, *wide[1:], beta=0.1))


def test_a_schedule_of_beta_compiles_once(fresh_dynamo):
    logits, mu, std = torch.randn(5, 3), torch.randn(5, 4), torch.rand(5, 4)
    target = torch.randint(3, (5,))
    graphs = GraphRecorder()
    compiled = torch.compile(mid_loss, fullgraph=True, backend=graphs)
    for beta in torch.linspace(0, 0.1, 10):
        expected = mid_loss(logits, target, mu, std, beta=beta)
        torch.testing.assert_close(compiled(logits, target, mu, std, beta=beta), expected)
    assert len(graphs) == 1


def test_output_information_compiles(fresh_dynamo):
    pred = torch.randn(20, 2)
    compiled = torch.compile(gaussian_output_information, fullgraph=True, backend="aot_eager")
    for estimator in ("smallest", "lower"):
        expected = gaussian_output_information(pred, noise_std=0.5, estimator=estimator)
        found = compiled(pred, noise_std=0.5, estimator=estimator)
        torch.testing.assert_close(found, expected)


def test_a_deviation_that_underflows_stays_finite():
    std = torch.zeros(2, 3, requires_grad=True)
    loss = _known(torch.zeros(2, 3), std)
    loss.backward()
    assert loss.isfinite()
    assert std.grad.isfinite().all()


def test_noise_stays_on_in_evaluation_unless_told_otherwise():
    h = torch.randn(4, 6)
    head = VIBHead(6, 3, std_shift=0.0).eval()
    assert not torch.equal(head(h).logits, head(h).logits)
    assert torch.equal(head(h, sample=False).logits, head(h, sample=False).logits)
    head = VIBHead(6, 3, std_shift=0.0, eval_mean=True)
    assert not torch.equal(head(h).logits, head(h).logits)
    assert torch.equal(head.eval()(h).logits, head(h, sample=False).logits)
    assert not torch.equal(head(h, sample=True).logits, head(h, sample=True).logits)


def test_noise_comes_from_the_generator():
    h, head = torch.randn(4, 6), VIBHead(6, 3)
    one, two = (head(h, generator=torch.Generator().manual_seed(1)).logits for _ in range(2))
    assert torch.equal(one, two)


def test_without_beta_and_noise_it_is_the_deterministic_classifier():
    h, target = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    head = VIBHead(6, 3, std_shift=200.0)  # the deviation underflows
    logits, mu, std = head(h)
    plain = head.classifier(head.encoder(h)[:, :3])
    assert torch.equal(logits, plain)
    torch.testing.assert_close(
        mid_loss(logits, target, mu, std, beta=0.0), F.cross_entropy(plain, target)
    )


def test_moment_bound_of_gaussian_predictions_is_exact():
    pred = torch.randn(4000, dtype=torch.float64)
    pred = 2 * (pred - pred.mean()) / pred.std(correction=0)
    found = gaussian_output_information(pred, noise_std=1.0, estimator="moment")
    assert found == pytest.approx(0.804719, abs=1e-6)


def test_pairwise_bounds_of_gaussian_predictions_are_the_known_ones():
    # Upper: moment + F / (2 (F + s^2)), but for the tails beyond 1000 quantiles.
    share = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    pred = 2 * torch.special.ndtri(share)
    upper = gaussian_output_information(pred, noise_std=1.0)
    lower = gaussian_output_information(pred, noise_std=1.0, estimator="lower")
    smallest = gaussian_output_information(pred, noise_std=1.0, estimator="smallest")
    assert upper == pytest.approx(1.2047, abs=0.03)
    assert lower == pytest.approx(0.5966, abs=0.03)
    assert smallest == gaussian_output_information(pred, noise_std=1.0, estimator="moment")


def test_pairwise_bound_of_two_far_groups_is_log_2():
    pred = torch.tensor([0.0, 20.0]).repeat(50)
    pairwise, moment, smallest = (
        gaussian_output_information(pred, noise_std=1.0, estimator=estimator)
        for estimator in ("pairwise", "moment", "smallest")
    )
    assert pairwise == pytest.approx(math.log(2), abs=1e-6)
    assert moment > 2
    assert smallest == pairwise


def test_moment_bound_in_many_dimensions_adds_up_over_independent_ones():
    pred = torch.zeros(4, 2, dtype=torch.float64)
    pred[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    pred[:, 1] = torch.tensor([2.0, -2.0, 2.0, -2.0])
    joint = gaussian_output_information(pred, noise_std=0.5, estimator="moment")
    apart = sum(
        gaussian_output_information(pred[:, i], noise_std=0.5, estimator="moment") for i in (0, 1)
    )
    torch.testing.assert_close(joint, apart)


@pytest.mark.parametrize("estimator", ["pairwise", "moment", "lower"])
def test_more_noise_reveals_less_and_a_constant_nothing(estimator):
    pred = torch.randn(100, 2)
    bounds = [
        gaussian_output_information(pred, noise_std=s, estimator=estimator) for s in (0.5, 1.0, 2.0)
    ]
    assert bounds[0] > bounds[1] > bounds[2]
    constant = gaussian_output_information(torch.ones(9), noise_std=1.0, estimator=estimator)
    assert constant == pytest.approx(0, abs=1e-6)


def test_pairwise_bound_is_at_most_log_n():
    pred = 1e6 * torch.randn(50)
    assert gaussian_output_information(pred, noise_std=1e-3) <= math.log(50) + 1e-6


@pytest.mark.parametrize("estimator", ["pairwise", "moment", "lower"])
def test_output_information_has_its_derivative(estimator):
    pred = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    call = lambda pred: gaussian_output_information(pred, noise_std=0.7, estimator=estimator)
    assert torch.autograd.gradcheck(call, pred)


def test_output_information_of_bad_input_names_the_argument():
    for exception, name, call in [
        (TypeError, "pred must", lambda: gaussian_output_information(LONG, noise_std=1.0)),
        (ValueError, "pred must", lambda: gaussian_output_information(torch.zeros(0), noise_std=1)),
        (ValueError, "noise_std must", lambda: gaussian_output_information(PRED, noise_std=0.0)),
        (
            ValueError,
            "estimator must",
            lambda: gaussian_output_information(PRED, noise_std=1.0, estimator="exact"),
        ),
    ]:
        with pytest.raises(exception, match=name):
            call()


PRED = torch.zeros(3)
LONG = PRED.long()


def test_regression_loss_is_the_error_plus_lambda_times_the_bound():
    regressor = NoisyRegressor(nn.Linear(4, 2), noise_std=0.5)
    x, y = torch.randn(30, 4), torch.randn(30, 2)
    seeded = lambda: torch.Generator().manual_seed(3)
    noisy = regressor(x, generator=seeded())
    revealed = gaussian_output_information(regressor.model(x), noise_std=0.5)
    found = regressor.loss(x, y, lambda_mi=0.3, generator=seeded())
    torch.testing.assert_close(found, F.mse_loss(noisy, y) + 0.3 * revealed)


def test_regressor_adds_its_noise_in_evaluation_too():
    regressor = NoisyRegressor(nn.Identity(), noise_std=0.5).eval()
    released = regressor(torch.zeros(10000))
    assert released.std() == pytest.approx(0.5, abs=0.02)


def test_a_penalty_on_the_bound_shrinks_what_regression_reveals():
    x = torch.randn(200, 3)
    y = x @ torch.tensor([[1.0], [-1.0], [0.5]])

    def revealed(lambda_mi):
        torch.manual_seed(0)
        regressor = NoisyRegressor(nn.Linear(3, 1), noise_std=0.3)
        optimizer = torch.optim.Adam(regressor.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            regressor.loss(x, y, lambda_mi=lambda_mi).backward()
            optimizer.step()
        return gaussian_output_information(regressor.model(x).detach(), noise_std=0.3)

    assert revealed(2.0) < revealed(0.0) - 0.5


def test_lower_kernel_bound_of_the_means_stays_below_the_variational_one():
    for spread in (0.1, 1.0, 3.0):
        mu = spread * torch.randn(300, 4, dtype=torch.float64)
        for std in (0.1, 1.0):
            kernel = kde_information(
                mu, torch.zeros(300).int(), noise_var=std**2, bound="lower", base=math.e
            ).input
            assert kernel <= _known(mu, torch.full_like(mu, std)) + 0.1


@pytest.mark.slow
def test_the_bottleneck_hides_inputs_from_a_linear_inversion():
    # Sheet of paper 167: 4 Gaussian classes in 20 dimensions; R^2 0.598 at beta 0 and 0.387 at 0.1.
    generator = torch.Generator().manual_seed(0)
    centers = 1.5 * torch.randn(4, 20, generator=generator)

    def draw():
        label = torch.randint(4, (800,), generator=generator)
        return centers[label] + torch.randn(800, 20, generator=generator), label

    (x, y), (test_x, test_y) = draw(), draw()

    def train(beta):
        torch.manual_seed(0)
        body, head = nn.Sequential(nn.Linear(20, 32), nn.ReLU()), VIBHead(32, 4)
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=3e-3)
        for _ in range(300):
            optimizer.zero_grad()
            logits, mu, std = head(body(x))
            mid_loss(logits, y, mu, std, beta=beta).backward()
            optimizer.step()
        with torch.no_grad():
            logits = head(body(test_x)).logits
        accuracy = (logits.argmax(1) == test_y).double().mean()
        return linear_inversion_attack(logits, test_x, generator=generator), accuracy

    (open_r2, _), (hidden_r2, accuracy) = train(0.0), train(0.1)
    assert hidden_r2 < open_r2 - 0.1
    assert accuracy >= 0.9
