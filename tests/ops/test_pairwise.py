"""pairwise_logsumexp: the operator contract, and the facts of its kinds, rules and precision."""

import dataclasses
import itertools

import pytest
import torch

import regularizers
from regularizers.ops import (
    FalselyNear,
    LabelWindow,
    OtherLabel,
    SameLabel,
    pairwise_logsumexp,
)
from regularizers.ops.pairwise import BACKWARD, KINDS, PAIRWISE_LOGSUMEXP
from tests.harness import OperatorContract, Sample, can_run, forward_and_gradients, needs_kernels

ROWS, COLUMNS, FEATURES = 9, 6, 3
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 1, 0])
COLUMN_LABELS = torch.tensor([1, 0, 2, 0, 1, 5])
TARGETS = torch.tensor([0.0, 1.5, 0.5, 4.0, 4.5, 1.0, 0.25, 4.25, 9.0])
PREDICTIONS = torch.tensor([0.0, 1.0, 3.5, 0.5, 4.0, 1.0, 4.0, 2.0, 1.5])
NEAR = FalselyNear(TARGETS, PREDICTIONS, window=1.0, push=0.3)
RULES = {
    "every pair": None,
    "same label": SameLabel(LABELS),
    "other label": OtherLabel(LABELS),
    "window": LabelWindow(TARGETS, 1.0),
    "window of two values": LabelWindow(torch.stack([TARGETS, PREDICTIONS], 1), 1.0),
    "falsely near": NEAR,
    "falsely near, linear": dataclasses.replace(NEAR, pushing="linear"),
}


def reduce(x, y=None, column_bias=None, **options):
    """Give one tensor for the contract; rows without pairs give 0."""
    found = pairwise_logsumexp(x, y, column_bias=column_bias, **options)
    logsumexp = torch.where(found.pair_count > 0, found.logsumexp, 0)
    return torch.stack([logsumexp, 0.1 * found.total])


def with_bias(x, column_bias, **options):
    return reduce(x, None, column_bias, **options)


def dense(x, y, kind, scale, bias, pairs, exclude_self):
    """Reduce in float64 from direct differences, pair by pair."""
    x, y = x.double(), y.double()
    sums = []
    for i in range(len(x)):
        scores, weights = [], []
        for j in range(len(y)):
            weight = 0.0 if exclude_self and i == j else _weight(pairs, i, j)
            if weight is None or (exclude_self and i == j):
                continue
            d = {
                "dot": lambda i=i, j=j: x[i] @ y[j],
                "sqdist": lambda i=i, j=j: (x[i] - y[j]).square().sum(),
                "dist": lambda i=i, j=j: (x[i] - y[j]).norm(),
            }[kind]()
            scores.append(scale * d + (0 if bias is None else bias[j].double()))
            weights.append(weight)
        if not scores:
            sums.append((-torch.inf, 0.0, 0))
            continue
        s, w = torch.stack(scores), torch.tensor(weights, dtype=torch.float64)
        sums.append((torch.logsumexp(s + w.log(), 0).item(), s.sum().item(), len(scores)))
    return [torch.tensor(column, dtype=torch.float64) for column in zip(*sums, strict=True)]


def _weight(pairs, i, j):
    """Weight of a pair, or None where it does not count."""
    if pairs is None:
        return 1.0
    if isinstance(pairs, (SameLabel, OtherLabel)):
        columns = pairs.labels if pairs.column_labels is None else pairs.column_labels
        same = bool(pairs.labels[i] == columns[j])
        return 1.0 if same == isinstance(pairs, SameLabel) else None
    far = (pairs.targets[i] - pairs.targets[j]).abs().mean().item()
    if isinstance(pairs, LabelWindow):
        return 1.0 if far <= pairs.window else None
    near = (pairs.predictions[i] - pairs.predictions[j]).abs().mean().item()
    if not (far > pairs.window and near <= pairs.window):
        return None
    pushed = torch.tensor(pairs.push * far, dtype=torch.float64)
    return (pushed.exp() if pairs.pushing == "exp" else pushed).item()


