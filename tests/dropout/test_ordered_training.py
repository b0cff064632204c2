"""Training with ordered layers: samplers, model walking and loss of the sheet of paper 71."""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from regularizers.dropout import (
    FixedFractionRankSampler,
    IndependentRankSampler,
    OrderedLowRankConv2d,
    OrderedLowRankLinear,
    RankSampler,
    SingleLayerRankSampler,
    decompose,
    group_lasso_penalty,
    lod_loss,
    merge,
    ordered_layers,
    sampled_ranks,
    shrink_model,
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 3)
    )


def two_layers(first=2, second=3):
    return decompose(nn.Sequential(nn.Linear(first, 5), nn.Linear(5, second)))


def test_decomposed_model_computes_what_it_computed():
    model, x = network(), torch.randn(2, 1, 4, 4)
    expected = model(x)
    assert decompose(model) is model
    assert [type(model[i]) for i in (0, 3, 4)] == [
        OrderedLowRankConv2d,
        OrderedLowRankLinear,
        OrderedLowRankLinear,
    ]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_first_and_last_layers_can_be_left_alone():
    model = decompose(network(), skip_first=1, skip_last=True)
    assert list(ordered_layers(model)) == ["3"]
    assert not any(
        isinstance(m, OrderedLowRankLinear) for m in decompose(network(), skip_first=9).modules()
    )


def test_a_model_that_is_one_layer_is_replaced():
    assert isinstance(decompose(nn.Linear(3, 3)), OrderedLowRankLinear)


def test_layers_whose_place_factors_cannot_take_are_left_alone():
    class OwnLinear(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 4),
            "tied": nn.Linear(4, 9, bias=False),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "reflecting": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "own": OwnLinear(4, 4),
            "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
            "attention": nn.MultiheadAttention(4, 2),
            "plain": nn.Linear(4, 4),
        }
    )
    model["tied"].weight = model["embedding"].weight
    assert list(ordered_layers(decompose(model))) == ["plain"]


@pytest.mark.parametrize("training", [True, False])
def test_a_decomposed_transformer_layer_runs(training):
    # In evaluation nn.TransformerEncoderLayer reads linear1.weight for its fast path.
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model(x)
        result = decompose(model)(x)
    assert set(ordered_layers(model)) == {"linear1", "linear2"}
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_in_two_places_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = decompose(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    assert isinstance(model[0], OrderedLowRankLinear)


def test_penalty_is_the_sum_over_layers():
    model = decompose(network())
    for hierarchical in (True, False):
        expected = sum(
            layer.group_lasso(hierarchical=hierarchical).sum()
            for layer in ordered_layers(model).values()
        )
        torch.testing.assert_close(group_lasso_penalty(model, hierarchical=hierarchical), expected)


def test_penalty_counts_components_that_are_no_longer_active():
    model = decompose(network())
    before = group_lasso_penalty(model)
    shrink_model(model, 0.5)
    torch.testing.assert_close(group_lasso_penalty(model), before)


def test_shrinking_a_model_reports_its_ranks():
    model = decompose(network())
    threshold = model[3].importance()[2].item()
    ranks = shrink_model(model, threshold)
    assert ranks["3"] == 3
    assert ranks == {name: layer.active_rank for name, layer in ordered_layers(model).items()}
    assert shrink_model(model, 0.0, prune=True) == ranks
    assert model[3].rank == 3


def test_merge_multiplies_out_what_does_not_pay():
    model, x = decompose(network()), torch.randn(2, 1, 4, 4)
    model[3].shrink_(model[3].importance()[2].item())  # 3 * 70 numbers for 384: stays
    expected = model(x)
    assert merge(model) is model
    assert [type(model[i]) for i in (0, 3, 4)] == [nn.Conv2d, OrderedLowRankLinear, nn.Linear]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_single_layer_sampler_visits_every_pair_once_a_round():
    sampler = SingleLayerRankSampler(two_layers())
    rounds = [
        sorted(
            (name, rank)
            for step in itertools.islice(sampler, 5)
            for name, rank in step.items()
            if rank is not None
        )
        for _ in range(3)
    ]
    assert rounds == [[("0", 1), ("0", 2), ("1", 1), ("1", 2), ("1", 3)]] * 3


def test_single_layer_sampler_begins_a_new_round_after_shrinking():
    model = two_layers()
    sampler = SingleLayerRankSampler(model)
    next(sampler)
    model[1].shrink_(model[1].importance()[0].item())
    steps = [next(sampler) for _ in range(3)]
    assert sorted((step["0"], step["1"]) for step in steps if step["0"]) == [(1, None), (2, None)]
    assert [step["1"] for step in steps if step["1"]] == [1]


def test_single_layer_sampler_shuffles():
    sampler = SingleLayerRankSampler(two_layers(5, 5), generator=torch.Generator().manual_seed(0))
    rounds = [tuple(map(str, itertools.islice(sampler, 10))) for _ in range(2)]
    assert rounds[0] != rounds[1]


def test_independent_sampler_is_uniform_over_ranks():
    sampler = IndependentRankSampler(two_layers(), generator=torch.Generator().manual_seed(0))
    counts = Counter((step["0"], step["1"]) for step in itertools.islice(sampler, 3000))
    # 6 pairs: 500 each; 4 sigma = 4 sqrt(3000 * 1/6 * 5/6) = 82.
    assert set(counts) == {(a, b) for a in (1, 2) for b in (1, 2, 3)}
    assert all(abs(count - 500) < 82 for count in counts.values())


def test_fixed_fraction_rounds_up_and_no_further():
    layers = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 5))
    sampler = FixedFractionRankSampler(decompose(layers), 0.1)
    assert next(sampler) == {"0": 3, "1": 1}  # 0.1 * 30 > 3 in floating point
    assert next(FixedFractionRankSampler(layers)) == {"0": 8, "1": 2}


