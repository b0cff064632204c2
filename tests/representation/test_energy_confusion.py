"""Energy confusion: the facts of the sheet of paper 145, and the energy distance."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.representation import ECAML, energy_confusion, energy_distance
from tests.harness import DTYPES, MethodContract

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, class sums against double sums
LABELS = torch.tensor([7, -2, 7, 0, 0, 7, -2, 0, 7])  # classes of 4, 2 and 3


def _embeddings(n=9, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


def _by_pairs(x, labels):
    """Mean squared distance of every pair of classes, and how many pairs of samples it has."""
    squares = (x[:, None] - x).square().sum(-1)
    classes = labels.unique()
    found = [
        squares[labels == first][:, labels == second]
        for place, first in enumerate(classes)
        for second in classes[place + 1 :]
    ]
    return torch.stack([part.mean() for part in found]), torch.tensor([p.numel() for p in found])


def _contrast(x, y):
    same = y[:, None] == y
    squares = (x[:, None] - x).square().sum(-1)
    return torch.where(same, squares, (1 - squares).relu()).mean()


class _Model(nn.Module):
    """An embedding layer under ECAML: the parameters that the contract asks for."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 5, dtype=dtype)
        self.loss = ECAML(_contrast, weight=0.2)

    def forward(self, x):
        return self.loss(self.embed(x), torch.arange(len(x)) % 3)


class TestECAML(MethodContract):
    def build(self, dtype):
        return _Model(dtype)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 27).reshape(9, 3).to(dtype)).to(dtype)

    def bad_inputs(self):
        x, y = torch.randn(4, 3), torch.arange(4)
        return [
            (TypeError, "metric_loss must", lambda: ECAML(3)),
            (ValueError, "weight must", lambda: ECAML(_contrast, weight=-1.0)),
            (ValueError, "adversarial must", lambda: ECAML(_contrast, adversarial="reverse")),
            (ValueError, "pairs must", lambda: ECAML(_contrast, pairs="some")),
            (ValueError, "weighting must", lambda: ECAML(_contrast, weighting="none")),
            (ValueError, "features must", lambda: ECAML(_contrast)(x, y, features=x)),
            (ValueError, "features must", lambda: ECAML(_contrast, adversarial="features")(x, y)),
        ]


def test_worked_value():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = energy_confusion(x, torch.tensor([0, 0, 1]), normalize=False)
    assert found.item() == pytest.approx(3.0)  # |(1, 0) - (0, 1)|^2 + 1 + 0


@pytest.mark.parametrize("weighting", ["class", "pair"])
def test_class_sums_equal_the_double_sum(weighting):
    x = _embeddings()
    means, counts = _by_pairs(x, LABELS)
    weights = counts.double() if weighting == "pair" else torch.ones(3).double()
    options = {"weighting": weighting, "normalize": False}
    mean = energy_confusion(x, LABELS, **options)
    torch.testing.assert_close(mean, (weights * means).sum() / weights.sum(), **EXACT)
    total = energy_confusion(x, LABELS, reduction="sum", **options)
    torch.testing.assert_close(total, (weights * means).sum(), **EXACT)


@pytest.mark.parametrize("weighting", ["class", "pair"])
def test_terms_of_samples_are_their_distances_from_the_other_classes(weighting):
    x = _embeddings()
    squares = (x[:, None] - x).square().sum(-1)
    size = (LABELS[:, None] == LABELS).sum(1)
    weight = 1 / size.double() if weighting == "class" else torch.ones(9).double()
    weight = torch.where(LABELS[:, None] == LABELS, 0, weight)
    expected = (weight * squares).sum(1) / weight.sum(1)
    found = energy_confusion(x, LABELS, weighting=weighting, normalize=False, reduction="none")
    torch.testing.assert_close(found, expected, **EXACT)


def test_weightings_agree_in_balanced_batches():
    x, labels = _embeddings(), torch.arange(9) % 3
    found = [energy_confusion(x, labels, weighting=weighting) for weighting in ("class", "pair")]
    torch.testing.assert_close(*found, **EXACT)


def test_unit_vectors_give_two_less_twice_the_product_of_the_means():
    x, labels = F.normalize(_embeddings()), torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 1])
    first, second = (x[labels == label].mean(0) for label in (0, 1))
    found = energy_confusion(3 * x, labels)
    torch.testing.assert_close(found, 2 - 2 * first @ second, **EXACT)


def test_values_of_unit_vectors_lie_between_zero_and_four():
    labels = torch.tensor([0, 0, 1, 1])
    same = torch.ones(4, 3, dtype=torch.float64)
    assert energy_confusion(same, labels).item() == pytest.approx(0.0, abs=1e-14)
    opposed = same * torch.tensor([1.0, 1.0, -1.0, -1.0]).double()[:, None]
    assert energy_confusion(opposed, labels).item() == pytest.approx(4.0)


