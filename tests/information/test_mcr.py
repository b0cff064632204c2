"""Multimodal competition: divergences, permutations, the game and its terms; sheet of paper 13."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.information import (
    MCR,
    jensen_shannon,
    latent_permutations,
    nt_xent,
)
from tests.harness import MethodContract

F64 = torch.float64
KINDS = ("random", "different_index", "different_label", "same_label")


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _fusion(dims, classes=3, hidden=8, dtype=F64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(sum(dims), hidden), nn.Tanh(), nn.Linear(hidden, classes))
    net = net.to(dtype)
    return net, lambda latents: net(torch.cat(latents, 1))


def _latents(*dims, batch=6):
    return [_randn(batch, dim, seed=k).requires_grad_() for k, dim in enumerate(dims)]


LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([0.0, 0.0], [math.log(3), 0.0], 0.033822),
        ([30.0, -30.0], [-30.0, 30.0], math.log(2)),
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1e5, 0.0], [0.0, 1e5], math.log(2)),
        ([0.0, -torch.inf], [0.0, 0.0], 0.215762),
    ],
)
def test_divergence_of_known_logits(p, q, expected):
    p, q = torch.tensor([p], dtype=F64), torch.tensor([q], dtype=F64)
    for pair in ((p, q), (q, p)):
        torch.testing.assert_close(jensen_shannon(*pair).item(), expected, rtol=0, atol=1e-6)


def test_divergence_is_that_of_the_mixture_and_bounded():
    p, q = 5 * _randn(50, 4), 5 * _randn(50, 4, seed=1)
    first, second = (torch.distributions.Categorical(logits=x) for x in (p, q))
    middle = torch.distributions.Categorical(probs=(first.probs + second.probs) / 2)
    kl = torch.distributions.kl_divergence
    expected = 0.5 * (kl(first, middle) + kl(second, middle))
    found = jensen_shannon(p, q, reduction="none")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(jensen_shannon(p, q), expected.mean())
    torch.testing.assert_close(jensen_shannon(p, q, reduction="sum"), expected.sum())
    assert found.min() >= 0
    assert found.max() <= math.log(2)


def test_divergence_has_finite_gradients_at_its_bounds():
    for values in ([1e5, 0.0], [0.0, -torch.inf]):
        p = torch.tensor([values], requires_grad=True)
        jensen_shannon(p, torch.zeros(1, 2)).backward()
        assert p.grad.isfinite().all()


def test_divergence_passes_gradcheck():
    p, q = _randn(4, 3).requires_grad_(), _randn(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(jensen_shannon, (p, q))
    assert torch.autograd.gradgradcheck(jensen_shannon, (p, q))


@pytest.mark.parametrize("kind", KINDS)
def test_permutations_obey_their_rule(kind):
    labels = torch.tensor([0, 0, 1, 2, 0, 1, 3])
    for seed in range(20):
        drawn = latent_permutations(
            labels, num_samples=2, kind=kind, generator=torch.Generator().manual_seed(seed)
        )
        assert len(drawn) == 2
        for shuffle, keep in drawn:
            assert shuffle.shape == keep.shape
            assert torch.equal(keep, keep.unique())
            if kind in ("random", "different_index"):
                assert torch.equal(shuffle.sort().values, torch.arange(7))
            if kind != "random":
                assert (shuffle != keep).all()
            if kind == "different_label":
                assert (labels[shuffle] != labels[keep]).all()
                assert len(keep) == 7
            if kind == "same_label":
                assert (labels[shuffle] == labels[keep]).all()
                assert keep.tolist() == [0, 1, 2, 4, 5]  # 2 and 3 are alone


def test_partners_are_drawn_evenly():
    labels = torch.tensor([0, 0, 1, 1, 2])
    generator = torch.Generator().manual_seed(0)
    drawn = latent_permutations(
        labels, num_samples=3000, kind="different_label", generator=generator
    )
    counts = torch.bincount(torch.stack([shuffle for shuffle, _ in drawn])[:, 0], minlength=5)
    # Partners 2, 3, 4 of sample 0: 1000 each, standard deviation 26.
    assert counts[:2].tolist() == [0, 0]
    assert (counts[2:] - 1000).abs().max() < 105


def test_all_pairs_of_different_labels_are_there_once():
    [(shuffle, keep)] = latent_permutations(
        torch.tensor([0, 0, 1]), num_samples=4, kind="all_different_label"
    )
    pairs = sorted(zip(keep.tolist(), shuffle.tolist(), strict=True))
    assert pairs == [(0, 2), (1, 2), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("different_label", [1, 1, 1]), ("all_different_label", [1, 1]), ("same_label", [0, 1, 2])],
)
def test_too_few_partners_are_an_error_and_no_loop(kind, labels):
    with pytest.raises(ValueError, match="labels must give 2 samples a partner"):
        latent_permutations(torch.tensor(labels), kind=kind)


def test_generator_reproduces_permutations():
    for kind in KINDS:
        first, second = (
            latent_permutations(LABELS, kind=kind, generator=torch.Generator().manual_seed(5))
            for _ in range(2)
        )
        assert torch.equal(first[0][0], second[0][0])


def test_contrast_of_two_modalities():
    z = torch.eye(2, dtype=F64).repeat(2, 1)
    loss = nt_xent(z, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(loss.item(), math.log(1 + 2 * math.exp(-2)))
    torch.testing.assert_close(loss.item(), 0.239545, rtol=0, atol=1e-6)


def test_contrast_is_its_formula_pair_by_pair():
    z, labels = _randn(7, 3), torch.tensor([0, 0, 1, 0, 1, 2, 2])
    scores = F.cosine_similarity(z[:, None], z, dim=2) / 0.3
    terms = []
    for i in range(7):
        away = scores[i, labels != labels[i]].exp().sum()
        for p in range(7):
            if p != i and labels[p] == labels[i]:
                terms.append(torch.log1p(away / scores[i, p].exp()))
    torch.testing.assert_close(nt_xent(z, labels, temperature=0.3), torch.stack(terms).mean())


def test_contrast_of_two_views_is_the_usual_nt_xent():
    z = _randn(10, 4)
    scores = F.cosine_similarity(z[:, None], z, dim=2) / 0.5
    scores = scores.fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(scores, torch.arange(10).roll(5))
    torch.testing.assert_close(nt_xent(z, torch.arange(5).repeat(2)), expected)


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0]], ids=["no positive", "no negative"])
def test_contrast_without_positives_or_negatives_is_0_with_a_graph(labels):
    z = _randn(3, 2).requires_grad_()
    loss = nt_xent(z, torch.tensor(labels))
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_contrast_passes_gradcheck():
    z, labels = _randn(5, 3).requires_grad_(), torch.tensor([0, 0, 1, 1, 2])
    call = lambda z: nt_xent(z, labels)
    assert torch.autograd.gradcheck(call, (z,))
    assert torch.autograd.gradgradcheck(call, (z,))


def test_nan_gives_nan():
    z = torch.eye(4)
    z[0, 0] = torch.nan
    assert nt_xent(z, torch.tensor([0, 0, 1, 1])).isnan()
    assert jensen_shannon(z, torch.zeros(4, 4)).isnan()


def _branches(fusion, latents, logits, permutations, strategy):
    """The regularizer of the sheet, branch by branch: M^2 calls of the fusion."""
    count = len(latents)
    total = 0
    for m, (shuffle, keep) in enumerate(permutations):
        for k in range(count):
            mixed = [
                (z if j == k or strategy == "collaborative" else z.detach())[
                    shuffle if j == m else keep
                ]
                for j, z in enumerate(latents)
            ]
            divergence = jensen_shannon(fusion(mixed), logits[keep])
            if strategy == "greedy":
                total = total + (-divergence if k == m else divergence / (count - 1))
            elif k == m:
                total = total - divergence
    return total


@pytest.mark.parametrize("dims", [(4, 4), (3, 4, 5)], ids=["two", "three"])
@pytest.mark.parametrize("strategy", ["greedy", "independent", "collaborative"])
def test_game_has_the_gradients_of_all_branches(strategy, dims):
    latents = _latents(*dims)
    net, fusion = _fusion(dims)
    logits = fusion(latents)
    permutations = [
        latent_permutations(LABELS, generator=torch.Generator().manual_seed(k))[0]
        for k in range(len(dims))
    ]
    found = MCR(fusion, strategy=strategy, weight=0.7)(
        latents, logits, LABELS, permutations=permutations
    )
    expected = 0.7 * _branches(fusion, latents, logits, permutations, strategy)
    torch.testing.assert_close(found.total, expected, rtol=1e-7, atol=1e-12)
    everything = [*latents, *net.parameters()]
    gradients = [
        torch.autograd.grad(value, everything, retain_graph=True, materialize_grads=True)
        for value in (found.total, expected)
    ]
    for have, want in zip(*gradients, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-7, atol=1e-12)


def test_greedy_game_is_worth_0_and_moves_latents_and_nothing_shared():
    latents = _latents(4, 4)
    net, fusion = _fusion((4, 4))
    output = MCR(fusion)(latents, fusion(latents), LABELS)
    output.total.backward()
    assert output.total.abs() < 1e-7
    assert output.influence.min() > 1e-3
    for z in latents:
        assert z.grad.abs().max() > 1e-4
    for parameter in net.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_projection_plays_in_front_of_the_features_and_not_inside_the_fusion():
    torch.manual_seed(0)
    raw = [_randn(6, 5), _randn(6, 5, seed=1)]
    projections = nn.ModuleList([nn.Linear(5, 4, dtype=F64) for _ in range(2)])
    _, fusion = _fusion((4, 4))
    project = lambda x: [p(part) for p, part in zip(projections, x, strict=True)]

    outside = project(raw)
    MCR(fusion)(outside, fusion(outside), LABELS).total.backward()
    assert all(p.weight.grad.abs().max() > 1e-4 for p in projections)

    projections.zero_grad()
    inside = lambda x: fusion(project(x))
    MCR(inside)(raw, inside(raw), LABELS).total.backward()
    assert all(torch.equal(p.weight.grad, torch.zeros(4, 5, dtype=F64)) for p in projections)


def test_greedy_step_raises_the_influence_of_the_modality_that_takes_it():
    latents = _latents(4, 4)
    _, fusion = _fusion((4, 4))
    permutations = [(torch.arange(6).roll(k + 1), torch.arange(6)) for k in range(2)]
    game = MCR(fusion)

    def influence(values):
        return game(values, fusion(values), LABELS, permutations=permutations).influence

    before = influence(latents)
    game(latents, fusion(latents), LABELS, permutations=permutations).total.backward()
    for k in range(2):
        moved = [z.detach() - 0.3 * z.grad * (j == k) for j, z in enumerate(latents)]
        gain = influence(moved) - before
        # Its own influence, less the other's, grows along its own gradient.
        assert gain[k] > gain[1 - k]
        assert gain[k] > 0


def test_identity_permutation_has_no_influence():
    latents = _latents(4, 4)
    _, fusion = _fusion((4, 4))
    identity = (torch.arange(6), torch.arange(6))
    output = MCR(fusion)(latents, fusion(latents), permutations=[identity] * 2)
    torch.testing.assert_close(output.influence, torch.zeros(2, dtype=F64), rtol=0, atol=1e-14)


def test_ignored_modality_has_no_influence_and_no_gradient():
    latents = _latents(4, 4)
    net, _ = _fusion((4,))
    fusion = lambda latents: net(latents[0])
    output = MCR(fusion, strategy="collaborative")(latents, fusion(latents))
    output.total.backward()
    assert output.influence[0] > 1e-3
    assert output.influence[1].abs() < 1e-14
    assert latents[1].grad is None or torch.equal(latents[1].grad, torch.zeros(6, 4, dtype=F64))


def test_modalities_get_permutations_of_their_own():
    torch.manual_seed(0)
    _, fusion = _fusion((4, 4))
    latents = _latents(4, 4, batch=32)
    seen = []
    spy = lambda mixed: seen.append([z.detach() for z in mixed]) or fusion(mixed)
    MCR(spy, strategy="collaborative")(latents, fusion(latents))
    order = [(seen[m][m][:, None] == latents[m].detach()).all(2).long().argmax(1) for m in range(2)]
    assert not torch.equal(*order)
    for m in range(2):
        assert torch.equal(seen[m][1 - m], latents[1 - m])


def test_several_samples_are_concatenated():
    sizes = []
    _, fusion = _fusion((4, 4))
    spy = lambda mixed: sizes.append(len(mixed[0])) or fusion(mixed)
    latents = _latents(4, 4)
    MCR(spy, strategy="independent", num_samples=3)(latents, fusion(latents))
    assert sizes == [18, 18]


def test_reference_gets_a_gradient_in_the_collaborative_game_unless_detached():
    latents = _latents(4, 4)
    _, fusion = _fusion((4, 4))
    for detach in (False, True):
        logits = fusion(latents).detach().requires_grad_()
        game = MCR(fusion, strategy="collaborative", detach_reference=detach)
        game(latents, logits).total.backward()
        assert (logits.grad is None) == detach


def test_terms_add_up_with_their_weights():
    latents = _latents(4, 4)
    _, fusion = _fusion((4, 4))
    game = MCR(
        fusion,
        strategy="independent",
        weight=0.5,
        contrast_weight=0.3,
        temperature=0.4,
        bottleneck_weight=0.2,
        feature_dims=(4, 4),
        num_classes=3,
    ).double()
    output = game(latents, fusion(latents), LABELS)
    contrast = nt_xent(torch.cat(latents), LABELS.repeat(2), temperature=0.4)
    torch.testing.assert_close(output.contrast, contrast)
    expected = -0.5 * output.influence.sum() + 0.3 * contrast + 0.2 * output.bottleneck
    torch.testing.assert_close(output.total, expected)


def test_pure_contrast_takes_the_modalities_of_one_sample_for_positives():
    latents = _latents(4, 4)
    _, fusion = _fusion((4, 4))
    output = MCR(fusion, contrast_weight=1.0, contrast="pure")(latents, fusion(latents))
    expected = nt_xent(torch.cat(latents), torch.arange(6).repeat(2))
    torch.testing.assert_close(output.contrast, expected)


def test_bottleneck_moves_features_and_its_own_map_and_not_the_logits():
    latents = _latents(3, 5)
    _, fusion = _fusion((3, 5))
    torch.manual_seed(1)
    game = MCR(
        fusion, weight=0.0, bottleneck_weight=1.0, feature_dims=(3, 5), num_classes=3
    ).double()
    logits = fusion(latents).detach().requires_grad_()
    output = game(latents, logits)
    output.total.backward()
    assert logits.grad is None
    assert all(z.grad.abs().max() > 1e-3 for z in latents)
    assert all(p.grad.abs().max() > 0 for p in game.parameters())
    first, _, second = game.reconstruct
    found = F.relu(logits @ first.weight.T) @ second.weight.T
    torch.testing.assert_close(output.bottleneck, (torch.cat(latents, 1) - found).square().mean())


def test_weights_of_0_add_nothing_and_measure_the_influence():
    latents = _latents(4, 4)
    _, fusion = _fusion((4, 4))
    output = MCR(fusion, weight=0.0)(latents, fusion(latents), LABELS)
    assert output.total == 0
    assert not output.total.requires_grad
    assert output.influence.min() > 1e-3


def test_fusion_is_not_registered():
    net, _ = _fusion((4, 4))
    game = MCR(lambda latents: net(torch.cat(latents, 1)))
    assert list(MCR(net).parameters()) == []
    assert list(game.state_dict()) == []


def test_features_may_have_more_dimensions():
    latents = [_randn(6, 5, 4).requires_grad_(), _randn(6, 4, seed=1).requires_grad_()]
    _, pooled = _fusion((4, 4))
    fusion = lambda latents: pooled([latents[0].mean(1), latents[1]])
    MCR(fusion)(latents, fusion(latents), LABELS).total.backward()
    assert latents[0].grad.shape == (6, 5, 4)


class _Game(nn.Module):
    """Encoders, fusion and regularizer in one module."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleList([nn.Linear(4, 3), nn.Linear(5, 3)])
        self.head = nn.Linear(6, 3)
        self.game = MCR(
            self.fuse,
            strategy="collaborative",
            contrast_weight=0.1,
            bottleneck_weight=0.1,
            feature_dims=(3, 3),
            num_classes=3,
            permutation="different_index",
        )

    def fuse(self, latents):
        return self.head(torch.cat(list(latents), 1))

    def forward(self, first, second, labels):
        latents = [f(x) for f, x in zip(self.encoders, (first, second), strict=True)]
        return self.game(latents, self.fuse(latents), labels).total


