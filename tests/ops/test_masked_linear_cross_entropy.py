"""multi_sample_dropout_cross_entropy: the operator contract and the facts of paper 30."""

import pytest
import torch
from torch.nn import functional as F

import regularizers
from regularizers.ops import dropout_samples, multi_sample_dropout_cross_entropy
from regularizers.ops.masked_linear_cross_entropy import BACKWARD, FORWARD
from tests.harness import RandomOperatorContract, Sample, forward_and_gradients


def _rate(value):
    return torch.tensor(value, dtype=torch.float64)


def _problem(rows, features, classes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + features + classes)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, features), (classes, features), (classes,))
    )
    target = torch.randint(classes, (rows,), generator=generator)
    return x, weight / features**0.5, bias, target


def _unfused(x, weight, bias, target, *, p, num_samples, seed, **options):
    """What a user would write: the mean over samples of the loss of a dropped batch."""
    samples = dropout_samples(x, p, num_samples, seed=seed)
    return torch.stack(
        [F.cross_entropy(F.linear(sample, weight, bias), target, **options) for sample in samples]
    ).mean(0)


class TestContract(RandomOperatorContract):
    bitwise_across_threads = False
    autocast_dtype = torch.float32
    scheduled = {"p": (0.0, 0.9), "label_smoothing": (0.0, 0.9)}

    def samples(self, dtype):
        def sample(name, rows=3, features=7, classes=5, with_bias=True, **options):
            x, weight, bias, target = _problem(rows, features, classes, dtype)
            options = {"p": 0.4, "num_samples": 3, "seed": 4, **options}
            if with_bias:
                call = lambda x, w, b, **more: multi_sample_dropout_cross_entropy(
                    x, w, b, target, **more
                )
                return Sample(name, (x, weight, bias), call, options)
            call = lambda x, w, **more: multi_sample_dropout_cross_entropy(
                x, w, None, target, **more
            )
            return Sample(name, (x, weight), call, options)

        omega = torch.linspace(0.5, 2.0, 5, dtype=dtype)
        transposed = sample("transposed", reduction="sum")
        transposed.differentiable = tuple(
            tensor.t().contiguous().t() for tensor in transposed.differentiable
        )
        return [
            sample("odd sizes"),
            sample("sum, no bias", with_bias=False, reduction="sum"),
            sample("rows", reduction="none"),
            sample("smoothed", label_smoothing=0.2),
            sample("weighted", class_weight=omega),
            sample(
                "everything",
                label_smoothing=0.1,
                class_weight=omega,
                ignore_index=2,
                reduction="none",
            ),
            sample("ignored rows", ignore_index=0, label_smoothing=0.1),
            sample("one of each", rows=1, features=1, classes=1, num_samples=1),
            sample("no dropout", p=0.0),
            transposed,
        ]

    def empty(self, dtype):
        x, weight, bias, target = _problem(0, 4, 3, dtype)
        call = lambda x, w, b, **more: multi_sample_dropout_cross_entropy(x, w, b, target, **more)
        return [
            Sample("no rows, sum", (x, weight, bias), call, {"reduction": "sum"}),
            Sample("no rows, none", (x, weight, bias), call, {"reduction": "none"}),
            Sample("no rows, mean", (x, weight, bias), call, {}),
        ]

    def operator_calls(self):
        x, weight, bias, target = _problem(5, 8, 3)
        leaves = tuple(tensor.requires_grad_() for tensor in (x, weight, bias))
        scalars = (_rate(0.5), _rate(0.1), torch.tensor(3))
        calls = []
        for code, grad_loss in ((0, torch.ones(5)), (1, torch.tensor(1.0))):
            arguments = (*leaves, target, None, *scalars, 2, -100, code, 7)
            unit = FORWARD.kernel(None)(*arguments)[1:]
            calls.append((FORWARD, arguments))
            calls.append(
                (BACKWARD, (grad_loss.requires_grad_(), *(u.detach() for u in unit), *arguments))
            )
        return calls

    def bad_inputs(self):
        x, weight, bias, target = _problem(4, 6, 3)

        def call(x=x, weight=weight, bias=bias, target=target, **options):
            return lambda: multi_sample_dropout_cross_entropy(x, weight, bias, target, **options)

        bad_target = target.clone()
        bad_target[2] = 3
        return [
            (TypeError, "x must", call(x=x.long())),
            (TypeError, "x must", call(x=x.to(torch.complex64))),
            (ValueError, "x must", call(x=x[0])),
            (ValueError, "weight must", call(weight=weight[:, :5])),
            (ValueError, "weight must", call(weight=weight[:0], bias=None)),
            (TypeError, "weight must", call(weight=weight.double())),
            (ValueError, "weight must", call(weight=weight.to("meta"))),
            (ValueError, "bias must", call(bias=bias[:2])),
            (TypeError, "bias must", call(bias=bias.double())),
            (TypeError, "target must", call(target=target.int())),
            (TypeError, "target must", call(target=[0, 1, 2, 0])),
            (ValueError, "target must", call(target=target[:3])),
            (ValueError, "target must.*row 2", call(target=bad_target)),
            (ValueError, "target must", call(target=-target - 1)),
            (ValueError, "class_weight must", call(class_weight=bias[:2])),
            (TypeError, "class_weight must", call(class_weight=bias.double())),
            (ValueError, "p must", call(p=1.0)),
            (ValueError, "p must", call(p=_rate(1.0))),
            (ValueError, "p must", call(p=-0.5)),
            (ValueError, "label_smoothing must", call(label_smoothing=1.0)),
            (ValueError, "label_smoothing must", call(label_smoothing=_rate(-0.1))),
            (ValueError, "num_samples must", call(num_samples=0)),
            (ValueError, "reduction must", call(reduction="average")),
            (ValueError, "seed", call(seed=2**70)),
            (ValueError, "seed and generator", call(seed=1, generator=torch.Generator())),
        ]