def test_rotation_relabelling_and_duplication_change_nothing():
    x = _embeddings()
    turn, _ = torch.linalg.qr(_embeddings(4, 4, seed=1))
    expected = energy_confusion(x, LABELS)
    torch.testing.assert_close(energy_confusion(x @ turn, LABELS), expected, **EXACT)
    torch.testing.assert_close(energy_confusion(x, 5 - 3 * LABELS), expected, **EXACT)
    torch.testing.assert_close(energy_confusion(x, LABELS.int()), expected, **EXACT)
    for weighting in ("class", "pair"):
        found = energy_confusion(x.repeat(2, 1), LABELS.repeat(2), weighting=weighting)
        torch.testing.assert_close(found, energy_confusion(x, LABELS, weighting=weighting), **EXACT)


@pytest.mark.parametrize("options", [{}, {"weighting": "pair"}], ids=str)
def test_gradient_of_a_sample_does_not_know_its_class_mates(options):
    def gradient_of_first(x):
        x = x.clone().requires_grad_()
        loss = energy_confusion(x, LABELS, normalize=False, **options)
        return torch.autograd.grad(loss, x)[0][0]

    x = _embeddings()
    moved = x.clone()
    moved[LABELS == 7] += _embeddings(4, seed=5) * torch.tensor([0.0, 1.0, 1.0, 1.0])[:, None]
    torch.testing.assert_close(gradient_of_first(moved), gradient_of_first(x), **EXACT)


def test_a_random_pair_draws_each_sample_to_the_mean_of_the_other_class():
    x = _embeddings().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    loss = energy_confusion(x, LABELS, pairs="random", normalize=False, generator=generator)
    (gradient,) = torch.autograd.grad(loss, x)
    chosen = LABELS[gradient.abs().sum(1) > 0].unique()
    assert len(chosen) == 2
    first, second = (label == LABELS for label in chosen)
    expected = torch.zeros_like(x)
    expected[first] = 2 * (x[first] - x[second].mean(0)) / first.sum()
    expected[second] = 2 * (x[second] - x[first].mean(0)) / second.sum()
    torch.testing.assert_close(gradient, expected.detach(), **EXACT)
    means, _ = _by_pairs(x[first | second], LABELS[first | second])
    torch.testing.assert_close(loss, means[0], **EXACT)


