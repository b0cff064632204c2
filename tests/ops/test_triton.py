"""Triton kernels against the references: on a GPU, or in Triton's interpreter on small tensors."""

import itertools

import pytest
import torch

import regularizers
from regularizers.ops import dropout_mask, dropout_samples, multi_sample_dropout_cross_entropy
from regularizers.ops.dropout import DROPOUT_SAMPLES, DROPOUT_SAMPLES_ADJOINT
from regularizers.ops.masked_linear_cross_entropy import BACKWARD, FORWARD
from regularizers.ops.philox import philox_words
from tests.harness import DTYPES, TOLERANCES
from tests.triton_harness import DEVICE, assert_agree, on_both, randn

# Without Triton the line above skips this file.
# isort: split
import triton
import triton.language as tl

from regularizers.ops.triton import dropout as dropout_kernels
from regularizers.ops.triton import masked_linear_cross_entropy as loss_kernels
from regularizers.ops.triton.philox import call_words, drop_rule, keep_calls, keep_elements

pytestmark = pytest.mark.interpreter
PAST_32_BITS = 2**32 - 5  # the call where elements pass 2^34 lies in the middle of a block


def _scalar(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def _seed(value):
    return _scalar(value, torch.int64)


# Random bits.


@triton.jit
def _words_kernel(out, seed, first_call, stream, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    words = call_words(tl.load(seed), first_call + place.to(tl.int64), stream)
    for word in tl.static_range(4):
        tl.store(out + 4 * place + word, words[word].to(tl.int64))


@triton.jit
def _keep_kernel(out, p, seed, first_call, stream, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    place = tl.arange(0, 4 * BLOCK)
    rule, bits = drop_rule(p), tl.load(seed)
    if WHOLE:
        call = first_call + tl.arange(0, BLOCK).to(tl.int64)
        keep = keep_calls(bits, rule, call, stream)
    else:
        element = tl.cast(first_call, tl.int64) * 4 + place
        keep = keep_elements(bits, rule, element, stream)
    tl.store(out + place, keep)


@pytest.mark.parametrize("first_call", [0, PAST_32_BITS])
@pytest.mark.parametrize("seed", [42, -1, -(2**63) + 12345])
def test_words_are_those_of_the_reference(seed, first_call):
    out = torch.empty(64, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](out, _seed(seed), first_call, 7, BLOCK=16)
    assert torch.equal(out, philox_words(_seed(seed), 64, stream=7, first_call=first_call))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("first_call", [0, PAST_32_BITS])
def test_kept_elements_are_those_of_the_reference(first_call, whole):
    out = torch.empty(64, dtype=torch.bool, device=DEVICE)
    _keep_kernel[(1,)](out, _scalar(0.3), _seed(9), first_call, 2, BLOCK=16, WHOLE=whole)
    words = philox_words(_seed(9), 64, stream=2, first_call=first_call)
    assert torch.equal(out, words >= round(0.3 * 2**32))


# dropout_samples.


@pytest.mark.parametrize("p", [0.0, 2.0**-34, 2.0**-32, 0.1, 0.5, 0.999, 1 - 2.0**-33, 1.0])
def test_masks_are_bit_equal_to_the_reference(p):
    with regularizers.use_backend("triton"):
        y = dropout_samples(torch.ones(7, 611, device=DEVICE), p, num_samples=3, seed=-8)
    assert torch.equal(y != 0, dropout_mask((7, 611), _scalar(p), _seed(-8), 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7, 11), (1030,)], ids=str)
def test_samples_and_their_gradient_agree(shape, dtype):
    x = randn(*shape, dtype=dtype)
    assert_agree(lambda x: dropout_samples(x, 0.4, num_samples=3, seed=5), x)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3),
        lambda x: x[:, ::2, :, 1::3],
        lambda x: x[:, :1].expand(2, 3, 5, 6),
        lambda x: x.flatten()[1:].view(-1),
    ],
    ids=["channels last", "transposed", "every second", "expanded", "off by one"],
)
def test_samples_keep_the_layout_of_the_input(layout):
    x = layout(randn(2, 4, 5, 6))
    call = lambda x: dropout_samples(x, 0.4, num_samples=3, seed=5)
    assert_agree(call, x)
    triton_result, reference = (results[0] for results in on_both(call, x))
    assert triton_result.stride() == reference.stride()