def test_layers_of_rank_zero_are_not_sampled():
    model = two_layers()
    nn.init.zeros_(model[0].factor_in)
    model[0].shrink_(1e-5)
    assert next(IndependentRankSampler(model))["0"] is None
    steps = itertools.islice(SingleLayerRankSampler(model), 3)
    assert sorted(step["1"] for step in steps) == [1, 2, 3]
    nn.init.zeros_(model[1].factor_in)
    model[1].shrink_(1e-5)
    assert next(SingleLayerRankSampler(model)) == {"0": None, "1": None}


def test_equal_generators_draw_equal_ranks():
    for kind in (SingleLayerRankSampler, IndependentRankSampler):
        first, second = (
            list(itertools.islice(kind(two_layers(), generator=g), 12))
            for g in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))
        )
        assert first == second


def test_a_sampler_of_ones_own_serves():
    class Ones(RankSampler):
        def draw(self, widths):
            return dict.fromkeys(widths, 1)

    model, x = two_layers(), torch.randn(2, 2)
    expected = model[1](model[0](x, rank=1), rank=1)
    with sampled_ranks(model, Ones(model)):
        assert torch.equal(model(x), expected)


def test_sampled_ranks_hold_inside_the_block_alone():
    model, x = two_layers(), torch.randn(2, 2)
    full = model(x)
    with sampled_ranks(model, {"0": 1}) as ranks:
        assert ranks == {"0": 1}
        torch.testing.assert_close(model(x), model[1](model[0](x, rank=1)))
    assert torch.equal(model(x), full)
    with pytest.raises(RuntimeError, match="inside"), sampled_ranks(model, {"0": 1}):
        raise RuntimeError("inside")
    assert torch.equal(model(x), full)


def test_columns_beyond_the_sampled_rank_get_zero_gradient():
    model = two_layers(4, 4)
    with sampled_ranks(model, {"0": 2, "1": None}):
        model(torch.randn(3, 4)).square().sum().backward()
    assert (model[0].factor_in.grad[2:] == 0).all()
    assert (model[0].factor_in.grad[:2] != 0).any()
    assert (model[1].factor_in.grad[3] != 0).any()


def test_loss_is_full_plus_distilled_plus_lasso():
    model, x, y = decompose(network()), torch.randn(4, 1, 4, 4), torch.tensor([0, 2, 1, 1])
    criterion, ranks = nn.CrossEntropyLoss(), {"3": 2}
    loss = lod_loss(model, x, y, criterion, itertools.repeat(ranks), lasso_weight=0.01)
    full = model(x)
    with sampled_ranks(model, ranks):
        partial = model(x)
    expected = F.cross_entropy(full, y) + F.cross_entropy(partial, full.softmax(1))
    torch.testing.assert_close(loss, expected + 0.01 * group_lasso_penalty(model))


def test_loss_without_full_pass_is_the_partial_loss_against_the_targets():
    model, x, y = decompose(network()), torch.randn(4, 1, 4, 4), torch.tensor([0, 2, 1, 1])
    loss = lod_loss(
        model, x, y, F.cross_entropy, itertools.repeat({"3": 2}), lasso_weight=0, full_pass=False
    )
    with sampled_ranks(model, {"3": 2}):
        torch.testing.assert_close(loss, F.cross_entropy(model(x), y))


def test_distillation_can_be_switched_off_or_given():
    model, x, y = two_layers(), torch.randn(4, 2), torch.randn(4, 3)
    ranks = {"1": 1}
    with sampled_ranks(model, ranks):
        partial = model(x)
    full = F.mse_loss(model(x), y)
    for distill, target in ((False, y), (lambda output: 2 * output, 2 * model(x))):
        loss = lod_loss(
            model, x, y, F.mse_loss, itertools.repeat(ranks), lasso_weight=0, distill=distill
        )
        torch.testing.assert_close(loss, full + F.mse_loss(partial, target))


def test_distillation_target_carries_no_gradient():
    # At ranks equal to the active ones both passes agree, and CE(z, softmax(z).detach()) is
    # stationary in z: what is left is the gradient of the full pass.
    model, x, y = decompose(network()), torch.randn(4, 1, 4, 4), torch.tensor([0, 2, 1, 1])
    lod_loss(model, x, y, F.cross_entropy, itertools.repeat({}), lasso_weight=0).backward()
    both = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for first, parameter in zip(both, model.parameters(), strict=True):
        torch.testing.assert_close(first, parameter.grad, rtol=1e-4, atol=1e-6)


