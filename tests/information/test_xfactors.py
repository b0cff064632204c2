"""XFactors: supervised InfoNCE, the latent split, swaps and scores; the sheet of paper 11."""

import math

import pytest
import torch
from torch import nn

from regularizers._shared.gaussian import reparameterize
from regularizers.information import (
    XFactorsLoss,
    factorvae_score,
    supervised_info_nce,
    swap_factor,
)
from tests.harness import DTYPES

F64 = torch.float64
PAIRS = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=F64)


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.551445), (0.07, 1.24975e-6)])
def test_loss_of_two_pairs(temperature, expected):
    loss = supervised_info_nce(PAIRS, torch.tensor([0, 0, 1, 1]), temperature=temperature)
    # The small value is a difference of logarithms near 14.
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-11)


def test_equal_embeddings_give_log_3():
    loss = supervised_info_nce(torch.ones(4, 2, dtype=F64), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(loss.item(), math.log(3))


def test_equal_labels_give_exactly_0():
    z = _randn(6, 3).requires_grad_()
    loss = supervised_info_nce(z, torch.zeros(6, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    torch.testing.assert_close(z.grad, torch.zeros_like(z), rtol=0, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_unique_labels_give_0_with_a_graph(reduction):
    z = _randn(4, 3).requires_grad_()
    loss = supervised_info_nce(z, torch.arange(4), reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_equal_similarities_give_the_logarithms_of_shares():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    loss = supervised_info_nce(torch.ones(6, 2, dtype=F64), labels)
    expected = (3 * math.log(5 / 2) + 2 * math.log(5)) / 5  # the last has no positive
    torch.testing.assert_close(loss.item(), expected)


def test_loss_is_its_formula():
    z, labels = _randn(8, 3), torch.tensor([0, 0, 1, 1, 0, 1, 0, 2])
    unit = z / z.norm(dim=1, keepdim=True)
    scores = (unit @ unit.T / 0.3).fill_diagonal_(-torch.inf)
    same = labels[:, None] == labels
    expected = scores.logsumexp(1) - scores.masked_fill(~same, -torch.inf).logsumexp(1)
    expected[-1] = 0
    call = lambda reduction: supervised_info_nce(z, labels, temperature=0.3, reduction=reduction)
    torch.testing.assert_close(call("none"), expected)
    torch.testing.assert_close(call("mean"), expected.sum() / 7)
    torch.testing.assert_close(call("sum"), expected.sum())
    dot = supervised_info_nce(unit, labels, temperature=0.3, similarity="dot")
    torch.testing.assert_close(dot, call("mean"))


def test_positives_inside_the_logarithm_differ_from_outside():
    z, labels = _randn(8, 3), torch.tensor([0, 0, 1, 1, 0, 1, 0, 2])
    unit = z / z.norm(dim=1, keepdim=True)
    scores = (unit @ unit.T).fill_diagonal_(-torch.inf)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    log_p = scores - scores.logsumexp(1, keepdim=True)
    outside = -torch.where(positive, log_p, 0).sum(1)[:7] / positive.sum(1)[:7]
    inside = supervised_info_nce(z, labels, temperature=1.0)
    assert (inside - outside.mean()).abs() > 0.1


def test_loss_is_invariant_to_rotation_scale_order_and_names_of_labels():
    z, labels = _randn(8, 3), torch.tensor([0, 0, 1, 1, 0, 1, 0, 2])
    expected = supervised_info_nce(z, labels)
    rotation, order = torch.linalg.qr(_randn(3, 3, seed=1))[0], torch.randperm(8)
    scale = torch.rand(8, 1, dtype=F64) + 0.1
    for changed, names in (
        (z @ rotation, labels),
        (scale * z, labels),
        (z[order], labels[order]),
        (z, 7 - 3 * labels),
    ):
        torch.testing.assert_close(supervised_info_nce(changed, names), expected)


def test_loss_is_never_negative():
    for seed in range(20):
        z, labels = _randn(9, 2, seed=seed), torch.arange(9) % 3
        assert supervised_info_nce(z, labels, reduction="none").min() >= 0


def test_ignored_samples_are_as_if_they_were_not_there():
    z = _randn(9, 3).requires_grad_()
    labels = torch.tensor([0, -1, 1, 1, -1, 0, -1, 2, 1])
    kept = labels >= 0
    loss = supervised_info_nce(z, labels, ignore_index=-1)
    torch.testing.assert_close(loss, supervised_info_nce(z[kept], labels[kept]))
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.equal(gradient[~kept], torch.zeros(3, 3, dtype=F64))
    rows = supervised_info_nce(z, labels, ignore_index=-1, reduction="none")
    assert torch.equal(rows[~kept], torch.zeros(3, dtype=F64))


def test_batch_of_ignored_samples_gives_0_with_a_graph():
    z = _randn(3, 2).requires_grad_()
    loss = supervised_info_nce(z, torch.full((3,), -1), ignore_index=-1)
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_gradcheck():
    z, labels = _randn(5, 3).requires_grad_(), torch.tensor([0, 0, 1, 1, -1])
    call = lambda z: supervised_info_nce(z, labels, temperature=0.5, ignore_index=-1)
    assert torch.autograd.gradcheck(call, (z,))
    assert torch.autograd.gradgradcheck(call, (z,))


def test_nan_gives_nan():
    z = PAIRS.clone()
    z[0, 0] = torch.nan
    assert supervised_info_nce(z, torch.tensor([0, 0, 1, 1])).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_types_give_float32(dtype):
    z = PAIRS.clone().to(dtype).requires_grad_()
    loss = supervised_info_nce(z, torch.tensor([0, 0, 1, 1]), temperature=1.0)
    assert loss.dtype == (F64 if dtype == F64 else torch.float32)
    torch.testing.assert_close(loss.item(), 0.551445, rtol=0, atol=1e-6)
    loss.backward()
    assert z.grad.dtype == dtype


def _latents(batch=6, residual=2, width=4, seed=0):
    mu_s, logvar_s = _randn(batch, residual, seed=seed), _randn(batch, residual, seed=seed + 1)
    mu_t, logvar_t, z_t = (_randn(batch, width, seed=seed + i) for i in (2, 3, 4))
    return [x.requires_grad_() for x in (mu_s, logvar_s, mu_t, logvar_t, z_t)]


LABELS = torch.tensor([[0, 1], [0, 0], [1, 1], [1, 0], [0, 1], [1, -1]])


def test_divergence_of_a_known_gaussian():
    mu, log_variance = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, math.log(4)]])
    zero = torch.zeros(1, 2)
    labels = torch.zeros(1, 1, dtype=torch.int64)
    loss = XFactorsLoss([2])
    found = loss(mu, log_variance, zero, zero, zero, labels)
    torch.testing.assert_close(found.kl_s.item(), 3.306853, rtol=0, atol=1e-6)
    assert found.kl_t == 0


def test_total_is_the_sum_of_its_terms():
    latents = _latents()
    loss = XFactorsLoss(
        [2, 2], beta_s=2.0, beta_t=3.0, kl_weight=0.1, nce_weights=[0.2, 0.4], cov_weight=0.7
    )
    found = loss(*latents, LABELS, recon=torch.tensor(1.5, dtype=F64))
    blocks = latents[-1].split([2, 2], 1)
    nce = [
        supervised_info_nce(blocks[0], LABELS[:, 0]),
        supervised_info_nce(blocks[1][:5], LABELS[:5, 1]),  # the last label is missing
    ]
    torch.testing.assert_close(found.nce, torch.stack(nce))
    expected = 1.5 + 0.1 * (2 * found.kl_s + 3 * found.kl_t)
    expected = expected + 0.2 * nce[0] + 0.4 * nce[1] + 0.7 * found.cov
    torch.testing.assert_close(found.total, expected)


def test_divergence_is_a_sum_over_dimensions_and_a_mean_over_the_batch():
    latents = _latents()
    found = XFactorsLoss([2, 2])(*latents, LABELS)
    for value, mu, log_variance in ((found.kl_s, *latents[:2]), (found.kl_t, *latents[2:4])):
        posterior = torch.distributions.Normal(mu, (log_variance / 2).exp())
        prior = torch.distributions.Normal(0.0, 1.0)
        expected = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
        torch.testing.assert_close(value, expected)


def test_contrast_of_a_block_moves_this_block_alone():
    latents = _latents()
    nce = XFactorsLoss([2, 2])(*latents, LABELS).nce
    for k in range(2):
        gradients = torch.autograd.grad(nce[k], latents, retain_graph=True, materialize_grads=True)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients[:4])
        own, other = gradients[4].split([2, 2], 1)[:: 1 if k == 0 else -1]
        assert own.abs().max() > 1e-3
        assert torch.equal(other, torch.zeros_like(other))


def test_divergence_moves_all_means_and_variances():
    latents = _latents()
    found = XFactorsLoss([2, 2])(*latents, LABELS)
    for gradient in torch.autograd.grad(found.kl_s + found.kl_t, latents[:4]):
        assert (gradient.abs() > 0).all()


def test_huge_log_variances_stay_finite():
    latents = [x.detach().float() for x in _latents()]
    latents[1] = torch.full_like(latents[1], 300.0)
    assert XFactorsLoss([2, 2])(*latents, LABELS).total.isfinite()


def test_correlation_term_is_the_norm_of_all_correlations():
    latents = _latents(batch=20)
    labels = LABELS.repeat(4, 1)[:20]
    cov = XFactorsLoss([2, 2])(*latents, labels).cov
    both = torch.corrcoef(torch.cat([latents[0], latents[2]], 1).T)
    torch.testing.assert_close(cov, both[:2, 2:].norm())


def test_clip_stops_the_gradient_of_large_correlations_and_the_default_does_not():
    mu_s, logvar_s, _, logvar_t, z_t = _latents()
    mu_t = (mu_s.detach().repeat(1, 2) + 0.01 * _randn(6, 4)).requires_grad_()  # norm near 2
    arguments = (mu_s, logvar_s, mu_t, logvar_t, z_t, LABELS)
    free = XFactorsLoss([2, 2])(*arguments).cov
    clipped = XFactorsLoss([2, 2], cov_clip=1.0)(*arguments).cov
    assert free > 1.9
    assert clipped == 1
    assert torch.autograd.grad(free, mu_s)[0].abs().max() > 1e-6
    assert torch.autograd.grad(clipped, mu_s)[0].abs().max() == 0


def test_correlation_of_constant_columns_is_0_with_a_finite_gradient():
    latents = _latents()
    latents[0] = torch.ones(6, 2, dtype=F64, requires_grad=True)
    cov = XFactorsLoss([2, 2], cov_weight=1.0)(*latents, LABELS).cov
    assert cov == 0
    assert torch.autograd.grad(cov, latents[0])[0].isfinite().all()


def test_single_sample_has_finite_terms():
    latents = [x[:1] for x in _latents()]
    output = XFactorsLoss([2, 2], cov_weight=1.0)(*latents, LABELS[:1])
    assert all(term.isfinite().all() for term in output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_terms_of_half_latents_are_float32(dtype):
    latents = [x.detach().to(dtype).requires_grad_() for x in _latents()]
    output = XFactorsLoss([2, 2])(*latents, LABELS)
    assert {term.dtype for term in output} == {F64 if dtype == F64 else torch.float32}
    output.total.backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in latents)


def test_loss_compiles_to_one_graph(fresh_dynamo):
    latents = _latents()
    loss = XFactorsLoss([2, 2], cov_weight=0.1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*latents, LABELS), loss(*latents, LABELS)
    torch.testing.assert_close(tuple(found), tuple(expected))
    torch.testing.assert_close(
        torch.autograd.grad(found.total, latents), torch.autograd.grad(expected.total, latents)
    )


def test_swap_changes_exactly_the_block():
    source, target = torch.zeros(3, 6), torch.ones(3, 6)
    first, second = swap_factor(source, target, 1, [1, 2, 3])
    assert first[0].tolist() == [0, 1, 1, 0, 0, 0]
    assert torch.equal(second, 1 - first)
    assert source.max() == 0


def test_swapping_twice_restores():
    source, target = _randn(3, 6), _randn(3, 6, seed=1)
    again = swap_factor(*swap_factor(source, target, 2, [1, 2, 3]), 2, [1, 2, 3])
    assert torch.equal(again[0], source)
    assert torch.equal(again[1], target)


def _score(latents, factors):
    return factorvae_score(
        latents, factors, num_votes=300, generator=torch.Generator().manual_seed(0)
    )


def test_score_is_1_for_factors_themselves_and_chance_for_noise():
    factors = torch.randint(4, (1000, 3), generator=torch.Generator().manual_seed(1))
    shuffled = 5.0 * factors[:, [2, 0, 1]].float()
    assert _score(shuffled, factors) == 1.0
    # 300 votes: a standard error of 0.03 about 1/3, and some from the table.
    assert _score(_randn(1000, 5), factors) < 0.5


def test_score_is_between_for_mixed_latents_and_ignores_constant_dimensions():
    factors = torch.randint(4, (1000, 2), generator=torch.Generator().manual_seed(1))
    mixed = factors.double() @ torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64)
    padded = torch.cat([factors.double(), torch.ones(1000, 1, dtype=F64)], 1)
    assert _score(mixed, factors) < 0.8
    assert _score(padded, factors) == 1.0


