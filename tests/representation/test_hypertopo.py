"""Hyperbolic contrast and product-manifold head: the facts of the sheet of paper 12."""

import math

import pytest
import torch
from torch import nn

import regularizers.representation.hypertopo as hypertopo
from regularizers.representation import (
    ProductManifoldHead,
    hyperbolic_info_nce,
    linear_warmup,
    poincare_distance,
    poincare_expmap0,
    select_checkpoint,
)
from tests.harness import DTYPES, MethodContract

F64 = torch.float64
HALVES = (torch.bfloat16, torch.float16)


class TestProductManifoldHead(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return ProductManifoldHead(6, 2, 3, 2, learn_curvature=True).to(dtype)

    def call(self, module, dtype):
        output = module(torch.linspace(-1, 1, 60, dtype=dtype).reshape(2, 5, 6))
        # h and s are wide for half types, the tangent vectors are not.
        ball = poincare_distance(output.h, torch.zeros_like(output.h), c=output.c_h)
        return output.tangent.sum(-1) + (ball + output.s.sum(-1)).to(dtype)

    def bad_inputs(self):
        head = ProductManifoldHead(6, 2, 3, 2)
        return [
            (ValueError, "in_dim must", lambda: ProductManifoldHead(0, 2, 3, 2)),
            (ValueError, "dim_s must", lambda: ProductManifoldHead(6, 2, 3, 0)),
            (ValueError, "curvature_h must", lambda: ProductManifoldHead(6, curvature_h=0.0)),
            (TypeError, "x must", lambda: head(torch.ones(1, 2, 6).long())),
        ]


def _ball(n, d, dtype=F64, seed=0, radius=0.9):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=dtype)
    return (
        radius
        * z
        / z.norm(dim=1, keepdim=True)
        * torch.rand(n, 1, generator=generator, dtype=dtype)
    )


def test_head_gives_points_of_ball_and_sphere_and_their_tangent_vectors():
    head = ProductManifoldHead(6, 2, 3, 4, curvature_h=2.0, curvature_s=0.25).double()
    x = torch.randn(2, 5, 6, dtype=F64)
    output = head(x)
    assert (2.0 * output.h.square().sum(-1) < 1).all()
    torch.testing.assert_close(output.s.norm(dim=-1), torch.full((2, 5), 2.0, dtype=F64))
    v_h, e, v_s = output.tangent.split([2, 3, 4], -1)
    torch.testing.assert_close(output.h, poincare_expmap0(v_h, c=2.0))
    torch.testing.assert_close(output.e, e)
    torch.testing.assert_close(output.s, 2 * nn.functional.normalize(v_s, dim=-1))


def test_learned_curvatures_start_where_they_are_set_and_get_a_gradient():
    head = ProductManifoldHead(
        6, 2, 3, 2, curvature_h=0.7, curvature_s=1.3, learn_curvature=True
    ).double()
    output = head(torch.randn(1, 8, 6, dtype=F64))
    torch.testing.assert_close(output.c_h.item(), 0.7, rtol=1e-5, atol=0)  # kept in float32
    torch.testing.assert_close(output.c_s.item(), 1.3, rtol=1e-5, atol=0)
    ids = torch.arange(8) // 4
    loss = hyperbolic_info_nce(output.h[0], ids, c=output.c_h) + output.s.sum()
    loss.backward()
    assert head.raw_curvature_h.grad.abs() > 0
    assert head.raw_curvature_s.grad.abs() > 0


def test_zero_tokens_have_a_finite_image_and_gradient():
    head = ProductManifoldHead(3, 2, 2, 2)
    with torch.no_grad():
        head.project_h.bias.zero_()
        head.project_s.bias.zero_()
    x = torch.zeros(1, 4, 3, requires_grad=True)
    output = head(x)
    (output.h.sum() + output.s.sum()).backward()
    assert torch.equal(output.h, torch.zeros(1, 4, 2))
    assert x.grad.isfinite().all()


def test_exponential_map_of_a_unit_vector():
    point = poincare_expmap0(torch.tensor([1.0, 0.0], dtype=F64))
    torch.testing.assert_close(point, torch.tensor([math.tanh(1), 0.0], dtype=F64))
    distance = poincare_distance(torch.zeros(2, dtype=F64), point)
    torch.testing.assert_close(distance.item(), 2.0)


def test_gradient_of_the_exponential_map_at_the_origin_is_the_identity():
    jacobian = torch.func.jacrev(poincare_expmap0)(torch.zeros(3, dtype=F64))
    torch.testing.assert_close(jacobian, torch.eye(3, dtype=F64))


@pytest.mark.parametrize("c", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("dtype", "edge"), [(torch.float32, 4e-3), (F64, 1e-5)], ids=str)
def test_exponential_map_stays_inside_the_ball(dtype, edge, c):
    point = poincare_expmap0(torch.tensor([3e3, -4e3], dtype=dtype), c=c)
    torch.testing.assert_close(point.norm().item(), (1 - edge) / c**0.5, rtol=1e-6, atol=0)
    assert poincare_distance(point, -point, c=c).isfinite()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_give_float32_points_and_distances(dtype):
    point = poincare_expmap0(torch.tensor([30.0, 40.0], dtype=dtype))
    assert point.dtype == torch.float32
    near = torch.tensor([0.5, 0.25], dtype=dtype)
    assert poincare_distance(near, near).dtype == torch.float32


