"""The splitter and the losses of two streams (sheet of paper 29)."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.representation import (
    DualStreamLoss,
    StreamSplitter,
    intra_image_contrastive_loss,
    prototype_contrastive_loss,
)
from tests.harness import MethodContract

WIDE = torch.float64


def _table(*shape):
    return torch.randint(-1, 2, shape)


class TestDualStreamLoss(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        banks = torch.randn(5, 7), torch.randn(4, 6)
        return DualStreamLoss(3, *banks, num_negatives=2).to(dtype)

    def call(self, module, dtype):
        a = torch.linspace(0, 9, 2 * 5 * 3, dtype=WIDE).sin().view(2, 5, 3).to(dtype)
        b = torch.linspace(0, 7, 2 * 4 * 3, dtype=WIDE).cos().view(2, 4, 3).to(dtype)
        table = torch.eye(5, 4).long().expand(2, 5, 4)
        return module(a, b, table.amax(2), table.amax(1), table, seed=3).total.to(dtype)

    def bad_inputs(self):
        f, bank, table = torch.ones(2, 3, 4), torch.ones(5, 4), torch.zeros(2, 3, 5).long()
        table[..., 0] = 1
        here = torch.ones(2, 3, dtype=torch.bool)
        contrast, intra = prototype_contrastive_loss, intra_image_contrastive_loss
        a, b = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
        good = DualStreamLoss(4, torch.ones(3, 4), bank, num_negatives=2)
        return [
            (
                ValueError,
                "cooccurrence must hold",
                lambda: contrast(f, bank, 2 * table, present=here),
            ),
            (
                ValueError,
                "cooccurrence must have",
                lambda: contrast(f, bank, table[:1], present=here),
            ),
            (
                ValueError,
                "num_negatives must be at most 4",
                lambda: contrast(f, bank, table, present=here, num_negatives=5),
            ),
            (
                ValueError,
                "num_negatives must",
                lambda: contrast(f, bank, table, present=here, num_negatives=0),
            ),
            (
                ValueError,
                "temperature",
                lambda: contrast(f, bank, table, present=here, temperature=0.0),
            ),
            (ValueError, "bank must", lambda: contrast(f, bank[:, :3], table, present=here)),
            (ValueError, "present must", lambda: contrast(f, bank, table, present=here[:1])),
            (TypeError, "present must", lambda: contrast(f, bank, table, present=here.int())),
            (TypeError, "features must", lambda: contrast(f.long(), bank, table, present=here)),
            (
                ValueError,
                "reduction",
                lambda: contrast(f, bank, table, present=here, reduction="max"),
            ),
            (ValueError, "cooccurrence must hold", lambda: intra(a, b, table - 2)),
            (ValueError, "cooccurrence must have", lambda: intra(a, b, table.mT)),
            (ValueError, "b must", lambda: intra(a, b[..., :3], table)),
            (ValueError, "temperature must", lambda: intra(a, b, table, temperature=-1.0)),
            (ValueError, "gate must", lambda: StreamSplitter(4, 4, gate="tanh")),
            (ValueError, "x must", lambda: StreamSplitter(4, 4)(torch.ones(2, 3))),
            (TypeError, "x must", lambda: StreamSplitter(4, 4)(torch.ones(2, 4).long())),
            (ValueError, "intra_weight", lambda: DualStreamLoss(4, bank, bank, intra_weight=-1.0)),
            (ValueError, "presence_a must", lambda: good(a, b, here[:1], here, table)),
            (ValueError, "presence_a must", lambda: good(a, b, 2 * here, here, table)),
        ]


def _problem(batch=3, concepts=4, others=9, dim=6):
    f = torch.randn(batch, concepts, dim, dtype=WIDE)
    bank = torch.randn(others, dim, dtype=WIDE)
    table = torch.zeros(batch, concepts, others, dtype=torch.int64)
    table[..., 1] = 1
    table[..., 4] = torch.randint(2, (batch, concepts))
    table[..., 7] = -1
    present = torch.ones(batch, concepts, dtype=torch.bool)
    present[0, 1] = False
    return f, bank, table, present


@pytest.mark.parametrize("negatives", [7, 1])
def test_features_of_zero_cost_the_logarithm_of_the_number_of_candidates(negatives):
    _, bank, table, present = _problem()
    f = torch.zeros(3, 4, 6, dtype=WIDE)
    found = prototype_contrastive_loss(f, bank, table, present=present, num_negatives=negatives)
    assert found.item() == pytest.approx(math.log(negatives + 1), rel=1e-14)


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_with_all_negatives_is_cross_entropy_against_the_prototype(normalize):
    f, bank, table, present = _problem()
    options = {"present": present, "temperature": 0.5, "normalize": normalize}
    unit = (lambda x: F.normalize(x, dim=-1)) if normalize else (lambda x: x)
    for exclude in (False, True):
        losses = []
        for i, q in present.nonzero().tolist():
            prototype = unit(bank[table[i, q] == 1].mean(0))
            negative = (table[i, q] == 0) | ((table[i, q] == -1) & (not exclude))
            candidates = torch.cat([prototype[None], unit(bank[negative])])
            logits = candidates @ unit(f[i, q]) / 0.5
            losses.append(F.cross_entropy(logits[None], torch.tensor([0])))
        found = prototype_contrastive_loss(
            f, bank, table, num_negatives=None, exclude_unknown=exclude, **options
        )
        torch.testing.assert_close(found, torch.stack(losses).mean())


def test_prototype_of_one_positive_is_its_row():
    bank = torch.randn(3, 6, dtype=WIDE)
    f = torch.randn(1, 1, 6, dtype=WIDE)
    found = prototype_contrastive_loss(
        f,
        bank,
        torch.tensor([[[0, 1, 0]]]),
        present=torch.ones(1, 1, dtype=torch.bool),
        num_negatives=2,
    )
    torch.testing.assert_close(found, F.cross_entropy((f[0] @ bank.T), torch.tensor([1])))


def test_order_of_the_bank_is_nothing_with_all_negatives():
    f, bank, table, present = _problem()
    order = torch.randperm(9)
    call = lambda bank, table: prototype_contrastive_loss(
        f, bank, table, present=present, num_negatives=None
    )
    torch.testing.assert_close(call(bank[order], table[..., order]), call(bank, table))


def test_negatives_are_distinct_never_positive_and_evenly_drawn():
    # With one-hot features of the bank's rows, the gradient names what was drawn.
    rows, others = 4000, 6
    table = torch.zeros(rows, 1, others, dtype=torch.int64)
    table[..., 0], table[..., 5] = 1, -1
    f = torch.zeros(rows, 1, others, requires_grad=True)
    here = torch.ones(rows, 1, dtype=torch.bool)
    for exclude, places in ((False, 5), (True, 4)):
        f.grad = None
        prototype_contrastive_loss(
            f,
            torch.eye(others),
            table,
            present=here,
            num_negatives=3,
            seed=1,
            exclude_unknown=exclude,
            reduction="sum",
        ).backward()
        drawn = (f.grad[:, 0] > 0).double()
        assert (drawn[:, 0] == 0).all()
        assert (drawn.sum(1) == 3).all()
        assert not exclude or (drawn[:, 5] == 0).all()
        share = drawn.mean(0)[1 : 1 + places]
        # 4000 draws: a deviation of 0.008 a share; five of them.
        torch.testing.assert_close(share, torch.full_like(share, 3 / places), rtol=0, atol=0.04)


def test_equal_seeds_draw_equal_negatives():
    f, bank, table, present = _problem()
    call = lambda **options: prototype_contrastive_loss(
        f, bank, table, present=present, num_negatives=2, **options
    )
    assert call(seed=1) == call(seed=1)
    assert call(seed=1) != call(seed=2)
    generator = torch.Generator().manual_seed(3)
    first = call(generator=generator)
    assert first == call(generator=generator.manual_seed(3))


def test_nothing_present_or_no_positive_is_zero_with_a_live_graph():
    f, bank, table, present = _problem()
    f.requires_grad_()
    for options in ({"present": present & False}, {"present": present, "cooccurrence": 0 * table}):
        value = prototype_contrastive_loss(f, bank, **{"cooccurrence": table, **options})
        assert value == 0
        (gradient,) = torch.autograd.grad(value, f)
        assert (gradient == 0).all()


def test_present_concept_without_a_positive_does_not_count():
    f, bank, table, present = _problem()
    each = prototype_contrastive_loss(
        f, bank, table, present=present, num_negatives=None, reduction="none"
    )
    table[1, 2] = 0
    found = prototype_contrastive_loss(f, bank, table, present=present, num_negatives=None)
    counted = present.clone()
    counted[1, 2] = False
    torch.testing.assert_close(found, each[counted].mean())


def test_bank_gets_no_gradient_and_the_table_stays_as_it_is():
    f, bank, table, present = _problem()
    table[0, 0, 1] = 3
    before = table.clone()
    f.requires_grad_()
    bank.requires_grad_()
    prototype_contrastive_loss(f, bank, table, present=present, clip=True).backward()
    assert bank.grad is None
    assert f.grad is not None
    assert torch.equal(table, before)


def test_nearer_the_prototype_is_cheaper():
    # The last feature is of the positives alone, so nothing else changes with it.
    f, bank, table, present = _problem()
    bank[:, -1] = 0
    bank[1, -1] = bank[4, -1] = 1
    table[..., 4] = 1
    values = []
    for along in torch.linspace(-2, 2, 9):
        f[..., -1] = along
        values.append(
            prototype_contrastive_loss(f, bank, table, present=present, num_negatives=None)
        )
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


def test_contrast_has_right_derivatives():
    f, bank, table, present = _problem()
    call = lambda f: prototype_contrastive_loss(f, bank, table, present=present, seed=1)
    assert torch.autograd.gradcheck(call, f.requires_grad_(), check_forward_ad=True)


def test_intra_image_contrast_of_known_logits():
    a = torch.eye(2, dtype=WIDE)[None].requires_grad_()
    b = torch.tensor([[[2.0, 0.0], [-2.0, 5.0]]], dtype=WIDE, requires_grad=True)
    table = torch.tensor([[[1, 0], [0, -1]]])
    found = intra_image_contrastive_loss(a, b, table)
    assert found.item() == pytest.approx(0.315668, abs=1e-6)
    each = intra_image_contrastive_loss(a, b, table, reduction="none")
    assert each[0, 1, 1] == 0
    (gradient,) = torch.autograd.grad(each[0, 1, 1], b)
    assert (gradient == 0).all()


def test_unknown_entries_are_not_in_the_mean():
    a, b = torch.randn(2, 3, 4, dtype=WIDE), torch.randn(2, 5, 4, dtype=WIDE)
    table = _table(2, 3, 5)
    known = table != -1
    scores = (a @ b.mT)[known]
    expected = F.binary_cross_entropy_with_logits(scores, table[known].to(WIDE))
    torch.testing.assert_close(intra_image_contrastive_loss(a, b, table), expected)
    renamed = table.where(known, -100)
    torch.testing.assert_close(
        intra_image_contrastive_loss(a, b, renamed, ignore_index=-100), expected
    )


def test_a_table_of_unknowns_is_zero_with_a_live_graph():
    a, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4)
    value = intra_image_contrastive_loss(a, b, torch.full((2, 3, 5), -1))
    value.backward()
    assert value == 0
    assert (a.grad == 0).all()


def test_swapping_streams_and_transposing_the_table_changes_nothing():
    a, b = torch.randn(2, 3, 4, dtype=WIDE), torch.randn(2, 5, 4, dtype=WIDE)
    table = _table(2, 3, 5)
    options = {"temperature": 0.3, "normalize": True}
    torch.testing.assert_close(
        intra_image_contrastive_loss(b, a, table.mT, **options),
        intra_image_contrastive_loss(a, b, table, **options),
    )


def test_counts_are_clipped_on_request_alone():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    table = _table(2, 3, 5)
    counts = table.where(table < 1, 3)
    assert intra_image_contrastive_loss(a, b, counts, clip=True) == intra_image_contrastive_loss(
        a, b, table
    )


def test_half_types_give_float32_and_nan_gives_nan():
    a, b = torch.randn(2, 3, 4).half(), torch.randn(2, 5, 4).half()
    table = _table(2, 3, 5)
    found = intra_image_contrastive_loss(a, b, table)
    assert found.dtype == torch.float32
    expected = intra_image_contrastive_loss(a.double(), b.double(), table)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    a[0, 0, 0] = math.nan
    table[0, 0, 0] = 1
    assert intra_image_contrastive_loss(a, b, table).isnan()


@pytest.mark.parametrize("gate", ["linear", "sigmoid"])
def test_parts_of_the_splitter_add_up_to_its_input(gate):
    splitter = StreamSplitter(6, 4, gate=gate)
    x = torch.randn(2, 9, 6)
    part_a, part_b = splitter.split(x)
    torch.testing.assert_close(part_a + part_b, x, rtol=1e-6, atol=1e-6)
    a, b = splitter(x)
    torch.testing.assert_close(a, splitter.stream_a(part_a))
    torch.testing.assert_close(b, splitter.stream_b(part_b))


def test_gate_of_one_leaves_the_other_stream_nothing():
    splitter = StreamSplitter(6, 4)
    nn.init.zeros_(splitter.gate.weight)
    nn.init.ones_(splitter.gate.bias)
    x = torch.randn(2, 9, 6)
    part_a, part_b = splitter.split(x)
    assert torch.equal(part_a, x)
    assert (part_b == 0).all()


def test_linear_gate_has_no_bounds_and_the_sigmoid_has():
    x = torch.ones(1, 6)
    for gate, expected in (("linear", 3.0), ("sigmoid", 1 / (1 + math.exp(-3)))):
        splitter = StreamSplitter(6, 4, gate=gate)
        nn.init.zeros_(splitter.gate.weight)
        nn.init.constant_(splitter.gate.bias, 3.0)
        torch.testing.assert_close(splitter.split(x)[0], torch.full((1, 6), expected))


def test_total_is_the_weighted_sum_of_its_terms():
    banks = torch.randn(3, 5), torch.randn(4, 6)
    loss = DualStreamLoss(
        4, *banks, presence_weight=0.5, prototype_weight=2.0, intra_weight=3.0, num_negatives=None
    )
    a, b, table = torch.randn(2, 3, 4), torch.randn(2, 4, 4), _table(2, 3, 4)
    here_a, here_b = _table(2, 3), _table(2, 4)
    found = loss(a, b, here_a, here_b, table)
    presence = F.cross_entropy(
        loss.presence_a(a).flatten(0, 1), here_a.flatten(), ignore_index=-1
    ) + F.cross_entropy(loss.presence_b(b).flatten(0, 1), here_b.flatten(), ignore_index=-1)
    prototype = prototype_contrastive_loss(
        loss.project_a(a), banks[1], table, present=here_a == 1, num_negatives=None
    ) + prototype_contrastive_loss(
        loss.project_b(b), banks[0], table.mT, present=here_b == 1, num_negatives=None
    )
    intra = intra_image_contrastive_loss(a, b, table)
    torch.testing.assert_close(found.presence, presence)
    torch.testing.assert_close(found.prototype, prototype)
    torch.testing.assert_close(found.intra, intra)
    torch.testing.assert_close(found.total, 0.5 * presence + 2 * prototype + 3 * intra)


def test_loss_runs_under_autocast():
    banks = torch.randn(3, 5), torch.randn(4, 6)
    loss = DualStreamLoss(4, *banks, num_negatives=None)
    a, b, table = torch.randn(2, 3, 4), torch.randn(2, 4, 4), _table(2, 3, 4)
    expected = loss(a, b, table.amax(2), table.amax(1), table)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(a, b, table.amax(2), table.amax(1), table)
    for have, want in zip(found, expected, strict=True):
        assert have.dtype == torch.float32
        torch.testing.assert_close(have, want, rtol=0.03, atol=0.03)


def test_unknown_presences_alone_are_zero():
    loss = DualStreamLoss(4, torch.randn(3, 5), torch.randn(4, 6), num_negatives=1)
    none = torch.full((2, 3), -1), torch.full((2, 4), -1), torch.full((2, 3, 4), -1)
    found = loss(torch.randn(2, 3, 4), torch.randn(2, 4, 4), *none)
    assert found.total == 0
    found.total.backward()


def test_presence_losses_send_each_concept_to_its_stream():
    # Sheet: one of 4 place vectors plus one of 4 finding vectors plus noise, streams of 8, 300
    # steps.
    torch.manual_seed(0)
    places, findings = torch.randn(2, 4, 16)

    def images(count):
        place, finding = torch.randint(4, (2, count))
        x = places[place] + findings[finding] + 0.3 * torch.randn(count, 16)
        return x, finding, place

    splitter, heads = StreamSplitter(16, 8), nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
    optimizer = torch.optim.AdamW([*splitter.parameters(), *heads.parameters()], lr=3e-3)
    for _ in range(300):
        x, *labels = images(128)
        losses = [
            F.cross_entropy(h(s), y) for h, s, y in zip(heads, splitter(x), labels, strict=True)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()

    def probe(stream, labels):
        """Accuracy of least squares on one-hot labels: the second half, from the first."""
        x = torch.cat([stream, torch.ones(len(stream), 1)], 1)
        half = len(x) // 2
        weight = torch.linalg.lstsq(x[:half], F.one_hot(labels[:half], 4).float()).solution
        return ((x[half:] @ weight).argmax(1) == labels[half:]).double().mean().item()

    x, finding, place = images(2000)
    with torch.no_grad():
        a, b = splitter(x)
    for own, other, labels in ((a, b, finding), (b, a, place)):
        assert probe(own, labels) > 0.95
        assert probe(own, labels) > probe(other, labels) + 0.08
