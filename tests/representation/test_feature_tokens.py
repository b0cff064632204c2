"""Tokens of a table's row and regularization tokens: contracts and the sheet of paper 83."""

import pytest
import torch

from regularizers._shared.transformer import Transformer
from regularizers.representation import FeatureTokenizer, RegularizationTokens
from tests.harness import MethodContract

CATEGORIES = torch.tensor([[0, 4], [1, 0], [1, 2]])


class TestRegularizationTokens(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return RegularizationTokens(2, 6).to(dtype)

    def call(self, module, dtype):
        return module(torch.ones(3, 4, 6, dtype=dtype))

    def bad_inputs(self):
        tokens = RegularizationTokens(2, 6)
        return [
            (ValueError, "num_tokens must", lambda: RegularizationTokens(-1, 6)),
            (ValueError, "dim must", lambda: RegularizationTokens(1, 0)),
            (ValueError, "x must", lambda: tokens(torch.ones(3, 4, 5))),
            (ValueError, "x must", lambda: tokens.strip(torch.ones(3, 1, 6))),
            (TypeError, "x must", lambda: tokens(torch.ones(3, 4, 6).long())),
        ]


class TestFeatureTokenizer(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return FeatureTokenizer(2, [2, 5], 6).to(dtype)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 6, dtype=dtype).view(3, 2), CATEGORIES)

    def bad_inputs(self):
        build, tokenizer = FeatureTokenizer, FeatureTokenizer(2, [2, 5], 6)
        x = torch.ones(3, 2)
        return [
            (ValueError, "num_numerical must", lambda: build(0, [], 6)),
            (ValueError, "num_numerical must", lambda: build(-1, [3], 6)),
            (ValueError, "cardinalities must", lambda: build(2, [0], 6)),
            (ValueError, "num_tokens must", lambda: build(2, [], 6, num_reg_tokens=-1)),
            (ValueError, "numerical must", lambda: tokenizer(x[:, :1], CATEGORIES)),
            (ValueError, "numerical must", lambda: tokenizer(None, CATEGORIES)),
            (TypeError, "numerical must", lambda: tokenizer(x.double(), CATEGORIES)),
            (ValueError, "categorical must", lambda: tokenizer(x)),
            (ValueError, "categorical must", lambda: tokenizer(x, CATEGORIES[:2])),
            (TypeError, "categorical must", lambda: tokenizer(x, CATEGORIES.int())),
            (ValueError, r"\[0, 2\) for feature 0", lambda: tokenizer(x, CATEGORIES + 1)),
            (ValueError, "categorical must", lambda: tokenizer(x, CATEGORIES - 1)),
            (ValueError, "categorical must", lambda: build(2, [], 6)(x, CATEGORIES)),
        ]


def test_stripping_restores_the_tokens():
    tokens, x = RegularizationTokens(3, 6), torch.randn(2, 4, 6)
    assert tokens.prepend(x).shape == (2, 7, 6)
    assert torch.equal(tokens.strip(tokens.prepend(x)), x)


def test_no_tokens_leave_the_input_object():
    x = torch.randn(2, 4, 6)
    assert RegularizationTokens(0, 6)(x) is x


def test_token_is_the_same_for_every_sample_before_the_first_layer():
    tokenizer = FeatureTokenizer(4, [], 6, num_reg_tokens=2)
    tokens = tokenizer(torch.randn(5, 4))
    expected = tokenizer.reg_tokens.weight + tokenizer.positions[:2]
    torch.testing.assert_close(tokens[:, :2], expected.expand(5, -1, -1))


def test_token_depends_on_every_feature_behind_a_layer():
    tokenizer, encoder = FeatureTokenizer(4, [], 8), Transformer(8, 1, 2)
    x = torch.randn(3, 4, requires_grad=True)
    encoder(tokenizer(x))[:, 0].square().sum().backward()
    assert (x.grad.abs() > 0).all()


def test_numerical_tokens_are_affine_in_their_feature():
    tokenizer = FeatureTokenizer(3, [], 6)
    x = torch.randn(5, 3)
    expected = tokenizer.weight * x[..., None] + tokenizer.bias + tokenizer.positions[1:]
    torch.testing.assert_close(tokenizer(x)[:, 1:], expected)


def test_categorical_tokens_are_rows_of_their_own_table():
    tokenizer = FeatureTokenizer(0, [2, 5], 6, num_reg_tokens=0)
    tokens = tokenizer(categorical=CATEGORIES) - tokenizer.positions - tokenizer.bias
    torch.testing.assert_close(tokens[:, 0], tokenizer.table[CATEGORIES[:, 0]])
    torch.testing.assert_close(tokens[:, 1], tokenizer.table[2 + CATEGORIES[:, 1]])


def test_a_compiled_category_out_of_range_reads_no_other_feature(fresh_dynamo):
    tokenizer = FeatureTokenizer(0, [2, 5], 6)
    compiled = torch.compile(tokenizer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(None, CATEGORIES), tokenizer(None, CATEGORIES))
    with pytest.raises(IndexError):
        compiled(None, CATEGORIES + 1)


def test_positions_have_base_100():
    positions = FeatureTokenizer(4, [], 4).positions
    torch.testing.assert_close(positions[:, 2], (torch.arange(5.0) / 10).sin())