def _probe(features, target, *, train=400):
    """Accuracy of logistic regression on the rows that it has not seen."""
    features = (features - features.mean(0)) / features.std(0)
    model = nn.Linear(features.shape[1], 4)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(features[:train]), target[:train])
        loss.backward()
        return loss

    optimizer.step(closure)
    return (model(features[train:]).argmax(1) == target[train:]).double().mean().item()


def _probes(nce_weight):
    """Linear probes of two factors from the block of the first, after training an autoencoder."""
    torch.manual_seed(0)
    labels = torch.randint(4, (800, 2))
    hot = torch.cat([nn.functional.one_hot(column, 4) for column in labels.T], 1).float()
    x = hot @ torch.randn(8, 24) + 0.1 * torch.randn(800, 24)
    encoder = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 16))
    decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 24))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    loss = XFactorsLoss([2, 2], nce_weights=nce_weight)
    for _ in range(200):
        rows = torch.randint(800, (128,))
        mu_s, logvar_s, mu_t, logvar_t = encoder(x[rows]).split(4, 1)
        z_s, z_t = (
            reparameterize(mu, (log_variance / 2).exp())
            for mu, log_variance in ((mu_s, logvar_s), (mu_t, logvar_t))
        )
        recon = (decoder(torch.cat([z_s, z_t], 1)) - x[rows]).square().mean()
        total = loss(mu_s, logvar_s, mu_t, logvar_t, z_t, labels[rows], recon=recon).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        mu_t = encoder(x)[:, 8:12]
    return [[_probe(mu_t[:, 2 * k : 2 * k + 2], labels[:, j]) for j in (k, 1 - k)] for k in (0, 1)]


