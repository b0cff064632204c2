"""Soft Euler characteristic and total variation: the facts of the sheet of paper 12."""

import pytest
import torch
from torch.nn import functional as F

from regularizers.representation import (
    betti_numbers,
    euler_characteristic_loss,
    soft_euler_characteristic,
    topology_surrogate_loss,
    total_variation,
)

F64 = torch.float64


def _map(rows):
    return torch.tensor(rows, dtype=F64)[None, None]


def _annulus(size=32, inner=6, outer=12):
    place = torch.arange(size) - (size - 1) / 2
    radius = (place[:, None] ** 2 + place**2).sqrt()
    return ((radius > inner) & (radius < outer)).double()[None, None]


def _noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


HOLE = F.pad(torch.zeros(1, 1, 1, 1, dtype=F64), (2, 2, 2, 2), value=1)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.ones(1, 1, 4, 4), 1),
        (HOLE, 0),
        (_map([[1, 0, 0], [0, 0, 0], [0, 0, 1]]), 2),
        (_map([[1, 0], [0, 1]]), 2),
        (torch.zeros(1, 1, 4, 4), 0),
        (torch.ones(1, 1, 1, 1), 1),
        (torch.ones(1, 1, 1, 5), 1),
        (_map([[0, 1, 0], [1, 0, 1], [0, 1, 0]]), 4),
    ],
    ids=["full", "hole", "far", "diagonal", "empty", "pixel", "row", "diamond"],
)
def test_characteristic_of_a_mask(mask, expected):
    assert soft_euler_characteristic(mask).item() == expected


def test_characteristic_is_the_inclusion_exclusion_sum():
    x = _noise(3, 1, 7, 5)
    right, down = x[..., :-1] * x[..., 1:], x[..., :-1, :] * x[..., 1:, :]
    blocks = right[..., :-1, :] * right[..., 1:, :]
    expected = x.sum((1, 2, 3)) - right.sum((1, 2, 3)) - down.sum((1, 2, 3)) + blocks.sum((1, 2, 3))
    torch.testing.assert_close(soft_euler_characteristic(x), expected)


def test_characteristic_keeps_its_digits_on_large_float32_masks():
    # The four sums of the formula are of the order of 2^20 here.
    assert soft_euler_characteristic(torch.ones(1, 1, 1024, 1024)).item() == 1


def test_characteristic_of_random_masks_is_components_less_holes():
    for seed in range(10):
        mask = (_noise(1, 1, 12, 15, seed=seed) > 0.45).double()
        b0, b1 = betti_numbers(mask[0, 0])
        assert soft_euler_characteristic(mask).item() == b0 - b1


def test_loss_is_blind_to_a_hole_and_an_island_that_cancel():
    target = torch.zeros(1, 1, 12, 12)
    target[..., 1:7, 1:7] = 1
    wrong = target.clone()
    wrong[..., 3, 3], wrong[..., 9, 9] = 0, 1
    assert euler_characteristic_loss(wrong, target, sigma=0.02) < 1e-5
    assert betti_numbers(target[0, 0]) == (1, 0)
    assert betti_numbers(wrong[0, 0]) == (2, 1)


def test_loss_of_the_target_itself_is_small():
    target = _annulus()
    assert euler_characteristic_loss(target, target, sigma=0.02) < 1e-3


def test_loss_squares_each_map_before_the_mean_over_the_batch():
    empty, one = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    one[..., 1, 1] = 1
    pred, target = torch.cat([one, empty]), torch.cat([empty, one])
    # Errors of +1 and -1 would cancel in a mean of characteristics.
    loss = euler_characteristic_loss(pred, target, sigma=0.02, normalize=False)
    torch.testing.assert_close(loss.item(), 1.0, rtol=1e-4, atol=0)


def test_loss_is_the_mean_over_thresholds_of_squared_errors():
    pred, target = _noise(2, 1, 6, 7), (_noise(2, 1, 6, 7, seed=1) > 0.5)
    levels, sigma = (0.2, 0.6), 0.1
    truth = soft_euler_characteristic(target.double())
    errors = [
        (soft_euler_characteristic(torch.sigmoid((pred - level) / sigma)) - truth).square()
        for level in levels
    ]
    expected = (errors[0] + errors[1]) / 2
    call = lambda **options: euler_characteristic_loss(
        pred, target, thresholds=levels, sigma=sigma, **options
    )
    torch.testing.assert_close(call(normalize=False, reduction="none"), expected)
    torch.testing.assert_close(call(), expected.mean() / 42)
    torch.testing.assert_close(call(reduction="sum"), expected.sum() / 42)


def test_no_gradient_reaches_the_target():
    target = _noise(1, 1, 4, 4).requires_grad_()
    pred = _noise(1, 1, 4, 4, seed=1).requires_grad_()
    topology_surrogate_loss(pred, target).backward()
    assert target.grad is None
    assert pred.grad.abs().sum() > 0


def test_total_variation_of_two_columns_is_1():
    assert total_variation(_map([[0, 1], [0, 1]])).item() == 1.0


def test_total_variation_of_one_row_or_column_is_that_along_it():
    assert total_variation(_map([[0, 1, 0]])).item() == 1.0
    assert total_variation(_map([[0], [1], [1]])).item() == 0.5
    assert total_variation(_map([[1]])).item() == 0.0


