"""Activation maximization: the step, the crops, the schedules, and one image a facet."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.representation import (
    Octave,
    UnitActivation,
    center_crop_offset,
    find_facets,
    maximize_activation,
    paper_octaves,
    tv_denoise,
)
from regularizers.representation import activation_maximization as module


def _linear(*shape):
    """An objective with a fixed gradient."""
    gradient = torch.randn(*shape)
    return lambda x: (x * gradient).sum((1, 2, 3))


WIDE = {"value_range": (-100.0, 100.0)}


def test_one_step_changes_the_mean_absolute_pixel_by_exactly_the_step():
    init = torch.randn(3, 2, 6, 5)
    found = maximize_activation(_linear(2, 6, 5), init, [Octave(1, 0.25)], **WIDE)
    torch.testing.assert_close((found - init).abs().mean((1, 2, 3)), torch.full((3,), 0.25))


def test_step_is_along_the_gradient_of_each_image_by_itself():
    init = torch.randn(2, 1, 4, 4)
    scale = torch.tensor([1.0, 1000.0]).view(2, 1, 1, 1)
    gradient = torch.randn(1, 4, 4)
    found = maximize_activation(
        lambda x: (scale * x * gradient).sum((1, 2, 3)), init, [Octave(1, 0.5)], **WIDE
    )
    expected = 0.5 * gradient / gradient.abs().mean()
    torch.testing.assert_close(found - init, expected.expand(2, 1, 4, 4))


def test_init_is_not_changed():
    init = torch.rand(1, 1, 4, 4)
    before = init.clone()
    maximize_activation(_linear(1, 4, 4), init, [Octave(3, 0.1)])
    assert torch.equal(init, before)


def test_image_without_a_gradient_takes_no_step():
    init = torch.rand(1, 1, 4, 4)
    found = maximize_activation(lambda x: 0 * x.sum((1, 2, 3)), init, [Octave(2, 0.1)])
    assert torch.equal(found, init)


def test_nan_gradient_gives_nan():
    init = torch.rand(1, 1, 4, 4)
    found = maximize_activation(lambda x: torch.nan * x.sum((1, 2, 3)), init, [Octave(1, 0.1)])
    assert found.isnan().any()


def test_margin_is_left_alone():
    init = torch.rand(2, 1, 10, 12)
    found = maximize_activation(_linear(1, 10, 12), init, [Octave(3, 0.01, margin=3)], **WIDE)
    changed = (found != init).any(0)[0]
    assert changed[3:-3, 3:-3].all()
    assert changed.sum() == 4 * 6


def test_step_inside_a_margin_still_changes_the_mean_pixel_by_the_step():
    init = torch.rand(1, 1, 10, 12)
    found = maximize_activation(_linear(1, 10, 12), init, [Octave(1, 0.01, margin=3)], **WIDE)
    assert (found - init).abs().mean().item() == pytest.approx(0.01, rel=1e-4)


def test_crops_have_the_mean_of_the_middle_and_stay_inside():
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor(
        [
            center_crop_offset((100, 60), (40, 40), window=0.2, generator=generator)
            for _ in range(4000)
        ]
    ).double()
    # Cutting off to an integer takes half a pixel.
    error = draws.mean(0) + 0.5 - torch.tensor([30.0, 10.0])
    assert (error.abs() < 3 * draws.std(0) / 4000**0.5 + 0.05).all()
    assert (draws >= 0).all()
    assert (draws <= torch.tensor([60.0, 20.0])).all()
    torch.testing.assert_close(draws.std(0)[0].item(), 0.2 * 60, rtol=0.05, atol=0)


def test_wide_windows_are_clipped_and_full_crops_do_not_move():
    offsets = {center_crop_offset((5, 5), (4, 5), window=50.0) for _ in range(100)}
    assert offsets == {(0, 0), (1, 0)}


def test_only_the_crop_is_updated():
    init = torch.rand(2, 1, 12, 12)
    found = maximize_activation(
        _linear(1, 5, 7),
        init,
        [Octave(1, 0.01, denoise=50.0)],
        crop=(5, 7),
        generator=torch.Generator().manual_seed(0),
        **WIDE,
    )
    changed = found != init
    for image in changed[:, 0]:
        rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        assert len(rows) == 5
        assert len(columns) == 7
        assert rows[-1] - rows[0] == 4
        assert columns[-1] - columns[0] == 6


def test_crops_are_a_function_of_the_generator():
    init = torch.rand(2, 1, 12, 12)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        objective = lambda x: (x * x).sum((1, 2, 3))
        return maximize_activation(
            objective, init, [Octave(5, 0.01)], crop=(8, 8), generator=generator
        )

    state = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("match_reference", "expected"),
    [(False, [0.5, 0.75, 1.0, 1.25]), (True, [0.375, 0.75, 1.125, 1.5])],
    ids=["ours", "reference"],
)
def test_weight_of_the_denoiser_follows_its_schedule(monkeypatch, match_reference, expected):
    weights = []
    monkeypatch.setattr(module, "tv_denoise", lambda x, weight: weights.append(weight) or x)
    octave = Octave(4, 0.1, denoise=(0.5, 1.5))
    init = torch.rand(1, 1, 4, 4)
    maximize_activation(_linear(1, 4, 4), init, [octave], match_reference=match_reference)
    assert weights == pytest.approx(expected)


def test_published_schedule_doubles_a_constant_weight(monkeypatch):
    weights = []
    monkeypatch.setattr(module, "tv_denoise", lambda x, weight: weights.append(weight) or x)
    init = torch.rand(1, 1, 4, 4)
    for reference in (False, True):
        octave = Octave(100, 0.1, denoise=0.4)
        maximize_activation(_linear(1, 4, 4), init, [octave], match_reference=reference)
    assert set(weights[:100]) == {0.4}
    assert weights[100] == pytest.approx(0.4, rel=0.02)
    assert weights[-1] == pytest.approx(0.8, rel=0.02)


def test_step_moves_between_its_ends():
    init = torch.zeros(1, 1, 4, 4)
    found = maximize_activation(_linear(1, 4, 4), init, [Octave(4, (1.0, 3.0))], **WIDE)
    assert found.abs().mean().item() == pytest.approx(1 + 1.5 + 2 + 2.5)


def test_denoising_is_a_step_of_its_own_after_the_ascent():
    init = torch.rand(1, 1, 8, 8)
    objective = _linear(1, 8, 8)
    plain = maximize_activation(objective, init, [Octave(1, 0.1)])
    found = maximize_activation(objective, init, [Octave(1, 0.1, denoise=5.0)])
    torch.testing.assert_close(found, tv_denoise(plain, weight=5.0))


def test_result_stays_in_the_range_and_has_the_size_of_the_octaves():
    init = torch.rand(2, 3, 10, 8)
    octaves = [Octave(3, 5.0, denoise=1.0), Octave(3, 5.0, scale=1.5), Octave(2, 1.0, scale=2.0)]
    found = maximize_activation(
        lambda x: x.square().sum((1, 2, 3)), init, octaves, value_range=(0.1, 0.6)
    )
    assert found.shape == (2, 3, 30, 24)
    assert found.min() >= 0.1
    assert found.max() <= 0.6


def test_an_octave_may_have_an_objective_of_its_own():
    init = torch.zeros(1, 1, 4, 4)
    up, down = (lambda x: x.sum((1, 2, 3))), (lambda x: -x.sum((1, 2, 3)))
    octaves = [Octave(3, 1.0), Octave(1, 1.0, objective=down)]
    torch.testing.assert_close(maximize_activation(up, init, octaves, **WIDE), init + 2)


def _network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(64, 5),
    )


def test_parameters_get_no_gradient_and_modes_come_back():
    model = _network()
    model[1].eval()
    modes = [part.training for part in model.modules()]
    statistics = model[1].running_mean.clone()
    with torch.no_grad():  # the caller's mode does not matter either
        maximize_activation(UnitActivation(model, "5", 2), torch.rand(2, 1, 6, 6), [Octave(2, 0.1)])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(model[1].running_mean, statistics)


def test_modes_come_back_after_an_error():
    model = _network()
    objective = UnitActivation(model, "5", 9)
    with pytest.raises(ValueError, match="units > 9"):
        maximize_activation(objective, torch.rand(2, 1, 6, 6), [Octave(2, 0.1)])
    assert model.training


def test_unit_of_a_map_is_its_central_place():
    model = _network().eval()
    x = torch.rand(2, 1, 6, 6)
    assert torch.equal(UnitActivation(model, "0", 3)(x), model[0](x)[:, 3, 2, 2])
    assert torch.equal(UnitActivation(model, "", 3)(x), model(x)[:, 3])


def test_schedules_of_the_paper_scale_with_the_pixels():
    for mode in ("mean", "center"):
        for byte, unit in zip(
            paper_octaves(mode), paper_octaves(mode, value_range=(0.0, 1.0)), strict=True
        ):
            assert unit.step == pytest.approx([step / 255 for step in byte.step])
            assert unit.denoise == pytest.approx([weight * 255 for weight in byte.denoise])
    logits = _linear(1, 4, 4)
    octaves = paper_octaves("center", logits=logits)
    assert [octave.objective is logits for octave in octaves] == [False, False, True, True, True]
    assert [octave.iterations for octave in octaves] == [190, 150, 150, 30, 10]


def test_each_facet_ends_on_its_own_image_and_the_overall_mean_on_one():
    # Sheet of paper 81: the unit is a logsumexp of two templates on disjoint supports.
    templates = torch.zeros(2, 1, 8, 8)
    templates[0, :, :, :4] = torch.rand(8, 4)
    templates[1, :, :, 4:] = torch.rand(8, 4)
    templates = F.normalize(templates.flatten(1)).view_as(templates)

    def cosines(x):
        return F.normalize(x.flatten(1)) @ templates.flatten(1).T

    def unit(x):
        return (8 * cosines(x)).logsumexp(1)

    kind = torch.arange(100) % 2
    images = (templates[kind] + 0.1 * torch.rand(100, 1, 8, 8)).clamp(0, 1)
    facets = find_facets(cosines(images), images, num_facets=2, embed="pca")
    octaves = [Octave(300, (0.02, 0.002))]
    found = cosines(maximize_activation(unit, facets.mean_images, octaves))
    own = found.argmax(1)
    assert sorted(own.tolist()) == [0, 1]
    assert found.max(1).values.min() > 0.95
    assert found.min(1).values.max() < 0.1
    # The mean shows both; from there the ascent can end on one only.
    overall = images.mean(0, keepdim=True)
    assert cosines(overall).min() > 0.6
    ended = cosines(maximize_activation(unit, overall, octaves))
    assert ended.max() > 0.95
    assert ended.min() < 0.1


def test_bad_input_names_the_argument():
    init = torch.rand(1, 1, 8, 8)
    run = lambda octave, **options: maximize_activation(_linear(1, 8, 8), init, [octave], **options)
    model = _network()
    for exception, name, call in [
        (ValueError, "margin must", lambda: run(Octave(1, 0.1, margin=4))),
        (ValueError, "margin must", lambda: run(Octave(1, 0.1, margin=2), crop=(8, 4))),
        (ValueError, "crop must", lambda: run(Octave(1, 0.1), crop=(9, 8))),
        (ValueError, "crop must", lambda: run(Octave(1, 0.1, scale=0.5), crop=(8, 8))),
        (ValueError, "value_range must", lambda: run(Octave(1, 0.1), value_range=(1.0, 0.0))),
        (TypeError, "octaves must", lambda: run(3)),
        (TypeError, "generator must", lambda: run(Octave(1, 0.1), generator=3)),
        (
            ValueError,
            "objective must",
            lambda: maximize_activation(lambda x: x.sum(), init, [Octave(1, 0.1)]),
        ),
        (
            TypeError,
            "init must",
            lambda: maximize_activation(_linear(1, 8, 8), init.long(), [Octave(1, 0.1)]),
        ),
        (
            ValueError,
            "init must",
            lambda: maximize_activation(_linear(1, 8, 8), init[0], [Octave(1, 0.1)]),
        ),
        (ValueError, "iterations must", lambda: Octave(0, 0.1)),
        (ValueError, "step must", lambda: Octave(1, -0.1)),
        (ValueError, "step must", lambda: Octave(1, (1.0, 2.0, 3.0))),
        (ValueError, "denoise must", lambda: Octave(1, 0.1, denoise=(0.0, 1.0))),
        (ValueError, "scale must", lambda: Octave(1, 0.1, scale=0.0)),
        (ValueError, "window must", lambda: Octave(1, 0.1, window=-1.0)),
        (ValueError, "margin must", lambda: Octave(1, 0.1, margin=-1)),
        (ValueError, "mode must", lambda: paper_octaves("noise")),
        (ValueError, "value_range must", lambda: paper_octaves(value_range=(1.0, 1.0))),
        (ValueError, "crop must", lambda: center_crop_offset((4, 4), (5, 4), window=0.1)),
        (ValueError, "window must", lambda: center_crop_offset((4, 4), (4, 4), window=-0.1)),
        (TypeError, "model must", lambda: UnitActivation(lambda x: x, "", 0)),
        (ValueError, "name must", lambda: UnitActivation(model, "9", 0)),
        (ValueError, "unit must", lambda: UnitActivation(model, "5", -1)),
    ]:
        with pytest.raises(exception, match=name):
            call()
