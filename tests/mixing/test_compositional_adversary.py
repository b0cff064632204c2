"""Compositional adversarial training (paper 26): the method contract and the facts of its sheet."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.mixing import (
    CompositionalAdversary,
    GradientReversal,
    TransformFamily,
    bit_accuracy,
    cat_step,
    default_families,
    straight_through_gumbel,
)
from tests.harness import MethodContract


class Blind(nn.Module):
    """An encoder that sees nothing: the policy is a table of logits."""

    def __init__(self, hidden=4):
        super().__init__()
        self.hidden = hidden

    def forward(self, x):
        return x.new_zeros(len(x), self.hidden)


class Product:
    """x @ matrix, and noise where a generator is given."""

    def __init__(self, matrix, noise=0.0):
        self.matrix, self.noise = matrix, noise

    def __call__(self, x, strength, generator=None):
        y = x @ self.matrix.to(x)
        return y + self.noise * torch.randn(x.shape, generator=generator) if self.noise else y


def _linear_families(count=5, features=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(count, features, features, generator=generator, dtype=torch.float64)
    return [
        TransformFamily(f"linear {k}", Product(m), (0.0, 1.0))
        for k, m in enumerate(matrices.to(dtype))
    ]


def _adversary(families=None, dtype=torch.float32, **options):
    families = _linear_families(dtype=dtype) if families is None else families
    options = {"encoder": Blind(), "hidden": 4, **options}
    return CompositionalAdversary(families, **options).to(dtype)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestContract(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        adversary = _adversary(encoder=nn.Linear(6, 4)).to(dtype)
        nn.init.normal_(adversary.head.weight)
        return adversary

    def call(self, module, dtype):
        x = torch.randn(8, 6, generator=_generator(1)).to(dtype)
        return module(x).x

    def bad_inputs(self):
        families = _linear_families()
        adversary, x = _adversary(), torch.ones(2, 6)
        broken = _adversary()
        nn.init.constant_(broken.head.bias, math.nan)
        cut = TransformFamily("cut", lambda x, s: x[:, :1], (0.0, 1.0))
        logits = torch.zeros(2, 3)
        return [
            (ValueError, "families", lambda: _adversary([])),
            (ValueError, "num_steps", lambda: _adversary(num_steps=0)),
            (ValueError, "hidden", lambda: CompositionalAdversary(families, hidden=0)),
            (ValueError, "temperature", lambda: _adversary(temperature=0.0)),
            (ValueError, "backward", lambda: _adversary(backward="rough")),
            (ValueError, "evaluated", lambda: _adversary(evaluated=2)),
            (ValueError, "evaluated", lambda: _adversary(backward="hard", evaluated=6)),
            (ValueError, "fn of family 'cut'", lambda: _adversary([cut])(x)),
            (ValueError, "logits", lambda: broken(x)),
            (TypeError, "x must", lambda: adversary(x.long())),
            (ValueError, "logits", lambda: straight_through_gumbel(logits * math.inf)),
            (ValueError, "temperature", lambda: straight_through_gumbel(logits, 0.0)),
            (ValueError, "entropy_weight", lambda: cat_step(adversary, x, sum, entropy_weight=-1)),
            (ValueError, "recover_loss_fn", lambda: cat_step(adversary, x, lambda x: x)),
            (ValueError, "scale", lambda: GradientReversal(-1.0)),
        ]


OPTIONS = [{"backward": "soft"}, {"backward": "hard"}, {"backward": "hard", "evaluated": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_equals_the_chosen_transforms(options):
    adversary, x = _adversary(num_steps=3, **options), torch.randn(40, 6)
    attack = adversary(x, generator=_generator())
    assert attack.choice.unique().numel() == 5
    expected = x
    for t in range(3):
        results = torch.stack([family(expected) for family in adversary.families])
        expected = results[attack.choice[:, t], torch.arange(40)]
    # A product of some rows and one of all differ in rounding.
    torch.testing.assert_close(attack.x.detach(), expected, rtol=1e-5, atol=1e-4)


def test_one_family_is_plain_augmentation_with_no_entropy():
    adversary, x = _adversary(_linear_families(1), num_steps=1), torch.randn(4, 6)
    attack = adversary(x)
    assert adversary.entropy(attack.logits).item() == 0
    torch.testing.assert_close(attack.x.detach(), adversary.families[0](x))


def _chi_squared(choice, count):
    observed = choice.flatten().bincount(minlength=count)
    expected = choice.numel() / count
    return ((observed - expected).square() / expected).sum().item()


def test_choices_are_uniform_at_first():
    attack = _adversary()(torch.randn(5000, 6), generator=_generator())
    assert attack.logits.abs().max() == 0
    assert _chi_squared(attack.choice, 5) < 18.5  # 0.1 % of chi squared with 4 degrees


def test_a_large_entropy_weight_makes_choices_uniform():
    adversary, x = _adversary(num_steps=1), torch.randn(512, 6)
    with torch.no_grad():
        adversary.head.bias.copy_(torch.tensor([2.0, 0.0, -1.0, 0.0, 1.0]))
    optimizer = torch.optim.Adam(adversary.parameters(), 0.1)
    assert _chi_squared(adversary(x, generator=_generator()).choice, 5) > 100
    for step in range(80):
        optimizer.zero_grad()
        loss = lambda attacked: attacked.square().mean()
        cat_step(adversary, x, loss, entropy_weight=1e4, generator=_generator(step)).loss.backward()
        optimizer.step()
    choice = adversary(torch.randn(5000, 6), generator=_generator()).choice
    assert _chi_squared(choice, 5) < 18.5


def test_index_follows_the_softmax_whatever_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(50_000, 3)
    for temperature in (0.1, 5.0):
        weights, index = straight_through_gumbel(logits, temperature, _generator())
        frequency = index.bincount(minlength=3) / 50_000
        # Five standard deviations of a frequency.
        torch.testing.assert_close(frequency, logits[0].softmax(0), rtol=0, atol=0.0112)
        assert torch.equal(weights, F.one_hot(index, 3).float())


def test_a_low_temperature_makes_the_gradient_rare_and_large():
    values = torch.tensor([1.0, 2.0, 4.0])
    variances = []
    for temperature in (2.0, 0.5, 0.1):
        logits = torch.zeros(20_000, 3).requires_grad_()
        weights, _ = straight_through_gumbel(logits, temperature, _generator())
        (gradient,) = torch.autograd.grad((weights @ values).sum(), logits)
        variances.append(gradient.var(0).sum().item())
    assert variances == sorted(variances)
    assert variances[2] > 5 * variances[0]


def _policy(logits, temperature, seed):
    """The softmax of a step that draws its Gumbel variables first."""
    u = torch.rand(logits.shape, generator=_generator(seed))
    return ((logits - torch.log(-torch.log(u))) / temperature).softmax(-1)


@pytest.mark.parametrize("backward", ["soft", "hard"])
def test_selector_gets_the_softmax_jacobian_of_all_families(backward):
    adversary = _adversary(num_steps=1, backward=backward, temperature=0.7)
    with torch.no_grad():
        adversary.head.bias.copy_(torch.randn(5))
    x, g = torch.randn(1, 6), torch.randn(1, 6)
    attack = adversary(x, generator=_generator(4))
    (found,) = torch.autograd.grad(attack.x, adversary.head.bias, g)
    s = _policy(attack.logits[0].detach(), 0.7, 4)[0]
    c = torch.stack([(g * family(x)).sum() for family in adversary.families])
    torch.testing.assert_close(found, s * (c - (s * c).sum()) / 0.7)


def test_image_gets_the_chosen_jacobian_or_the_weighted_ones():
    x, g = torch.randn(1, 6, requires_grad=True), torch.randn(1, 6)
    found = {}
    for name, options in zip(("soft", "hard", "chosen"), OPTIONS, strict=True):
        adversary = _adversary(num_steps=1, **options)
        attack = adversary(x, generator=_generator(4))
        (found[name],) = torch.autograd.grad(attack.x, x, g)
    jacobians = [torch.autograd.grad(family(x), x, g)[0] for family in adversary.families]
    s = _policy(torch.zeros(1, 5), 1.0, 4)[0]
    weighted = sum(weight * jacobian for weight, jacobian in zip(s, jacobians, strict=True))
    torch.testing.assert_close(found["soft"], weighted)
    torch.testing.assert_close(found["hard"], jacobians[attack.choice.item()])
    torch.testing.assert_close(found["chosen"], jacobians[attack.choice.item()])


def test_evaluating_some_families_gives_the_gradient_of_all_on_average():
    x, g = torch.randn(1, 6), torch.randn(1, 6)
    gradients = {}
    for evaluated in (None, 2):
        adversary = _adversary(num_steps=1, backward="hard", evaluated=evaluated)
        found = []
        for seed in range(400):
            attack = adversary(x, generator=_generator(seed))
            found += torch.autograd.grad(attack.x, adversary.head.bias, g)
        gradients[evaluated] = torch.stack(found)
    # The same Gumbel variables: they differ by the drawn families alone.
    difference = gradients[2] - gradients[None]
    error = difference.std(0) / 400**0.5
    assert (difference.mean(0).abs() < 4 * error).all()


def test_selector_does_not_reach_the_image():
    adversary = _adversary(num_steps=1, encoder=nn.Linear(6, 4))
    nn.init.normal_(adversary.head.weight)
    x = torch.randn(3, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(adversary(x).logits.sum(), x, allow_unused=True)
    assert gradient is None


FIXED = torch.randn(64, 6, generator=_generator())


def _game(entropy_weight=0.02):
    torch.manual_seed(0)
    adversary = _adversary(encoder=nn.Linear(6, 4))
    defender = nn.Linear(6, 6)
    nn.init.normal_(adversary.head.weight)

    def step():
        loss = lambda attacked: attacked.square().mean()
        generator = _generator(1)
        return cat_step(
            adversary, defender(FIXED), loss, entropy_weight=entropy_weight, generator=generator
        )

    return adversary, defender, step


def test_one_backward_gives_both_sides_their_gradients():
    adversary, defender, step = _game()
    found = step()
    found.loss.backward()
    # The two sides one by one, without reversal.
    attack = adversary(defender(FIXED), generator=_generator(1))
    loss, entropy = attack.x.square().mean(), adversary.entropy(attack.logits)
    for side, objective in ((defender, loss), (adversary, -(loss + 0.02 * entropy))):
        expected = torch.autograd.grad(objective, tuple(side.parameters()), retain_graph=True)
        for parameter, gradient in zip(side.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(found.defender_loss, loss.detach())
    torch.testing.assert_close(found.adversary_loss, -(loss + 0.02 * entropy).detach())


def test_adversary_step_raises_and_defender_step_lowers_the_loss():
    for side, sign in (("adversary", 1), ("defender", -1)):
        adversary, defender, step = _game(entropy_weight=0.0)
        parameters = (adversary if side == "adversary" else defender).parameters()
        optimizer = torch.optim.SGD(parameters, 1e-2)
        before = step()
        for _ in range(30):
            optimizer.zero_grad()
            step().loss.backward()
            optimizer.step()
        after = step()
        assert sign * (after.defender_loss - before.defender_loss) > 0, side


def test_identity_and_two_steps_cover_single_attacks():
    identity = TransformFamily("identity", lambda x, s: x, (0.0, 0.0))
    flip = TransformFamily("flip", lambda x, s: x.flip(-1), (0.0, 0.0))
    adversary = _adversary([identity, flip], num_steps=2)
    with torch.no_grad():
        adversary.step_embedding.weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 4))
        adversary.head.weight.copy_(torch.tensor([[5.0], [-5.0]]).expand(2, 4))
    x = torch.randn(7, 6)
    attack = adversary(x, generator=_generator())
    assert attack.choice.tolist() == [[0, 1]] * 7
    assert torch.equal(attack.x.detach(), x.flip(-1))


def test_deterministic_attacks_take_the_likeliest_family_and_the_middle_strength():
    gain = TransformFamily("gain", lambda x, s: x * s[:, None], (1.0, 5.0))
    zero = TransformFamily("zero", lambda x, s: x * 0, (0.0, 0.0))
    adversary = _adversary([zero, gain], num_steps=1)
    with torch.no_grad():
        adversary.head.bias.copy_(torch.tensor([0.0, 0.1]))
    x = torch.randn(20, 6)
    assert torch.equal(adversary(x, deterministic=True).x.detach(), 3 * x)


def test_learned_strengths_follow_the_loss():
    gain = TransformFamily("gain", lambda x, s: x * s[:, None], (0.5, 2.0))
    adversary = _adversary([gain], num_steps=1, learn_strength=True)
    optimizer = torch.optim.Adam(adversary.parameters(), 0.1)
    x = torch.randn(16, 6)
    for _ in range(50):
        optimizer.zero_grad()
        cat_step(adversary, x, lambda attacked: attacked.square().mean()).loss.backward()
        optimizer.step()
    ratio = (adversary(x).x / x).detach()
    assert ratio.min() > 1.9  # the strongest gain is 2


def test_generator_reproduces_an_attack_on_images():
    adversary = CompositionalAdversary(default_families(), num_steps=2, hidden=8)
    x = torch.rand(6, 3, 16, 16)
    first, second = (adversary(x, generator=_generator(3)) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.choice, second.choice)


def test_reversal_is_exact_forward_and_scaled_backward():
    x = (1e4 * torch.randn(9)).requires_grad_()
    y = GradientReversal(0.5)(x)
    assert torch.equal(y, x)
    cotangent = torch.randn(9)
    torch.testing.assert_close(torch.autograd.grad(y, x, cotangent)[0], -0.5 * cotangent)


def _train(entropy_weight, seed):
    """Bits through 15 mild linear attacks and a sign-flipped rotation; worst and mean accuracy."""
    generator = _generator(seed)
    eye = torch.eye(24)
    mild = [eye + 0.03 * torch.randn(24, 24, generator=generator) for _ in range(15)]
    hard = -torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]

    families = [
        TransformFamily(str(k), Product(m.T, noise=0.4), (0.0, 0.0), random=True)
        for k, m in enumerate([*mild, hard])
    ]
    torch.manual_seed(seed)
    embedder = nn.Linear(12, 24)
    extractor = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 12))
    adversary = _adversary(families, num_steps=1)
    parameters = [*embedder.parameters(), *extractor.parameters()]
    if entropy_weight is not None:
        parameters.append(adversary.head.bias)  # the policy is a table of logits
    optimizer = torch.optim.Adam(parameters, 3e-3)
    for _ in range(400):
        bits = torch.randint(2, (128, 12), generator=generator).float()
        recover = lambda x, b=bits: F.binary_cross_entropy_with_logits(extractor(x), b)
        optimizer.zero_grad()
        marked = torch.tanh(embedder(2 * bits - 1))
        weight = entropy_weight or 0.0
        cat_step(
            adversary, marked, recover, entropy_weight=weight, generator=generator
        ).loss.backward()
        optimizer.step()
    with torch.no_grad():
        bits = torch.randint(2, (4000, 12), generator=generator).float()
        x = torch.tanh(embedder(2 * bits - 1))
        accuracy = torch.stack(
            [bit_accuracy(extractor(f(x, generator=generator)), bits).mean() for f in families]
        )
    return accuracy.min().item(), accuracy.mean().item()


@pytest.mark.slow
def test_training_against_the_adversary_lifts_the_worst_attack():
    torch.set_num_threads(1)
    random, trained = _train(None, 0), _train(0.02, 0)
    assert trained[0] > random[0] + 0.05  # 0.94 against 0.80
    assert trained[1] > random[1] - 0.03