def test_distance_from_the_origin():
    zero, half = torch.zeros(2, dtype=F64), torch.tensor([0.5, 0.0], dtype=F64)
    torch.testing.assert_close(poincare_distance(zero, half).item(), 2 * math.atanh(0.5))


def test_distance_is_that_of_the_published_form():
    x, y = _ball(40, 3), _ball(40, 3, seed=1)
    c = 0.8
    ratio = (x - y).square().sum(1) / (1 - c * x.square().sum(1)) / (1 - c * y.square().sum(1))
    expected = torch.acosh(1 + 2 * c * ratio) / c**0.5
    torch.testing.assert_close(poincare_distance(x, y, c=c), expected)


def test_distance_tends_to_twice_the_euclidean_one_as_curvature_goes_to_0():
    x, y = _ball(40, 3), _ball(40, 3, seed=1)
    # Relative deviation of order c.
    expected = 2 * (x - y).norm(dim=1)
    torch.testing.assert_close(poincare_distance(x, y, c=1e-9), expected, rtol=1e-8, atol=0)


def test_distance_keeps_its_digits_between_near_points():
    # The published form adds 2e-18 to 1 here.
    x = torch.tensor([0.3, 0.0], dtype=F64)
    y = x + torch.tensor([0.0, 1e-9], dtype=F64)
    torch.testing.assert_close(poincare_distance(x, y).item(), 2e-9 / (1 - 0.09), rtol=1e-6, atol=0)


def test_distance_is_invariant_to_moebius_translations():
    def translate(a, x):
        dot, a2, x2 = (a * x).sum(-1, True), a.square().sum(-1, True), x.square().sum(-1, True)
        return ((1 + 2 * dot + x2) * a + (1 - a2) * x) / (1 + 2 * dot + a2 * x2)

    x, y, a = _ball(40, 3), _ball(40, 3, seed=1), _ball(1, 3, seed=2)
    torch.testing.assert_close(
        poincare_distance(translate(a, x), translate(a, y)), poincare_distance(x, y)
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_gradient_of_the_distance_is_finite_at_equal_points_and_near_the_edge(dtype):
    edge = 1 - (1e-7 if dtype == torch.float32 else 1e-15)
    for point in ([0.0, 0.0], [0.4, 0.1], [edge, 0.0]):
        x = torch.tensor(point, dtype=dtype, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        distance = poincare_distance(x, y)
        distance.backward()
        assert distance == 0
        assert x.grad.isfinite().all()
        assert y.grad.isfinite().all()


def test_distance_and_map_pass_gradcheck_with_a_learned_curvature():
    x, y = _ball(4, 3).requires_grad_(), _ball(4, 3, seed=1).requires_grad_()
    c = torch.tensor(0.9, dtype=F64, requires_grad=True)
    call = lambda x, y, c: poincare_distance(x, y, c=c)
    assert torch.autograd.gradcheck(call, (x, y, c))
    assert torch.autograd.gradgradcheck(call, (x, y, c))
    assert torch.autograd.gradcheck(lambda x, c: poincare_expmap0(x, c=c), (x, c))


def _example(dtype=F64):
    z = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.0], [0.5, 0.0]], dtype=dtype)
    return z.requires_grad_(), torch.tensor([0, 0, 1, 1])


def test_hyperbolic_nce_of_two_pairs():
    loss = hyperbolic_info_nce(*_example(), temperature=0.5)
    torch.testing.assert_close(loss.item(), 0.200671, rtol=0, atol=1e-6)


def test_hyperbolic_nce_is_the_mean_over_positives_inside_the_logarithm():
    z, ids = _ball(7, 3), torch.tensor([0, 0, 1, 1, 0, 2, 0])
    scores = -poincare_distance(z[:, None], z, c=0.6) / 0.3
    losses = []
    for i in range(7):
        others = [j for j in range(7) if j != i]
        positives = [j for j in others if ids[j] == ids[i]]
        if positives:
            log_p = scores[i] - scores[i, others].logsumexp(0)
            losses.append(math.log(len(positives)) - log_p[positives].logsumexp(0))
    expected = torch.stack(losses).mean()
    found = hyperbolic_info_nce(z, ids, c=0.6, temperature=0.3)
    torch.testing.assert_close(found, expected)
    rows = hyperbolic_info_nce(z, ids, c=0.6, temperature=0.3, reduction="none")
    assert rows[5] == 0
    torch.testing.assert_close(rows.sum() / 6, expected)


def test_hyperbolic_nce_without_a_positive_is_0_and_keeps_its_graph():
    z = _ball(3, 2).requires_grad_()
    loss = hyperbolic_info_nce(z, torch.arange(3))
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_hyperbolic_nce_has_finite_gradients_where_tokens_coincide():
    z, ids = _example(torch.float32)
    hyperbolic_info_nce(z, ids).backward()
    assert z.grad.isfinite().all()


