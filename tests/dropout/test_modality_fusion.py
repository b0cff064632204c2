"""Fusion heads and the evaluation over subsets: contracts and the sheet of paper 121."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.dropout import (
    ConcatFusion,
    ModalityMAE,
    SumFusion,
    TransformerFusion,
    evaluate_modality_subsets,
)
from tests.harness import MethodContract


def _tokens(dtype=torch.float32):
    return torch.linspace(-1, 1, 144, dtype=torch.float64).sin().view(6, 3, 8).to(dtype)


class TestTransformerFusion(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return TransformerFusion(3, 8, 5, depth=1, num_heads=2).to(dtype)

    def call(self, module, dtype):
        return module(_tokens(dtype))

    def bad_inputs(self):
        return [
            (ValueError, "out_features must", lambda: TransformerFusion(3, 8, 0)),
            (ValueError, "num_heads must", lambda: TransformerFusion(3, 8, 5, num_heads=3)),
            (ValueError, "x must", lambda: TransformerFusion(3, 8, 5)(torch.ones(2, 2, 8))),
        ]


class TestSumFusion(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return SumFusion(3, 8, 5).to(dtype)

    def call(self, module, dtype):
        return module(_tokens(dtype))

    def bad_inputs(self):
        return [
            (ValueError, "num_modalities must", lambda: SumFusion(0, 8, 5)),
            (ValueError, "x must", lambda: SumFusion(3, 8, 5)(torch.ones(2, 3, 9))),
        ]


class TestConcatFusion(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return ConcatFusion(3, 8, 5).to(dtype)

    def call(self, module, dtype):
        return module(_tokens(dtype))

    def bad_inputs(self):
        return [
            (ValueError, "dim must", lambda: ConcatFusion(3, 0, 5)),
            (ValueError, "x must", lambda: ConcatFusion(3, 8, 5)(torch.ones(2, 24))),
        ]


def test_sum_and_concat_fusion_are_the_same_functions():
    add, concat = SumFusion(3, 8, 5), ConcatFusion(3, 8, 5)
    with torch.no_grad():
        concat.head.weight.copy_(torch.cat([head.weight for head in add.heads], 1))
        concat.head.bias.copy_(sum(head.bias for head in add.heads))
    torch.testing.assert_close(add(_tokens()), concat(_tokens()))


def test_transformer_fusion_tells_modalities_apart():
    fusion = TestTransformerFusion().build(torch.float32)
    nn.init.normal_(fusion.class_token)
    x = _tokens()
    assert (fusion(x) - fusion(x[:, [1, 0, 2]])).abs().max() > 1e-4


def test_evaluation_runs_over_all_subsets_and_restores_the_mode():
    class Model(nn.Module):
        def forward(self, x, present):
            assert not self.training
            return (x * present[..., None]).sum(1)

    model = Model()
    x, y = torch.eye(2)[torch.tensor([[0, 1, 1], [1, 1, 1]])], torch.tensor([0, 1])
    found = evaluate_modality_subsets(model, x, y, batch_size=1)
    assert list(found) == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert found[0,] == 1.0
    assert found[1, 2] == 0.5
    assert model.training
    assert found == evaluate_modality_subsets(model, x, y)


def test_evaluation_takes_another_metric():
    error = lambda output, target: (output[:, 0] - target).abs()
    x, y = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([1.0, 5.0])
    add = lambda x, present: (x * present[..., None]).sum(1)
    found = evaluate_modality_subsets(add, x, y, metric=error)
    assert found == {(0,): 1.0, (1,): 1.0, (0, 1): 2.0}


def test_evaluation_names_bad_arguments():
    model = lambda x, present: x.sum(1)
    with pytest.raises(ValueError, match="x must"):
        evaluate_modality_subsets(model, torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="y must"):
        evaluate_modality_subsets(model, torch.ones(3, 2, 1), torch.ones(2))
    with pytest.raises(ValueError, match="batch_size must"):
        evaluate_modality_subsets(model, torch.ones(3, 2, 1), torch.ones(3), batch_size=0)


@pytest.mark.slow
def test_reconstruction_beats_a_plain_network_fed_zeros():
    # Sheet of paper 121, fact 8: three views of four classes, features that are never near zero;
    # .80 against .72 on average over two seeds.
    torch.set_num_threads(1)
    gains = []
    for seed in range(2):
        ours, zeros = _subset_accuracies(seed)
        gains.append(sum(ours.values()) / 7 - sum(zeros.values()) / 7)
    assert sum(gains) / 2 >= 0.05


def _subset_accuracies(seed):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 4, 16, generator=generator)

    def views(count):
        y = torch.randint(4, (count,), generator=generator)
        noise = 2 * torch.randn(count, 3, 16, generator=generator)
        return (means[:, y].transpose(0, 1) + noise + 1).relu(), y

    (x, y), (x_test, y_test) = views(600), views(2000)
    torch.manual_seed(seed)
    mae, head = ModalityMAE(3, 16, depth=1, num_memory_tokens=2), SumFusion(3, 16, 4)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(
        [*mae.parameters(), *head.parameters(), *plain.parameters()], lr=2e-3
    )
    for step in range(500):
        rows = torch.randint(600, (128,), generator=generator)
        tokens, loss, _ = mae(x[rows], seed=step)
        for logits in (head(tokens), plain(x[rows])):
            loss = loss + F.cross_entropy(logits, y[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mae.eval()
    with_mae = lambda x, present: head(mae(x, present)[0])
    with_zeros = lambda x, present: plain(x * present[..., None])
    return tuple(
        evaluate_modality_subsets(model, x_test, y_test) for model in (with_mae, with_zeros)
    )