def test_tiny_example_by_hand():
    # Sheet of paper 30, fact 1, with the seed whose masks are (1, 0) and (1, 1).
    seed = next(
        s
        for s in range(1000)
        if dropout_samples(torch.ones(2), 0.5, 2, seed=s).bool().int().tolist() == [[1, 0], [1, 1]]
    )
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight = torch.eye(2).requires_grad_()
    bias = torch.zeros(2, requires_grad=True)
    loss = multi_sample_dropout_cross_entropy(
        x, weight, bias, torch.tensor([1]), p=0.5, num_samples=2, seed=seed
    )
    loss.backward()
    torch.testing.assert_close(loss.item(), 1.126928, atol=1e-6, rtol=0)
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, -0.119203]]), atol=1e-6, rtol=0)
    expected = torch.tensor([[1.0, 0.238406], [-1.0, -0.238406]])
    torch.testing.assert_close(weight.grad, expected, atol=1e-6, rtol=0)


def test_golden_values_of_seed_42():
    # Sheet of paper 30, fact 1b.
    x = torch.tensor([[1.0, 2, 3, 4], [-1, 0.5, 0, 2]], requires_grad=True)
    weight = (torch.arange(12.0).reshape(3, 4) / 10 - 0.5).requires_grad_()
    bias = torch.zeros(3, requires_grad=True)
    loss = multi_sample_dropout_cross_entropy(
        x, weight, bias, torch.tensor([2, 0]), p=0.5, num_samples=3, seed=42
    )
    loss.backward()
    torch.testing.assert_close(loss.item(), 0.889129, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        bias.grad, torch.tensor([-0.3322, 0.1874, 0.1449]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        x.grad[0], torch.tensor([-0.0689, -0.0011, 0.0, -0.0067]), atol=1e-4, rtol=0
    )
    assert torch.equal(weight.grad[:, 2], torch.zeros(3))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_without_dropout_equals_cross_entropy(reduction, label_smoothing):
    x, weight, bias, target = _problem(9, 12, 5)
    options = {
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "ignore_index": 1,
    }
    omega = torch.rand(5)

    def fused(*leaves):
        return multi_sample_dropout_cross_entropy(
            *leaves, target, p=0.0, class_weight=omega, **options
        )

    def plain(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias), target, weight=omega, **options)

    sample = Sample("", (x, weight, bias), fused)
    found = forward_and_gradients(fused, sample.leaves())
    expected = forward_and_gradients(plain, sample.leaves())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "features", "classes", "num_samples"),
    [(33, 70, 10, 8), (17, 129, 100, 5), (6, 2051, 40, 300)],
)
def test_equals_the_unfused_computation_with_the_same_masks(rows, features, classes, num_samples):
    # The last case has more samples than a chunk holds, the first two take the private and the
    # shared weight gradient.
    x, weight, bias, target = _problem(rows, features, classes)
    target[0] = -100
    options = {"p": 0.3, "num_samples": num_samples, "seed": 21, "label_smoothing": 0.1}
    sample = Sample("", (x, weight, bias), multi_sample_dropout_cross_entropy)
    found = forward_and_gradients(
        lambda *leaves: multi_sample_dropout_cross_entropy(*leaves, target, **options),
        sample.leaves(),
    )
    expected = forward_and_gradients(
        lambda *leaves: _unfused(*leaves, target, **options), sample.leaves()
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_types_accumulate_in_float32(dtype, reduction):
    *tensors, target = _problem(33, 400, 20, dtype)
    options = {"p": 0.5, "num_samples": 4, "seed": 3, "reduction": reduction}

    def results(dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        loss = multi_sample_dropout_cross_entropy(*leaves, target, **options)
        return (loss.detach(), *torch.autograd.grad(loss.sum(), leaves))

    # The inputs are exact in float32, so only the final rounding differs: half a unit in the last
    # place.
    resolution = torch.finfo(dtype).eps / 2
    for have, want in zip(results(dtype), results(torch.float32), strict=True):
        torch.testing.assert_close(have.float(), want, rtol=1.01 * resolution, atol=1e-7)


def test_gradient_scaling_saves_float16_gradients_from_underflow():
    x, weight, bias, target = _problem(512, 16, 4, torch.float16)
    scale = 2.0**10
    leaf = (x * 2e-4).requires_grad_()
    weight = (weight * 2e-4).detach()
    loss = multi_sample_dropout_cross_entropy(leaf, weight, bias, target, seed=1)
    (gradient,) = torch.autograd.grad(loss.float() * scale, leaf, retain_graph=True)
    wide = leaf.detach().float().requires_grad_()
    reference = multi_sample_dropout_cross_entropy(
        wide, weight.float(), bias.float(), target, seed=1
    )
    (expected,) = torch.autograd.grad(reference, wide)
    unscaled = torch.autograd.grad(loss, leaf)[0]
    # Without scaling, many of these gradients are below the smallest float16.
    assert (unscaled == 0).float().mean() > 0.1
    torch.testing.assert_close(gradient.float() / scale, expected, rtol=1e-3, atol=1e-10)


def test_equal_masks_make_samples_redundant():
    # Fact 2: with p = 0 all masks are equal, and M = 8 is M = 1.
    x, weight, bias, target = _problem(9, 12, 5)
    one, eight = (
        multi_sample_dropout_cross_entropy(x, weight, bias, target, p=0.0, num_samples=m)
        for m in (1, 8)
    )
    assert torch.equal(one, eight)


def test_gradient_variance_falls_with_the_number_of_samples():
    # Fact 4: E[gradient] does not depend on M, and its total variance is M times smaller (0.125 +-
    # 20 % over 400 draws).
    x, weight, bias, target = _problem(32, 64, 10)
    weight.requires_grad_()

    def gradients(num_samples):
        return torch.stack(
            [
                torch.autograd.grad(
                    multi_sample_dropout_cross_entropy(
                        x,
                        weight,
                        bias,
                        target,
                        num_samples=num_samples,
                        seed=1000 * num_samples + draw,
                    ),
                    weight,
                )[0]
                for draw in range(400)
            ]
        )

    one, eight = gradients(1), gradients(8)
    ratio = (eight.var(0).sum() / one.var(0).sum()).item()
    assert 0.1 < ratio < 0.15
    # Squared distance of the means, against its expectation under equal means; four standard
    # deviations would be less.
    distance = (one.mean(0) - eight.mean(0)).square().sum()
    expected = (one.var(0).sum() + eight.var(0).sum()) / 400
    assert distance < 2 * expected


def test_nan_under_a_dropped_feature_does_not_leak():
    keep = dropout_samples(torch.ones(1, 64), 0.5, 1, seed=3)[0, 0] != 0
    _, weight, bias, target = _problem(1, 64, 5)
    x = torch.where(keep, 1.0, float("nan"))[None].requires_grad_()
    weight.requires_grad_()
    loss = multi_sample_dropout_cross_entropy(x, weight, bias, target, num_samples=1, seed=3)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_nan_under_a_kept_feature_propagates():
    x, weight, bias, target = _problem(3, 8, 4)
    x[1, 2] = float("nan")
    rows = multi_sample_dropout_cross_entropy(x, weight, bias, target, p=0.0, reduction="none")
    assert rows.isnan().tolist() == [False, True, False]


def test_large_logits_neither_overflow_nor_lose_the_loss():
    x, weight, bias, target = _problem(6, 8, 4)
    found = multi_sample_dropout_cross_entropy(x * 1e4, weight, bias, target, p=0.0)
    torch.testing.assert_close(found, F.cross_entropy(F.linear(x * 1e4, weight, bias), target))


def test_all_ignored_rows_give_what_cross_entropy_gives():
    x, weight, bias, _ = _problem(4, 6, 3)
    target = torch.full((4,), -100)
    for reduction in ("mean", "sum", "none"):
        found = multi_sample_dropout_cross_entropy(x, weight, bias, target, reduction=reduction)
        expected = F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_class_weights_of_zero_give_what_cross_entropy_gives(backend):
    x, weight, bias, _ = _problem(4, 6, 3)
    target, omega = torch.zeros(4, dtype=torch.int64), torch.tensor([0.0, 1.0, 1.0])

    def results(loss):
        leaf = x.detach().requires_grad_()
        found = loss(leaf)
        return found.detach(), torch.autograd.grad(found, leaf)[0]

    with regularizers.use_backend(backend):
        found = results(
            lambda leaf: multi_sample_dropout_cross_entropy(
                leaf, weight, bias, target, p=0.0, class_weight=omega
            )
        )
    expected = results(lambda leaf: F.cross_entropy(F.linear(leaf, weight, bias), target, omega))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[0].isnan()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_nan_in_an_ignored_row_does_not_count(backend):
    x, weight, bias, target = _problem(4, 6, 3)
    x[1], target[1] = float("nan"), -100
    with regularizers.use_backend(backend):
        found = multi_sample_dropout_cross_entropy(
            x, weight, bias, target, p=0.0, label_smoothing=0.2
        )
    expected = F.cross_entropy(F.linear(x, weight, bias), target, label_smoothing=0.2)
    torch.testing.assert_close(found, expected)


def test_ignored_rows_get_exactly_zero_gradient():
    x, weight, bias, target = _problem(4, 6, 3)
    target[1] = -100
    x.requires_grad_()
    multi_sample_dropout_cross_entropy(
        x, weight, bias, target, label_smoothing=0.2, seed=1
    ).backward()
    assert torch.equal(x.grad[1], torch.zeros(6))
    assert x.grad[0].abs().sum() > 0


def test_gradient_penalty_reaches_the_second_derivative():
    x, weight, bias, target = _problem(4, 6, 3, torch.float64)
    for leaf in (x, weight):
        leaf.requires_grad_()

    def penalty(loss):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), weight)[0]

    options = {"p": 0.5, "num_samples": 2, "seed": 6}
    found = penalty(multi_sample_dropout_cross_entropy(x, weight, bias, target, **options))
    expected = penalty(_unfused(x, weight, bias, target, **options))
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)