def test_blocks_hold_their_own_factor_and_forget_the_other():
    plain, split = _probes(0.0), _probes(0.1)
    for (own, other), (plain_own, plain_other) in zip(split, plain, strict=True):
        assert own >= 0.95
        assert own > plain_own
        assert other <= 0.6
        assert other < plain_other


def _called(**changes):
    latents = dict(zip(("mu_s", "logvar_s", "mu_t", "logvar_t", "z_t"), _latents(), strict=True))
    return XFactorsLoss([2, 2])(**{**latents, "labels": LABELS, **changes})


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (ValueError, "z must", lambda: supervised_info_nce(PAIRS[0], LABELS[:, 0])),
        (TypeError, "z must", lambda: supervised_info_nce(LABELS, LABELS[:, 0])),
        (ValueError, "labels must", lambda: supervised_info_nce(PAIRS, LABELS[:, 0])),
        (ValueError, "labels must", lambda: supervised_info_nce(PAIRS, LABELS[:4])),
        (TypeError, "labels must", lambda: supervised_info_nce(PAIRS, torch.ones(4))),
        (
            ValueError,
            "temperature must",
            lambda: supervised_info_nce(PAIRS, torch.arange(4), temperature=0.0),
        ),
        (
            ValueError,
            "similarity must",
            lambda: supervised_info_nce(PAIRS, torch.arange(4), similarity="l2"),
        ),
        (
            ValueError,
            "reduction must",
            lambda: supervised_info_nce(PAIRS, torch.arange(4), reduction="max"),
        ),
        (ValueError, "block_dims must", lambda: XFactorsLoss([])),
        (ValueError, "block_dims must", lambda: XFactorsLoss([2, 0])),
        (ValueError, "nce_weights must", lambda: XFactorsLoss([2, 2], nce_weights=[1.0])),
        (ValueError, "nce_weights must", lambda: XFactorsLoss([2], nce_weights=-1.0)),
        (ValueError, "kl_weight must", lambda: XFactorsLoss([2], kl_weight=-1.0)),
        (ValueError, "cov_clip must", lambda: XFactorsLoss([2], cov_clip=0.0)),
        (ValueError, "temperature must", lambda: XFactorsLoss([2], temperature=0.0)),
        (ValueError, "z_t must", lambda: _called(z_t=_randn(6, 5))),
        (ValueError, "mu_t must", lambda: _called(mu_t=_randn(5, 4))),
        (ValueError, "logvar_s must", lambda: _called(logvar_s=_randn(6, 3))),
        (TypeError, "logvar_t must", lambda: _called(logvar_t=_randn(6, 4).float())),
        (ValueError, "labels must", lambda: _called(labels=LABELS[:, :1])),
        (ValueError, "labels must", lambda: _called(labels=LABELS[:5])),
        (TypeError, "labels must", lambda: _called(labels=LABELS.float())),
        (ValueError, "factor must", lambda: swap_factor(PAIRS, PAIRS, 1, [2])),
        (ValueError, "z_t_source must", lambda: swap_factor(PAIRS, PAIRS, 0, [3])),
        (ValueError, "z_t_target must", lambda: swap_factor(PAIRS, PAIRS[:2], 0, [2])),
        (TypeError, "z_t_target must", lambda: swap_factor(PAIRS, PAIRS.float(), 0, [2])),
        (ValueError, "latents must", lambda: factorvae_score(PAIRS[0], LABELS)),
        (ValueError, "latents must", lambda: factorvae_score(torch.ones(6, 2), LABELS)),
        (ValueError, "factors must", lambda: factorvae_score(PAIRS, LABELS)),
        (TypeError, "factors must", lambda: factorvae_score(PAIRS, PAIRS)),
        (ValueError, "num_votes must", lambda: factorvae_score(PAIRS, LABELS[:4], num_votes=0)),
        (ValueError, "batch_size must", lambda: factorvae_score(PAIRS, LABELS[:4], batch_size=1)),
    ],
)
def test_bad_input_names_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call()