def test_hyperbolic_nce_in_blocks_is_that_in_one(monkeypatch):
    z, ids = _ball(11, 3).requires_grad_(), torch.arange(11) % 4
    whole = hyperbolic_info_nce(z, ids)
    (expected,) = torch.autograd.grad(whole, z)
    monkeypatch.setattr(hypertopo, "_BLOCK", 3 * 33)  # three rows a block, two in the last
    parts = hyperbolic_info_nce(z, ids)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, z)[0], expected)


def test_hyperbolic_nce_with_a_nan_is_nan():
    z, ids = _example()
    z = z.detach().clone()
    z[0, 0] = torch.nan
    assert hyperbolic_info_nce(z, ids).isnan()
    assert hyperbolic_info_nce(z, torch.arange(4)).isnan()  # also where no row counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hyperbolic_nce_accumulates_half_types_in_float32(dtype):
    z, ids = _example(dtype)
    loss = hyperbolic_info_nce(z, ids, temperature=0.5)
    assert loss.dtype == (F64 if dtype == F64 else torch.float32)
    torch.testing.assert_close(loss.item(), 0.200671, rtol=0, atol=1e-5)  # exact coordinates
    loss.backward()
    assert z.grad.dtype == dtype


def test_hyperbolic_nce_and_distance_compile_to_one_graph(fresh_dynamo):
    z, ids = _ball(6, 3), torch.arange(6) // 2
    call = lambda z: hyperbolic_info_nce(poincare_expmap0(z, c=0.7), ids, c=0.7)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), call(z))


def test_hyperbolic_nce_separates_images_where_training_pulls_them():
    torch.manual_seed(0)
    v = (0.1 * torch.randn(24, 2)).requires_grad_()
    ids = torch.arange(24) % 3
    optimizer = torch.optim.Adam([v], lr=0.05)
    for _ in range(60):
        loss = hyperbolic_info_nce(poincare_expmap0(v), ids, temperature=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = poincare_expmap0(v.detach())
    distance = poincare_distance(z[:, None], z)
    same = ids[:, None] == ids
    # With 7 positives inside the logarithm the least loss is log 7; it starts at 3.15.
    assert loss.item() < math.log(7) + 0.05
    assert distance[~same].mean() > 3 * distance[same].mean()


def test_checkpoint_is_the_lowest_distance_among_the_highest_scores():
    records = [{"dice": dice, "pd": pd} for dice, pd in ((0.2, 0.0), (0.9, 0.4), (0.8, 0.3))]
    assert select_checkpoint(records, k=2) == 2
    assert select_checkpoint(records, k=1) == 1
    assert select_checkpoint(records) == 0  # all three are among the best five
    assert select_checkpoint([{"dice": 0.5, "pd": 0.1}] * 3) == 0


def test_warmup_reaches_1_and_is_1_without_epochs():
    assert [linear_warmup(epoch, 5) for epoch in (0, 2, 4, 9)] == [0.2, 0.6, 1.0, 1.0]
    assert linear_warmup(0, 0) == 1.0


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (ValueError, "c must", lambda: poincare_expmap0(torch.ones(2), c=0.0)),
        (ValueError, "c must", lambda: poincare_expmap0(torch.ones(2), c=torch.tensor(-1.0))),
        (ValueError, "c must", lambda: poincare_expmap0(torch.ones(2), c=torch.ones(2))),
        (TypeError, "v must", lambda: poincare_expmap0(torch.ones(2).long())),
        (ValueError, "x must", lambda: poincare_distance(torch.ones(2), torch.zeros(2))),
        (ValueError, "y must", lambda: poincare_distance(torch.zeros(2), torch.ones(2))),
        (TypeError, "y must", lambda: poincare_distance(torch.zeros(2), torch.zeros(2).double())),
        (
            ValueError,
            "z must",
            lambda: hyperbolic_info_nce(torch.ones(2, 2), torch.zeros(2).long()),
        ),
        (ValueError, "z must", lambda: hyperbolic_info_nce(torch.zeros(2), torch.zeros(2).long())),
        (ValueError, "ids must", lambda: hyperbolic_info_nce(_ball(3, 2), torch.zeros(2).long())),
        (TypeError, "ids must", lambda: hyperbolic_info_nce(_ball(3, 2), torch.zeros(3))),
        (
            ValueError,
            "temperature must",
            lambda: hyperbolic_info_nce(_ball(3, 2), torch.arange(3), temperature=0.0),
        ),
        (
            ValueError,
            "reduction must",
            lambda: hyperbolic_info_nce(_ball(3, 2), torch.arange(3), reduction="max"),
        ),
        (ValueError, "records must", lambda: select_checkpoint([])),
        (ValueError, "records must", lambda: select_checkpoint([{"dice": 1.0}])),
        (ValueError, "records must", lambda: select_checkpoint([{"dice": 1.0, "pd": math.nan}])),
        (ValueError, "k must", lambda: select_checkpoint([{"dice": 1.0, "pd": 0.0}], k=0)),
        (ValueError, "epochs must", lambda: linear_warmup(0, -1)),
    ],
)
def test_bad_input_names_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call()