def test_surrogate_is_the_weighted_sum_of_its_terms():
    pred, target = _noise(2, 1, 6, 7), (_noise(2, 1, 6, 7, seed=1) > 0.5)
    for reduction in ("mean", "sum", "none"):
        euler = euler_characteristic_loss(pred, target, sigma=0.2, reduction=reduction)
        expected = 0.3 * euler + 0.7 * total_variation(pred, reduction=reduction)
        found = topology_surrogate_loss(
            pred, target, alpha=0.3, beta=0.7, sigma=0.2, reduction=reduction
        )
        torch.testing.assert_close(found, expected)


def test_gradcheck():
    pred, target = _noise(2, 1, 4, 3).requires_grad_(), (_noise(2, 1, 4, 3, seed=1) > 0.5)
    call = lambda pred: topology_surrogate_loss(pred, target, alpha=1.0, beta=1.0)
    assert torch.autograd.gradcheck(call, (pred,))
    assert torch.autograd.gradgradcheck(call, (pred,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_accumulate_in_float32(dtype):
    target = _annulus()
    pred = target.to(dtype).requires_grad_()
    loss = topology_surrogate_loss(pred, target)
    assert loss.dtype == torch.float32
    expected = topology_surrogate_loss(target, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    loss.backward()
    assert pred.grad.dtype == dtype


def test_nan_gives_nan():
    pred = torch.full((1, 1, 4, 4), 0.5)
    pred[..., 1, 1] = torch.nan
    assert topology_surrogate_loss(pred, torch.ones(1, 1, 4, 4)).isnan()


def test_surrogate_compiles_to_one_graph(fresh_dynamo):
    pred, target = _noise(2, 1, 6, 7), _noise(2, 1, 6, 7, seed=1)
    compiled = torch.compile(topology_surrogate_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pred, target), topology_surrogate_loss(pred, target))


def _fit(labels, alpha, beta):
    """Fit free logits to labels; return the mask."""
    logits = torch.zeros_like(labels, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(100):
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        loss = loss + topology_surrogate_loss(logits.sigmoid(), labels, alpha=alpha, beta=beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (logits.detach() > 0).double()


def test_surrogate_restores_an_annulus_with_flipped_labels():
    truth = _annulus()
    labels = torch.where(_noise(1, 1, 32, 32) < 0.04, 1 - truth, truth)
    plain, regular = _fit(labels, 0.0, 0.0), _fit(labels, 1e-3, 1.0)
    wrong = [int((mask != truth).sum()) for mask in (plain, regular)]
    assert betti_numbers(truth[0, 0]) == (1, 1)
    assert min(betti_numbers(plain[0, 0])) > 5
    assert betti_numbers(regular[0, 0]) == (1, 1)
    assert wrong[1] < wrong[0] / 4


def test_characteristic_alone_finds_other_masks_of_its_value():
    truth = _annulus()
    labels = torch.where(_noise(1, 1, 32, 32) < 0.04, 1 - truth, truth)
    logits = (4 * labels - 2).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(100):
        loss = euler_characteristic_loss(logits.sigmoid(), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mask = (logits.detach() > 0).double()
    assert loss < 1e-5
    assert (mask != truth).sum() > 2 * (labels != truth).sum()
    assert betti_numbers(mask[0, 0]) != (1, 1)


CALLS = {
    "soft": lambda x: soft_euler_characteristic(x),
    "euler": lambda x: euler_characteristic_loss(x, torch.zeros_like(x)),
    "variation": lambda x: total_variation(x),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("shape", [(4, 4), (1, 2, 4, 4), (0, 1, 4, 4), (1, 1, 0, 4)], ids=str)
def test_other_shapes_than_maps_are_refused(call, shape):
    with pytest.raises(ValueError, match=r"must have shape \[B, 1, H, W\]"):
        call(torch.zeros(shape))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_integers_are_refused(call):
    with pytest.raises(TypeError, match="must be float"):
        call(torch.zeros(1, 1, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "pred", "options"),
    [
        ("pred must", torch.full((1, 1, 2, 2), 1.1), {}),
        ("pred must", torch.full((1, 1, 2, 2), -1e-5), {}),
        ("target must", torch.zeros(1, 1, 2, 3), {}),
        ("thresholds must", torch.zeros(1, 1, 2, 2), {"thresholds": (0.0, 0.5)}),
        ("thresholds must", torch.zeros(1, 1, 2, 2), {"thresholds": ()}),
        ("sigma must", torch.zeros(1, 1, 2, 2), {"sigma": 0.0}),
        ("alpha must", torch.zeros(1, 1, 2, 2), {"alpha": -1.0}),
        ("beta must", torch.zeros(1, 1, 2, 2), {"beta": -1.0}),
        ("reduction must", torch.zeros(1, 1, 2, 2), {"reduction": "max"}),
    ],
)
def test_bad_input_names_the_argument(name, pred, options):
    with pytest.raises(ValueError, match=name):
        topology_surrogate_loss(pred, torch.zeros(1, 1, 2, 2), **options)


def test_rounding_around_0_and_1_is_accepted():
    pred = torch.tensor([-5e-7, 1 + 5e-7]).reshape(1, 1, 1, 2)
    assert euler_characteristic_loss(pred, torch.zeros(1, 1, 1, 2)).isfinite()
