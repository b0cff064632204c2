"""Benchmarks of mixing rows: blends, boxes, their gradients, and the loss with two labels.

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers._bench.floors import copy
from regularizers.mixing import mixed_cross_entropy
from regularizers.ops import mix, paste_boxes

Shape = tuple[int, int, int, int]


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the slowest and every compiled peer."""
    batch = 64 if device == "cpu" else 512
    large: Shape = (batch, 3, 224, 224)
    small: Shape = (4 * batch, 3, 32, 32)
    compiled = not quick
    found = [
        _blend(large, device, compiled, [Goal("eager", at_most=1 / 3)]),
        _one_box(large, device, compiled, [Goal("clone + slice", at_most=1 / 2)]),
        _box_each(large, device, compiled, [Goal("mask + where", at_most=1 / 3)]),
        _loss(8 * batch, 1000, device, compiled),
    ]
    if not quick:
        found += [
            _blend(small, device, compiled),
            _one_box(small, device, compiled),
            _box_each(small, device, compiled),
            _weight_gradient(large, device, compiled),
            _both_gradients(large, device, compiled),
            _box_gradient(large, device, compiled),
        ]
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    sizes = (16, 64, 256) if quick else (8, 16, 32, 64, 128, 256, 512, 1024)
    return [
        ScalingCurve(
            "blend-over-batch",
            "mix, one weight for each row, x [B, 3, 64, 64]",
            "batch size B",
            sizes,
            lambda batch: _blend((batch, 3, 64, 64), device),
        ),
        ScalingCurve(
            "box-over-batch",
            "paste_boxes, one box for each row, x [B, 3, 64, 64]",
            "batch size B",
            sizes,
            lambda batch: _box_each((batch, 3, 64, 64), device),
        ),
    ]


