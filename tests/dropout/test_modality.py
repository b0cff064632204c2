"""Modality dropout and ActionMAE: the method contract and the facts of the sheet of paper 121."""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.dropout import ModalityMAE, modality_dropout
from tests.harness import MethodContract


def _tokens(dtype=torch.float32, batch=6):
    return torch.linspace(-1, 1, batch * 24, dtype=torch.float64).sin().view(batch, 3, 8).to(dtype)


class TestModalityMAE(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return ModalityMAE(3, 8, depth=1, num_heads=2, num_memory_tokens=2).to(dtype)

    def call(self, module, dtype):
        tokens, loss, _ = module(_tokens(dtype), seed=5)
        return tokens.sum() + loss

    def inert(self, module):
        return module(_tokens())[0], _tokens()

    def bad_inputs(self):
        build = ModalityMAE
        mae, x = build(3, 8), torch.ones(2, 3, 8)
        nothing = torch.tensor([[True, False, True], [False, False, False]])
        return [
            (ValueError, "num_modalities must", lambda: build(0, 8)),
            (ValueError, "dim must", lambda: build(3, 1)),
            (ValueError, "depth must", lambda: build(3, 8, depth=-1)),
            (ValueError, "num_heads must", lambda: build(3, 8, num_heads=3)),
            (ValueError, "num_memory_tokens must", lambda: build(3, 8, num_memory_tokens=-1)),
            (ValueError, "min_keep must", lambda: build(3, 8, min_keep=4)),
            (TypeError, "min_keep must", lambda: build(3, 8, min_keep=1.0)),
            (ValueError, "x must", lambda: mae(torch.ones(2, 3, 7))),
            (ValueError, "x must", lambda: mae(torch.ones(2, 4, 8))),
            (ValueError, "x must", lambda: mae(torch.ones(3, 8))),
            (TypeError, "x must", lambda: mae(x.long())),
            (ValueError, "present must", lambda: mae(x, nothing)),
            (ValueError, "present must", lambda: mae(x, nothing[:1])),
            (TypeError, "present must", lambda: mae(x, nothing.int())),
            (ValueError, "present must", lambda: mae(x, [])),
            (ValueError, "present must", lambda: mae(x, [0, 3])),
            (ValueError, "present must", lambda: mae(x, [1, 1])),
            (ValueError, "present must", lambda: mae(x, [0], seed=1)),
        ]


@pytest.mark.parametrize("num_keep", [1, 2, 3, 4])
def test_every_row_misses_what_is_not_kept(num_keep):
    kept, ids_keep, _, missing = modality_dropout(torch.randn(50, 4, 2), num_keep=num_keep)
    assert kept.shape == (50, num_keep, 2)
    assert ids_keep.shape == (50, num_keep)
    assert (missing.sum(1) == 4 - num_keep).all()


def test_subsets_are_uniform():
    # 6 subsets of 2 of 4 in 12,000 rows: 4 standard deviations of each count.
    rows = 12_000
    _, ids_keep, _, _ = modality_dropout(torch.zeros(rows, 4, 1), num_keep=2, seed=3)
    counts = Counter(map(tuple, ids_keep.tolist()))
    assert set(counts) == set(itertools.combinations(range(4), 2))
    expected, deviation = rows / 6, (rows * 5 / 36) ** 0.5
    assert all(abs(count - expected) < 4 * deviation for count in counts.values())


def test_number_of_kept_modalities_is_uniform():
    x, draws = torch.zeros(1, 3, 1), 3000
    counts = Counter(modality_dropout(x, seed=seed)[0].shape[1] for seed in range(draws))
    deviation = (draws * 2 / 9) ** 0.5
    assert set(counts) == {1, 2, 3}
    assert all(abs(count - draws / 3) < 4 * deviation for count in counts.values())


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"keep_all_allowed": False}, {1, 2}),
        ({"min_keep": 2}, {2, 3}),
        ({"min_keep": 3, "keep_all_allowed": False}, {3}),
    ],
)
def test_range_of_the_number_can_be_narrowed(options, allowed):
    x = torch.zeros(1, 3, 1)
    found = {modality_dropout(x, seed=seed, **options)[0].shape[1] for seed in range(60)}
    assert found == allowed


def test_restoring_undoes_the_shuffle():
    x = torch.randn(40, 4, 3)
    kept, _, ids_restore, missing = modality_dropout(x, num_keep=2)
    filling = torch.full((40, 2, 3), 7.0)
    restored = torch.cat([kept, filling], 1).gather(1, ids_restore[..., None].expand(-1, -1, 3))
    assert torch.equal(restored, torch.where(missing[..., None], torch.tensor(7.0), x))


