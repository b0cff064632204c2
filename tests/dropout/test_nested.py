"""Nested dropout: the method contract and the facts of the sheet of paper 44."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.dropout import (
    NestedDropout,
    PrefixDistribution,
    expected_prefix_cross_entropy,
    nested_co_teaching_step,
    nested_dropout,
    prefix_accuracy,
    prefix_logits,
    select_prefix,
)
from tests.harness import MethodContract


class TestNestedDropout(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 6, dtype=dtype), NestedDropout(6, std=4.0), nn.Linear(6, 3, dtype=dtype)
        )

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 30, dtype=dtype).reshape(5, 6))

    def inert(self, module):
        x = torch.randn(5, 6)
        return module(x), module[2](module[0](x))

    def bad_inputs(self):
        law = PrefixDistribution.uniform(1, 4)
        return [
            (ValueError, "num_features must", lambda: NestedDropout(0)),
            (ValueError, "std must", lambda: NestedDropout(4, std=0.0)),
            (ValueError, "distribution must", lambda: NestedDropout(5, distribution=law)),
            (ValueError, "distribution must", lambda: NestedDropout(5, distribution="normal")),
            (TypeError, "x must", lambda: NestedDropout(4)([1.0])),
            (ValueError, "x must", lambda: NestedDropout(4)(torch.ones(2, 5))),
            (ValueError, "k must", lambda: NestedDropout(4)(torch.ones(2, 4), k=5)),
            (ValueError, "k must", lambda: setattr(NestedDropout(4), "k_eval", 5)),
            (ValueError, "k must", lambda: nested_dropout(torch.ones(2, 4), 0)),
        ]


def test_keeping_all_features_is_the_identity():
    x = torch.randn(3, 4)
    assert nested_dropout(x, 4) is x


def test_one_length_for_the_batch_and_the_first_feature_is_always_kept():
    layer = NestedDropout(16, std=5.0)
    for seed in range(30):
        kept = layer(torch.ones(8, 16), seed=seed)
        assert (kept == kept[0]).all()
        length = int(kept[0].sum())
        assert 1 <= length <= 16
        assert (kept[:, :length] == 1).all()  # not rescaled


def test_a_length_a_sample_varies_within_the_batch():
    layer = NestedDropout(16, distribution="uniform", per_sample=True)
    kept = layer(torch.ones(64, 16), seed=1).sum(1)
    assert len(set(kept.tolist())) > 8


def test_other_dimensions_may_hold_the_features():
    layer = NestedDropout(3, distribution=PrefixDistribution.fixed(2, 3), dim=1)
    masked = layer(torch.ones(2, 3, 4, 4))
    assert (masked[:, :2] == 1).all()
    assert (masked[:, 2] == 0).all()


def test_a_fixed_law_is_a_linear_layer_on_the_first_features():
    layer = NestedDropout(6, distribution=PrefixDistribution.fixed(4, 6))
    head, x = nn.Linear(6, 3), torch.randn(5, 6)
    torch.testing.assert_close(head(layer(x)), F.linear(x[:, :4], head.weight[:, :4], head.bias))


def test_dropped_features_and_their_weights_get_no_gradient():
    x, head = torch.randn(5, 6, requires_grad=True), nn.Linear(6, 3)
    head(nested_dropout(x, 4)).sum().backward()
    for gradient in (x.grad, head.weight.grad):
        assert (gradient[:, 4:] == 0).all()
        assert (gradient[:, :4] != 0).all()


def test_the_last_column_of_the_head_learns_only_from_full_length():
    for k in (5, 6):
        head = nn.Linear(6, 3)
        head(nested_dropout(torch.randn(5, 6), k)).sum().backward()
        assert bool((head.weight.grad[:, -1] != 0).all()) == (k == 6)


def test_the_length_of_evaluation_is_saved_and_used():
    layer = NestedDropout(8)
    layer.k_eval = 3
    other = NestedDropout(8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(torch.ones(1, 8))[0], torch.tensor([1.0] * 3 + [0.0] * 5))
    assert set(layer.state_dict()) == {"k_eval"}


def test_the_length_of_evaluation_may_change_in_one_compiled_graph(fresh_dynamo):
    layer, graphs = NestedDropout(8).eval(), []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=record)
    for k in range(1, 9):
        layer.k_eval = k
        assert compiled(torch.ones(1, 8)).sum() == k
    assert len(graphs) == 1


def test_the_best_prefix_is_the_shortest_of_those_level():
    assert select_prefix(torch.tensor([7, 9, 9, 8]), 10) == (2, 0.9)
    assert select_prefix(torch.tensor([7, 9, 9, 8]), 10, penalty=0.0) == (2, 0.9)
    assert select_prefix(torch.tensor([70, 71]), 100, penalty=0.02) == (1, 0.7)


@pytest.mark.parametrize(
    ("exception", "name", "arguments", "options"),
    [
        (TypeError, "correct must", ([1], 2), {}),
        (ValueError, "correct must", (torch.ones(2, 2), 2), {}),
        (ValueError, "correct must", (torch.ones(0), 2), {}),
        (ValueError, "correct must", (torch.tensor([1, 3]), 2), {}),
        (ValueError, "total must", (torch.tensor([0, 0]), 0), {}),
        (ValueError, "penalty must", (torch.tensor([0, 1]), 2), {"penalty": -1.0}),
    ],
)
def test_bad_searches_are_refused(exception, name, arguments, options):
    with pytest.raises(exception, match=name):
        select_prefix(*arguments, **options)


def test_the_sampled_loss_tends_to_the_expected_loss():
    x, head, target = torch.randn(16, 12), nn.Linear(12, 4), torch.randint(4, (16,))
    law = PrefixDistribution.gaussian(12, std=5.0)
    z = prefix_logits(x, head.weight, head.bias).detach()
    losses = torch.stack([F.cross_entropy(z[k], target) for k in range(12)])
    draws = losses[law.sample((20_000,), seed=3) - 1]
    expected = expected_prefix_cross_entropy(x, head.weight, head.bias, target, law.probs)
    assert abs(draws.mean() - expected.item()) < 3 * draws.std() / len(draws) ** 0.5


class _Pair:
    """Two nets whose samples' losses are known: features are logits, given as inputs."""

    def __init__(self, dropout=lambda: NestedDropout(4, std=3.0)):
        self.nets = [nn.Linear(4, 4), nn.Linear(4, 4)]
        self.heads = [nn.Linear(4, 4), nn.Linear(4, 4)]
        self.dropouts = [dropout(), dropout()]

    def step(self, x, y, **options):
        return nested_co_teaching_step(
            *self.nets,
            *self.heads,
            x,
            y,
            dropout_a=self.dropouts[0],
            dropout_b=self.dropouts[1],
            **options,
        )

    def losses(self, which, x, y, k=4):
        with torch.no_grad():
            z = self.heads[which](nested_dropout(self.nets[which](x), k))
            return F.cross_entropy(z, y, reduction="none")


