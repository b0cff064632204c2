"""Multi-sample dropout: the method contract and the facts of the sheet of paper 30."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.dropout import (
    MultiSampleDropout,
    MultiSampleDropoutCrossEntropy,
    multi_sample_dropout,
    multi_sample_loss,
)
from regularizers.ops import dropout_samples
from tests.harness import MethodContract


class TestMultiSampleDropout(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return MultiSampleDropout(nn.Linear(6, 3, dtype=dtype), p=0.4, num_samples=4)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 30, dtype=dtype).reshape(5, 6))

    def inert(self, module):
        x = torch.randn(5, 6)
        return module(x), module.head(x)[None]

    def bad_inputs(self):
        head = nn.Linear(2, 2)
        return [
            (TypeError, "head must", lambda: MultiSampleDropout(lambda x: x)),
            (ValueError, "p must", lambda: MultiSampleDropout(head, p=-0.1)),
            (ValueError, "p must", lambda: MultiSampleDropout(head, p=1.5)),
            (ValueError, "num_samples must", lambda: MultiSampleDropout(head, num_samples=0)),
            (
                ValueError,
                "diversity must",
                lambda: MultiSampleDropout(head, num_samples=2, diversity=[None]),
            ),
            (TypeError, "x must", lambda: MultiSampleDropout(head)(torch.ones(2, 2).long())),
        ]


class TestMultiSampleDropoutCrossEntropy(MethodContract):
    target = torch.tensor([0, 2, 1, 2, 0])

    def build(self, dtype):
        torch.manual_seed(0)
        return MultiSampleDropoutCrossEntropy(
            6, 3, p=0.4, num_samples=4, label_smoothing=0.1, dtype=dtype
        )

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 30, dtype=dtype).reshape(5, 6), self.target)

    def inert(self, module):
        x = torch.randn(5, 6)
        return module(x, self.target), F.cross_entropy(
            module.logits(x), self.target, label_smoothing=0.1
        )

    def bad_inputs(self):
        build = MultiSampleDropoutCrossEntropy
        return [
            (ValueError, "in_features must", lambda: build(0, 3)),
            (ValueError, "num_classes must", lambda: build(3, 0)),
            (TypeError, "num_classes must", lambda: build(3, 2.5)),
            (ValueError, "p must", lambda: build(3, 2, p=1.0)),
            (ValueError, "num_samples must", lambda: build(3, 2, num_samples=0)),
            (ValueError, "label_smoothing must", lambda: build(3, 2, label_smoothing=1.0)),
            (ValueError, "reduction must", lambda: build(3, 2, reduction="average")),
            (
                ValueError,
                "weight must",
                lambda: build(3, 2)(torch.ones(2, 4), torch.zeros(2).long()),
            ),
        ]


def test_evaluation_returns_the_input_as_one_sample():
    x = torch.randn(3, 4)
    result = multi_sample_dropout(x, training=False)
    assert result.shape == (1, 3, 4)
    assert result.data_ptr() == x.data_ptr()


def test_samples_are_those_of_the_operator():
    x = torch.randn(3, 4)
    assert torch.equal(multi_sample_dropout(x, 0.3, 5, seed=2), dropout_samples(x, 0.3, 5, seed=2))


def test_p_of_one_gives_zeros():
    assert torch.equal(multi_sample_dropout(torch.randn(3, 4), 1.0, 2), torch.zeros(2, 3, 4))


def test_head_runs_once_on_all_samples():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x[:, :2]

    head = Counting()
    outputs = MultiSampleDropout(head, num_samples=6)(torch.randn(4, 5))
    assert head.calls == 1
    assert outputs.shape == (6, 4, 2)


def test_module_loss_equals_the_fused_loss_for_one_seed():
    x, target = torch.randn(8, 6), torch.randint(3, (8,))
    fused = MultiSampleDropoutCrossEntropy(6, 3, num_samples=5)
    head = nn.Linear(6, 3)
    head.load_state_dict(fused.state_dict())
    unfused = MultiSampleDropout(head, num_samples=5)
    losses = []
    for module in (
        lambda: fused(x, target),
        lambda: unfused.loss(x, target, nn.CrossEntropyLoss()),
    ):
        torch.manual_seed(4)
        losses.append(module())
    torch.testing.assert_close(*losses)


def test_losses_are_averaged_not_logits():
    # Jensen: the loss of the mean logits is smaller than the mean of the losses.
    outputs, target = torch.randn(8, 16, 5), torch.randint(5, (16,))
    mean_of_losses = multi_sample_loss(outputs, target, F.cross_entropy)
    torch.testing.assert_close(
        mean_of_losses, torch.stack([F.cross_entropy(o, target) for o in outputs]).mean()
    )
    assert F.cross_entropy(outputs.mean(0), target) < mean_of_losses


def test_sample_reduction_keeps_the_shape_of_the_criterion():
    outputs, target = torch.randn(8, 16, 5), torch.randint(5, (16,))
    rows = lambda o, t: F.cross_entropy(o, t, reduction="none")
    each = multi_sample_loss(outputs, target, rows, reduction="none")
    assert each.shape == (8, 16)
    torch.testing.assert_close(multi_sample_loss(outputs, target, rows), each.mean(0))
    torch.testing.assert_close(
        multi_sample_loss(outputs, target, rows, reduction="sum"), each.sum(0)
    )


def test_loss_without_samples_is_refused():
    with pytest.raises(ValueError, match="outputs must"):
        multi_sample_loss(torch.empty(0, 3, 2), torch.zeros(3).long(), F.cross_entropy)
    with pytest.raises(ValueError, match="reduction must"):
        multi_sample_loss(
            torch.empty(1, 3, 2), torch.zeros(3).long(), F.cross_entropy, reduction="max"
        )


def test_diversity_alters_one_sample_each_before_dropout():
    flip = lambda features: features.flip(-1)
    layer = MultiSampleDropout(nn.Identity(), p=0.0, num_samples=3, diversity=[None, flip, None])
    x = torch.randn(2, 4, 5)
    assert torch.equal(layer(x), torch.stack([x, x.flip(-1), x]))
    layer.p = 0.5
    kept = layer(torch.ones(20, 30)) != 0
    assert not torch.equal(kept[0], kept[2])
    assert torch.equal(layer.eval()(x), x[None])


def test_rate_is_assigned_in_place_and_checked():
    layer = MultiSampleDropoutCrossEntropy(4, 2)
    before = layer.p
    layer.p = 0.25
    assert layer.p is before
    assert before.item() == 0.25
    with pytest.raises(ValueError, match="p must"):
        layer.p = 1.0
    assert layer.p.item() == 0.25


def test_rate_takes_a_tensor_of_one_number_and_no_other():
    layer = MultiSampleDropout(nn.Identity(), p=0.5)
    before = layer.p
    layer.p = torch.tensor(0.25)
    assert layer.p is before
    assert before.item() == 0.25
    with pytest.raises(ValueError, match="p must"):
        layer.p = torch.tensor([0.3, 0.4])
    with pytest.raises(ValueError, match="p must"):
        layer.p = torch.tensor(2.0)


def test_evaluation_leaves_the_default_generator_alone():
    fused = MultiSampleDropoutCrossEntropy(4, 2).eval()
    plain = MultiSampleDropout(nn.Linear(4, 2)).eval()
    state = torch.get_rng_state()
    fused(torch.ones(3, 4), torch.tensor([0, 1, 1]))
    plain(torch.ones(3, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_rate_stays_exact_under_half_and_out_of_the_state_dict():
    layer = MultiSampleDropout(nn.Linear(4, 2), p=0.1).to(torch.bfloat16)
    assert layer.p.dtype == torch.float64
    assert layer.p.item() == 0.1
    assert set(layer.state_dict()) == {"head.weight", "head.bias"}


def test_rate_survives_the_meta_device():
    with torch.device("meta"):
        layer = MultiSampleDropoutCrossEntropy(4, 2, p=0.3)
    layer = layer.to_empty(device="cpu")
    assert layer.p.item() == 0.3


def test_a_schedule_of_the_module_compiles_once(fresh_dynamo):
    layer = MultiSampleDropoutCrossEntropy(4, 2)
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=record)
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 1])
    for step in range(20):
        layer.p = step / 40
        layer.label_smoothing = step / 50
        compiled(x, target)
    assert len(graphs) == 1


def test_class_weight_follows_the_module_and_stays_out_of_the_state_dict():
    layer = MultiSampleDropoutCrossEntropy(4, 2, class_weight=torch.tensor([1.0, 2.0])).double()
    assert layer.class_weight.dtype == torch.float64
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.slow
def test_more_samples_reach_a_lower_training_loss_in_equal_steps():
    # Sheet of paper 30, fact 8: 256 x 64 inputs, linear teacher, 64 hidden units, SGD 0.5, 150
    # steps; means over 5 seeds.
    def clean_loss(num_samples, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(256, 64, generator=generator)
        target = (x @ torch.randn(64, 10, generator=generator)).argmax(1)
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        head = MultiSampleDropoutCrossEntropy(64, 10, num_samples=num_samples)
        optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.5)
        for _ in range(150):
            optimizer.zero_grad()
            head(body(x), target).backward()
            optimizer.step()
        with torch.no_grad():
            return F.cross_entropy(head.logits(body(x)), target).item()

    one, eight = (sum(clean_loss(m, seed) for seed in range(5)) / 5 for m in (1, 8))
    assert eight < one