def test_kept_tokens_stay_in_order():
    _, ids_keep, _, _ = modality_dropout(torch.randn(40, 4, 3), num_keep=3)
    assert (ids_keep.diff(dim=1) > 0).all()


def test_one_subset_for_the_batch_on_request():
    _, _, _, missing = modality_dropout(torch.randn(40, 4, 3), num_keep=2, per_sample=False)
    assert (missing == missing[0]).all()


def test_evaluation_keeps_the_input_object():
    x = torch.randn(5, 3, 2)
    kept, ids_keep, ids_restore, missing = modality_dropout(x, num_keep=1, training=False)
    assert kept is x
    assert torch.equal(ids_keep, ids_restore)
    assert not missing.any()
    mae = ModalityMAE(3, 8).eval()
    x = _tokens()
    assert mae(x)[0] is x
    assert mae(x)[1] == 0


def test_a_single_modality_is_always_kept():
    x, mae = torch.randn(9, 1, 8), ModalityMAE(1, 8, depth=1, keep_all_allowed=False)
    for seed in range(5):
        assert modality_dropout(x, keep_all_allowed=False, seed=seed)[0] is x
        tokens, loss, _ = mae(x, seed=seed)
        assert torch.equal(tokens, x)
        assert loss == 0


def test_gradient_reaches_kept_modalities_alone():
    x = torch.randn(6, 3, 2, requires_grad=True)
    kept, _, _, missing = modality_dropout(x, num_keep=2)
    kept.sum().backward()
    assert torch.equal(x.grad != 0, ~missing[..., None].expand(-1, -1, 2))