def _batch(size):
    return torch.randn(size, 4), torch.randint(4, (size,))


def test_split_exchange_trains_each_net_on_the_picks_of_the_other():
    pair, (x, y) = _Pair(), _batch(11)
    step = pair.step(x, y, forget_rate=0.5)
    first, second = torch.arange(6), torch.arange(6, 11)  # A ranks the odd one too
    order_a = pair.losses(0, x[first], y[first]).argsort()
    order_b = pair.losses(1, x[second], y[second]).argsort()
    assert torch.equal(step.index_b, first[order_a[:3]])
    assert torch.equal(step.index_a, second[order_b[:2]])


def test_shared_exchange_ranks_the_whole_batch():
    pair, (x, y) = _Pair(), _batch(10)
    step = pair.step(x, y, forget_rate=0.2, exchange="shared")
    assert torch.equal(step.index_b, pair.losses(0, x, y).argsort()[:8])
    assert torch.equal(step.index_a, pair.losses(1, x, y).argsort()[:8])


def test_both_nets_train_on_one_random_length():
    pair, (x, y) = _Pair(), _batch(20)
    step = pair.step(x, y, seed=7)
    k = int(pair.dropouts[0].distribution.sample(seed=7))
    for which, (loss, index) in enumerate(
        [(step.loss_a, step.index_a), (step.loss_b, step.index_b)]
    ):
        torch.testing.assert_close(loss, pair.losses(which, x[index], y[index], k).mean())