class TestContract(OperatorContract):
    bitwise_across_threads = True  # every sum is added up in an order that the sizes give
    autocast_dtype = torch.float32
    scheduled = {"scale": (-1.0, 2.0)}

    def samples(self, dtype):
        generator = torch.Generator().manual_seed(0)
        x, y, bias = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in ((ROWS, FEATURES), (COLUMNS, FEATURES), (ROWS,))
        )
        found = [
            Sample("two sides", (x, y), reduce, {"scale": 0.7}),
            Sample("one side", (x,), reduce, {"scale": 0.7}),
            Sample("one side, the diagonal too", (x,), reduce, {"exclude_self": False}),
            Sample(
                "two sides of other lengths, no diagonal", (x, y), reduce, {"exclude_self": True}
            ),
            Sample("column bias", (x, y, bias[:COLUMNS]), reduce),
            Sample("column bias, one side", (x, bias), with_bias),
            Sample("one pair", (x[:1, :1], y[:1, :1]), reduce),
            Sample("a point alone", (x[:1],), reduce),
            Sample("not contiguous", (x.T[:, ::2], y.T[:, 1:]), reduce),
            Sample("repelling distances", (x,), reduce, {"kind": "dist", "scale": -0.8}),
            Sample("squares of two sides", (x, y), reduce, {"kind": "sqdist", "scale": -0.5}),
            Sample("distances of two sides", (x, y), reduce, {"kind": "dist", "scale": 0.5}),
        ]
        for name, pairs in RULES.items():
            options = {"kind": "sqdist", "scale": -0.3, "pairs": pairs}
            found.append(Sample(name, (x,), reduce, options))
        columns = {"pairs": OtherLabel(LABELS, COLUMN_LABELS), "kind": "dist", "scale": -1.0}
        found.append(Sample("labels of two sides", (x, y), reduce, columns))
        swapped = {"pairs": SameLabel(LABELS, LABELS.roll(2)), "exclude_self": False}
        return [*found, Sample("labels of two kinds", (x, bias), with_bias, swapped)]

    def empty(self, dtype):
        x, y = torch.randn(4, 3, dtype=dtype), torch.randn(5, 3, dtype=dtype)
        return [
            Sample("no rows", (x[:0], y), reduce),
            Sample("no columns", (x, y[:0]), reduce),
            Sample("no points", (x[:0],), reduce, {"kind": "sqdist"}),
            Sample("no features", (x[:, :0], y[:, :0]), reduce),
        ]

    def operator_calls(self):
        x, y, bias = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4)
        scale = torch.tensor(0.5, dtype=torch.float64)
        none = (None,) * 4
        labels = (torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 1, 1, 2]), None, None)
        plain = (x, None, None, *none, scale, 1, 0, 0.0, 0.0, True)
        full = (x, y, bias, *labels, scale, 0, 1, 0.0, 0.0, False)
        targets = (x, None, None, None, None, x[:, :2], x[:, 1:], scale, 2, 4, 0.5, 0.1, True)
        sums = torch.zeros(5)
        return [
            (PAIRWISE_LOGSUMEXP, plain),
            (PAIRWISE_LOGSUMEXP, (x.requires_grad_(), *full[1:])),
            (PAIRWISE_LOGSUMEXP, targets),
            (BACKWARD, (sums, torch.ones(5), None, *plain, True, False, False)),
            (BACKWARD, (sums, torch.ones(5), sums, *full, True, True, True)),
            (BACKWARD, (sums, None, torch.ones(5), *targets, True, False, False)),
        ]

    def bad_inputs(self):
        x, y = torch.ones(4, 3), torch.ones(5, 3)
        labels, targets = torch.arange(4), torch.ones(4)
        window = LabelWindow(targets, 1.0)
        false = FalselyNear(targets, targets, 1.0)

        def call(*tensors, **options):
            return lambda: pairwise_logsumexp(*tensors, **options)

        def ruled(pairs, **fields):
            return call(x, pairs=dataclasses.replace(pairs, **fields))

        same = SameLabel(labels)
        return [
            (TypeError, "x must", call([1.0])),
            (TypeError, "x must", call(x.long())),
            (ValueError, "x and y must", call(x[0])),
            (ValueError, "x and y must", call(x, y[:, :2])),
            (TypeError, "y must", call(x, 3)),
            (TypeError, "y must", call(x, y.double())),
            (ValueError, "y must", call(x, y.to("meta"))),
            (ValueError, "kind must", call(x, kind="cosine")),
            (TypeError, "scale must", call(x, scale="warm")),
            (ValueError, "scale must", call(x, scale=torch.ones(2))),
            (ValueError, "scale must", call(x, scale=float("nan"))),
            (ValueError, "scale must", call(x, scale=torch.tensor(torch.inf))),
            (TypeError, "exclude_self must", call(x, exclude_self=1)),
            (TypeError, "column_bias must", call(x, y, column_bias=labels)),
            (ValueError, "column_bias must", call(x, y, column_bias=targets)),
            (TypeError, "pairs must", call(x, pairs="same")),
            (TypeError, "labels must", ruled(same, labels=[0, 1, 2, 3])),
            (TypeError, "labels must", ruled(same, labels=targets)),
            (ValueError, "labels must", ruled(same, labels=labels[:3])),
            (ValueError, "labels must", ruled(same, labels=labels[:, None])),
            (TypeError, "column_labels must", ruled(same, column_labels=targets)),
            (ValueError, "column_labels must", ruled(same, column_labels=labels[:2])),
            (ValueError, "column_labels must", call(x, y, pairs=same)),
            (TypeError, "targets must", ruled(window, targets=labels)),
            (ValueError, "targets must", ruled(window, targets=targets[:3])),
            (ValueError, "targets must", ruled(window, targets=torch.ones(4, 0))),
            (ValueError, "window must", ruled(window, window=-1.0)),
            (TypeError, "window must", ruled(window, window="wide")),
            (ValueError, "y must", call(x, y, pairs=window)),
            (TypeError, "predictions must", ruled(false, predictions=labels)),
            (ValueError, "predictions must", ruled(false, predictions=torch.ones(4, 2))),
            (ValueError, "push must", ruled(false, push=-0.1)),
            (ValueError, "pushing must", ruled(false, pushing="square")),
        ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_sums_are_those_of_the_pairs_one_by_one(kind, rule):
    x, bias = torch.randn(ROWS, FEATURES), torch.randn(ROWS)
    options = {"kind": kind, "scale": -0.6, "pairs": RULES[rule]}
    for exclude in (False, True):
        expected = dense(x, x, kind, -0.6, bias, RULES[rule], exclude)
        for backend in filter(can_run, ("cpp", "reference")):
            with regularizers.use_backend(backend):
                found = pairwise_logsumexp(x, column_bias=bias, exclude_self=exclude, **options)
            assert torch.equal(found.pair_count.double(), expected[2])
            for have, want in zip(found[:2], expected[:2], strict=True):
                torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5)