def test_dropout_with_a_fixed_number_compiles_to_one_graph(fresh_dynamo):
    step = lambda x, seed: modality_dropout(x, num_keep=2, seed=seed)
    x, seed = torch.randn(5, 3, 2), torch.tensor(4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for have, want in zip(compiled(x, seed), step(x, seed), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (ValueError, "num_keep must", lambda x: modality_dropout(x, num_keep=0)),
        (ValueError, "num_keep must", lambda x: modality_dropout(x, num_keep=4)),
        (TypeError, "num_keep must", lambda x: modality_dropout(x, num_keep=1.5)),
        (ValueError, "min_keep must", lambda x: modality_dropout(x, min_keep=4)),
        (ValueError, "x must", lambda x: modality_dropout(x[0])),
        (TypeError, "x must", lambda x: modality_dropout(x.int())),
        (ValueError, "seed and generator", lambda x: modality_dropout(
            x, seed=1, generator=torch.Generator()
        )),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(exception, name, call):
    with pytest.raises(exception, match=name):
        call(torch.ones(2, 3, 4))


def test_target_is_normalised_over_its_features():
    # The target [1, 3] becomes (-0.7071, 0.7071): with a prediction of zero the loss is 0.5.
    mae = ModalityMAE(2, 2, num_heads=1)
    nn.init.zeros_(mae.predict.weight)
    x = torch.tensor([[[5.0, 9.0], [1.0, 3.0]]], dtype=torch.float64)
    loss = mae.double()(x, present=[0])[1]
    torch.testing.assert_close(loss, torch.tensor(0.5, dtype=torch.float64), rtol=1e-6, atol=0)
    with torch.no_grad():
        mae.predict.bias.copy_(torch.tensor([-0.70710678, 0.70710678]))
    assert mae(x, present=[0])[1] < 1e-12  # the 1e-6 under the root


def test_target_is_used_as_it_is_on_request():
    mae = ModalityMAE(2, 2, num_heads=1, normalize_target=False)
    nn.init.zeros_(mae.predict.weight)
    x = torch.tensor([[[5.0, 9.0], [1.0, 3.0]]])
    assert mae(x, present=[0])[1] == 5.0


def test_kept_slots_carry_no_loss():
    mae, x = TestModalityMAE().build(torch.float64), _tokens(torch.float64)
    present = torch.tensor([True, False, True]).expand(6, 3)
    tokens, loss, _ = mae(x, present)
    target = x[:, 1]
    target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(loss, F.mse_loss(tokens[:, 1], target))


def test_all_present_passes_through_with_a_loss_of_zero():
    mae, x = TestModalityMAE().build(torch.float32), _tokens()
    tokens, loss, missing = mae(x, present=[0, 1, 2])
    assert torch.equal(tokens, x)
    assert loss == 0
    assert not missing.any()


def test_all_tokens_are_predicted_ones_where_one_is_missing():
    mae, x = TestModalityMAE().build(torch.float32), _tokens()
    present = torch.ones(6, 3, dtype=torch.bool)
    present[2, 0] = False
    tokens, _, _ = mae(x, present)
    changed = (tokens != x).all(2)
    assert changed.tolist() == [[row == 2] * 3 for row in range(6)]


def test_value_of_a_missing_modality_cannot_change_the_prediction():
    mae, x = TestModalityMAE().build(torch.float32), _tokens()
    other = x.clone()
    other[:, 1] = 100.0
    for training in (True, False):
        mae.train(training)
        first, second = mae(x, present=[0, 2]), mae(other, present=[0, 2])
        assert torch.equal(first[0], second[0])
        assert first[1] != second[1]


def test_a_nan_at_a_missing_place_reaches_no_prediction():
    mae, x = TestModalityMAE().build(torch.float32), _tokens()
    expected = mae(x, present=[0, 2])[0]
    x[:, 1] = torch.nan
    assert torch.equal(mae(x, present=[0, 2])[0], expected)


def test_attention_over_masked_slots_equals_removing_the_tokens():
    mae, x = TestModalityMAE().build(torch.float64), _tokens(torch.float64)
    missing = torch.tensor([False, True, False]).expand(6, 3)
    tokens = mae._reconstruct(x, missing)
    memory = mae.memory.expand(6, -1, -1)
    kept = mae.encoder(torch.cat([memory, (x + mae.positions)[:, [0, 2]]], 1))
    mask = mae.mask_token.expand(6, 1, -1)
    places = torch.cat([kept[:, 2:3], mask, kept[:, 3:]], 1) + mae.positions
    by_removal = mae.predict(mae.decoder(torch.cat([kept[:, :2], places], 1)))[:, 2:]
    torch.testing.assert_close(tokens, by_removal)


def test_two_missing_modalities_get_different_reconstructions():
    mae = TestModalityMAE().build(torch.float32)
    tokens, _, _ = mae(_tokens(), present=[1])
    assert (tokens[:, 0] - tokens[:, 2]).abs().max() > 1e-2


@pytest.mark.parametrize("present", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
def test_any_present_set_restores_its_slots(present):
    # With a decoder that passes on what it gets, a token comes out at its own modality's place.
    mae = TestModalityMAE().build(torch.float32)
    mae.encoder, mae.decoder, mae.predict = _FirstOnly(), _FirstOnly(), nn.Identity()
    x = _tokens()
    tokens, _, missing = mae(x, present=present)
    absent = [modality for modality in range(3) if modality not in present]
    torch.testing.assert_close(tokens[:, present], (x + 2 * mae.positions)[:, present])
    expected = (mae.mask_token + mae.positions)[absent].expand(6, -1, -1)
    torch.testing.assert_close(tokens[:, absent], expected)
    assert missing[0].nonzero().flatten().tolist() == absent


class _FirstOnly(nn.Module):
    def forward(self, x, present=None):
        return x


def test_order_of_the_present_modalities_does_not_matter():
    mae, x = TestModalityMAE().build(torch.float32), _tokens()
    assert torch.equal(mae(x, present=[2, 0])[0], mae(x, present=[0, 2])[0])


def test_target_can_be_detached():
    x = _tokens().requires_grad_()
    for detach in (False, True):
        mae = ModalityMAE(3, 8, num_heads=2, detach_target=detach)
        (gradient,) = torch.autograd.grad(mae(x, present=[0, 2])[1], x)
        assert (gradient[:, 1] != 0).any() == (not detach)


def test_training_draws_one_number_of_modalities_for_the_batch():
    mae, x = TestModalityMAE().build(torch.float32), _tokens()
    numbers = set()
    for seed in range(30):
        count = mae(x, seed=seed)[2].sum(1)
        assert (count == count[0]).all()
        numbers.add(count[0].item())
    assert numbers == {0, 1, 2}


def test_training_draws_as_modality_dropout_does():
    mae, x = TestModalityMAE().build(torch.float32), _tokens()
    for seed in range(10):
        assert torch.equal(mae(x, seed=seed)[2], modality_dropout(x, seed=seed)[3])


def test_state_dict_holds_the_positions_for_models_built_on_meta():
    source = TestModalityMAE().build(torch.float32)
    with torch.device("meta"):
        mae = TestModalityMAE().build(torch.float32)
    mae.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = _tokens()
    assert torch.equal(mae(x, present=[0])[0], source(x, present=[0])[0])


def test_loss_is_float32_under_autocast():
    mae = TestModalityMAE().build(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, loss, _ = mae(_tokens(), present=[0, 1])
    assert loss.dtype == torch.float32
    assert tokens.dtype == torch.float32