def test_bad_input_names_the_argument():
    model, dense = two_layers(), nn.Sequential(nn.Linear(2, 2))
    loss = lambda m, **options: lod_loss(
        m, torch.ones(1, 2), torch.tensor([0]), F.cross_entropy, iter([{}]), **options
    )

    def inside(action):
        with sampled_ranks(model, {"0": 1}):
            action()

    def enter(ranks):
        with sampled_ranks(model, ranks):
            pass

    cases = [
        (ValueError, "skip_first must", lambda: decompose(dense, skip_first=-1)),
        (ValueError, "model must have ordered", lambda: group_lasso_penalty(dense)),
        (ValueError, "model must have ordered", lambda: shrink_model(dense)),
        (ValueError, "model must have ordered", lambda: SingleLayerRankSampler(dense)),
        (ValueError, "model must have ordered", lambda: loss(dense)),
        (ValueError, "threshold must", lambda: shrink_model(model, -1e-3)),
        (ValueError, "lasso_weight must", lambda: loss(model, lasso_weight=-1.0)),
        (ValueError, "merge must not", lambda: inside(lambda: merge(model))),
        (ValueError, "shrink_ must not", lambda: inside(lambda: shrink_model(model))),
        (ValueError, "sampler must name", lambda: enter({"7": 1})),
        (ValueError, "sampler must give", lambda: enter({"0": 1, "1": 4})),
        (ValueError, "sampler must give", lambda: enter({"0": -1})),
        (ValueError, "fraction must", lambda: FixedFractionRankSampler(model, 0.0)),
        (ValueError, "fraction must", lambda: FixedFractionRankSampler(model, 1.1)),
    ]
    for exception, message, call in cases:
        with pytest.raises(exception, match=message):
            call()
        assert all(layer.sampled_rank is None for layer in ordered_layers(model).values())


def test_one_graph_serves_all_ranks_with_the_documented_setting(fresh_dynamo):
    model = decompose(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)))
    sampler = IndependentRankSampler(model, generator=torch.Generator().manual_seed(0))
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(4, 40)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        compiled = torch.compile(model, fullgraph=True, backend=record)
        for _ in range(20):
            with sampled_ranks(model, sampler):
                torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) <= 3  # the first ranks, any rank; rank 1 is special to torch.compile


def train_factors(sampled):
    """Minimise the residuals of a 6 x 6 matrix over prefixes, or of full rank alone."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # many small calls
    left, right = (torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q for _ in range(2))
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    matrix = left * values @ right.T
    layer = OrderedLowRankLinear(6, 6, bias=False, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    residuals = lambda: torch.stack(
        [(matrix - layer(eye, rank=b).T).square().sum() for b in range(1, 7)]
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for step in range(2600 if sampled else 600):
        if step == 2000:
            optimizer.param_groups[0]["lr"] = 0.002
        optimizer.zero_grad()
        (residuals().sum() if sampled else residuals()[-1]).backward()
        optimizer.step()
    return residuals().detach(), layer.importance(hierarchical=False)


@pytest.mark.slow
def test_ordered_training_of_a_linear_teacher_recovers_its_singular_values():
    # Optimal residuals are the squared singular values left out.
    expected = torch.tensor([30.25, 14.25, 5.25, 1.25, 0.25, 0.0], dtype=torch.float64)
    residuals, importance = train_factors(sampled=True)
    torch.testing.assert_close(residuals, expected, rtol=0, atol=1e-2)
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(importance, values, rtol=0, atol=1e-2)
    residuals, _ = train_factors(sampled=False)
    assert residuals[-1] < 1e-2
    assert residuals[0] > 32  # full rank alone does not find the order


@pytest.mark.slow
def test_lasso_and_shrinking_come_close_to_principal_components():
    # Sheet of paper 71, fact 8: a linear autoencoder of rank 5 on rotated Gaussian points.
    torch.set_num_threads(1)  # many small calls
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    points = torch.randn(1024, 5) * torch.tensor([3.0, 2.0, 1.0, 0.1, 0.1]) @ rotation.T
    model = nn.Sequential(OrderedLowRankLinear(5, 5, bias=False))
    sampler = IndependentRankSampler(model, generator=torch.Generator().manual_seed(0))
    error = lambda output, target: (output - target).square().sum(1).mean()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(2000):
        if step == 1500:
            optimizer.param_groups[0]["lr"] = 0.001
        batch = points[torch.randint(1024, (128,))]
        optimizer.zero_grad()
        lod_loss(model, batch, batch, error, sampler, lasso_weight=5e-2, distill=False).backward()
        optimizer.step()
    largest = model[0].importance()[0].item()
    assert shrink_model(model, 0.1 * largest) == {"0": 3}
    left_out = torch.linalg.svdvals(points)[3:].square().sum() / 1024
    with torch.no_grad():
        assert error(model(points), points) < 1.15 * left_out
