"""Random calls of functions of the families: finite in, finite out, or an error that says so.

An argument that is wrong in type or shape raises ValueError or TypeError, nothing else.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regularizers import dropout, information, mixing, representation, transport, weights
from tests.fuzzing import TAME, hypothesis_draws
from tests.harness import Sample
from tests.test_fuzz import FUZZ, _no_hang  # noqa: F401 (a fixture)


def _images(d, call, **options):
    x = d.tensor(d.rows(1), d.size(1), d.size(1), d.size(1))
    return Sample("", (x,), call, options)


def _labelled(d, call):
    n = d.rows(1)
    target = d.integers(0, 4, n)
    alpha = d.number(1.0, 0.2)
    generator = d.generator()
    mixed = lambda x: call(x, target, alpha=alpha, generator=generator).x
    return Sample("", (d.tensor(n, d.size(1), d.size(1), d.size(1)),), mixed)


def _embeddings(d, call, least=2, **options):
    return Sample("", (d.tensor(2, d.rows(least), d.size(1)),), call, options)


def _clouds(d, call, **options):
    features = d.size(1)
    return Sample("", (d.tensor(d.rows(1), features), d.tensor(d.size(1), features)), call, options)


def _vector(d, call, **options):
    return Sample("", (d.tensor(d.size(1), d.size(1)),), call, options)


TABLE = {
    "dropout.drop_block2d": lambda d: _images(d, dropout.drop_block2d, p=d.number(0.2, 0.0)),
    "dropout.drop_path": lambda d: _images(d, dropout.drop_path, p=d.number(0.2, 0.9)),
    "mixing.mixup": lambda d: _labelled(d, mixing.mixup),
    "mixing.cutmix": lambda d: _labelled(d, mixing.cutmix),
    "transport.project_simplex": lambda d: _vector(d, transport.project_simplex),
    "transport.project_sparse_simplex": lambda d: _vector(
        d, transport.project_sparse_simplex, k=d.number(1, 3)
    ),
    "transport.project_sparse_nonneg": lambda d: _vector(
        d, transport.project_sparse_nonneg, k=d.number(1, 3)
    ),
    "transport.sigreg": lambda d: _embeddings(
        d, transport.sigreg, num_slices=d.number(4, 1), seed=d.seed()
    ),
    "transport.visreg": lambda d: _embeddings(d, transport.visreg),
    "transport.invariance_loss": lambda d: _embeddings(d, transport.invariance_loss),
    "transport.vicreg_loss": lambda d: _embeddings(d, transport.vicreg_loss),
    "transport.sinkhorn_divergence": lambda d: _clouds(
        d, transport.sinkhorn_divergence, epsilon=d.number(1.0, 0.5), max_iter=20
    ),
    "weights.class_balanced_weights": lambda d: Sample(
        "", (d.integers(1, 50, d.size(1)).float(),), weights.class_balanced_weights
    ),
}


# Losses of one batch of points, and of two.
ONE = [
    information.ebab_edges,
    information.metric_distances,
    representation.attention_neg_entropy,
    representation.dispersive_loss,
    representation.singular_value_loss,
    representation.spread_out_loss,
    dropout.multi_sample_dropout,
    transport.sliced_gaussian_wasserstein,
]
TWO = [
    dropout.codebook_entropy_loss,
    information.jensen_shannon,
    mixing.softmax_consistency,
    representation.batch_contrastive_loss,
    representation.energy_distance,
    representation.mnr_loss,
]


def _points(call):
    return lambda d: Sample("", (d.tensor(d.rows(2), d.size(2)),), call)


def _pairs(call):
    def build(d):
        n, features = d.rows(2), d.size(2)
        return Sample("", (d.tensor(n, features), d.tensor(n, features)), call)

    return build


def _name(call):
    return f"{call.__module__.split('.')[1]}.{call.__name__}"


TABLE |= {_name(call): _points(call) for call in ONE}
TABLE |= {_name(call): _pairs(call) for call in TWO}


def _tensors(found):
    """The floating-point tensors of a result, whatever holds them."""
    if isinstance(found, torch.Tensor):
        return [found] if found.is_floating_point() else []
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (tuple, list)):
        return [tensor for part in found for tensor in _tensors(part)]
    return []


FEWER = settings(FUZZ, max_examples=-(-FUZZ.max_examples // 4))


@pytest.mark.parametrize("name", TABLE)
def test_finite_in_finite_out_or_an_error_that_says_so(name):
    answered, asked = 0, 0

    @FEWER
    @given(st.data())
    def run(data):
        nonlocal answered, asked
        asked += 1
        draws = hypothesis_draws(data.draw, values=TAME)
        sample = draws.spoil(TABLE[name](draws))
        try:
            found = _tensors(sample(*sample.differentiable))
        except (TypeError, ValueError):
            return
        assert found
        assert all(tensor.isfinite().all() for tensor in found)
        answered += 1

    run()
    assert answered > asked / 2  # errors are for what is wrong