class TestMCR(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return _Game().to(dtype)

    def call(self, module, dtype):
        x = torch.linspace(-1, 1, 54).reshape(6, 9).sin().to(dtype)
        total = module(x[:, :4], x[:, 4:], LABELS)
        assert total.dtype == (F64 if dtype == F64 else torch.float32)
        return total.to(dtype)

    def bad_inputs(self):
        z, logits = [torch.ones(6, 4), torch.ones(6, 4)], torch.ones(6, 3)
        game = MCR(lambda latents: logits)
        build = lambda **options: MCR(lambda latents: logits, **options)
        return [
            (TypeError, "fusion must", lambda: MCR(3)),
            (ValueError, "weight must", lambda: build(weight=-1.0)),
            (ValueError, "strategy must", lambda: build(strategy="kind")),
            (ValueError, "num_samples must", lambda: build(num_samples=0)),
            (ValueError, "permutation must", lambda: build(permutation="any")),
            (ValueError, "temperature must", lambda: build(temperature=0.0)),
            (ValueError, "contrast must", lambda: build(contrast="x")),
            (ValueError, "feature_dims and num_classes", lambda: build(bottleneck_weight=1.0)),
            (ValueError, "features must have 2", lambda: game(z[:1], logits)),
            (ValueError, r"features must have shape \[6", lambda: game([z[0], z[1][:5]], logits)),
            (TypeError, "features must", lambda: game([z[0], z[1].long()], logits)),
            (ValueError, "logits must", lambda: game(z, logits[:, :1])),
            (ValueError, "logits must", lambda: game([z[0][:1]] * 2, logits[:1])),
            (ValueError, "labels must", lambda: game(z, logits, LABELS[:5])),
            (TypeError, "labels must", lambda: game(z, logits, LABELS.float())),
            (ValueError, "labels must be given", lambda: build(contrast_weight=1.0)(z, logits)),
            (
                ValueError,
                "features must have one width",
                lambda: build(contrast_weight=1.0)([z[0], z[1][:, :3]], logits, LABELS),
            ),
            (
                ValueError,
                r"features must have shape \[B, D\]",
                lambda: build(contrast_weight=1.0)([x[..., None] for x in z], logits, LABELS),
            ),
            (
                ValueError,
                "permutations must",
                lambda: game(z, logits, permutations=[(LABELS, LABELS)]),
            ),
            (ValueError, "q_logits must", lambda: jensen_shannon(logits, logits[:5])),
            (ValueError, "p_logits must", lambda: jensen_shannon(logits[:, :1], logits)),
            (ValueError, "reduction must", lambda: jensen_shannon(logits, logits, reduction="x")),
            (ValueError, "labels must hold 2", lambda: latent_permutations(LABELS[:1])),
            (TypeError, "labels must", lambda: latent_permutations(LABELS.float())),
            (ValueError, "kind must", lambda: latent_permutations(LABELS, kind="x")),
            (ValueError, "num_samples must", lambda: latent_permutations(LABELS, num_samples=0)),
            (ValueError, "temperature must", lambda: nt_xent(z[0], LABELS, temperature=0.0)),
            (ValueError, "labels must", lambda: nt_xent(z[0], LABELS[:5])),
            (ValueError, "z must", lambda: nt_xent(z[0][0], LABELS)),
        ]


def _influences(weight, seed):
    """Influence of two modalities on test data, and accuracy, after a short training."""
    torch.manual_seed(seed)
    centers = torch.randn(2, 4, 20)

    def draw(count):
        labels = torch.randint(4, (count,))
        x = [
            c[labels] + s * torch.randn(count, 20) for c, s in zip(centers, (1.0, 1.5), strict=True)
        ]
        return x, labels

    encoders = nn.ModuleList([nn.Sequential(nn.Linear(20, 16), nn.ReLU()) for _ in range(2)])
    head = nn.Linear(32, 4)
    fusion = lambda latents: head(torch.cat(latents, 1))
    encode = lambda x: [f(part) for f, part in zip(encoders, x, strict=True)]
    game, optimizer = (
        MCR(fusion, weight=weight),
        torch.optim.Adam([*encoders.parameters(), *head.parameters()], lr=1e-3),
    )
    for _ in range(100):
        x, labels = draw(64)
        latents = encode(x)
        logits = fusion(latents)
        loss = F.cross_entropy(logits, labels) + game(latents, logits, labels).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, labels = draw(2000)
    with torch.no_grad():
        latents = encode(x)
        logits = fusion(latents)
        influence = game(latents, logits, labels).influence
    return influence, (logits.argmax(1) == labels).float().mean()


def test_greedy_game_raises_both_influences_at_equal_accuracy():
    runs = [[_influences(weight, seed) for seed in range(2)] for weight in (0.0, 3.0)]
    plain, played = (sum(influence for influence, _ in found) for found in runs)
    accuracy, kept = (sum(accuracy for _, accuracy in found) / 2 for found in runs)
    assert (played > 1.1 * plain).all()
    assert kept > accuracy - 0.02