def test_only_wanted_gradients_are_computed():
    x, weight, bias, target = _problem(4, 6, 3)
    weight.requires_grad_()
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if function is FORWARD.kernel(None):
                seen.append([tensor.numel() for tensor in result[1:]])
            return result

    with Recorder():
        multi_sample_dropout_cross_entropy(x, weight, bias, target)
        with torch.no_grad():
            multi_sample_dropout_cross_entropy(x, weight, bias, target)
    assert seen == [[0, 18, 0], [0, 0, 0]]


def test_saves_neither_masks_nor_activations_nor_logits():
    x, weight, bias, target = _problem(64, 32, 16)
    leaves = Sample("", (x, weight, bias), multi_sample_dropout_cross_entropy).leaves()
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        multi_sample_dropout_cross_entropy(*leaves, target, num_samples=32)
    # Inputs, their gradients, and scalars: nothing with a factor of num_samples.
    assert sum(saved) <= 2 * (x.numel() + weight.numel() + bias.numel()) + target.numel() + 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples():
    # Fact 7: by less than 1.2 from M = 1 to M = 32. The profiler sees every allocation of torch's
    # allocator, scratch included.
    x, weight, bias, target = _problem(1024, 1024, 1000)
    leaves = Sample("", (x, weight, bias), multi_sample_dropout_cross_entropy).leaves()

    def peak(num_samples):
        with torch.profiler.profile(profile_memory=True) as profile:
            multi_sample_dropout_cross_entropy(*leaves, target, num_samples=num_samples).backward()
        current = highest = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                current += event.nbytes()
                highest = max(highest, current)
        return highest

    peak(1)
    one, many = peak(1), peak(32)
    assert one > weight.numel() * 4  # the profiler saw something
    assert many < 1.2 * one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_takes_the_low_type_for_the_product_and_float32_for_the_loss(dtype):
    x, weight, bias, target = _problem(8, 32, 5)
    omega = torch.rand(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = multi_sample_dropout_cross_entropy(
            x.to(dtype), weight, bias, target, p=0.0, class_weight=omega
        )
        expected = F.cross_entropy(F.linear(x.to(dtype), weight, bias), target, weight=omega)
    assert found.dtype == expected.dtype == torch.float32
    # torch rounds the logits to bfloat16 before the loss, the fused operator does not.
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_target_value_is_checked_in_compiled_code(fresh_dynamo):
    x, weight, bias, target = _problem(4, 6, 3)
    compiled = torch.compile(
        multi_sample_dropout_cross_entropy, fullgraph=True, backend="aot_eager"
    )
    compiled(x, weight, bias, target)
    with pytest.raises(ValueError, match="target must"):
        compiled(x, weight, bias, target + 3)


def test_nothing_is_computed_before_a_bad_value_is_found():
    x, weight, bias, target = _problem(4, 6, 3)
    inputs = [tensor.clone() for tensor in (x, weight, bias)]
    with pytest.raises(ValueError, match="target"):
        multi_sample_dropout_cross_entropy(x, weight, bias, target + 3)
    assert all(map(torch.equal, inputs, (x, weight, bias)))


def test_forcing_a_backend_that_cannot_serve_says_why():
    x, weight, bias, target = _problem(4, 6, 3)
    with regularizers.use_backend("cpp"), pytest.raises(RuntimeError, match="meta"):
        multi_sample_dropout_cross_entropy(*(t.to("meta") for t in (x, weight, bias, target)))