# Blocks of 32 to 128 points, whole and broken, an even and an odd number of them.
@needs_kernels
@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        *itertools.product((33, 128, 600), ("every pair", "same label", "falsely near, linear")),
        (1100, "falsely near, linear"),
        (2100, "same label"),
    ],
)
def test_blocks_agree_with_the_reference(rows, rule):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(rows, generator=generator, dtype=torch.float64)
    targets = 3 * torch.randn(rows, generator=generator)
    pairs = {
        "every pair": None,
        "same label": SameLabel(torch.arange(rows) % 7, torch.arange(rows) % 5),
        "falsely near, linear": FalselyNear(targets, targets.roll(1), 1.0, 0.5, "linear"),
    }[rule]
    call = lambda x, bias: with_bias(x, bias, kind="dist", scale=-0.9, pairs=pairs)
    with regularizers.use_backend("cpp"):
        found = forward_and_gradients(call, (x.clone().requires_grad_(), bias.requires_grad_()))
    leaves = x.clone().requires_grad_(), bias.detach().clone().requires_grad_()
    with regularizers.use_backend("reference"):
        expected = forward_and_gradients(call, leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@needs_kernels
@pytest.mark.parametrize(("rows", "columns"), [(1, 700), (130, 5), (257, 300), (2100, 40)])
def test_blocks_of_two_sides_agree_with_the_reference(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    tensors = [
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((rows, 35), (columns, 35), (columns,))
    ]
    pairs = OtherLabel(torch.arange(rows) % 3, torch.arange(columns) % 4)
    call = lambda *tensors: reduce(*tensors, kind="sqdist", scale=-0.1, pairs=pairs)
    found = []
    for backend in ("cpp", "reference"):
        with regularizers.use_backend(backend):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            found.append(forward_and_gradients(call, leaves))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@needs_kernels
def test_bits_of_results_and_gradients_are_those_of_any_number_of_threads():
    x, y = torch.randn(1500, 20), torch.randn(700, 20)
    for tensors in ((x,), (x, y)):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            result, gradients = forward_and_gradients(
                lambda *t: reduce(*t, kind="dist", scale=-1.0), leaves
            )
            found.append((result, *gradients))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))