def test_ranking_uses_the_prefix_of_evaluation_and_falls_back_from_one_to_all():
    pair, (x, y) = _Pair(), _batch(20)
    for dropout in pair.dropouts:
        dropout.k_eval = 2
    step = pair.step(x, y, exchange="shared")
    assert torch.equal(step.index_b, pair.losses(0, x, y, 2).argsort()[:16])
    for dropout in pair.dropouts:
        dropout.k_eval = 1
    step = pair.step(x, y, exchange="shared")
    assert torch.equal(step.index_b, pair.losses(0, x, y, 4).argsort()[:16])
    step = pair.step(x, y, exchange="shared", fallback_full=False)
    assert torch.equal(step.index_b, pair.losses(0, x, y, 1).argsort()[:16])


def test_each_loss_trains_its_own_net_and_ranking_leaves_no_gradient():
    pair, (x, y) = _Pair(), _batch(20)
    pair.step(x, y).loss_a.backward()
    assert all(p.grad is not None for p in pair.nets[0].parameters())
    assert all(p.grad is None for net in (pair.nets[1], pair.heads[1]) for p in net.parameters())


def test_modes_are_restored_and_frozen_batch_norms_stay_frozen():
    pair, (x, y) = _Pair(), _batch(20)
    norm = nn.BatchNorm1d(4)
    pair.nets[0] = nn.Sequential(nn.Linear(4, 4), norm).train()
    norm.eval()
    before = norm.running_mean.clone()
    pair.step(x, y)
    assert not norm.training
    assert pair.nets[0].training
    assert pair.dropouts[0].training
    assert torch.equal(norm.running_mean, before)


def test_plain_dropout_is_the_other_compressor():
    pair, (x, y) = _Pair(lambda: nn.Dropout(0.3)), _batch(20)
    step = pair.step(x, y, exchange="shared")
    assert torch.equal(step.index_b, pair.losses(0, x, y).argsort()[:16])  # ranked without dropout
    assert step.loss_a != pair.losses(0, x[step.index_a], y[step.index_a]).mean()


def test_bad_co_teaching_is_refused():
    pair, (x, y) = _Pair(), _batch(20)
    for name, options in (
        ("exchange must", {"exchange": "swap"}),
        ("forget_rate must", {"forget_rate": 1.0}),
        ("losses must", {"forget_rate": 0.95}),
    ):
        with pytest.raises(ValueError, match=name):
            pair.step(x, y, **options)
    for other in (nn.Dropout(0.3), NestedDropout(5)):
        pair.dropouts[1] = other
        with pytest.raises(ValueError, match="dropout_b must"):
            pair.step(x, y)


@pytest.mark.slow
def test_nested_dropout_learns_through_forty_percent_of_wrong_labels():
    # Sheet of paper 44, fact 8, with 2 seeds: 10 Gaussian classes in 32 dimensions, 1000 points,
    # 40 % flipped labels, MLP 32-256-256; k by clean validation. Test accuracy 0.83 against 0.63.
    torch.set_num_threads(1)

    def accuracy(nested, seed):
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(10, 32, generator=generator)

        def draw(count):
            y = torch.randint(10, (count,), generator=generator)
            return means[y] + 1.3 * torch.randn(count, 32, generator=generator), y

        (x, clean), (x_val, y_val), (x_test, y_test) = draw(1000), draw(500), draw(2000)
        flipped = torch.rand(1000, generator=generator) < 0.4
        shift = torch.randint(1, 10, (1000,), generator=generator)
        y = torch.where(flipped, (clean + shift) % 10, clean)
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        head, layer = nn.Linear(256, 10), NestedDropout(256, std=5.0)
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3)
        for _ in range(60):
            for rows in torch.randperm(1000, generator=generator).split(128):
                optimizer.zero_grad()
                features = body(x[rows])
                F.cross_entropy(head(layer(features) if nested else features), y[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            if not nested:
                return (head(body(x_test)).argmax(1) == y_test).double().mean().item()
            correct = prefix_accuracy(body(x_val), head.weight, head.bias, y_val)
            layer.k_eval, _ = select_prefix(correct, 500)
            z = head(layer.eval()(body(x_test)))
            return (z.argmax(1) == y_test).double().mean().item()

    gains = [accuracy(True, seed) - accuracy(False, seed) for seed in range(2)]
    assert sum(gains) / 2 >= 0.10