@pytest.mark.parametrize("layout", ["samples last", "one for all samples"])
def test_adjoint_takes_a_gradient_of_any_layout(layout):
    y = randn(6, 7, 3).permute(2, 0, 1)
    if layout == "one for all samples":
        y = randn(6, 7).expand(3, 6, 7)
    arguments = (y, _scalar(0.4), _seed(5))
    have, want = (DROPOUT_SAMPLES_ADJOINT.kernel(which)(*arguments) for which in ("triton", None))
    torch.testing.assert_close(have, want)


def test_samples_do_not_depend_on_how_programs_share_them(monkeypatch):
    call = lambda: dropout_samples(randn(5, 300), 0.5, num_samples=5, seed=3)
    with regularizers.use_backend("triton"):
        shared = call()
        monkeypatch.setattr(dropout_kernels, "FILLING_PROGRAMS", 1)
        assert torch.equal(call(), shared)
        monkeypatch.setattr(dropout_kernels, "FILLING_PROGRAMS", 4)
        assert torch.equal(call(), shared)


def test_nan_under_a_dropped_element_reaches_neither_samples_nor_gradient():
    dropped = ~dropout_mask((64,), _scalar(0.5), _seed(1), 1)[0]
    x = torch.where(dropped, torch.nan, 1.0).requires_grad_()
    with regularizers.use_backend("triton"):
        y = dropout_samples(x, 0.5, num_samples=1, seed=1)
    (gradient,) = torch.autograd.grad(y, x, torch.where(dropped, torch.nan, 1.0)[None])
    expected = torch.where(dropped, 0.0, 2.0)
    assert torch.equal(y[0], expected)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_samples_of_nothing_are_empty(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    with regularizers.use_backend("triton"):
        y = dropout_samples(x, 0.5, num_samples=3, seed=1)
    y.sum().backward()
    assert y.shape == (3, *shape)
    assert x.grad.shape == shape


def test_samples_pass_gradcheck():
    def call(x):
        with regularizers.use_backend("triton"):
            return dropout_samples(x, 0.4, num_samples=2, seed=5)

    x = randn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(call, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


# multi_sample_dropout_cross_entropy.


def _problem(rows, features, classes, dtype=torch.float32):
    """Return x, weight, bias and target."""
    x, weight, bias = (
        randn(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate([(rows, features), (classes, features), (classes,)])
    )
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(classes, (rows,), generator=generator).to(DEVICE)
    return x, weight / max(features, 1) ** 0.5, bias, target


def _assert_loss_agrees(rows, features, classes, dtype=torch.float32, with_bias=True, **options):
    x, weight, bias, target = _problem(rows, features, classes, dtype)
    options = {"p": 0.4, "num_samples": 3, "seed": 4, **options}
    if rows > 1 and "ignore_index" not in options:
        target[0] = -100

    def call(x, weight, bias=None):
        return multi_sample_dropout_cross_entropy(x, weight, bias, target, **options)

    assert_agree(call, x, weight, *([bias] if with_bias else []))


def _omega(classes, dtype=torch.float32):
    return torch.linspace(0.0, 2.0, classes, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_agree(reduction, dtype):
    _assert_loss_agrees(5, 37, 11, dtype, reduction=reduction)


@pytest.mark.parametrize(
    ("reduction", "label_smoothing", "weighted", "with_bias"),
    list(itertools.product(["mean", "none"], [0.0, 0.2], [False, True], [False, True])),
)
def test_options_of_the_loss_agree(reduction, label_smoothing, weighted, with_bias):
    options = {"class_weight": _omega(7)} if weighted else {}
    _assert_loss_agrees(
        4,
        12,
        7,
        with_bias=with_bias,
        reduction=reduction,
        label_smoothing=label_smoothing,
        ignore_index=2,
        **options,
    )


@pytest.mark.parametrize(
    ("rows", "features", "classes", "num_samples"),
    [(1, 1, 1, 1), (3, 0, 4, 2), (0, 8, 3, 2), (33, 20, 2, 1), (3, 70, 17, 5), (2, 9, 150, 3)],
)
def test_odd_sizes_of_the_loss_agree(rows, features, classes, num_samples):
    _assert_loss_agrees(rows, features, classes, num_samples=num_samples)


@pytest.mark.parametrize("p", [0.0, 0.999])
def test_extreme_rates_of_the_loss_agree(p):
    _assert_loss_agrees(5, 16, 4, p=p)


@pytest.mark.parametrize("classes", [11, 140], ids=["masks in registers", "stored operand"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_chunks_agree(monkeypatch, reduction, classes):
    monkeypatch.setattr(loss_kernels, "CHUNK_BYTES", 2 * 3 * 144 * 4)  # of 2 or 18 rows of 20
    _assert_loss_agrees(20, 13, classes, reduction=reduction, class_weight=_omega(classes))


def test_a_row_larger_than_a_chunk_agrees(monkeypatch):
    monkeypatch.setattr(loss_kernels, "CHUNK_BYTES", 1)
    _assert_loss_agrees(3, 8, 5)


def test_split_weight_gradient_agrees(monkeypatch):
    monkeypatch.setattr(loss_kernels, "LEAST_STEPS", 1)
    _assert_loss_agrees(30, 8, 5)


def test_softmax_over_several_tiles_agrees(monkeypatch):
    monkeypatch.setattr(loss_kernels, "SOFTMAX_ELEMENTS", 8)
    _assert_loss_agrees(3, 8, 37, label_smoothing=0.1, class_weight=_omega(37))


def test_strided_inputs_of_the_loss_agree():
    x, weight, _, target = _problem(5, 12, 4)
    call = lambda x, w: multi_sample_dropout_cross_entropy(x, w, None, target, p=0.4, seed=4)
    assert_agree(call, x.t().contiguous().t(), weight[:, None].expand(4, 2, 12)[:, 1])


def test_golden_values():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, 0.5, 0.0, 2.0]], device=DEVICE)
    weight = torch.arange(12.0, device=DEVICE).view(3, 4) / 10 - 0.5
    leaves = [x, weight, torch.zeros(3, device=DEVICE)]
    target = torch.tensor([2, 0], device=DEVICE)
    call = lambda *leaves: multi_sample_dropout_cross_entropy(
        *leaves, target, p=0.5, num_samples=3, seed=42
    )
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with regularizers.use_backend("triton"):
        loss = call(*leaves)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(loss, leaves)
    expect = lambda have, want: torch.testing.assert_close(
        have, torch.tensor(want, device=DEVICE), rtol=0, atol=6e-5
    )
    expect(loss, 0.889129)
    expect(grad_bias, [-0.3322, 0.1874, 0.1449])
    expect(grad_x[0], [-0.0689, -0.0011, 0.0, -0.0067])
    expect(grad_weight[:, 2], [0.0, 0.0, 0.0])


def test_ignored_rows_have_zero_gradient_even_where_they_are_nan():
    x, weight, bias, target = _problem(4, 8, 3)
    x[0], target[0] = torch.nan, -100
    x.requires_grad_()
    with regularizers.use_backend("triton"):
        loss = multi_sample_dropout_cross_entropy(x, weight, bias, target, seed=1)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(loss)
    assert torch.equal(gradient[0], torch.zeros(8, device=DEVICE))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_of_ignored_rows_alone_agrees(reduction):
    _assert_loss_agrees(1, 8, 3, reduction=reduction, ignore_index=_problem(1, 8, 3)[3].item())


def test_nan_under_a_dropped_feature_reaches_neither_loss_nor_gradient():
    x, weight, bias, target = _problem(3, 8, 3)
    kept = dropout_mask((3, 8), _scalar(0.5), _seed(1), 2).any(0)
    x = torch.where(kept, x, torch.nan)
    call = lambda *leaves: multi_sample_dropout_cross_entropy(
        *leaves, target, p=0.5, num_samples=2, seed=1
    )
    assert not kept.all()
    for value in on_both(call, x, weight, bias)[0]:
        assert torch.isfinite(value).all()


def test_logits_of_minus_infinity_outside_the_target_agree(monkeypatch):
    monkeypatch.setattr(loss_kernels, "SOFTMAX_ELEMENTS", 2)  # a whole first tile of them
    x, weight, _, _ = _problem(4, 8, 6)
    bias = torch.tensor([-torch.inf] * 3 + [0.0] * 3, device=DEVICE)
    target = torch.tensor([3, 4, 5, 3], device=DEVICE)
    call = lambda x, w: multi_sample_dropout_cross_entropy(x, w, bias, target, seed=1)
    have, want = on_both(call, x, weight)
    assert torch.isfinite(have[0])
    for pair in zip(have, want, strict=True):
        torch.testing.assert_close(*pair, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=["x", "W", "b", "x and b"])
def test_gradients_wanted_alone_are_those_of_all(wanted):
    *tensors, target = _problem(4, 8, 3)

    def gradients(chosen):
        leaves = [t.clone().requires_grad_(i in chosen) for i, t in enumerate(tensors)]
        with regularizers.use_backend("triton"):
            loss = multi_sample_dropout_cross_entropy(*leaves, target, seed=1)
        return torch.autograd.grad(loss, [leaves[i] for i in wanted])

    for have, want in zip(gradients(wanted), gradients((0, 1, 2)), strict=True):
        assert torch.equal(have, want)


@pytest.mark.skipif(DEVICE == "cuda", reason="targets are not checked on CUDA")
def test_a_target_out_of_range_raises_on_a_cpu():
    x, weight, bias, target = _problem(4, 8, 3)
    target[2] = 3
    with (
        regularizers.use_backend("triton"),
        pytest.raises(ValueError, match=r"target must lie in .* got 3 in row 2"),
    ):
        multi_sample_dropout_cross_entropy(x, weight, bias, target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_passes_gradcheck(reduction):
    x, weight, bias, target = _problem(2, 5, 3, torch.float64)

    def call(x, weight, bias):
        with regularizers.use_backend("triton"):
            return multi_sample_dropout_cross_entropy(
                x,
                weight,
                bias,
                target,
                p=0.4,
                num_samples=2,
                label_smoothing=0.1,
                class_weight=_omega(3, torch.float64),
                reduction=reduction,
                seed=6,
            )

    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", [0, 1])
def test_results_are_shaped_as_the_fake_rules_say(reduction, dtype):
    x, weight, bias, target = _problem(4, 8, 3, dtype)
    scalars = (_scalar(0.5), _scalar(0.1), _seed(3))
    loss_arguments = (x, weight, bias, target, None, *scalars, 2, -100, reduction, 7)
    loss, *unit = FORWARD.kernel("triton")(*loss_arguments)
    calls = [
        (DROPOUT_SAMPLES, (x, *scalars[:1], scalars[2], 2)),
        (DROPOUT_SAMPLES_ADJOINT, (torch.stack([x, x]), *scalars[:1], scalars[2])),
        (FORWARD, loss_arguments),
        (BACKWARD, (torch.ones_like(loss), *unit, *loss_arguments)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(
            operator.kernel("triton"), arguments, test_utils=("test_schema", "test_faketensor")
        )
