"""Betti numbers, boundary scores and diagram distances: the facts of the sheet of paper 12."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

import regularizers.geometry
import regularizers.representation
from regularizers.representation import (
    betti_numbers,
    boundary_f1,
    persistence_diagram_distance,
)
from regularizers.representation.topology_metrics import _diagram

FULL, CROSS = np.ones((3, 3)), ndimage.generate_binary_structure(2, 1)


def _noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _smooth(size, seed):
    noise = ndimage.gaussian_filter(_noise(size, size, seed=seed).numpy(), 1.5)
    noise = (noise - noise.min()) / np.ptp(noise)
    return torch.from_numpy(noise)[None, None]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 1, 1], [1, 0, 1], [1, 1, 1]], (1, 1)),
        ([[1, 0], [0, 1]], (2, 0)),
        ([[0, 0], [0, 0]], (0, 0)),
        ([[1]], (1, 0)),
        ([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], (1, 2)),
    ],
    ids=["hole", "diagonal", "empty", "pixel", "two holes"],
)
def test_betti_numbers_of_a_mask(rows, expected):
    assert betti_numbers(torch.tensor(rows)) == expected


def test_connectivity_decides_what_a_diamond_is():
    diamond = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert betti_numbers(diamond) == (4, 0)
    assert betti_numbers(diamond, connectivity=8) == (1, 1)
    assert betti_numbers(diamond, background=4) == (4, 1)  # as published: 3, and not 4


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("background", [4, 8])
def test_betti_numbers_are_those_of_scipy(connectivity, background):
    structure = {4: CROSS, 8: FULL}
    for seed in range(5):
        mask = _noise(23, 31, seed=seed) > 0.5
        inside = ndimage.label(mask.numpy(), structure[connectivity])[1]
        around = np.pad(~mask.numpy(), 1, constant_values=True)
        outside = ndimage.label(around, structure[background])[1]
        found = betti_numbers(mask, connectivity=connectivity, background=background)
        assert found == (inside, outside - 1)


def test_long_winding_components_are_one():
    spiral = torch.zeros(33, 33)
    spiral[::2] = 1
    spiral[1::4, -1] = 1
    spiral[3::4, 0] = 1
    assert betti_numbers(spiral) == (1, 0)


def test_geometry_has_the_same_functions():
    for name in ("betti_numbers", "soft_euler_characteristic", "persistence_diagram_distance"):
        assert getattr(regularizers.geometry, name) is getattr(regularizers.representation, name)


def _square(shift=0):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4 + shift : 12 + shift] = 1
    return mask


def test_boundary_score_forgives_shifts_up_to_the_tolerance():
    assert boundary_f1(_square(), _square()) == 1
    assert boundary_f1(_square(), _square(2), tolerance=2) == 1
    assert boundary_f1(_square(), _square(3), tolerance=2) < 1
    # At tolerance 0 two sides of 8 + 8 - 2 pixels of 28 stay where they were, less a shift of 1.
    torch.testing.assert_close(
        boundary_f1(_square(), _square(1), tolerance=0).item(), 14 / 28, rtol=1e-5, atol=0
    )


def test_boundary_score_is_that_of_scipys_morphology():
    pred, target = _noise(3, 1, 14, 17) > 0.4, _noise(3, 1, 14, 17, seed=1) > 0.4
    reach = np.arange(-2, 3)
    disk = reach[:, None] ** 2 + reach**2 <= 4
    expected = []
    for a, b in zip(pred[:, 0].numpy(), target[:, 0].numpy(), strict=True):
        edges = [m & ~ndimage.binary_erosion(m, CROSS, border_value=1) for m in (a, b)]
        wide = [ndimage.binary_dilation(edge, disk) for edge in edges]
        precision = (edges[0] & wide[1]).sum() / edges[0].sum()
        recall = (edges[1] & wide[0]).sum() / edges[1].sum()
        expected.append(2 * precision * recall / (precision + recall))
    found = boundary_f1(pred, target, reduction="none")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(boundary_f1(pred, target), found.mean())


def test_boundary_score_of_empty_masks_is_1_and_of_one_empty_mask_0():
    empty = torch.zeros(1, 1, 16, 16)
    assert boundary_f1(empty, empty) == 1
    assert boundary_f1(_square(), empty) < 1e-6


def _thresholded_betti(values, points, level, dim):
    """Components or holes of {values <= level}, from the picture and from the diagram."""
    mask = torch.from_numpy(values <= level)
    alive = ((points[:, 0] <= level) & (points[:, 1] > level)).sum()
    return betti_numbers(mask, connectivity=8)[dim], alive


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("grid", [0, 6], ids=["distinct", "ties"])
def test_diagrams_count_the_components_and_holes_of_every_level(dim, grid):
    for seed in range(4):
        values = _noise(13, 17, seed=seed).numpy()
        if grid:
            values = np.floor(values * grid) / grid
        points = _diagram(values, dim)
        for level in np.linspace(0, 1, 23):
            seen, counted = _thresholded_betti(values, points, level, dim)
            assert seen == counted, (seed, level)


def _assignment(a, b, ground):
    """Distances between all points, with copies of the diagonal on both sides."""
    half = {np.inf: 0.5, 2: 0.5**0.5}[ground]
    cost = np.zeros((len(a) + len(b),) * 2)
    cost[: len(a), : len(b)] = np.linalg.norm(a[:, None] - b, ord=ground, axis=2)
    cost[: len(a), len(b) :] = half * np.ptp(a, axis=1)[:, None]
    cost[len(a) :, : len(b)] = half * np.ptp(b, axis=1)
    return cost


def _wasserstein_oracle(a, b):
    cost = _assignment(a, b, 2)
    return cost[linear_sum_assignment(cost)].sum()


def _bottleneck_oracle(a, b):
    cost = _assignment(a, b, np.inf)
    for level in np.unique(cost):
        above = (cost > level).astype(float)
        if above[linear_sum_assignment(above)].sum() == 0:
            return level
    return 0.0


@pytest.mark.parametrize(
    ("metric", "oracle"),
    [("bottleneck", _bottleneck_oracle), ("wasserstein", _wasserstein_oracle)],
)
@pytest.mark.parametrize("kind", ["smooth", "noisy"])
def test_diagram_distances_are_those_of_an_assignment(metric, oracle, kind):
    join = max if metric == "bottleneck" else lambda *terms: sum(terms)
    for seed in range(3):
        if kind == "smooth":
            pred, target = _smooth(24, 2 * seed), _smooth(24, 2 * seed + 1)
        else:
            pred, target = (
                _noise(1, 1, 9, 9, seed=seed),
                (_noise(1, 1, 9, 9, seed=9) > 0.5).double(),
            )
        maps = [1 - x[0, 0].numpy() for x in (pred, target)]
        (first, *a), (second, *b) = (_diagram(values, 0) for values in maps)
        a, b = np.reshape(a, (-1, 2)), np.reshape(b, (-1, 2))
        components = join(abs(first[0] - second[0]), oracle(a, b))
        holes = oracle(*(_diagram(values, 1) for values in maps))
        for dims, expected in (([0], components), ([1], holes), ((0, 1), (components + holes) / 2)):
            found = persistence_diagram_distance(pred, target, dims=dims, metric=metric)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_distance_of_a_map_from_itself_is_0_and_is_symmetric():
    a, b = _smooth(24, 0), _smooth(24, 1)
    for metric in ("bottleneck", "wasserstein"):
        assert abs(persistence_diagram_distance(a, a, metric=metric)) < 1e-12
        there = persistence_diagram_distance(a, b, metric=metric)
        back = persistence_diagram_distance(b, a, metric=metric)
        np.testing.assert_allclose(there, back, rtol=1e-9)


def test_bottleneck_distance_is_bounded_by_the_largest_change():
    a = _smooth(32, 0)
    b = (a + 0.1 * (_noise(1, 1, 32, 32) - 0.5)).clamp(0, 1)
    distance = persistence_diagram_distance(a, b)
    assert 0 < distance <= (a - b).abs().max().item() + 1e-12


def test_distance_is_the_mean_over_the_batch():
    a, b = (torch.cat([_smooth(16, seed), _smooth(16, seed + 1)]) for seed in (0, 5))
    each = [persistence_diagram_distance(a[i : i + 1], b[i : i + 1]) for i in range(2)]
    assert persistence_diagram_distance(a, b) == pytest.approx(sum(each) / 2, rel=1e-12)


def test_distance_sees_an_island_and_a_hole_that_cancel_in_the_characteristic():
    target = torch.zeros(1, 1, 12, 12)
    target[..., 1:7, 1:7] = 1
    wrong = target.clone()
    wrong[..., 3, 3], wrong[..., 9, 9] = 0, 1
    assert persistence_diagram_distance(wrong, target) == 0.5


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (ValueError, "mask must", lambda x: betti_numbers(x)),
        (TypeError, "mask must", lambda x: betti_numbers(x.numpy())),
        (ValueError, "connectivity must", lambda x: betti_numbers(x[0, 0], connectivity=6)),
        (ValueError, "background must", lambda x: betti_numbers(x[0, 0], background=6)),
        (ValueError, "pred must", lambda x: boundary_f1(x[0], x)),
        (ValueError, "target must", lambda x: boundary_f1(x, x[..., 1:])),
        (ValueError, "tolerance must", lambda x: boundary_f1(x, x, tolerance=-1)),
        (ValueError, "reduction must", lambda x: boundary_f1(x, x, reduction="max")),
        (ValueError, "dims must", lambda x: persistence_diagram_distance(x, x, dims=[2])),
        (ValueError, "dims must", lambda x: persistence_diagram_distance(x, x, dims=[])),
        (ValueError, "metric must", lambda x: persistence_diagram_distance(x, x, metric="w")),
        (ValueError, "finite", lambda x: persistence_diagram_distance(x * torch.nan, x)),
        (ValueError, "target must", lambda x: persistence_diagram_distance(x, x[0])),
    ],
)
def test_bad_input_names_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call(torch.zeros(1, 1, 4, 4))