def test_y_that_is_x_gives_the_gradient_of_both_roles():
    x, leaf = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    reduce(leaf, leaf, scale=0.5).sum().backward()
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    reduce(left, right, scale=0.5).sum().backward()
    torch.testing.assert_close(leaf.grad, left.grad + right.grad)


def test_a_row_without_pairs_gives_nothing_and_takes_no_gradient():
    x = torch.randn(3, 2, requires_grad=True)
    for backend in filter(can_run, ("cpp", "reference")):
        with regularizers.use_backend(backend):
            found = pairwise_logsumexp(x, pairs=SameLabel(torch.tensor([0, 0, 1])))
        assert found.logsumexp[2] == -torch.inf
        assert (found.total[2], found.pair_count[2]) == (0, 0)
        (gradient,) = torch.autograd.grad(found.logsumexp.sum() + found.total.sum(), x)
        assert gradient.isfinite().all()
        assert gradient[2].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_gives_nan(kind):
    x = torch.randn(40, 3)
    x[5, 1] = torch.nan
    for backend in filter(can_run, ("cpp", "reference")):
        with regularizers.use_backend(backend):
            leaf = x.clone().requires_grad_()
            found = pairwise_logsumexp(leaf, kind=kind)
            found.logsumexp.sum().backward()
        assert found.logsumexp.isnan().all()
        assert found.total.isnan().all()
        assert leaf.grad.isnan().all()


def test_nan_of_a_pair_that_does_not_count_stays_away():
    x = torch.randn(6, 3)
    x[5, 1] = torch.nan
    same = SameLabel(torch.tensor([0, 0, 0, 1, 1, 1]))
    for backend in filter(can_run, ("cpp", "reference")):
        with regularizers.use_backend(backend):
            found = pairwise_logsumexp(x, pairs=same)
        assert found.logsumexp.isnan().tolist() == [False] * 3 + [True] * 3


def test_a_pair_pushed_by_nothing_counts_and_adds_nothing():
    pairs = dataclasses.replace(NEAR, push=0.0, pushing="linear")
    x = torch.randn(ROWS, FEATURES, requires_grad=True)
    for backend in filter(can_run, ("cpp", "reference")):
        with regularizers.use_backend(backend):
            found = pairwise_logsumexp(x, pairs=pairs)
        assert found.pair_count.sum() > 0
        assert found.logsumexp.eq(-torch.inf).all()
        (gradient,) = torch.autograd.grad(found.logsumexp.sum(), x)
        assert gradient.eq(0).all()


