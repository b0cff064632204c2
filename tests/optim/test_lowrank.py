"""Frozen weight and trained factors: what starts, trains, merges, is saved; models around it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.optim import LowRankLinear, inject_low_rank, merge_low_rank
from tests.harness import MethodContract


def grown(base=None, **options):
    """A layer whose factors are both away from their start."""
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(6, 4) if base is None else base, rank=2, **options)
    nn.init.normal_(layer.lora_B)
    return layer


class TestLowRankLinear(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return grown(nn.Linear(6, 4, dtype=dtype), alpha=3.0, train_bias=True)

    def call(self, module, dtype):
        torch.manual_seed(2)
        return module(torch.randn(5, 6).to(dtype))

    def bad_inputs(self):
        def made(**options):
            return lambda: LowRankLinear(nn.Linear(6, 4), **options)

        quantized = nn.Linear(6, 4)
        quantized.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)
        attention = nn.MultiheadAttention(4, 2)
        return [
            (ValueError, "rank must be at least 1", made(rank=0)),
            (ValueError, r"rank must be at most min\(m, n\) = 4", made(rank=5)),
            (TypeError, "rank", made(rank=2.0)),
            (ValueError, "alpha", made(rank=2, alpha=0.0)),
            (TypeError, "weight of base", lambda: LowRankLinear(quantized, rank=2)),
            (TypeError, "base", lambda: LowRankLinear(nn.Conv2d(3, 3, 1), rank=1)),
            (
                ValueError,
                "base must be a layer that is called",
                lambda: LowRankLinear(attention.out_proj),
            ),
        ]


def test_output_is_that_of_the_formula():
    layer, x = grown(alpha=6.0), torch.randn(3, 5, 6)
    want = F.linear(x, layer.weight, layer.bias) + 3.0 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), want)


def test_starts_as_its_base_bit_for_bit():
    base, x = nn.Linear(6, 4), torch.randn(3, 6)
    assert torch.equal(LowRankLinear(base, rank=2)(x), base(x))


@pytest.mark.parametrize("train_bias", [False, True])
def test_only_the_factors_and_perhaps_the_bias_have_gradients(train_bias):
    layer = grown(train_bias=train_bias)
    layer(torch.randn(3, 6)).sum().backward()
    have = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert have == {"lora_A", "lora_B"} | ({"bias"} if train_bias else set())


def test_merged_output_is_the_same_and_unmerging_is_exact():
    layer, x = grown(alpha=3.0).eval(), torch.randn(3, 6)
    want, weight = layer(x), layer.weight.clone()
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), want)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), want)


def test_what_is_saved_does_not_depend_on_merging():
    layer = grown()
    before = copy.deepcopy(layer.state_dict())
    layer.merge()
    assert before.keys() == layer.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_training_and_loading_unmerge():
    layer = grown().eval()
    layer.merge()
    layer.train()
    assert not layer.merged
    layer.merge()
    layer.load_state_dict(grown().state_dict())
    assert not layer.merged


def test_half_weights_are_merged_in_float32_and_rounded_once():
    layer = grown(nn.Linear(6, 4, dtype=torch.bfloat16))
    product = layer.lora_B.float() @ layer.lora_A.float()
    want = (layer.weight.float() + product).bfloat16()
    assert torch.equal(layer.merged_weight(), want)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_for_deployment_has_the_merged_weight_and_its_own_memory(bias):
    layer, x = grown(nn.Linear(6, 4, bias=bias)), torch.randn(3, 6)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    torch.testing.assert_close(linear(x), layer(x))
    linear.weight.data.zero_()
    assert layer.weight.abs().sum() > 0


def test_checkpoint_of_the_plain_model_loads():
    base = nn.Linear(6, 4)
    result = grown().load_state_dict(base.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys == ["lora_A", "lora_B"]


def small_model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "blocks": nn.ModuleList(
                nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}) for _ in range(2)
            ),
            "fc1_norm": nn.LayerNorm(4),
            "head": nn.Linear(4, 2),
        }
    )


def low_rank_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, LowRankLinear)]


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("fc1", ["blocks.0.fc1", "blocks.1.fc1"]),
        (["fc1", "head"], ["blocks.0.fc1", "blocks.1.fc1", "head"]),
        ("blocks.1.fc2", ["blocks.1.fc2"]),
        (r"blocks\.0\..*", ["blocks.0.fc1", "blocks.0.fc2"]),
        (r"fc\d", ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]),
    ],
)
def test_layers_are_found_by_name_end_of_name_or_pattern(target, found):
    model = inject_low_rank(small_model(), target, lambda base: LowRankLinear(base, 1))
    assert low_rank_names(model) == found


def test_everything_but_factors_and_what_was_asked_for_is_frozen():
    model = inject_low_rank(
        small_model(), "fc1", lambda base: LowRankLinear(base, 1, train_bias=True), trainable="head"
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = ("blocks.0.fc1", "blocks.1.fc1")
    want = {f"{layer}.{name}" for layer in layers for name in ("lora_A", "lora_B", "bias")}
    assert trained == want | {"head.weight", "head.bias"}


def test_a_shared_layer_stays_shared():
    shared = nn.Linear(4, 4)
    model = inject_low_rank(nn.Sequential(shared, shared), "0", lambda base: LowRankLinear(base, 1))
    assert model[0] is model[1]


def test_encoder_layers_use_their_adapters_in_evaluation():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = inject_low_rank(encoder, ["linear1", "linear2"], lambda b: LowRankLinear(b, 2)).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = encoder(x)
        nn.init.normal_(encoder.linear1.lora_B)
        assert (encoder(x) - before).abs().max() > 1e-3


def test_merged_model_is_plain_and_computes_the_same():
    model = inject_low_rank(
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)),
        ["0", "2"],
        lambda base: LowRankLinear(base, 2),
    )
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6)
    want = model(x)
    model = merge_low_rank(model)
    assert not low_rank_names(model)
    torch.testing.assert_close(model(x), want)


def test_a_model_that_cannot_be_adapted_is_left_as_it_was():
    model = small_model()
    for target, make, message in (
        ("nothing", None, "target must match"),
        ("fc1_norm", None, "target must match"),
        (["fc1", "head"], lambda base: LowRankLinear(base, 3), "rank"),
    ):
        with pytest.raises(ValueError, match=message):
            inject_low_rank(model, target, make)
        assert not low_rank_names(model)
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="reads its weight"):
        inject_low_rank(nn.TransformerEncoderLayer(8, 2), "out_proj")
    with pytest.raises(TypeError, match="model"):
        inject_low_rank("model", "fc1")
