"""Stochastic layer-wise shuffle: the method contract and the facts of the sheet of paper 33."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regularizers
from regularizers.dropout import StochasticLayerShuffle, apply_layer_shuffle, shuffled_call
from regularizers.ops import philox_words
from tests.harness import MethodContract


class TestStochasticLayerShuffle(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return StochasticLayerShuffle(nn.Linear(3, 3, dtype=dtype), p=0.5)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 30, dtype=dtype).reshape(2, 5, 3))

    def inert(self, module):
        x = torch.randn(2, 5, 3)
        return module(x), module.layer(x)

    def bad_inputs(self):
        x = torch.ones(2, 5, 3)
        layer = nn.Identity()
        return [
            (TypeError, "layer must", lambda: StochasticLayerShuffle(torch.tanh, 0.1)),
            (ValueError, "p must", lambda: StochasticLayerShuffle(layer, 1.5)),
            (ValueError, "p must", lambda: shuffled_call(layer, x, p=-0.1)),
            (ValueError, "p must", lambda: shuffled_call(layer, x, p=torch.tensor(1.5))),
            (ValueError, "x must", lambda: shuffled_call(layer, x[0], p=0.5)),
            (TypeError, "x must", lambda: shuffled_call(layer, [1.0], p=0.5)),
            (ValueError, "residual must", lambda: shuffled_call(layer, x, x[:, :4], p=0.5)),
            (ValueError, "protect must", lambda: shuffled_call(layer, x, p=0.5, protect=[5])),
            (
                ValueError,
                "layer_index must",
                lambda: shuffled_call(layer, x, p=0.5, layer_index=-1),
            ),
            (ValueError, "layer must", lambda: shuffled_call(lambda x: x[:, :2], x, p=1.0)),
            (ValueError, "layer must", lambda: shuffled_call(lambda x: [x], x, p=1.0)),
            (TypeError, "layers must", lambda: apply_layer_shuffle([layer])),
            (ValueError, "max_p must", lambda: apply_layer_shuffle(nn.ModuleList([layer]), 1.1)),
            (
                ValueError,
                "schedule must",
                lambda: apply_layer_shuffle(nn.ModuleList([layer]), schedule="late"),
            ),
        ]


def _running_sum(x):
    return x.cumsum(1)


def test_rates_grow_linearly_from_zero():
    # Sheet of paper 33, fact 1.
    layers = apply_layer_shuffle(nn.ModuleList(nn.Identity() for _ in range(24)))
    rates = [layer.p.item() for layer in layers]
    assert rates[0] == 0
    assert rates[1] == pytest.approx(0.02174, abs=1e-5)
    assert rates[12] == pytest.approx(0.26087, abs=1e-5)
    assert rates[23] == 0.5
    assert sum(rates) == pytest.approx(6.0)
    assert apply_layer_shuffle(nn.ModuleList([nn.Identity()]))[0].p.item() == 0


def test_a_layer_is_shuffled_iff_its_coin_lies_below_p():
    x = torch.arange(7.0).reshape(1, 7, 1)
    for seed in range(40):
        coin = philox_words(torch.tensor(seed), 8, stream=2)[7].item() / 2**32
        y = shuffled_call(_running_sum, x, p=0.4, seed=seed, layer_index=2)
        assert torch.equal(y, _running_sum(x)) == (coin >= 0.4), seed


def test_tokens_are_sorted_by_their_words():
    seen = []
    x = torch.arange(9.0).reshape(1, 9, 1)
    shuffled_call(lambda t: seen.append(t) or t, x, p=1.0, seed=5)
    order = philox_words(torch.tensor(5), 9).argsort()
    assert torch.equal(seen[0].flatten(), x.flatten()[order])


def test_tokenwise_layers_and_attention_without_positions_do_not_notice():
    x = torch.randn(3, 11, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    for layer in (nn.Linear(8, 8), nn.LayerNorm(8), lambda t: attention(t, t, t)[0]):
        torch.testing.assert_close(
            shuffled_call(layer, x, p=1.0, seed=0), layer(x), rtol=1e-5, atol=1e-6
        )


def test_a_recurrent_layer_does_notice():
    x = torch.randn(3, 11, 8)
    layer = nn.GRU(8, 8, batch_first=True)
    run = lambda t: layer(t)[0]
    assert not torch.allclose(shuffled_call(run, x, p=1.0, seed=0), run(x), atol=1e-3)


@pytest.mark.parametrize("per_sample", [False, True])
def test_order_comes_back_exactly(per_sample):
    x = torch.randn(4, 13, 3)
    options = {"p": 1.0, "per_sample": per_sample}
    assert torch.equal(shuffled_call(nn.Identity(), x, seed=1, **options), x)
    place = torch.arange(13.0)[:, None]
    y = shuffled_call(lambda t: t + place, x, seed=1, **options)
    torch.testing.assert_close(y.sum(1), (x + place).sum(1))
    assert not torch.equal(y, x + place)


def test_samples_are_permuted_alike_unless_asked():
    x = torch.arange(20.0).reshape(1, 20, 1).expand(6, 20, 1)
    seen = []
    keep = lambda t: seen.append(t) or t
    shuffled_call(keep, x, p=1.0, seed=3)
    shuffled_call(keep, x, p=1.0, seed=3, per_sample=True)
    assert torch.equal(seen[0], seen[0][:1].expand(6, 20, 1))
    assert len({tuple(row.flatten().tolist()) for row in seen[1]}) == 6
    assert torch.equal(seen[1].sort(1).values, x)


def test_zero_and_evaluation_never_permute_and_one_always_does():
    x = torch.arange(50.0).reshape(1, 50, 1)
    expected = _running_sum(x)
    for seed in range(10):
        assert torch.equal(shuffled_call(_running_sum, x, p=0.0, seed=seed), expected)
        assert torch.equal(
            shuffled_call(_running_sum, x, p=1.0, training=False, seed=seed), expected
        )
        assert not torch.equal(shuffled_call(_running_sum, x, p=1.0, seed=seed), expected)


def test_the_residual_stream_is_permuted_alike():
    x, r = torch.randn(2, 9, 3), torch.randn(2, 9, 5)
    pairs = []

    def layer(x, residual, scale):
        pairs.append((x, residual))
        return x * scale, None, residual

    y, nothing, residual = shuffled_call(layer, x, r, p=1.0, seed=4, scale=2.0)
    order = philox_words(torch.tensor(4), 9).argsort()
    assert torch.equal(pairs[0][0], x[:, order])
    assert torch.equal(pairs[0][1], r[:, order])
    assert torch.equal(y, 2 * x)
    assert nothing is None
    assert torch.equal(residual, r)


def test_protected_places_stay():
    seen = []
    x = torch.arange(12.0).reshape(1, 12, 1)
    shuffled_call(lambda t: seen.append(t) or t, x, p=1.0, seed=2, protect=[0, -1, 5])
    found = seen[0].flatten()
    assert found[[0, 5, 11]].tolist() == [0, 5, 11]
    assert sorted(found.tolist()) == list(range(12))
    assert not torch.equal(found, x.flatten())


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient_is_that_of_the_permuted_graph(per_sample):
    seen = []
    x = torch.randn(2, 7, 3, requires_grad=True)

    def layer(t):
        seen.append(t.detach())
        return t.cumsum(1).sin()

    y = shuffled_call(layer, x, p=1.0, seed=8, per_sample=per_sample)
    cotangent = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, cotangent)
    # Tokens are distinct, so the first coordinate tells the order that the layer saw.
    order = (seen[0][:, :, None, 0] == x[:, None, :, 0]).int().argmax(2)
    index = order[..., None].expand_as(x)
    permuted = x.detach().gather(1, index).requires_grad_()
    (expected,) = torch.autograd.grad(
        permuted.cumsum(1).sin(), permuted, cotangent.gather(1, index)
    )
    torch.testing.assert_close(found, torch.zeros_like(x).scatter(1, index, expected))


def test_share_of_shuffled_calls_is_p():
    x = torch.arange(30.0).reshape(1, 30, 1)
    layer = StochasticLayerShuffle(nn.GRU(1, 1, batch_first=True), 0.3)
    calls = []
    layer.layer.forward = lambda t: calls.append(torch.equal(t, x)) or t
    for _ in range(400):
        layer(x)
    assert abs(calls.count(False) - 120) < 4 * (400 * 0.3 * 0.7) ** 0.5


def test_rate_stays_on_the_cpu_and_out_of_the_state_dict():
    layer = StochasticLayerShuffle(nn.Linear(2, 2), 0.3).to("meta")
    assert layer.p.device.type == "cpu"
    assert layer.p.dtype == torch.float64
    assert set(layer.state_dict()) == {"layer.weight", "layer.bias"}


def test_works_while_a_backend_is_forced():
    x = torch.randn(2, 5, 3)
    expected = shuffled_call(_running_sum, x, p=1.0, seed=2)
    with regularizers.use_backend("reference"):
        assert torch.equal(shuffled_call(_running_sum, x, p=1.0, seed=2), expected)


def test_compiled_and_eager_calls_agree_and_a_schedule_compiles_once(fresh_dynamo):
    x = torch.randn(2, 6, 3)
    graphs = []
    compiled = torch.compile(
        lambda x, p, seed: shuffled_call(_running_sum, x, p=p, seed=seed),
        fullgraph=True,
        backend=lambda graph, _: graphs.append(graph) or graph,
    )
    for step in range(12):
        p = torch.tensor(step / 12, dtype=torch.float64)
        seed = torch.tensor(step)
        torch.testing.assert_close(
            compiled(x, p, seed), shuffled_call(_running_sum, x, p=p, seed=seed)
        )
    assert len(graphs) == 1


@pytest.mark.slow
def test_shuffling_does_not_harm_a_task_without_order():
    # Sheet of paper 33, fact 7: 3 residual GRU layers, 100 sequences of length 16 whose label does
    # not depend on the order.
    torch.set_num_threads(1)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(8, 8, batch_first=True)

        def forward(self, x):
            return x + self.gru(x)[0]

    def accuracy(max_p, seed):
        torch.manual_seed(seed)
        direction = torch.randn(8)
        x = torch.randn(500, 16, 8)
        target = ((x @ direction).tanh().sum(1) > 0).long()
        layers = apply_layer_shuffle(nn.ModuleList(Layer() for _ in range(3)), max_p)
        head = nn.Linear(8, 2)
        optimizer = torch.optim.Adam([*layers.parameters(), *head.parameters()], lr=3e-3)

        def logits(rows):
            for layer in layers:
                rows = layer(rows)
            return head(rows.mean(1))

        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(logits(x[:100]), target[:100]).backward()
            optimizer.step()
        layers.eval()
        with torch.no_grad():
            return (logits(x[100:]).argmax(1) == target[100:]).double().mean().item()

    plain, shuffled = (sum(accuracy(p, seed) for seed in range(2)) / 2 for p in (0.0, 1.0))
    assert shuffled >= plain - 0.02, (plain, shuffled)
