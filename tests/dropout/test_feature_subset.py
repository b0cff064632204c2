"""Feature masks of a table: the facts of the sheet of paper 83."""

from collections import Counter

import pytest
import torch

from regularizers.dropout import sample_feature_masks


@pytest.mark.parametrize("num_contexts", [1, 2])
def test_no_feature_is_context_and_target(num_contexts):
    for seed in range(20):
        contexts, targets = sample_feature_masks(16, 10, num_contexts=num_contexts, seed=seed)
        for row in range(16):
            for target in targets[:, row]:
                chosen = contexts[:, row].flatten().tolist() + target.tolist()
                assert len(set(chosen)) == len(chosen)


def test_sizes_are_those_of_the_shares():
    # 10 features, shares .2 to .4: 2, 3 or 4; the middle twice as likely as either end.
    draws = 4000
    sizes = [
        tuple(mask.shape[2] for mask in sample_feature_masks(1, 10, seed=seed))
        for seed in range(draws)
    ]
    for kind in range(2):
        counts = Counter(size[kind] for size in sizes)
        assert set(counts) == {2, 3, 4}
        for size, share in ((2, 0.25), (3, 0.5), (4, 0.25)):
            assert abs(counts[size] - draws * share) < 4 * (draws * share * (1 - share)) ** 0.5


def test_shapes_are_one_size_a_batch():
    contexts, targets = sample_feature_masks(6, 10, num_contexts=2, num_targets=3, seed=0)
    assert contexts.shape[:2] == (2, 6)
    assert targets.shape[:2] == (3, 6)
    assert contexts.dtype == targets.dtype == torch.int64
    assert (contexts.diff(dim=2) > 0).all()
    assert (targets.diff(dim=2) > 0).all()


def test_every_feature_is_target_and_context_equally_often():
    rows = 20_000
    contexts, targets = sample_feature_masks(rows, 10, seed=2)
    for masks in (contexts, targets[:1]):
        share = masks.shape[2] / 10
        counts = torch.bincount(masks.flatten(), minlength=10)
        deviation = (rows * share * (1 - share)) ** 0.5
        assert ((counts - rows * share).abs() < 4 * deviation).all()


def test_targets_of_a_sample_are_independent():
    # 2 of the 8 features that no context has: two targets agree in one of 28 samples.
    rows = 20_000
    shares = {"context_share": (0.2, 0.3), "target_share": (0.2, 0.3)}
    for seed in range(100):
        contexts, targets = sample_feature_masks(rows, 10, num_targets=2, seed=seed, **shares)
        if contexts.shape[2] == targets.shape[2] == 2:
            break
    equal = (targets[0] == targets[1]).all(1).double().mean().item()
    assert abs(equal - 1 / 28) < 4 * (1 / 28 * 27 / 28 / rows) ** 0.5


def test_reference_repeats_one_target():
    _, targets = sample_feature_masks(8, 10, match_reference=True, seed=0)
    assert len(targets) == 4
    assert (targets == targets[0]).all()


def test_sizes_that_do_not_fit_are_drawn_again():
    # Three contexts of up to 4 and a target of up to 4 of 10 features: only the small ones fit.
    for seed in range(50):
        contexts, targets = sample_feature_masks(2, 10, num_contexts=3, seed=seed)
        assert 3 * contexts.shape[2] + targets.shape[2] <= 10


def test_masks_are_a_function_of_the_seed():
    draw = lambda **options: sample_feature_masks(8, 12, **options)[1]
    assert torch.equal(draw(seed=3), draw(seed=3))
    generator = torch.Generator()
    assert torch.equal(
        draw(generator=generator.manual_seed(1)), draw(generator=generator.manual_seed(1))
    )
    torch.manual_seed(5)
    first = draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)


@pytest.mark.parametrize(
    ("exception", "name", "arguments", "options"),
    [
        (ValueError, "batch must", (0, 10), {}),
        (ValueError, "num_features must", (4, 2), {}),
        (TypeError, "num_features must", (4, 10.0), {}),
        (ValueError, "context_share must", (4, 10), {"context_share": (0.4, 0.4)}),
        (ValueError, "context_share must", (4, 10), {"context_share": (0.5, 0.4)}),
        (ValueError, "target_share must", (4, 10), {"target_share": (0.2, 1.0)}),
        (ValueError, "target_share must", (4, 10), {"target_share": (0.01, 0.4)}),
        (ValueError, "target_share must", (4, 10), {"target_share": (0.2, 0.21)}),
        (ValueError, "num_features must", (4, 10), {"num_contexts": 5}),
        (ValueError, "num_contexts must", (4, 10), {"num_contexts": 0}),
        (ValueError, "num_targets must", (4, 10), {"num_targets": 0}),
    ],
)
def test_bad_input_names_the_argument(exception, name, arguments, options):
    with pytest.raises(exception, match=name):
        sample_feature_masks(*arguments, **options)