def test_scores_that_no_exponential_holds_are_right():
    x = torch.tensor([[30.0, 0.0], [40.0, 0.0], [-40.0, 0.0]], dtype=torch.float64)
    expected = torch.logsumexp((x @ x.T).fill_diagonal_(-torch.inf), 1)
    for dtype in (torch.float32, torch.float64):
        found = pairwise_logsumexp(x.to(dtype)).logsumexp
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_a_column_of_bias_minus_infinity_adds_nothing_to_the_log_sum_exp():
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    for backend in filter(can_run, ("cpp", "reference")):
        with regularizers.use_backend(backend):
            found = pairwise_logsumexp(x, y, column_bias=bias).logsumexp
            expected = pairwise_logsumexp(x, y[[0, 2, 3]]).logsumexp
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(f.sum(), x)[0] for f in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_distances_of_equal_points_are_zero_and_have_a_gradient_of_zero():
    x = torch.ones(6, 3, dtype=torch.float64).mul(torch.tensor([1.0, 2.0, 3.0]))
    for backend in filter(can_run, ("cpp", "reference")):
        leaf = x.clone().requires_grad_()
        with regularizers.use_backend(backend):
            found = pairwise_logsumexp(leaf, kind="dist", scale=-1.0)
            found.logsumexp.sum().backward()
        torch.testing.assert_close(found.total, torch.zeros_like(found.total), rtol=0, atol=1e-7)
        assert leaf.grad.eq(0).all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_squared_distances_keep_their_digits_far_from_the_origin(offset):
    # The points are those of float32, the sums those of direct differences in float64. About the
    # mean |x|^2 is 48, so a squared distance carries an error of some 1e-7 x 96.
    x = torch.randn(300, 48) + offset
    wide = x.double()
    squares = (wide[:, None] - wide).square().sum(-1)
    diagonal = torch.eye(300, dtype=torch.bool)
    expected = torch.logsumexp((-0.05 * squares).masked_fill(diagonal, -torch.inf), 1)
    for backend in filter(can_run, ("cpp", "reference")):
        with regularizers.use_backend(backend):
            found = pairwise_logsumexp(x, kind="sqdist", scale=-0.05)
        torch.testing.assert_close(found.logsumexp.double(), expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(
            found.total.double(), -0.05 * squares.sum(1), rtol=1e-6, atol=1e-4
        )


def test_gradient_of_the_dispersive_sum_is_that_of_double_precision():
    x = torch.randn(500, 32) + 100
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).detach().clone().requires_grad_()
        found = pairwise_logsumexp(leaf, kind="sqdist", scale=-0.1).logsumexp
        found.mean().backward()
        gradients.append(leaf.grad.double())
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 3e-6  # rounding of the points about their mean, and of sums over 500 pairs


def test_labels_may_be_any_integers():
    labels = torch.tensor([-(2**62), 2**40, 2**40 + 1, 2**62, 2**40, -(2**62)])
    x = torch.randn(6, 3)
    found = pairwise_logsumexp(x, pairs=SameLabel(labels)).pair_count
    assert found.tolist() == [1, 1, 0, 0, 1, 1]
    small = pairwise_logsumexp(x, pairs=SameLabel(torch.tensor([0, 1, 2, 3, 1, 0]).to(torch.int8)))
    assert torch.equal(found, small.pair_count)


def test_a_target_at_the_edge_of_the_window_counts():
    targets = torch.tensor([1.0, 3.0, 6.0])
    found = pairwise_logsumexp(torch.randn(3, 2), pairs=LabelWindow(targets, 2.0))
    assert found.pair_count.tolist() == [1, 1, 0]


def test_half_types_add_up_in_float32():
    x = torch.randn(2000, 8).to(torch.bfloat16)
    found = pairwise_logsumexp(x, kind="sqdist", scale=-0.5)
    expected = pairwise_logsumexp(x.double(), kind="sqdist", scale=-0.5)
    assert found.logsumexp.dtype == torch.float32
    torch.testing.assert_close(found.logsumexp.double(), expected.logsumexp, rtol=1e-5, atol=1e-5)


def test_autocast_takes_the_wider_type_of_two_sides():
    x, y = torch.randn(5, 3), torch.randn(4, 3).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = pairwise_logsumexp(x, y).logsumexp
    torch.testing.assert_close(found, pairwise_logsumexp(x, y.float()).logsumexp)


def test_a_side_without_gradient_costs_none():
    x, y = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)
    pairwise_logsumexp(x, y).total.sum().backward()
    torch.testing.assert_close(y.grad, x.sum(0).expand(4, 3))


def test_rules_made_inside_compile_to_one_graph(fresh_dynamo):
    def losses(x, labels, targets):
        same = pairwise_logsumexp(x, pairs=SameLabel(labels))
        pushed = pairwise_logsumexp(x, pairs=FalselyNear(targets, targets.roll(1), 0.5, 0.1))
        return same.total, pushed.pair_count

    arguments = torch.randn(ROWS, FEATURES), LABELS, TARGETS
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), losses(*arguments))


def test_infonce_is_cross_entropy_of_the_scores():
    x, y = torch.randn(20, 6), torch.randn(20, 6)
    found = pairwise_logsumexp(x, y, scale=2.0).logsumexp - 2 * (x * y).sum(1)
    expected = torch.nn.functional.cross_entropy(2 * x @ y.T, torch.arange(20), reduction="none")
    torch.testing.assert_close(found, expected)
