"""Arguments of GeomLoss and OTT-JAX: their meaning here, and bad ones."""

import pytest
import torch

from regularizers.transport import Euclidean, SqEuclidean, from_blur, from_ott, sinkhorn


def test_blur_is_a_length_and_epsilon_its_power():
    assert from_blur(0.1) == {"cost": SqEuclidean(scale=0.5), "epsilon": 0.1**2}
    assert from_blur(0.1, p=1) == {"cost": Euclidean(), "epsilon": 0.1}


def test_reach_is_the_root_of_the_price_of_mass():
    options = from_blur(0.5, reach=2.0)
    assert options["tau_a"] == options["tau_b"] == pytest.approx(4 / (4 + 0.25))


def test_scaling_anneals_from_the_diameter():
    options = from_blur(0.5, p=2, scaling=0.8, diameter=5.0)
    assert options["eps_init"] * options["epsilon"] == pytest.approx(25.0)
    assert options["eps_decay"] == pytest.approx(0.64)


def test_value_and_epsilon_agree_with_ott():
    jax = pytest.importorskip("jax")
    linear = pytest.importorskip("ott.solvers.linear")
    pointcloud = pytest.importorskip("ott.geometry.pointcloud")
    x, y = torch.randn(20, 2), torch.randn(25, 2) + 1
    settings = {"relative_epsilon": "mean", "scale_cost": "max_cost", "epsilon": 0.2}
    geometry = pointcloud.PointCloud(
        jax.numpy.asarray(x.numpy()), jax.numpy.asarray(y.numpy()), **settings
    )
    theirs = linear.solve(geometry, threshold=1e-5)
    ours = sinkhorn(x, y, **from_ott(threshold=1e-5, **settings))
    assert ours.epsilon.item() == pytest.approx(float(geometry.epsilon), rel=1e-5)
    assert ours.value.item() == pytest.approx(float(theirs.reg_ot_cost), rel=1e-4)
    entropy = ours.objective("entropy").item()
    assert entropy == pytest.approx(float(theirs.ent_reg_cost), rel=1e-4)
    # Uniform masses shift potentials by a constant, as does the gauge.
    f = torch.tensor(theirs.f.tolist())
    torch.testing.assert_close(ours.f - ours.f.mean(), f - f.mean(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("blur", lambda: from_blur(0.0)),
        ("p must", lambda: from_blur(0.1, p=3)),
        ("reach", lambda: from_blur(0.1, reach=-1.0)),
        ("scaling", lambda: from_blur(0.1, scaling=0.5)),
        ("scaling", lambda: from_blur(0.1, scaling=1.0, diameter=1.0)),
        ("diameter", lambda: from_blur(0.1, scaling=0.5, diameter=0.0)),
        ("norm_error", lambda: from_ott(norm_error=2)),
        ("scale_cost", lambda: from_ott(scale_cost="std")),
    ],
)
def test_bad_input_names_the_argument(name, call):
    with pytest.raises(ValueError, match=name):
        call()
