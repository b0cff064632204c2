"""Coherence, soft mining and the anomaly map of intrinsic normal prototypes (sheet of paper 66)."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from regularizers.representation import anomaly_map, coherence_loss, soft_mining_cosine_loss


def _tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_coherence_of_known_tokens():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    p = torch.tensor([[[2.0, 0.0]]], dtype=torch.float64)
    expected = (0 + 1 + 1 - 1 / math.sqrt(2)) / 3
    assert coherence_loss(x, p).item() == pytest.approx(expected, rel=1e-14)
    assert expected == pytest.approx(0.43096, abs=1e-5)


def test_coherence_is_zero_where_every_token_has_its_prototype():
    p = _tokens(2, 3, 5)
    x = p[:, [0, 2, 1, 1]] * torch.tensor([0.1, 3.0, 7.0, 1.0])[:, None]
    assert coherence_loss(x, p).abs() < 1e-15


def test_more_prototypes_never_raise_coherence():
    x, p = _tokens(4, 9, 5), _tokens(4, 8, 5)
    values = [coherence_loss(x, p[:, :count]) for count in range(1, 9)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


def test_lengths_of_tokens_and_prototypes_are_nothing():
    x, p = _tokens(2, 9, 5), _tokens(2, 3, 5)
    scaled = coherence_loss(x * torch.rand(2, 9, 1).add(0.1), p * torch.rand(2, 3, 1).add(0.1))
    torch.testing.assert_close(scaled, coherence_loss(x, p))


def test_assignment_names_the_nearest_prototype():
    x, p = _tokens(2, 9, 5), _tokens(2, 3, 5)
    found = coherence_loss(x, p, return_assignment=True)
    distance = 1 - F.cosine_similarity(x[:, :, None], p[:, None], dim=-1)
    torch.testing.assert_close(found.distance, distance.amin(-1))
    assert torch.equal(found.nearest, distance.argmin(-1))
    torch.testing.assert_close(found.loss, distance.amin(-1).mean())
    torch.testing.assert_close(coherence_loss(x, p, reduction="none"), found.distance)
    torch.testing.assert_close(coherence_loss(x, p, reduction="sum"), found.distance.sum())


def test_coherence_has_right_derivatives():
    x, p = _tokens(2, 4, 5).requires_grad_(), _tokens(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(coherence_loss, (x, p), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(coherence_loss, (x, p))


def test_tokens_and_prototypes_of_no_length_cost_one_and_pull_nothing():
    x, p = torch.zeros(1, 2, 3, requires_grad=True), torch.zeros(1, 2, 3, requires_grad=True)
    value = coherence_loss(x, p)
    value.backward()
    assert value == 1
    assert (x.grad == 0).all()
    assert (p.grad == 0).all()


def test_half_types_give_float32_and_nan_gives_nan():
    x, p = torch.randn(2, 9, 64).half(), torch.randn(2, 3, 64).half()
    found = coherence_loss(x, p)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), coherence_loss(x.double(), p.double()), rtol=1e-5, atol=0
    )
    x[0, 0, 0] = math.nan
    assert coherence_loss(x, p).isnan()


def test_half_types_may_stand_beside_wide_ones():
    x, p = torch.randn(2, 9, 64), torch.randn(2, 3, 64).half()
    torch.testing.assert_close(coherence_loss(x, p), coherence_loss(x, p.float()))
    e, d = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3).half()
    torch.testing.assert_close(
        soft_mining_cosine_loss([e], [d]), soft_mining_cosine_loss([e], [d.float()])
    )


def _pair_with_errors(errors):
    """Return e and d of two channels, one row of places, with the given 1 - cos."""
    errors = torch.tensor(errors, dtype=torch.float64)
    cos = 1 - errors
    e = torch.stack([torch.ones_like(cos), torch.zeros_like(cos)])[None, :, None]
    d = torch.stack([cos, (1 - cos.square()).sqrt()])[None, :, None]
    return e, d.requires_grad_()


def _gradient(e, d, **options):
    return torch.autograd.grad(soft_mining_cosine_loss(e, d, **options), d)


def test_gradient_is_multiplied_by_the_factors_of_the_formula():
    e, d = _pair_with_errors([0.1, 0.1, 0.4])
    (mined,), (plain,) = _gradient([e], [d]), _gradient([e], [d], power=0.0)
    torch.testing.assert_close(
        mined / plain, torch.tensor([0.125, 0.125, 8.0]).double().expand(1, 2, 1, 3)
    )


def test_finite_differences_of_the_value_see_no_factor():
    e, d = _pair_with_errors([0.1, 0.1, 0.4])
    (mined,) = _gradient([e], [d])
    step = torch.zeros_like(d)
    step[0, 0, 0, 2] = 1e-6
    with torch.no_grad():
        up, down = (soft_mining_cosine_loss([e], [d + s]) for s in (step, -step))
    difference = ((up - down) / 2e-6).item()
    assert mined[0, 0, 0, 2].item() == pytest.approx(8 * difference, rel=1e-6)


@pytest.mark.parametrize("error", [0.3, 0.0])
def test_even_errors_leave_the_plain_gradient(error):
    e, d = _pair_with_errors([error] * 4)
    (mined,), (plain,) = _gradient([e], [d]), _gradient([e], [d], power=0.0)
    torch.testing.assert_close(mined, plain)
    assert plain.isfinite().all()


def test_value_is_that_of_the_flattened_maps_without_factors():
    es, ds = [_tokens(2, 4, 3, 3), _tokens(2, 6, 2, 2)], [_tokens(2, 4, 3, 3), _tokens(2, 6, 2, 2)]
    each = torch.stack(
        [1 - F.cosine_similarity(e.flatten(1), d.flatten(1)) for e, d in zip(es, ds, strict=True)]
    ).mean(0)
    torch.testing.assert_close(soft_mining_cosine_loss(es, ds, reduction="none"), each)
    torch.testing.assert_close(soft_mining_cosine_loss(es, ds, reduction="sum"), each.sum())
    for power in (0.0, 3.0):
        torch.testing.assert_close(soft_mining_cosine_loss(es, ds, power=power), each.mean())


def test_factors_belong_to_the_call_and_not_to_the_map():
    # A hook left on the tensor would scale the gradient of every other use of it as well.
    e, d = _tokens(2, 4, 3, 3), _tokens(2, 4, 3, 3).requires_grad_()
    (once,) = _gradient([e], [d])
    other = d.square().sum()
    total = soft_mining_cosine_loss([e], [d]) + soft_mining_cosine_loss([e], [d]) + other
    (found,) = torch.autograd.grad(total, d)
    torch.testing.assert_close(found, 2 * once + 2 * d)


def test_encoder_gets_no_gradient():
    e, d = _tokens(2, 4, 3, 3).requires_grad_(), _tokens(2, 4, 3, 3).requires_grad_()
    soft_mining_cosine_loss([e], [d]).backward()
    assert e.grad is None
    assert d.grad is not None


def test_one_large_map_is_float32_for_half_types():
    e, d = torch.randn(1, 64, 40, 40).half(), torch.randn(1, 64, 40, 40).half()
    found = soft_mining_cosine_loss([e], [d])
    assert found.dtype == torch.float32
    expected = soft_mining_cosine_loss([e.double()], [d.double()])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_soft_mining_compiles_to_one_graph(fresh_dynamo):
    e, d = _tokens(2, 4, 3, 3), _tokens(2, 4, 3, 3).requires_grad_()
    compiled = torch.compile(soft_mining_cosine_loss, fullgraph=True, backend="aot_eager")
    loss = compiled([e], [d])
    torch.testing.assert_close(torch.autograd.grad(loss, d), _gradient([e], [d]))


def test_map_is_the_mean_of_resized_cosine_errors():
    es, ds = [_tokens(2, 4, 3, 3), _tokens(2, 6, 2, 2)], [_tokens(2, 4, 3, 3), _tokens(2, 6, 2, 2)]
    maps = [
        F.interpolate(
            1 - F.cosine_similarity(e, d)[:, None], size=(6, 9), mode="bilinear", align_corners=True
        )
        for e, d in zip(es, ds, strict=True)
    ]
    found = anomaly_map(es, ds, size=(6, 9))
    assert found.shape == (2, 1, 6, 9)
    torch.testing.assert_close(found, (maps[0] + maps[1]) / 2)


def test_map_does_not_see_lengths_and_loss_over_flattened_maps_does():
    e, d = _tokens(2, 4, 3, 3), _tokens(2, 4, 3, 3)
    longer = d.clone()
    longer[..., 0, 0] *= 5
    torch.testing.assert_close(anomaly_map([e], [longer], size=3), anomaly_map([e], [d], size=3))
    assert soft_mining_cosine_loss([e], [longer]) != soft_mining_cosine_loss([e], [d])


def test_bad_input_names_the_argument():
    x, p, e = torch.ones(2, 9, 4), torch.ones(2, 3, 4), torch.ones(2, 4, 3, 3)
    for exception, name, call in (
        (ValueError, "tokens must", lambda: coherence_loss(x[0], p)),
        (ValueError, "tokens must", lambda: coherence_loss(x[:, :0], p)),
        (ValueError, "prototypes must", lambda: coherence_loss(x, p[:1])),
        (ValueError, "prototypes must", lambda: coherence_loss(x, p[:, :0])),
        (TypeError, "prototypes must", lambda: coherence_loss(x, p.long())),
        (TypeError, "tokens must", lambda: coherence_loss(x.long(), p)),
        (ValueError, "reduction must", lambda: coherence_loss(x, p, reduction="max")),
        (ValueError, "decoder_feats must", lambda: soft_mining_cosine_loss([e], [e, e])),
        (ValueError, "decoder_feats must", lambda: soft_mining_cosine_loss([], [])),
        (ValueError, "decoder_feats must", lambda: soft_mining_cosine_loss([e], [e[..., :2]])),
        (TypeError, "decoder_feats must", lambda: soft_mining_cosine_loss([e], [e.long()])),
        (ValueError, "power must", lambda: soft_mining_cosine_loss([e], [e], power=-1.0)),
        (ValueError, "reduction must", lambda: soft_mining_cosine_loss([e], [e], reduction="max")),
        (ValueError, "size must", lambda: anomaly_map([e], [e], size=0)),
        (ValueError, "decoder_feats must", lambda: anomaly_map([e], [e[:1]], size=3)),
    ):
        with pytest.raises(exception, match=name):
            call()
