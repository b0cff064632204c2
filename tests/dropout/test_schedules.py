"""Schedules of rates: curves, writing them into models, and the facts of the sheet of paper 50."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.dropout import (
    DepthSchedule,
    DropBlock2d,
    DropoutSchedule,
    MultiSampleDropout,
    RateSchedule,
    ScheduledDropout,
    TimeSchedule,
    apply_schedule,
    set_dropout,
)


def test_curves_over_time():
    at = (0.0, 0.25, 0.5, 0.75, 1.0)
    expected = {
        "constant": [1, 1, 1, 1, 1],
        "linear": [0, 0.25, 0.5, 0.75, 1],
        "cosine": [0, 0.1464466, 0.5, 0.8535534, 1],
    }
    for kind, values in expected.items():
        assert [TimeSchedule(kind)(t) for t in at] == pytest.approx(values), kind
    assert [TimeSchedule("late", 0.5)(t) for t in at] == [0, 0, 1, 1, 1]
    assert [TimeSchedule("early", 0.5)(t) for t in at] == [1, 1, 0, 0, 0]
    assert [TimeSchedule("linear", 0.25, 0.75)(t) for t in at] == [0, 0, 0.5, 1, 1]


def test_depth_counts_from_one_or_from_zero():
    assert [DepthSchedule()(layer, 4) for layer in range(4)] == [0.25, 0.5, 0.75, 1]
    from_zero = DepthSchedule(from_zero=True)
    assert [from_zero(layer, 5) for layer in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert from_zero(0, 1) == 0
    assert DepthSchedule("late", start=0.5)(0, 4) == 0
    assert DepthSchedule("constant")(0, 4) == 1


def test_a_rate_is_the_product_of_both_shares():
    schedule = RateSchedule(0.4, DepthSchedule("linear"), TimeSchedule("linear"))
    assert schedule(9, 20, 0.5) == pytest.approx(0.1)
    assert schedule(19, 20, 2.0) == pytest.approx(0.4)  # clamped at the end of the training


def test_schedules_are_values():
    assert TimeSchedule("late", 0.3) == TimeSchedule("late", 0.3)
    assert RateSchedule(0.1) == RateSchedule(0.1)


def test_apply_schedule_writes_in_order_of_registration_and_counts():
    model = nn.Sequential(DropBlock2d(0.0), nn.Sequential(nn.ReLU(), DropBlock2d(0.0)))
    before = model[0].p
    assert apply_schedule(model, DropBlock2d, RateSchedule(0.2), 1.0) == 2
    assert model[0].p is before  # in place
    assert [model[0].p.item(), model[1][1].p.item()] == pytest.approx([0.1, 0.2])


def test_apply_schedule_recompiles_nothing(fresh_dynamo):
    model = MultiSampleDropout(nn.Linear(4, 2))
    graphs = []
    compiled = torch.compile(
        model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for step in range(12):
        apply_schedule(
            model, MultiSampleDropout, RateSchedule(0.5, time=TimeSchedule("linear")), step / 12
        )
        compiled(torch.ones(3, 4))
    assert len(graphs) == 1


def test_a_bad_rate_changes_nothing():
    model = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.3))
    with pytest.raises(ValueError, match="rate must"):
        apply_schedule(model, nn.Dropout, lambda index, *_: float(index) * 2, 0.0)
    assert [model[0].p, model[1].p] == [0.3, 0.3]
    with pytest.raises(TypeError, match="module_types must"):
        apply_schedule(nn.Sequential(nn.Dropout(0.3), nn.ReLU()), nn.Module, lambda *_: 0.1, 0.0)


@pytest.mark.parametrize("progress", [-0.1, float("nan")])
def test_progress_below_zero_or_nan_is_refused(progress):
    for call in (
        TimeSchedule(),
        DropoutSchedule(0.1).value,
        lambda t: apply_schedule(nn.Dropout(), nn.Dropout, RateSchedule(0.1), t),
    ):
        with pytest.raises(ValueError, match="progress must"):
            call(progress)


def test_bad_schedules_are_refused():
    for name, call in (
        ("kind must", lambda: TimeSchedule("exponential")),
        ("start must", lambda: TimeSchedule("linear", 0.5, 0.5)),
        ("start must", lambda: TimeSchedule("late", -0.5)),
        ("end must", lambda: DepthSchedule("linear", end=1.5)),
        ("p must", lambda: RateSchedule(1.5)),
        ("layer_index must", lambda: DepthSchedule()(4, 4)),
        ("layer_index must", lambda: DepthSchedule()(-1, 4)),
        ("num_layers must", lambda: DepthSchedule()(0, 0)),
        ("p must", lambda: DropoutSchedule(1.0)),
        ("p must", lambda: DropoutSchedule(-0.1)),
        ("kind must", lambda: DropoutSchedule(0.1, kind="sometimes")),
        ("start must", lambda: DropoutSchedule(0.1, kind="linear", start=0.6, end=0.5)),
        ("p must", lambda: set_dropout(nn.Dropout(), 1.0)),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(TypeError, match="schedule must"):
        ScheduledDropout(nn.Dropout(), 0.1)


def test_dropout_comes_in_late_or_linearly():
    # Sheet of paper 50, fact 1.
    late = DropoutSchedule(0.2, kind="late", start=0.5)
    assert [late.value(0.49), late.value(0.5)] == [0, 0.2]
    assert DropoutSchedule(0.2, kind="linear", start=0.0).value(0.5) == pytest.approx(0.1)
    assert DropoutSchedule(0.2).value(0.0) == 0.2
    assert DropoutSchedule(0.2, kind="early").value(0.5) == 0


def test_set_dropout_reaches_attention_and_counts_modules():
    layer = nn.TransformerEncoderLayer(8, 2, dropout=0.5)
    assert set_dropout(layer, 0.1) == 4
    assert layer.self_attn.dropout == 0.1
    assert [layer.dropout.p, layer.dropout1.p, layer.dropout2.p] == [0.1] * 3
    assert set_dropout(layer, 0.3, types=nn.MultiheadAttention) == 1
    assert [layer.self_attn.dropout, layer.dropout.p] == [0.3, 0.1]


def test_modules_stay_the_same_and_drop_in_training_only():
    model = nn.Sequential(nn.Dropout(0.5))
    module = model[0]
    set_dropout(model, 0.9)
    assert model[0] is module
    x = torch.ones(1000)
    assert (model(x) == 0).any()
    assert torch.equal(model.eval()(x), x)


def test_the_context_restores_every_rate_also_after_an_error():
    model = nn.Sequential(nn.Dropout(0.5), nn.MultiheadAttention(4, 2, dropout=0.3))

    def interrupted_training():
        with ScheduledDropout(model, DropoutSchedule(0.2, kind="late")) as dropout:
            assert dropout.step(0.0) == 0.0
            assert dropout.step(0.7) == 0.2
            assert [model[0].p, model[1].dropout] == [0.2, 0.2]
            raise KeyError

    with pytest.raises(KeyError):
        interrupted_training()
    assert [model[0].p, model[1].dropout] == [0.5, 0.3]


def _markov_tokens(generator, length):
    """An order-2 source of 12 symbols."""
    table = torch.distributions.Dirichlet(torch.full((12, 12, 12), 0.3)).sample()
    tokens = [0, 1]
    noise = torch.rand(length, generator=generator)
    cumulative = table.cumsum(-1)
    for u in noise:
        row = cumulative[tokens[-2], tokens[-1]]
        tokens.append(min(int(torch.searchsorted(row, u)), 11))
    return torch.tensor(tokens)


@pytest.mark.slow
def test_late_dropout_saves_a_model_that_repeats_its_data():
    # Sheet of paper 50, fact 7: 1500 training tokens, context 8, 600 AdamW steps.
    torch.set_num_threads(1)

    def final_loss(schedule, seed):
        torch.manual_seed(seed)
        tokens = _markov_tokens(torch.Generator().manual_seed(seed), 3500)
        windows = tokens.unfold(0, 9, 1)
        train, held_out = windows[:1500], windows[1600:]
        model = nn.Sequential(
            nn.Embedding(12, 16),
            nn.Flatten(),
            nn.Dropout(0.0),
            nn.Linear(128, 256),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Linear(256, 12),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        with ScheduledDropout(model, schedule) as dropout:
            for step in range(600):
                dropout.step(step / 600)
                batch = train[torch.randint(len(train), (64,))]
                optimizer.zero_grad()
                F.cross_entropy(model(batch[:, :8]), batch[:, 8]).backward()
                optimizer.step()
        with torch.no_grad():
            return F.cross_entropy(model.eval()(held_out[:, :8]), held_out[:, 8]).item()

    schedules = [
        DropoutSchedule(0.0),
        DropoutSchedule(0.5, kind="late"),
        DropoutSchedule(0.5),
    ]
    none, late, constant = (final_loss(schedule, seed=0) for schedule in schedules)
    assert late <= none - 1
    assert late <= constant + 0.2
