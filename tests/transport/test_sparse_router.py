"""SparseOTRouter: load and capacity, derivatives, and a small mixture of experts on real data."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.transport import SparseOTRouter
from tests.harness import MethodContract


def _affinity(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def test_experts_take_at_most_k_tokens_and_equal_load():
    for shape in ((32, 4), (2, 32, 4)):
        weights = SparseOTRouter(12, tol=1e-4)(_affinity(*shape))
        assert (weights > 0).sum(-2).max() <= 12
        torch.testing.assert_close(weights.sum(-2), torch.full((*shape[:-2], 4), 8.0).double())


def test_a_token_takes_part_once():
    weights = SparseOTRouter(20, tol=1e-3, max_iter=300)(_affinity(32, 4))
    assert (weights.sum(1) - 1).abs().max() < 1e-3


def test_normalized_weights_of_served_tokens_sum_to_one():
    sums = SparseOTRouter(9, normalize=True, max_iter=20)(_affinity(32, 4)).sum(1)
    served = sums > 0
    assert served.sum() > 16
    torch.testing.assert_close(sums[served], torch.ones_like(sums[served]))


def test_skewed_affinities_are_balanced():
    # Every token likes expert 0 best: plain top-1 sends all tokens there.
    affinity = _affinity(64, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    top = F.one_hot(affinity.argmax(1), 4).sum(0)
    weights = SparseOTRouter(24)(affinity)
    assert top.max() > 55
    assert (weights > 0).sum(0).max() <= 24


def test_small_gamma_sends_a_token_to_one_expert():
    affinity = _affinity(32, 4)
    shared = [
        ((SparseOTRouter(16, gamma=gamma)(affinity) > 1e-6).sum(1) > 1).sum() for gamma in (0.01, 5)
    ]
    assert shared[0] <= 4 < shared[1]


def test_permuting_tokens_permutes_the_weights():
    affinity, order = _affinity(24, 4), torch.randperm(24)
    router = SparseOTRouter(16, tol=1e-7, max_iter=500)
    torch.testing.assert_close(router(affinity[order]), router(affinity)[order], atol=1e-5, rtol=0)


def test_weights_have_the_derivative_of_finite_differences():
    router = SparseOTRouter(6, gamma=2.0, solver="newton", tol=1e-10)
    assert torch.autograd.gradcheck(
        router, _affinity(7, 3).requires_grad_(), eps=1e-5, atol=1e-4, rtol=1e-3
    )


class _Routed(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.gate = nn.Linear(4, 3, dtype=dtype)
        self.router = SparseOTRouter(6)

    def forward(self, x):
        return self.router(self.gate(x))


class TestSparseOTRouter(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return _Routed(dtype)

    def call(self, module, dtype):
        return module(_affinity(8, 4).to(dtype)) * torch.linspace(0, 1, 3, dtype=dtype)

    def bad_inputs(self):
        affinity = _affinity(8, 3)
        return [
            (ValueError, "k must", lambda: SparseOTRouter(0)),
            (TypeError, "k must", lambda: SparseOTRouter(1.5)),
            (ValueError, "capacity_factor must", lambda: SparseOTRouter(capacity_factor=0.5)),
            (ValueError, "gamma must", lambda: SparseOTRouter(gamma=0.0)),
            (ValueError, "max_iter must", lambda: SparseOTRouter(max_iter=0)),
            (ValueError, "solver must", lambda: SparseOTRouter(solver="bcd")),
            (ValueError, "k must", lambda: SparseOTRouter(2)(affinity)),
            (ValueError, "affinity must", lambda: SparseOTRouter()(affinity[0])),
            (TypeError, "affinity must", lambda: SparseOTRouter()(affinity.long())),
        ]


def _top_two(affinity):
    """The usual router: softmax over the two largest affinities of a token."""
    values, places = affinity.topk(2, dim=1)
    return torch.zeros_like(affinity).scatter(1, places, values.softmax(1))


def _train(router, data, target, held_out, held_out_target, epochs=3):
    """Train a mixture of four experts; return its accuracy and the largest expert's share."""
    torch.manual_seed(0)
    gate = nn.Linear(64, 4)
    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)) for _ in range(4)
    )
    optimizer = torch.optim.Adam([*gate.parameters(), *experts.parameters()], lr=5e-3)

    def mixture(x):
        weights = router(gate(x))
        logits = torch.stack([expert(x) for expert in experts], 1)
        return (weights.unsqueeze(-1) * logits).sum(1), weights

    for _ in range(epochs):
        for batch in torch.randperm(len(data)).split(128):
            if len(batch) == 128:
                optimizer.zero_grad()
                F.cross_entropy(mixture(data[batch])[0], target[batch]).backward()
                optimizer.step()
    with torch.no_grad():
        logits, weights = mixture(held_out)
        load = (weights > 0).sum(0) / (weights > 0).sum()
    return (logits.argmax(1) == held_out_target).double().mean().item(), load.max().item()


@pytest.mark.slow
def test_a_mixture_on_digits_is_better_balanced_and_as_accurate():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    data = (x[:1280], y[:1280], x[1280:], y[1280:])
    accuracy, load = _train(SparseOTRouter(capacity_factor=2.0, tol=1e-2, max_iter=50), *data)
    plain_accuracy, plain_load = _train(_top_two, *data)
    assert load < 0.30  # 0.25 is even
    assert load < plain_load
    assert accuracy > plain_accuracy - 0.03
