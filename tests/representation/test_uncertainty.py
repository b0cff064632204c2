"""Multi-grained uncertainty: the facts of the sheet of paper 105."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.representation import (
    MultiGrainedUncertaintyLoss,
    NormalAugmenter,
    uncertainty_matching_loss,
)
from tests.harness import DTYPES, GraphRecorder

F64 = torch.float64


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _matching(query, target):
    return F.cross_entropy(query @ target.T, torch.arange(len(query)))


def test_augmenter_draws_around_the_standardised_row():
    f = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=F64)
    standard = torch.tensor([-1.341635, -0.447212, 0.447212, 1.341635], dtype=F64)
    variance = 5 / 3  # the unbiased one, s = 1.290994
    draws = NormalAugmenter()(f.expand(20_000, -1), generator=torch.Generator().manual_seed(0))
    # Standard errors of 20 000 draws: 1.5 % of s for the mean, 1 % of the variance.
    assert (draws.mean(0) - (standard + 2.5)).abs().max() < 0.05 * variance**0.5
    expected = variance * (1 + standard.square())
    assert (draws.var(0) / expected - 1).abs().max() < 0.05


def test_entries_of_a_row_are_jittered_independently():
    draws = NormalAugmenter()(
        torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=F64).expand(20_000, -1),
        generator=torch.Generator().manual_seed(1),
    )
    correlation = torch.corrcoef(draws.T) - torch.eye(4, dtype=F64)
    assert correlation.abs().max() < 4 / 20_000**0.5  # four standard errors, six pairs


def test_scales_multiply_both_draws():
    f = _randn(3, 5)
    draw = lambda **options: NormalAugmenter(**options)(
        f, generator=torch.Generator().manual_seed(2)
    )
    both = 2 * draw(alpha_scale=1.0, beta_scale=0.0) + 3 * draw(alpha_scale=0.0, beta_scale=1.0)
    torch.testing.assert_close(draw(alpha_scale=2.0, beta_scale=3.0), both)


def test_constant_row_comes_back_times_the_scale():
    f = torch.full((2, 4), 1.5)
    assert torch.equal(NormalAugmenter(beta_scale=2.0)(f), torch.full((2, 4), 3.0))


def test_gradient_passes_through_the_standardised_row_alone():
    f = _randn(3, 6).requires_grad_()
    augmenter = NormalAugmenter()
    cotangent = _randn(3, 6, seed=1)
    augmented = augmenter(f, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad(augmented, f, cotangent)

    constant = f.detach()
    spread = constant.std(1, keepdim=True)
    generator = torch.Generator().manual_seed(3)
    alpha = 1 + spread * torch.randn(3, 6, generator=generator, dtype=F64)
    standard = (f - f.mean(1, keepdim=True)) / (f.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found, torch.autograd.grad(alpha * standard, f, cotangent)[0])
    # A shift of the whole row moves only what carries no gradient.
    torch.testing.assert_close(found.sum(1), torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)


def test_augmenter_compiles_to_one_graph(fresh_dynamo):
    f = _randn(3, 6).requires_grad_()
    compiled = torch.compile(NormalAugmenter(), fullgraph=True, backend="aot_eager")
    augmented = compiled(f)
    assert torch.autograd.grad(augmented.sum(), f)[0].abs().max() > 0
    assert not torch.equal(augmented, compiled(f))


def test_augmenter_in_eval_returns_its_input():
    f = torch.randn(3, 4)
    assert NormalAugmenter().eval()(f) is f


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_kept_by_the_augmenter_and_widened_by_the_losses(dtype):
    query, target = (_randn(4, 6, seed=seed).to(dtype).requires_grad_() for seed in (0, 1))
    augmented = NormalAugmenter()(target, generator=torch.Generator().manual_seed(0))
    assert augmented.dtype == dtype
    loss = MultiGrainedUncertaintyLoss(total_epochs=4)(query, target, augmented, epoch=1)
    assert loss.dtype == (F64 if dtype == F64 else torch.float32)
    loss.backward()
    for leaf in (query, target):
        assert leaf.grad.dtype == dtype
        assert leaf.grad.isfinite().all()
    wide = (x.detach().double() for x in (query, target, augmented))
    expected = MultiGrainedUncertaintyLoss(total_epochs=4)(*wide, epoch=1)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)


def test_uncertainty_loss_is_its_formula_for_the_batch():
    query, augmented = _randn(5, 6), _randn(5, 6, seed=1)
    sigma = augmented.std()
    expected = 0.5 * (torch.exp(-sigma) * _matching(query, augmented) + sigma)
    torch.testing.assert_close(uncertainty_matching_loss(query, augmented), expected)


def test_uncertainty_loss_is_its_formula_for_samples():
    query, augmented = _randn(5, 6), _randn(5, 6, seed=1)
    sigma = augmented.std(1)
    matching = F.cross_entropy(query @ augmented.T, torch.arange(5), reduction="none")
    expected = 0.5 * (torch.exp(-sigma) * matching + sigma)
    call = lambda reduction: uncertainty_matching_loss(
        query, augmented, per="sample", reduction=reduction
    )
    torch.testing.assert_close(call("none"), expected)
    torch.testing.assert_close(call("mean"), expected.mean())
    torch.testing.assert_close(call("sum"), expected.sum())


def _with_matching_and_spread(matching, sigma):
    """Two pairs of the given cross-entropy whose targets have the given deviation."""
    augmented = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64)
    augmented = augmented * sigma / augmented.std()
    # Score of the wrong target over that of the right one: log(1 + e^gap) = matching.
    gap = math.log(math.expm1(matching))
    query = -augmented * gap / (2 * augmented[0].square().sum())
    return query, augmented


def test_loss_at_cross_entropy_2_and_deviation_1():
    query, augmented = _with_matching_and_spread(2.0, 1.0)
    loss = uncertainty_matching_loss(query, augmented)
    torch.testing.assert_close(loss.item(), 0.867879, rtol=0, atol=1e-6)


def test_best_deviation_is_the_logarithm_of_the_cross_entropy():
    losses = {
        sigma: uncertainty_matching_loss(*_with_matching_and_spread(2.0, sigma)).item()
        for sigma in (0.6, math.log(2), 0.8)
    }
    torch.testing.assert_close(losses[math.log(2)], 0.846574, rtol=0, atol=1e-6)
    assert min(losses, key=losses.get) == math.log(2)


def test_gradient_of_the_query_shrinks_with_the_deviation():
    query, augmented = _randn(4, 6).requires_grad_(), _randn(4, 6, seed=1)
    (plain,) = torch.autograd.grad(_matching(query, augmented), query)
    (found,) = torch.autograd.grad(uncertainty_matching_loss(query, augmented), query)
    torch.testing.assert_close(found, 0.5 * torch.exp(-augmented.std()) * plain)


def test_deviation_has_a_gradient():
    query, augmented = torch.zeros(3, 4, dtype=F64), _randn(3, 4).requires_grad_()
    # Queries of 0 make the cross-entropy constant, log 3: what is left comes from sigma.
    uncertainty_matching_loss(query, augmented).backward()
    sigma = augmented.detach().std().requires_grad_()
    (slope,) = torch.autograd.grad(0.5 * (torch.exp(-sigma) * math.log(3) + sigma), sigma)
    centered = augmented.detach() - augmented.detach().mean()
    torch.testing.assert_close(augmented.grad, slope * centered / (11 * sigma.detach()))


def test_gradcheck():
    tensors = [_randn(4, 3, seed=seed).requires_grad_() for seed in range(3)]
    loss = MultiGrainedUncertaintyLoss(total_epochs=2, per="sample")
    call = lambda *tensors: loss(*tensors, epoch=1)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("gamma_scale", [1.0, 2.5])
def test_schedule_goes_from_the_uncertain_loss_towards_the_precise_one(gamma_scale):
    query, target, augmented = (_randn(4, 6, seed=seed) for seed in range(3))
    loss = MultiGrainedUncertaintyLoss(total_epochs=10, gamma_scale=gamma_scale)
    coarse, precise = uncertainty_matching_loss(query, augmented), _matching(query, target)
    low, high = sorted((coarse, precise))
    for epoch in (0, 2.5, 10):
        gamma = math.exp(-gamma_scale * epoch / 10)
        found = loss(query, target, augmented, epoch=epoch)
        torch.testing.assert_close(found, gamma * coarse + (1 - gamma) * precise)
        assert low <= found <= high
    assert torch.equal(loss(query, target, augmented, epoch=0), coarse)


def test_end_of_the_schedule_keeps_37_percent():
    query, target, augmented = (_randn(4, 6, seed=seed) for seed in range(3))
    loss = MultiGrainedUncertaintyLoss(total_epochs=10)(query, target, augmented, epoch=10)
    coarse, precise = uncertainty_matching_loss(query, augmented), _matching(query, target)
    torch.testing.assert_close(loss, 0.36787944 * coarse + 0.63212056 * precise)


def test_gradient_of_targets_flows_through_both_terms():
    query, target = _randn(4, 6), _randn(4, 6, seed=1).requires_grad_()
    augmented = NormalAugmenter()(target, generator=torch.Generator().manual_seed(0))
    loss = MultiGrainedUncertaintyLoss(total_epochs=10)
    (found,) = torch.autograd.grad(loss(query, target, augmented, epoch=5), target)
    augmented = NormalAugmenter()(target, generator=torch.Generator().manual_seed(0))
    gamma = math.exp(-0.5)
    parts = (
        gamma * uncertainty_matching_loss(query, augmented),
        (1 - gamma) * _matching(query, target),
    )
    gradients = [torch.autograd.grad(part, target, retain_graph=True)[0] for part in parts]
    torch.testing.assert_close(found, sum(gradients))
    assert min(gradient.abs().max() for gradient in gradients) > 1e-3


def test_one_graph_serves_every_epoch(fresh_dynamo):
    query, target, augmented = (_randn(4, 6, seed=seed) for seed in range(3))
    loss = MultiGrainedUncertaintyLoss(total_epochs=10)
    graphs = GraphRecorder()
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for step in range(10):
        epoch = torch.tensor(float(step), dtype=F64)
        torch.testing.assert_close(
            compiled(query, target, augmented, epoch=epoch),
            loss(query, target, augmented, epoch=step),
        )
    assert len(graphs) == 1


def test_nan_gives_nan():
    query, augmented = _randn(4, 6), _randn(4, 6, seed=1)
    augmented[0, 0] = torch.nan
    assert uncertainty_matching_loss(query, augmented).isnan()


def _recall_at_10(regular, seed):
    """Retrieval of near-duplicates by two towers, trained for 10 epochs."""
    torch.manual_seed(seed)
    centers = torch.randn(60, 24)

    def pairs(count):
        x = centers.repeat(count // 60, 1) + 0.3 * torch.randn(count, 24)
        return x + 0.1 * torch.randn_like(x), x

    towers = [nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 24)) for _ in range(2)]
    embed = lambda x: [4 * F.normalize(t(part), dim=1) for t, part in zip(towers, x, strict=True)]
    parameters = [p for tower in towers for p in tower.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    train, test = pairs(600), pairs(600)
    augmenter, loss = NormalAugmenter(), MultiGrainedUncertaintyLoss(total_epochs=10)
    for epoch in range(10):
        for rows in torch.randperm(600).split(60):
            query, target = embed([x[rows] for x in train])
            if regular:
                value = loss(query, target, augmenter(target), epoch=epoch)
            else:
                value = _matching(query, target)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    with torch.no_grad():
        query, target = embed(test)
    scores = query @ target.T
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    return (rank < 10).float().mean().item()


def test_retrieval_is_not_worse_with_uncertainty():
    plain, regular = (
        sum(_recall_at_10(choice, seed) for seed in range(2)) / 2 for choice in (False, True)
    )
    assert regular >= plain - 0.005
    assert plain > 0.5


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (ValueError, "alpha_scale must", lambda x: NormalAugmenter(alpha_scale=-1.0)),
        (ValueError, "eps must", lambda x: NormalAugmenter(eps=0.0)),
        (ValueError, "f must", lambda x: NormalAugmenter()(x[:, :1])),
        (TypeError, "f must", lambda x: NormalAugmenter()(x.long())),
        (ValueError, "augmented must", lambda x: uncertainty_matching_loss(x, x[:2])),
        (TypeError, "augmented must", lambda x: uncertainty_matching_loss(x, x.half())),
        (ValueError, "query must", lambda x: uncertainty_matching_loss(x[:, :1], x[:, :1])),
        (ValueError, "query must", lambda x: uncertainty_matching_loss(x[:0], x[:0])),
        (ValueError, "per must", lambda x: uncertainty_matching_loss(x, x, per="row")),
        (ValueError, "reduction must", lambda x: uncertainty_matching_loss(x, x, reduction="max")),
        (ValueError, "total_epochs must", lambda x: MultiGrainedUncertaintyLoss(total_epochs=0)),
        (
            ValueError,
            "epoch must",
            lambda x: MultiGrainedUncertaintyLoss(total_epochs=3)(x, x, x, epoch=-1),
        ),
        (
            ValueError,
            "epoch must",
            lambda x: MultiGrainedUncertaintyLoss(total_epochs=3)(x, x, x, epoch=3.1),
        ),
        (
            ValueError,
            "target must",
            lambda x: MultiGrainedUncertaintyLoss(total_epochs=3)(x, x[:2], x, epoch=0),
        ),
    ],
)
def test_bad_input_names_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call(torch.ones(3, 4))