def test_random_pairs_are_uniform_and_decided_by_the_generator():
    x = _embeddings()
    draw = lambda generator: energy_confusion(x, LABELS, pairs="random", generator=generator)
    assert draw(torch.Generator().manual_seed(1)) == draw(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    values, counts = torch.stack([draw(generator) for _ in range(600)]).unique(return_counts=True)
    assert len(values) == 3
    assert (counts - 200).abs().max() < 47  # four standard deviations of a share of a third


@pytest.mark.parametrize("pairs", ["all", "random"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_class_gives_zero_with_a_live_graph(pairs, reduction):
    x = _embeddings().requires_grad_()
    found = energy_confusion(x, torch.ones(9).long(), pairs=pairs, reduction=reduction)
    assert (found == 0).all()
    found.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("options", [{}, {"weighting": "pair"}, {"reduction": "none"}], ids=str)
def test_gradcheck(options):
    x = _embeddings(6, 3).requires_grad_()
    loss = lambda x: energy_confusion(x, LABELS[:6], **options)
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_types_give_float32(dtype):
    x = _embeddings().to(dtype)
    found = energy_confusion(x, LABELS)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = energy_confusion(x.double(), LABELS)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_nan_gives_nan():
    x = _embeddings()
    x[0, 0] = math.nan
    assert energy_confusion(x, LABELS).isnan()
    assert energy_confusion(x, torch.ones(9).long()).isnan()


def test_a_weight_of_zero_is_the_metric_loss_itself():
    x, y = _embeddings(), LABELS
    assert torch.equal(ECAML(_contrast, weight=0.0)(x, y), _contrast(x, y))


def test_the_weight_may_change():
    x, loss = _embeddings(), ECAML(_contrast, weight=0.0)
    loss.weight = 0.5
    expected = _contrast(x, LABELS) + 0.5 * energy_confusion(x, LABELS)
    torch.testing.assert_close(loss(x, LABELS), expected)
    with pytest.raises(ValueError, match="weight must"):
        loss.weight = -1.0


def test_joint_adds_the_confusion_of_the_embeddings():
    x = _embeddings()
    expected = _contrast(x, LABELS) + 0.3 * energy_confusion(x, LABELS, weighting="pair")
    found = ECAML(_contrast, weight=0.3, weighting="pair")(x, LABELS)
    torch.testing.assert_close(found, expected)


def test_confused_features_leave_the_embedding_layer_to_the_metric_loss():
    torch.manual_seed(0)
    backbone, embed = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

    def gradients(weight):
        features = backbone(_embeddings()).tanh()
        loss = ECAML(_contrast, weight=weight, adversarial="features")
        total = loss(embed(features), LABELS, features=features)
        return torch.autograd.grad(total, [backbone.weight, embed.weight])

    plain, confused = gradients(0.0), gradients(1.0)
    assert not torch.allclose(plain[0], confused[0])
    assert torch.equal(plain[1], confused[1])


@pytest.mark.parametrize("power", [0.5, 1.0, 1.7, 2.0])
def test_energy_distance_is_its_formula(power):
    x, y = _embeddings(7), _embeddings(5, seed=1)
    mean = lambda a, b: (a[:, None] - b).norm(dim=-1).pow(power).mean()
    expected = 2 * mean(x, y) - mean(x, x) - mean(y, y)
    torch.testing.assert_close(energy_distance(x, y, power=power), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_energy_distance_of_equal_samples_is_zero_with_a_finite_gradient(power):
    x = _embeddings().requires_grad_()
    found = energy_distance(x, x.detach().clone(), power=power)
    assert abs(found) < 1e-7  # distances from a matrix product, near 0
    (gradient,) = torch.autograd.grad(found, x)
    assert gradient.isfinite().all()


def test_twice_the_energy_confusion_bounds_the_squared_energy_distance():
    x, y = _embeddings(7), _embeddings(5, seed=1)
    labels = torch.tensor([0] * 7 + [1] * 5)
    confusion = energy_confusion(torch.cat([x, y]), labels, normalize=False)
    assert energy_distance(x, y, power=2.0) <= 2 * confusion


def test_bad_input_names_the_argument():
    x, y = torch.randn(4, 3), torch.arange(4)
    for exception, name, call in [
        (TypeError, "embeddings must", lambda: energy_confusion(x.long(), y)),
        (TypeError, "labels must", lambda: energy_confusion(x, y.float())),
        (TypeError, "labels must", lambda: energy_confusion(x, y > 1)),
        (ValueError, "labels must", lambda: energy_confusion(x, y[:3])),
        (ValueError, "labels must", lambda: energy_confusion(x, y[:, None])),
        (ValueError, "embeddings must", lambda: energy_confusion(x[:1], y[:1])),
        (ValueError, "embeddings must", lambda: energy_confusion(x[:, :0], y)),
        (ValueError, "reduction must", lambda: energy_confusion(x, y, reduction="all")),
        (ValueError, "pairs must", lambda: energy_confusion(x, y, pairs="two")),
        (ValueError, "weighting must", lambda: energy_confusion(x, y, weighting="size")),
        (ValueError, "x and y must", lambda: energy_distance(x, x[:, :2])),
        (ValueError, "x and y must", lambda: energy_distance(x, x[:0])),
        (TypeError, "y must", lambda: energy_distance(x, x.double())),
        (ValueError, "power must", lambda: energy_distance(x, x, power=0.0)),
        (ValueError, "power must", lambda: energy_distance(x, x, power=2.5)),
    ]:
        with pytest.raises(exception, match=name):
            call()


def test_confusion_draws_seen_classes_together_and_keeps_them_apart():
    def triplet(x, y):
        x = F.normalize(x)
        squares = 2 - 2 * x @ x.T
        same = y[:, None] == y
        positive = torch.where(same, squares, -1).amax(1)
        negative = torch.where(same, 5, squares).amin(1)
        return (positive - negative + 0.2).relu().mean()

    def run(weight):
        generator = torch.Generator().manual_seed(0)
        centers = 2 * torch.randn(8, 16, generator=generator)
        y = torch.arange(64) % 8
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        loss = ECAML(triplet, weight=weight)
        for _ in range(150):
            x = centers[y] + torch.randn(64, 16, generator=generator)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            z = F.normalize(model(centers[y] + torch.randn(64, 16, generator=generator)))
        squares = (2 - 2 * z @ z.T).fill_diagonal_(9)
        recall = (y[squares.argmin(1)] == y).float().mean().item()
        return energy_confusion(z, y).item(), recall

    torch.set_num_threads(1)
    (apart, recall), (confused, confused_recall) = run(0.0), run(0.05)
    assert confused < 0.5 * apart
    assert confused_recall > recall - 0.1
