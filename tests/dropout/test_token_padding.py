"""Redundant token padding: the method contract and the facts of the sheet of paper 78."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.dropout import (
    NestedDropout,
    PrefixDistribution,
    RedundantTokenPadding,
    SemanticProjector,
    freeze_for_decoder_finetune,
    hierarchical_semantic_loss,
    prefix_mask,
    sample_num_tokens,
)
from tests.harness import MethodContract


class TestRedundantTokenPadding(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return RedundantTokenPadding(4, num_tokens=6, num_pad=3, k_min=2, dtype=dtype)

    def call(self, module, dtype):
        queries, positions = module(torch.linspace(-1, 1, 48, dtype=dtype).reshape(2, 6, 4))
        return queries + positions

    def inert(self, module):
        tokens = torch.randn(2, 9, 4)
        return module.truncate(tokens)[0], tokens[:, :6]

    def bad_inputs(self):
        build = lambda **options: RedundantTokenPadding(
            4, **{"num_tokens": 6, "num_pad": 3, "k_min": 2, **options}
        )
        padding, tokens = build(), torch.ones(2, 9, 4)
        return [
            (ValueError, "embed_dim must", lambda: RedundantTokenPadding(0)),
            (ValueError, "num_tokens must", lambda: build(num_tokens=0)),
            (ValueError, "num_pad must", lambda: build(num_pad=7)),
            (ValueError, "num_pad must", lambda: build(num_pad=-1)),
            (ValueError, "k_min must", lambda: build(k_min=7)),
            (ValueError, "k_min must", lambda: build(k_min=0)),
            (ValueError, "init_std must", lambda: build(init_std=0.0)),
            (ValueError, "q must", lambda: padding(torch.ones(2, 5, 4))),
            (TypeError, "q must", lambda: padding(torch.ones(2, 6, 4).int())),
            (ValueError, "tokens must", lambda: padding.truncate(torch.ones(2, 6, 4))),
            (ValueError, "k must", lambda: padding.truncate(tokens, 10)),
            (ValueError, "k must", lambda: padding.truncate(tokens, 0)),
            (ValueError, "k must", lambda: padding.truncate(tokens, torch.tensor([1, 10]))),
            (ValueError, "k must", lambda: padding.truncate(tokens, torch.tensor([0, 1]))),
            (ValueError, "k must", lambda: padding.truncate(tokens, torch.tensor([1, 2, 3]))),
            (ValueError, "k must", lambda: build().eval().truncate(tokens, 7)),
        ]


class TestSemanticProjector(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return SemanticProjector(3, 5).to(dtype)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 24, dtype=dtype).reshape(2, 4, 3))

    def bad_inputs(self):
        return [
            (ValueError, "dim must", lambda: SemanticProjector(0, 2)),
            (ValueError, "out_dim must", lambda: SemanticProjector(2, 0)),
        ]


def test_paper_defaults_keep_all_tokens_in_half_of_the_steps():
    padded, plain = (PrefixDistribution.padded_uniform(256, pad, 32) for pad in (224, 0))
    assert abs(padded.probs[-1].item() - 225 / 449) < 1e-12
    assert abs(plain.probs[-1].item() - 1 / 225) < 1e-12
    assert abs(padded.mean().item() - 199.875) < 1e-3
    assert abs(plain.mean().item() - 144.0) < 1e-9
    assert abs(padded.keep_probability()[199].item() - 0.625835) < 1e-6
    assert abs(plain.keep_probability()[199].item() - 0.253333) < 1e-6


def test_small_keep_probabilities():
    padded, plain = (PrefixDistribution.padded_uniform(4, pad, 1) for pad in (3, 0))
    for law, expected in ((padded, (1, 6 / 7, 5 / 7, 4 / 7)), (plain, (1, 3 / 4, 1 / 2, 1 / 4))):
        torch.testing.assert_close(law.keep_probability(), torch.tensor(expected).double())


def test_drawn_lengths_follow_the_uniform_law():
    k = sample_num_tokens(44_000, num_tokens=8, num_pad=5, k_min=3, per_sample=True, seed=0)
    counts = torch.bincount(k, minlength=14)
    # 11 lengths, 4000 draws each: 4 sigma = 4 sqrt(44000 * 1/11 * 10/11) = 241.
    assert (counts[:3] == 0).all()
    assert (counts[3:] - 4000).abs().max() < 241


def test_clipped_lengths_follow_the_padded_law():
    k = sample_num_tokens(20_000, num_tokens=5, num_pad=4, k_min=2, per_sample=True, seed=1)
    share = torch.bincount(k.clamp(max=5), minlength=6)[1:] / 20_000
    probs = PrefixDistribution.padded_uniform(5, 4, 2).probs
    sigma = (probs * (1 - probs) / 20_000).sqrt()
    assert ((share - probs).abs() <= 4 * sigma).all()


def test_one_length_serves_the_batch_unless_asked_otherwise():
    k = sample_num_tokens(50, num_tokens=8, num_pad=8, k_min=1)
    assert k.shape == (50,)
    assert (k == k[0]).all()
    assert (
        sample_num_tokens(50, num_tokens=8, num_pad=8, k_min=1, per_sample=True).unique().numel()
        > 4
    )


def test_no_padding_is_nested_dropout_with_a_uniform_law():
    padding = RedundantTokenPadding(4, num_tokens=6, num_pad=0, k_min=2, per_sample=True)
    q = torch.randn(5, 6, 4)
    queries, positions = padding(q)
    assert queries is q
    assert torch.equal(positions, padding.pos)
    kept, _, k = padding.truncate(q, seed=3)
    expected = PrefixDistribution.uniform(2, 6).sample((5,), seed=3)
    assert torch.equal(k, expected)
    assert torch.equal(kept, prefix_mask(q, expected, 1))
    padding = RedundantTokenPadding(4, num_tokens=6, num_pad=0, k_min=1, per_sample=True)
    nested = NestedDropout(6, distribution="uniform", per_sample=True, dim=1)
    results = []
    for truncate in (lambda: padding.truncate(q)[0], lambda: nested(q)):
        torch.manual_seed(2)
        results.append(truncate())
    assert torch.equal(*results)


def test_no_padding_and_the_least_length_n_is_no_dropout():
    padding = RedundantTokenPadding(4, num_tokens=6, num_pad=0, k_min=6)
    tokens = torch.randn(5, 6, 4)
    for _ in range(5):
        assert torch.equal(padding.truncate(tokens)[0], tokens)


def test_padding_queries_are_copies_of_the_tail_with_positions_of_their_own():
    n, m = 6, 4
    padding = RedundantTokenPadding(8, num_tokens=n, num_pad=m, k_min=1, dtype=torch.float64)
    q = torch.randn(3, n, 8, dtype=torch.float64)
    queries, positions = padding(q)
    output = queries + positions
    assert torch.equal(queries[:, :n], q)
    for j in range(m):
        torch.testing.assert_close(
            output[:, n + j] - padding.pos_pad[j], output[:, n - m + j] - padding.pos[n - m + j]
        )
    assert not torch.equal(padding.pos_pad, padding.pos[n - m :])


def test_positions_start_with_the_standard_deviation_of_the_width():
    padding = RedundantTokenPadding(64)
    for parameter in (padding.pos, padding.pos_pad):
        # 224 * 64 values: the deviation is known to 0.6 %, 4 sigma 2.4 %.
        assert abs(parameter.std().item() * 8 - 1) < 0.024
    assert abs(RedundantTokenPadding(64, init_std=0.5).pos.std().item() - 0.5) < 0.012


def tokenizer(**options):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "padding": RedundantTokenPadding(8, num_tokens=6, num_pad=4, k_min=2, **options),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
            "decoder_positions": RedundantTokenPadding(8, num_tokens=6, num_pad=4, k_min=2),
            "decoder": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        }
    )

    def run(q, k=None):
        queries, positions = model["padding"](q)
        encoded = model["encoder"](queries + positions)
        tokens, ignored, k = model["padding"].truncate(encoded, k)
        places = model["decoder_positions"].positions[: tokens.shape[1]]
        return model["decoder"](tokens + places, src_key_padding_mask=ignored), encoded, k

    return model, run


def test_one_length_cuts_and_lengths_a_sample_mask_to_the_same_result():
    _, run = tokenizer()
    q = torch.randn(3, 6, 8)
    for k in (2, 5, 9):
        cut = run(q, k)[0]
        masked = run(q, torch.full((3,), k))[0]
        assert cut.shape[1] == k
        torch.testing.assert_close(masked[:, :k], cut, rtol=1e-4, atol=1e-5)


def test_tokens_beyond_k_get_zero_gradient_from_the_decoder():
    _, run = tokenizer()
    q = torch.randn(3, 6, 8)
    lengths = torch.tensor([2, 7, 10])
    for k in (4, lengths):
        output, encoded, _ = run(q, k)
        mask = torch.arange(10) < torch.as_tensor(k).reshape(-1, 1)
        output = output if isinstance(k, int) else output * mask[..., None]
        (gradient,) = torch.autograd.grad(output.square().sum(), encoded)
        assert torch.equal((gradient != 0).any(-1), mask.expand(3, 10))


@torch.no_grad()
def test_evaluation_needs_the_padding_in_the_encoder_but_not_in_the_decoder():
    model, run = tokenizer()
    model.eval()
    q = torch.randn(3, 6, 8)
    before, _, k = run(q)
    assert k == 6
    assert before.shape == (3, 6, 8)
    model["decoder_positions"].pos_pad.add_(1.0)
    assert torch.equal(run(q)[0], before)
    # Not the same number everywhere: the layer norm of the encoder would take it out.
    model["padding"].pos_pad[:, 0].add_(1.0)
    assert not torch.allclose(run(q)[0], before)


def test_decoder_gradients_come_as_often_as_the_keep_probability_says():
    padding = RedundantTokenPadding(2, num_tokens=6, num_pad=4, k_min=2)
    steps, hits = 2000, torch.zeros(10, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.ones(1, 10, 2, requires_grad=True)
        padding.truncate(tokens, generator=generator)[0].sum().backward()
        hits += (tokens.grad[0] != 0).any(-1)
    expected = PrefixDistribution.uniform(2, 10).keep_probability()
    sigma = (expected * (1 - expected) / steps).clamp(min=0).sqrt()  # 1 may be rounded up
    assert ((hits / steps - expected).abs() <= 4 * sigma + 1e-12).all()
    padded = PrefixDistribution.padded_uniform(6, 4, 2).keep_probability()
    torch.testing.assert_close(expected[:6], padded)


@pytest.mark.parametrize("per_sample", [False, True])
def test_equal_seeds_and_generators_draw_equal_lengths(per_sample):
    padding = RedundantTokenPadding(2, num_tokens=40, num_pad=40, k_min=1, per_sample=per_sample)
    tokens = torch.randn(3, 80, 2)
    first, second = (padding.truncate(tokens, seed=5)[2] for _ in range(2))
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))
    first, second = (
        padding.truncate(tokens, generator=torch.Generator().manual_seed(1))[2] for _ in range(2)
    )
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))


def test_truncation_a_sample_compiles_to_one_graph(fresh_dynamo):
    padding = RedundantTokenPadding(4, num_tokens=6, num_pad=3, k_min=2, per_sample=True)
    tokens = torch.randn(5, 9, 4)
    compiled = torch.compile(padding.truncate, fullgraph=True, backend="aot_eager")
    seed = torch.tensor(3)
    for got, expected in zip(
        compiled(tokens, seed=seed), padding.truncate(tokens, seed=seed), strict=True
    ):
        assert torch.equal(got, expected)


def test_identical_features_lose_minus_one_and_orthogonal_ones_nothing():
    features = torch.randn(3, 5, 4, dtype=torch.float64)
    loss = hierarchical_semantic_loss(features, features, 1, num_tokens=8)
    torch.testing.assert_close(loss, torch.tensor(-1.0, dtype=torch.float64))
    first, second = torch.eye(4)[0].expand(3, 5, 4), torch.eye(4)[1].expand(3, 5, 4)
    assert hierarchical_semantic_loss(first, second, 1, num_tokens=8).item() == 0


def test_loss_does_not_depend_on_the_scale_of_either_input():
    features, target = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    options = {"num_tokens": 8, "k_min": 2}
    loss = hierarchical_semantic_loss(features, target, 4, **options)
    torch.testing.assert_close(
        hierarchical_semantic_loss(7 * features, 0.1 * target, 4, **options), loss
    )


def test_loss_is_the_weighted_mean_of_negative_cosines():
    features, target, k = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.tensor([2, 5, 9])
    weights = torch.tensor([1.0, 0.5, 0.0])  # k_min = 2, N = 8
    cosine = F.cosine_similarity(features, target, dim=-1).mean(1)
    each = -weights * cosine
    for reduction, expected in (("none", each), ("mean", each.mean()), ("sum", each.sum())):
        loss = hierarchical_semantic_loss(
            features, target, k, num_tokens=8, k_min=2, reduction=reduction
        )
        torch.testing.assert_close(loss, expected)


def weight(k, schedule="linear", **options):
    features = torch.ones(1, 1, 2, dtype=torch.float64)
    return -hierarchical_semantic_loss(features, features, k, schedule=schedule, **options).item()


def test_linear_weight_is_halfway_at_half_the_tokens():
    options = {"num_tokens": 256, "k_min": 32, "weight_max": 0.9, "weight_min": 0.3}
    assert abs(weight(144, **options) - 0.6) < 1e-12
    assert abs(weight(144, "cosine", **options) - 0.6) < 1e-12
    assert abs(weight(88, "cosine", **options) - (0.3 + 0.3 * (1 + math.sqrt(0.5)))) < 1e-12
    assert abs(weight(200, "constant", **options) - 0.9) < 1e-12
    assert abs(weight(144, lambda u: u**2, **options) - 0.25) < 1e-12


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_weight_does_not_increase_and_is_constant_in_the_padding(schedule):
    options = {"num_tokens": 8, "k_min": 3, "weight_min": 0.1}
    weights = [weight(k, schedule, **options) for k in range(1, 13)]
    assert all(a >= b for a, b in itertools.pairwise(weights))
    assert weights[:3] == pytest.approx([1.0, 1.0, 1.0])
    assert len(set(weights[7:])) == 1


def test_a_least_length_of_n_leaves_the_full_weight():
    assert weight(8, num_tokens=8, k_min=8) == pytest.approx(1.0)


def test_target_gets_no_gradient():
    features, target = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    hierarchical_semantic_loss(features, target, 2, num_tokens=8).backward()
    assert target.grad is None
    assert features.grad.abs().sum() > 0


def test_gradient_passes_gradcheck():
    features = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target, k = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([2, 5])
    assert torch.autograd.gradcheck(
        lambda f: hierarchical_semantic_loss(f, target, k, num_tokens=8), (features,)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features_are_compared_in_float32(dtype):
    features = (torch.randn(2, 3, 4) * 300).to(dtype)  # squares beyond float16
    loss = hierarchical_semantic_loss(features, features, 1, num_tokens=8)
    assert loss.dtype == dtype
    assert loss.item() == -1


def test_loss_compiles_to_one_graph_for_all_lengths(fresh_dynamo):
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(hierarchical_semantic_loss, fullgraph=True, backend=record)
    features, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for k in range(1, 12):
        lengths = torch.tensor([k, 3])
        torch.testing.assert_close(
            compiled(features, target, lengths, num_tokens=8),
            hierarchical_semantic_loss(features, target, lengths, num_tokens=8),
        )
    assert len(graphs) == 1


def test_fine_tuning_trains_the_decoder_on_n_tokens():
    model, run = tokenizer()
    trained = freeze_for_decoder_finetune(model, ["decoder", "decoder_positions"])
    expected = [*model["decoder_positions"].parameters(), *model["decoder"].parameters()]
    assert {id(p) for p in trained} == {id(p) for p in expected}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in expected}
    assert not model["encoder"].training
    assert not model["padding"].training
    assert model["decoder"].training
    assert model["decoder"].self_attn.training
    assert not model["decoder_positions"].training
    assert run(torch.randn(2, 6, 8))[2] == 6


def test_bad_input_names_the_argument():
    x, k = torch.ones(2, 3, 4), torch.tensor([1, 2])
    loss = lambda *arguments, **options: hierarchical_semantic_loss(
        *arguments, **{"num_tokens": 8, **options}
    )
    cases = [
        (ValueError, "features must", lambda: loss(x[0], x[0], 1)),
        (TypeError, "features must", lambda: loss(x.int(), x, 1)),
        (ValueError, "target must", lambda: loss(x, x[:, :2], 1)),
        (ValueError, "num_kept must", lambda: loss(x, x, 0)),
        (ValueError, "num_kept must", lambda: loss(x, x, torch.tensor([0, 1]))),
        (ValueError, "num_kept must", lambda: loss(x, x, k[:1])),
        (TypeError, "num_kept must", lambda: loss(x, x, k.int())),
        (ValueError, "num_tokens must", lambda: loss(x, x, 1, num_tokens=0)),
        (ValueError, "k_min must", lambda: loss(x, x, 1, k_min=9)),
        (ValueError, "weight_min must", lambda: loss(x, x, 1, weight_min=2.0)),
        (ValueError, "weight_min must", lambda: loss(x, x, 1, weight_min=-0.1)),
        (ValueError, "schedule must", lambda: loss(x, x, 1, schedule="step")),
        (ValueError, "reduction must", lambda: loss(x, x, 1, reduction="max")),
        (
            ValueError,
            "batch_size must",
            lambda: sample_num_tokens(-1, num_tokens=4, num_pad=2, k_min=1),
        ),
        (
            ValueError,
            "num_pad must",
            lambda: sample_num_tokens(1, num_tokens=4, num_pad=5, k_min=1),
        ),
        (
            ValueError,
            "decoder_prefix must",
            lambda: freeze_for_decoder_finetune(nn.Linear(2, 2), "decoder"),
        ),
    ]
    for exception, message, call in cases:
        with pytest.raises(exception, match=message):
            call()
