"""Mixing rows and pasting boxes: the operator contract, and what is special to them."""

import pytest
import torch

import regularizers
from regularizers.ops import mix, paste_boxes
from regularizers.ops.mix import MIX, MIX_BACKWARD, PASTE, PASTE_ADJOINT
from tests.harness import DTYPES, TOLERANCES, OperatorContract, Sample


def _randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _weights(*shape, dtype=torch.float64):
    # Inside (0, 1), so that finite differences do not leave the interval.
    generator = torch.Generator().manual_seed(1)
    return (0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)


CYCLE = torch.tensor([2, 0, 1])


class TestMixContract(OperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32
    scheduled = {"lam": (0.0, 1.0)}

    def samples(self, dtype):
        def sample(name, x, *lam, perm=CYCLE, **options):
            call = lambda x, lam=None, **o: mix(x, perm, o.get("lam", 0.0) if lam is None else lam)
            return Sample(name, (x, *lam), call, options)

        x = _randn(3, 2, 3, 5, dtype=dtype)
        each = _weights(3, dtype=dtype)
        return [
            sample("one number", _randn(3, 7, dtype=dtype), lam=0.3),
            sample("one weight", _randn(3, 7, dtype=dtype), _weights(dtype=dtype)),
            sample("one for each", _randn(3, 67, dtype=dtype), each),
            sample("channels_last", x.to(memory_format=torch.channels_last), each),
            sample("transposed", _randn(5, 3, dtype=dtype).t(), each),
            sample("fixed points", x, each, perm=torch.tensor([0, 2, 1])),
            sample("fewer", x, each[:2], perm=torch.tensor([2, 1])),
            sample("fewer, unused rows", x, each[:1], perm=torch.tensor([0])),
            sample("numbers", _randn(3, dtype=dtype), each),
            sample("one", _randn(1, 1, dtype=dtype), each[:1], perm=torch.tensor([0])),
        ]

    def empty(self, dtype):
        call = lambda x, lam: mix(x, torch.arange(x.shape[0]), lam)
        return [
            Sample("no rows", (_randn(0, 3, dtype=dtype), _weights(0, dtype=dtype)), call),
            Sample("no elements", (_randn(2, 0, dtype=dtype), _weights(2, dtype=dtype)), call),
        ]

    def operator_calls(self):
        x, lam = _randn(3, 4).requires_grad_(), _weights(3).requires_grad_()
        grad = _randn(3, 4, seed=2).requires_grad_()
        return [
            (MIX, (x, CYCLE, lam)),
            (MIX, (x, CYCLE[:2], lam[:2].detach())),
            (MIX_BACKWARD, (grad, x, CYCLE, lam, True, True)),
            (MIX_BACKWARD, (grad, x, CYCLE, lam, False, True)),
        ]

    def bad_inputs(self):
        x, nan = _randn(3, 4), torch.tensor(float("nan"))
        return [
            (TypeError, "x must", lambda: mix(x.long(), CYCLE, 0.5)),
            (TypeError, "x must", lambda: mix([1.0], CYCLE, 0.5)),
            (ValueError, "x must", lambda: mix(x.sum(), CYCLE, 0.5)),
            (TypeError, "perm must", lambda: mix(x, CYCLE.int(), 0.5)),
            (ValueError, "perm must", lambda: mix(x, CYCLE[None], 0.5)),
            (ValueError, "perm must", lambda: mix(x, torch.arange(4), 0.5)),
            (ValueError, "perm must not name", lambda: mix(x, torch.tensor([0, 1, 1]), 0.5)),
            (ValueError, "perm must hold", lambda: mix(x, torch.tensor([0, 1, 3]), 0.5)),
            (ValueError, "perm must hold", lambda: mix(x, torch.tensor([0, 1, -1]), 0.5)),
            (ValueError, "perm must", lambda: mix(x, CYCLE.to("meta"), 0.5)),
            (TypeError, "lam must", lambda: mix(x, CYCLE, "half")),
            (TypeError, "lam must", lambda: mix(x, CYCLE, CYCLE)),
            (ValueError, "lam must", lambda: mix(x, CYCLE, 1.5)),
            (ValueError, "lam must", lambda: mix(x, CYCLE, nan)),
            (ValueError, "lam must", lambda: mix(x, CYCLE, torch.tensor([0.5, -0.1, 0.5]))),
            (ValueError, "lam must", lambda: mix(x, CYCLE, torch.ones(2))),
        ]


BOX_2D = torch.tensor([[1, 3], [0, 4]])


class TestPasteContract(OperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32
    scheduled = {}

    def samples(self, dtype):
        def sample(name, x, box, perm=CYCLE):
            return Sample(name, (x,), lambda x: paste_boxes(x, perm, box))

        image = _randn(3, 2, 3, 5, dtype=dtype)
        each = torch.tensor([[[0, 2], [1, 5]], [[1, 1], [0, 5]], [[0, 3], [0, 5]]])
        volume = _randn(3, 2, 2, 3, 4, dtype=dtype)
        cube = torch.tensor([[0, 1], [1, 3], [2, 4]])
        return [
            sample("images", image, BOX_2D),
            sample("a box for each", image, each),
            sample("channels_last", image.to(memory_format=torch.channels_last), each),
            sample("signals", _randn(3, 2, 7, dtype=dtype), torch.tensor([[2, 6]])),
            sample("volumes", volume, cube),
            sample("channels_last_3d", volume.to(memory_format=torch.channels_last_3d), cube),
            sample(
                "lines of channels_last", image.to(memory_format=torch.channels_last), BOX_2D[1:]
            ),
            sample(
                "channels too",
                image.to(memory_format=torch.channels_last),
                torch.tensor([[1, 2], [0, 3], [2, 4]]),
            ),
            sample("transposed", _randn(2, 5, 3, dtype=dtype).permute(2, 0, 1), BOX_2D[1:]),
            sample("fewer", image, each[:2], torch.tensor([2, 1])),
            sample("fewer, unused rows", image, BOX_2D, torch.tensor([0])),
            sample("one", _randn(1, 1, dtype=dtype), torch.tensor([[0, 1]]), torch.tensor([0])),
        ]

    def empty(self, dtype):
        call = lambda x: paste_boxes(x, torch.arange(x.shape[0]), torch.tensor([[0, 0]]))
        return [
            Sample("no rows", (_randn(0, 2, 3, dtype=dtype),), call),
            Sample("no places", (_randn(2, 2, 0, dtype=dtype),), call),
            Sample("no channels", (_randn(2, 0, 3, dtype=dtype),), call),
        ]

    def operator_calls(self):
        x, box = _randn(3, 2, 3, 5).requires_grad_(), BOX_2D.expand(3, 2, 2)
        last = _randn(3, 2, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
        return [
            (PASTE, (x, CYCLE, box)),
            (PASTE, (last, CYCLE[:2], box[:2])),
            (PASTE_ADJOINT, (x, CYCLE, box, 3)),
            (PASTE_ADJOINT, (last, torch.tensor([4, 2, 0]), box, 5)),
        ]

    def bad_inputs(self):
        x = _randn(3, 2, 3, 5)
        call = lambda box=BOX_2D, perm=CYCLE, x=x: lambda: paste_boxes(x, perm, box)
        return [
            (TypeError, "x must", call(x=None)),
            (TypeError, "perm must", call(perm=CYCLE.float())),
            (ValueError, "perm must not name", call(perm=torch.tensor([0, 0, 1]))),
            (ValueError, "perm must hold", call(perm=torch.tensor([0, 9, 1]))),
            (TypeError, "box must", call(BOX_2D.int())),
            (ValueError, "box must have shape", call(BOX_2D[0])),
            (ValueError, "box must have shape", call(BOX_2D.expand(2, 2, 2))),
            (ValueError, "box must have shape", call(torch.zeros(4, 2).long())),
            (ValueError, "box must have fewer", call(x=x[:, 0, 0])),
            (ValueError, "box must have 0 <= begin", call(torch.tensor([[2, 1], [0, 4]]))),
            (ValueError, "box must have 0 <= begin", call(torch.tensor([[0, 1], [0, 6]]))),
            (ValueError, "box must have 0 <= begin", call(torch.tensor([[-1, 1], [0, 4]]))),
        ]


def test_a_weight_of_one_keeps_the_rows_and_of_zero_gives_the_partners():
    x = _randn(3, 4)
    assert torch.equal(mix(x, CYCLE, 1.0), x)
    assert torch.equal(mix(x, CYCLE, 0.0), x[CYCLE])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_agree_with_the_reference(dtype):
    # Several stretches a row, and a last one that is no whole vector.
    x, lam = _randn(3, 10_007, dtype=dtype), _weights(3).float()
    results = []
    for backend in ("cpp", "reference"):
        leaves = x.clone().requires_grad_(), lam.clone().requires_grad_()
        with regularizers.use_backend(backend):
            out = mix(leaves[0], CYCLE, leaves[1])
        out.backward(_randn(3, 10_007, dtype=dtype, seed=3))
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for have, want in zip(*results, strict=True):
        # Sums of 1e4 products differ by their order: 1e-7 of their size, which is about 100.
        torch.testing.assert_close(have, want, rtol=1e-5, atol=max(TOLERANCES[dtype]["atol"], 1e-4))


def test_a_product_for_the_weight_alone_needs_no_gradient_of_the_inputs():
    x, lam = _randn(3, 4), _weights(3).requires_grad_()
    grad = _randn(3, 4, seed=2)
    mix(x, CYCLE, lam).backward(grad)
    torch.testing.assert_close(lam.grad, ((x - x[CYCLE]) * grad).sum(1))


def test_inputs_are_kept_for_the_gradient_of_the_weight_alone():
    def saved(lam):
        found = []
        pack = lambda tensor: found.append(tensor.numel()) or tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mix(_randn(3, 40).requires_grad_(), CYCLE, lam)
        return max(found)

    assert saved(0.3) == 3
    assert saved(_weights(3).requires_grad_()) == 120


def test_an_infinite_gradient_stays_infinite_in_a_row_without_partner():
    x = _randn(3, 2).requires_grad_()
    mix(x, torch.tensor([2]), 0.5).backward(torch.tensor([[float("inf"), 1.0]]).double())
    assert x.grad.tolist() == [[float("inf"), 0.5], [0, 0], [float("inf"), 0.5]]


def test_memory_layout_is_kept():
    for shape, layout in (
        ((3, 2, 4, 5), torch.channels_last),
        ((3, 2, 2, 4, 5), torch.channels_last_3d),
    ):
        x = _randn(*shape).to(memory_format=layout).requires_grad_()
        for call in (lambda x: mix(x, CYCLE, 0.3), lambda x: paste_boxes(x, CYCLE, BOX_2D)):
            out = call(x)
            assert out.is_contiguous(memory_format=layout)
            # The gradient arrives in another layout.
            (grad,) = torch.autograd.grad(out, x, torch.ones(shape, dtype=x.dtype))
            assert grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.complex128], ids=str
)
def test_boxes_are_pasted_between_rows_of_any_dtype(dtype):
    x = (10 * _randn(3, 2, 4, 5)).to(dtype)
    found = paste_boxes(x, CYCLE, BOX_2D)
    expected = x.clone()
    expected[:, :, 1:3, 0:4] = x[CYCLE][:, :, 1:3, 0:4]
    assert torch.equal(found, expected)


def test_nan_outside_of_the_box_stays_there():
    x = torch.zeros(2, 4)
    x[1, 0] = x[0, 2] = torch.nan
    found = paste_boxes(x, torch.tensor([1, 0]), torch.tensor([[2, 4]]))
    assert found.isnan().tolist() == [[False] * 4, [True, False, True, False]]


def test_adjoint_is_the_transposed_map():
    x, perm = _randn(5, 2, 3, 4), torch.tensor([3, 0, 4])
    box = torch.tensor([[[0, 2], [1, 3]], [[1, 3], [0, 4]], [[0, 3], [2, 4]]])
    y = _randn(3, 2, 3, 4, seed=4)
    forward, back = PASTE(x, perm, box), PASTE_ADJOINT(y, perm, box, 5)
    torch.testing.assert_close((forward * y).sum(), (x * back).sum())


def test_inputs_are_not_modified():
    x = _randn(3, 2, 3, 5)
    before = x.clone()
    mix(x, CYCLE, 0.5)
    paste_boxes(x, CYCLE, BOX_2D)
    assert torch.equal(x, before)