class _Batch:
    """Images, partners, weights and boxes of a quarter of the image."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        count, _, height, width = shape
        self.x = torch.randn(shape, generator=generator).to(device)
        self.perm = torch.randperm(count, generator=generator).to(device)
        self.lam = torch.rand(count, generator=generator).to(device)
        corner = torch.rand(count, 2, generator=generator)
        begin = (corner * torch.tensor([height / 2, width / 2])).long()
        end = begin + torch.tensor([height // 2, width // 2])
        self.boxes = torch.stack([begin, end], -1).to(device)
        (self.top, self.bottom), (self.left, self.right) = self.boxes[0].tolist()


def _eager_blend(x: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    weight = lam.view(-1, 1, 1, 1)
    return x * weight + x[perm] * (1 - weight)


def _eager_boxes(x: Tensor, perm: Tensor, boxes: Tensor) -> Tensor:
    rows = torch.arange(x.shape[2], device=x.device)
    columns = torch.arange(x.shape[3], device=x.device)
    begin, end = boxes[..., 0], boxes[..., 1]
    down = (rows >= begin[:, :1]) & (rows < end[:, :1])
    across = (columns >= begin[:, 1:]) & (columns < end[:, 1:])
    return torch.where((down[:, :, None] & across[:, None, :])[:, None], x[perm], x)


def _with_compiled(
    name: str, function: Callable[..., Any], compiled: bool
) -> dict[str, Callable[..., Any]]:
    peers = {name: function}
    if compiled:
        # fullgraph: past the recompilation limit an error, never a silent fall back to eager.
        peers["torch.compile"] = torch.compile(function, fullgraph=True, dynamic=False)
    return peers


def _calls(functions: dict[str, Callable[..., Any]], *arguments: Any) -> dict[str, Call]:
    return {name: lambda f=f: f(*arguments) for name, f in functions.items()}  # type: ignore[misc]


def _floors(data: _Batch, passes: int, device: str) -> dict[str, Call]:
    return {f"copy, {passes} passes": copy(passes * data.x.nbytes, device=device)}


def _blend(shape: Shape, device: str, compiled: bool = False, goals: Sequence[Goal] = ()) -> Case:
    data = _Batch(shape, device)
    functions = _with_compiled("eager", _eager_blend, compiled)
    return Case(
        f"mix, x {list(shape)}",
        ours=lambda: mix(data.x, data.perm, data.lam),
        peers=_calls(functions, data.x, data.perm, data.lam),
        floors=_floors(data, 3, device),
        goals=goals,
        bytes_moved=3 * data.x.nbytes,
    )


def _one_box(shape: Shape, device: str, compiled: bool = False, goals: Sequence[Goal] = ()) -> Case:
    data = _Batch(shape, device)
    down, across = slice(data.top, data.bottom), slice(data.left, data.right)

    def clone_and_slice(x: Tensor, perm: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, down, across] = x[perm][:, :, down, across]
        return y

    functions = _with_compiled("clone + slice", clone_and_slice, compiled)
    return Case(
        f"paste_boxes, one box, x {list(shape)}",
        ours=lambda: paste_boxes(data.x, data.perm, data.boxes[0]),
        peers=_calls(functions, data.x, data.perm),
        floors=_floors(data, 2, device),
        goals=goals,
        bytes_moved=2 * data.x.nbytes,
    )


def _box_each(
    shape: Shape, device: str, compiled: bool = False, goals: Sequence[Goal] = ()
) -> Case:
    data = _Batch(shape, device)
    functions = _with_compiled("mask + where", _eager_boxes, compiled)
    return Case(
        f"paste_boxes, a box for each, x {list(shape)}",
        ours=lambda: paste_boxes(data.x, data.perm, data.boxes),
        peers=_calls(functions, data.x, data.perm, data.boxes),
        floors=_floors(data, 2, device),
        goals=goals,
        bytes_moved=2 * data.x.nbytes,
    )


def _training_step(function: Callable[..., Tensor], grad: Tensor, *leaves: Tensor) -> Call:
    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        function().backward(grad)

    return call


def _gradient_case(
    name: str,
    shape: Shape,
    device: str,
    passes: int,
    ways: Callable[[_Batch], tuple[Callable[[], Tensor], dict[str, Call]]],
    wanted: tuple[str, ...],
) -> Case:
    data = _Batch(shape, device)
    leaves = [getattr(data, leaf).requires_grad_() for leaf in wanted]
    grad = torch.randn(shape, device=device)
    ours, peers = ways(data)
    step = lambda function: _training_step(function, grad, *leaves)  # noqa: E731
    return Case(
        f"{name}, forward + backward, x {list(shape)}",
        ours=step(ours),
        peers={peer: step(function) for peer, function in peers.items()},
        floors=_floors(data, passes, device),
        bytes_moved=passes * data.x.nbytes,
    )


def _blend_ways(
    compiled: bool,
) -> Callable[[_Batch], tuple[Callable[[], Tensor], dict[str, Call]]]:
    functions = _with_compiled("eager", _eager_blend, compiled)
    return lambda data: (
        lambda: mix(data.x, data.perm, data.lam),
        _calls(functions, data.x, data.perm, data.lam),
    )


def _weight_gradient(shape: Shape, device: str, compiled: bool) -> Case:
    # Forward: two reads and a write; backward: two rows and a gradient are read.
    ways = _blend_ways(compiled)
    return _gradient_case("mix, gradient of lam", shape, device, 6, ways, ("lam",))


def _both_gradients(shape: Shape, device: str, compiled: bool) -> Case:
    # Backward: two rows and two gradients are read, one is written.
    ways = _blend_ways(compiled)
    return _gradient_case("mix, gradients of x and lam", shape, device, 8, ways, ("x", "lam"))


def _box_gradient(shape: Shape, device: str, compiled: bool) -> Case:
    functions = _with_compiled("mask + where", _eager_boxes, compiled)
    return _gradient_case(
        "paste_boxes, a box for each",
        shape,
        device,
        4,
        lambda data: (
            lambda: paste_boxes(data.x, data.perm, data.boxes),
            _calls(functions, data.x, data.perm, data.boxes),
        ),
        ("x",),
    )


def _two_cross_entropies(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    first, second = (F.cross_entropy(z, t, reduction="none") for t in (a, b))
    return (lam * first + (1 - lam) * second).mean()


def _soft_cross_entropy(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    hot_a, hot_b = (F.one_hot(t, z.shape[1]).to(z.dtype) for t in (a, b))
    return F.cross_entropy(z, lam[:, None] * hot_a + (1 - lam[:, None]) * hot_b)


def _loss(batch: int, classes: int, device: str, compiled: bool) -> Case:
    z = torch.randn(batch, classes, device=device, requires_grad=True)
    a, b = torch.randint(classes, (2, batch), device=device)
    lam = torch.rand(batch, device=device)
    one = torch.ones((), device=device)
    functions = {
        **_with_compiled("two cross-entropies", _two_cross_entropies, compiled),
        "soft target": _soft_cross_entropy,
    }
    steps = {
        name: _training_step(call, one, z) for name, call in _calls(functions, z, a, b, lam).items()
    }
    return Case(
        f"mixed_cross_entropy, forward + backward, logits {[batch, classes]}",
        ours=_training_step(lambda: mixed_cross_entropy(z, a, b, lam), one, z),
        peers=steps,
        floors={"one cross-entropy": _training_step(lambda: F.cross_entropy(z, a), one, z)},
        bytes_moved=2 * z.nbytes,
    )
