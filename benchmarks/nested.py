"""Benchmarks of prefixes: the prefix layer against a mask, and all prefixes in one pass.

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers.dropout import OrderedLowRankLinear
from regularizers.ops import expected_prefix_cross_entropy, prefix_accuracy, prefix_linear

BATCH, FEATURES, CLASSES = 512, 2048, 1000  # of the layer
SCANNED = 512  # features of the scans


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the slowest and every compiled peer."""
    batch = BATCH if device == "cpu" else 16 * BATCH
    goal = [Goal("mask, then multiply", at_most=0.65)]
    found = [
        _rows(batch, FEATURES, CLASSES, device, compiled=not quick, goals=goal),
        _one(batch, FEATURES, CLASSES, FEATURES // 2, device),
        _low_rank(batch, 1024, 64, device, False, [Goal("two thin layers", at_most=1.1)]),
        _low_rank(batch, 1024, 64, device, True, [Goal("two thin layers", at_most=1.3)]),
        _accuracy(SCANNED, 10, device, goals=[Goal("loop over prefixes", at_most=1 / 50)]),
        _accuracy(SCANNED, 100, device, goals=[Goal("loop over prefixes", at_most=1 / 50)]),
        _expected(SCANNED, 10, device),
    ]
    if not quick:
        found += [
            _accuracy(SCANNED, 1000, device, goals=[Goal("loop over prefixes", at_most=1 / 50)]),
            _expected(SCANNED, 100, device),
        ]
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    widths = (256, 1024) if quick else (128, 256, 512, 1024, 2048, 4096)
    lengths = (64, 1024) if quick else (32, 128, 512, 1024, 1536, 2048)
    features = (64, 256) if quick else (32, 64, 128, 256, 512, 1024)
    return [
        ScalingCurve(
            "layer-over-features",
            f"prefix_linear, k uniform a row, forward and backward, B = {BATCH}, C = {CLASSES}",
            "D",
            widths,
            lambda width: _rows(BATCH, width, CLASSES, device),
        ),
        ScalingCurve(
            "layer-over-k",
            f"prefix_linear, one k, forward and backward, B = {BATCH}, D = {FEATURES}",
            "k",
            lengths,
            lambda k: _one(BATCH, FEATURES, CLASSES, k, device),
        ),
        ScalingCurve(
            "accuracy-over-features",
            f"prefix_accuracy, B = {BATCH}, C = 100",
            "D",
            features,
            lambda width: _accuracy(width, 100, device),
        ),
        ScalingCurve(
            "loss-over-features",
            f"expected_prefix_cross_entropy, forward and backward, B = {BATCH}, C = 10",
            "D",
            features,
            lambda width: _expected(width, 10, device),
        ),
    ]


def _layer(batch: int, features: int, classes: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, features, generator=generator)
    weight = torch.randn(classes, features, generator=generator) / features**0.5
    tensors = x, weight, torch.zeros(classes)
    x, weight, bias = (tensor.to(device).requires_grad_() for tensor in tensors)
    return x, weight, bias


def _with_backward(call: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Call:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        call(*leaves).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return run


def _masked(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    kept = torch.arange(x.shape[1], device=x.device) < k.unsqueeze(-1)
    return F.linear(torch.where(kept, x, 0), weight, bias)


def _rows(
    batch: int,
    features: int,
    classes: int,
    device: str,
    compiled: bool = False,
    goals: Sequence[Goal] = (),
) -> Case:
    """A length a row, uniform on 1, ..., D."""
    leaves = _layer(batch, features, classes, device)
    generator = torch.Generator().manual_seed(1)
    k = torch.randint(1, features + 1, (batch,), generator=generator).to(device)
    grad = torch.randn(batch, classes, device=device)
    half = _layer(batch, features // 2, classes, device)
    masked = _with_backward(lambda *t: _masked(*t, k), leaves, grad)
    peers = {"mask, then multiply": masked}
    if compiled:
        function = torch.compile(_masked, fullgraph=True, dynamic=False)
        peers["torch.compile"] = _with_backward(lambda *t: function(*t, k), leaves, grad)
    return Case(
        f"prefix_linear, k uniform a row, forward and backward, "
        f"x [{batch}, {features}], C = {classes}",
        ours=_with_backward(lambda *t: prefix_linear(*t, k), leaves, grad),
        peers=peers,
        floors={"a dense layer of D / 2 features": _with_backward(F.linear, half, grad)},
        goals=goals,
        flops=6 * classes * int(k.sum()),
    )


def _one(batch: int, features: int, classes: int, k: int, device: str) -> Case:
    leaves = _layer(batch, features, classes, device)
    grad = torch.randn(batch, classes, device=device)
    length = torch.tensor(k, device=device)
    small = _layer(batch, k, classes, device)
    return Case(
        f"prefix_linear, k = {k} for the batch, forward and backward, "
        f"x [{batch}, {features}], C = {classes}",
        ours=_with_backward(lambda *t: prefix_linear(*t, length), leaves, grad),
        peers={
            "mask, then multiply": _with_backward(lambda *t: _masked(*t, length), leaves, grad),
            "prefix_linear, k an int": _with_backward(
                lambda *t: prefix_linear(*t, k), leaves, grad
            ),
        },
        floors={"a dense layer of k features": _with_backward(F.linear, small, grad)},
        flops=6 * batch * classes * k,
    )


def _low_rank(
    batch: int, width: int, rank: int, device: str, backward: bool, goals: Sequence[Goal]
) -> Case:
    """An ordered low-rank layer of ``width`` to ``width`` at rank r against two thin layers.

    Its backward pass writes the zeros of both full gradients as well, which thin layers have not.
    """
    x, dense, _ = _layer(batch, width, width, device)
    layer = OrderedLowRankLinear(width, width, bias=False, device=device)
    down, up = layer.factor_in, layer.factor_out
    thin_down = down.detach()[:rank].clone().requires_grad_()
    thin_up = up.detach()[:, :rank].clone().requires_grad_()
    grad = torch.randn(batch, width, device=device)

    def ordered(x: Tensor, *_: Tensor) -> Tensor:
        return layer(x, rank=rank)

    def two(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(x, down), up)

    def masked(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        inner = F.linear(x, down)
        kept = torch.arange(width, device=device) < rank
        return F.linear(torch.where(kept, inner, 0), up)

    def candidate(call: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Call:
        if backward:
            return _with_backward(call, leaves, grad)
        return torch.no_grad()(lambda: call(*leaves))

    passes = "forward and backward" if backward else "forward"
    return Case(
        f"ordered low-rank layer at rank {rank} of {width}, {passes}, x [{batch}, {width}]",
        ours=candidate(ordered, (x, down, up)),
        peers={
            "mask the components": candidate(masked, (x, down, up)),
            "a dense layer": candidate(F.linear, (x, dense)),
        },
        floors={"two thin layers": candidate(two, (x, thin_down, thin_up))},
        goals=goals,
        flops=(6 if backward else 2) * batch * rank * 2 * width,
    )


def _accuracy(features: int, classes: int, device: str, goals: Sequence[Goal] = ()) -> Case:
    x, weight, bias = (t.detach() for t in _layer(BATCH, features, classes, device))
    target = torch.randint(classes, (BATCH,), device=device)

    def loop() -> Tensor:
        return torch.stack(
            [
                (F.linear(x[:, :k], weight[:, :k], bias).argmax(1) == target).sum()
                for k in range(1, features + 1)
            ]
        )

    def running_sums() -> Tensor:
        z = (x.T[:, :, None] * weight.T[:, None]).cumsum(0) + bias
        return (z.argmax(2) == target).sum(1)

    peers: dict[str, Call] = {"loop over prefixes": loop}
    if BATCH * features * classes <= 1 << 25:
        peers["cumsum"] = running_sums
    return Case(
        f"prefix_accuracy, x [{BATCH}, {features}], C = {classes}",
        ours=lambda: prefix_accuracy(x, weight, bias, target),
        peers=peers,
        floors={"one dense layer": lambda: F.linear(x, weight, bias)},
        goals=goals,
        flops=2 * BATCH * features * classes,
    )


def _expected(features: int, classes: int, device: str) -> Case:
    leaves = _layer(BATCH, features, classes, device)
    target = torch.randint(classes, (BATCH,), device=device)
    law = torch.full((features,), 1 / features, device=device)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = (x.T[:, :, None] * weight.T[:, None]).cumsum(0) + bias
        every = target.expand(features, BATCH).flatten()
        losses = F.cross_entropy(z.flatten(0, 1), every, reduction="none")
        return losses.reshape(features, BATCH).mean(1) @ law

    unit = torch.ones((), device=device)
    z = torch.randn(BATCH * classes, features, device=device)
    return Case(
        f"expected_prefix_cross_entropy, forward and backward, "
        f"x [{BATCH}, {features}], C = {classes}",
        ours=_with_backward(
            lambda *t: expected_prefix_cross_entropy(*t, target, law), leaves, unit
        ),
        peers={"autograd through cumsum": _with_backward(eager, leaves, unit)},
        floors={"two exponentials a logit": lambda: (torch.exp(z), torch.exp(z))},
    )
