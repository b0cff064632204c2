"""Benchmarks of dropout: dropout_samples and multi_sample_dropout_cross_entropy.

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
from regularizers._bench.floors import copy, fresh_fill, fresh_fill_huge_pages
from regularizers.ops import dropout_samples, multi_sample_dropout_cross_entropy
from regularizers.ops.philox import PHILOX_WORDS, WORDS_PER_CALL

P = 0.5
M = 8


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the slowest and every compiled peer."""
    large, small = ((512, 2048), (128, 2048)) if device == "cpu" else ((4096, 4096), (512, 2048))
    compiled = not quick
    found = [
        _samples_fresh(
            large, device, compiled, [Goal("eager", at_most=1 / 7), Goal("fill", at_most=1.15)]
        ),
        _samples_recycled(small, device, compiled, [Goal("Philox words + copy", at_most=2)]),
    ]
    if not quick:
        found += [
            _samples_backward(large, device, compiled, fresh_memory=True),
            _samples_backward(small, device, compiled, fresh_memory=False),
        ]
    bounds = {10: 1.0, 100: 1.2} if quick else {10: 1.0, 100: 1.2, 1000: 1.15}
    found += [
        _loss(large, classes, device, compiled, goals=[Goal("products", at_most=bound)])
        for classes, bound in bounds.items()
    ]
    if not quick:
        found.append(_loss(large, 100, device, compiled, dtype=torch.bfloat16))
    found.append(_loss_memory_growth(device, with_eager=not quick))
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    features = 2048 if device == "cpu" else 4096
    curves = [
        ScalingCurve(
            "samples-over-batch",
            f"dropout_samples, M = {M}, x [B, {features}]{_regime(device, fresh=True)}",
            "batch size B",
            (64, 256, 1024) if quick else (16, 32, 64, 128, 256, 512, 1024, 2048),
            lambda batch: _samples_fresh((batch, features), device),
        ),
        ScalingCurve(
            "loss-over-classes",
            f"multi_sample_dropout_cross_entropy, forward + backward, M = {M}, x [512, {features}]",
            "classes C",
            (10, 30, 100) if quick else (3, 10, 30, 100, 300, 1000),
            lambda classes: _loss((512, features), classes, device),
        ),
    ]
    if not quick:
        curves += [
            ScalingCurve(
                "samples-over-batch-recycled",
                f"dropout_samples, M = {M}, x [B, {features}]{_regime(device, fresh=False)}",
                "batch size B",
                (8, 16, 32, 64, 128, 256),
                lambda batch: _samples_recycled((batch, features), device),
            ),
            ScalingCurve(
                "loss-memory-over-samples",
                "multi_sample_dropout_cross_entropy, x [1024, 1024], C = 1000",
                "samples M",
                (1, 2, 4, 8, 16, 32),
                lambda num_samples: _loss_memory(device, num_samples),
            ),
        ]
    return curves


# --- dropout_samples ------------------------------------------------------------------------------


def _regime(device: str, *, fresh: bool) -> str:
    if device != "cpu":
        return ""  # CUDA's caching allocator always recycles
    return ", fresh memory" if fresh else ", memory recycled"


def _eager_samples(x: Tensor) -> Tensor:
    return torch.stack([F.dropout(x, P) for _ in range(M)])


def _ways_to_sample(x: Tensor, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    ways = {"ours": lambda: dropout_samples(x, P, M), "eager": lambda: _eager_samples(x)}
    if compiled:
        function = _compile(_eager_samples)
        ways["torch.compile"] = lambda: function(x)
    return ways


def _samples_fresh(
    shape: tuple[int, int], device: str, compiled: bool = False, goals: Sequence[Goal] = ()
) -> Case:
    """Every call is given new pages, as large tensors are: faults cost more than the kernel."""
    x = torch.randn(shape, device=device)
    bytes_moved = (1 + M) * x.nbytes
    floors = {"fill": fresh_fill(M, *shape, device=device)}
    if device == "cpu":
        floors["fill, huge pages"] = fresh_fill_huge_pages(M, *shape)
    floors["copy, as many bytes"] = copy(bytes_moved, device=device)
    ways = _ways_to_sample(x, compiled)
    return Case(
        f"dropout_samples, M = {M}, x {list(shape)}{_regime(device, fresh=True)}",
        ours=ways.pop("ours"),
        peers=ways,
        floors=floors,
        goals=goals,
        bytes_moved=bytes_moved,
        fresh_memory=True,
    )


def _samples_recycled(
    shape: tuple[int, int], device: str, compiled: bool = False, goals: Sequence[Goal] = ()
) -> Case:
    """Every call gets the memory that the last one freed: the floor is random bits and writes."""
    x = torch.randn(shape, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    out = x.new_empty(M, *shape)

    def words_and_copy() -> None:
        if PHILOX_WORDS.serving(device) == "reference":
            raise RuntimeError(f"no compiled kernel makes Philox words on {device}")
        PHILOX_WORDS(seed, 0, out.numel() // WORDS_PER_CALL, 0, 0)
        out.copy_(x.expand_as(out))

    ways = _ways_to_sample(x, compiled)
    return Case(
        f"dropout_samples, M = {M}, x {list(shape)}{_regime(device, fresh=False)}",
        ours=ways.pop("ours"),
        peers=ways,
        floors={"Philox words + copy": words_and_copy},
        goals=goals,
        bytes_moved=(1 + M) * x.nbytes,
    )


def _samples_backward(
    shape: tuple[int, int], device: str, compiled: bool, *, fresh_memory: bool
) -> Case:
    x = torch.randn(shape, device=device, requires_grad=True)
    grad = torch.randn(M, *shape, device=device)

    def fill_and_sum() -> None:
        torch.empty_like(grad).fill_(1)
        grad.sum(0)

    ways: dict[str, Call] = {
        name: _training_step(way, grad, x) for name, way in _ways_to_sample(x, compiled).items()
    }
    return Case(
        f"dropout_samples, forward + backward, M = {M}, x {list(shape)}"
        + _regime(device, fresh=fresh_memory),
        ours=ways.pop("ours"),
        peers=ways,
        floors={"fill + sum": fill_and_sum},
        bytes_moved=2 * (1 + M) * x.nbytes,
        fresh_memory=fresh_memory,
    )


# --- multi_sample_dropout_cross_entropy -----------------------------------------------------------


class _Head:
    """A linear classifier on random data, and the ways to compute its multi-sample loss."""

    def __init__(
        self, shape: tuple[int, int], classes: int, device: str, dtype: torch.dtype = torch.float32
    ) -> None:
        batch, features = shape

        def leaf(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype).requires_grad_()

        self.x = leaf(batch, features)
        self.weight = leaf(classes, features)
        self.bias = leaf(classes)
        self.target = torch.randint(classes, (batch,), device=device)

    def step(self, loss: Callable[..., Tensor], *options: int) -> Call:
        """Return one forward and backward pass of ``loss(x, weight, bias, target, *options)``."""
        leaves = (self.x, self.weight, self.bias)
        return _training_step(lambda: loss(*leaves, self.target, *options), None, *leaves)


def _fused_loss(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, num_samples: int
) -> Tensor:
    return multi_sample_dropout_cross_entropy(x, weight, bias, target, p=P, num_samples=num_samples)


def _eager_loss(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, num_samples: int
) -> Tensor:
    losses = [
        F.cross_entropy(F.linear(F.dropout(x, P), weight, bias), target) for _ in range(num_samples)
    ]
    return torch.stack(losses).mean()


def _batched_loss(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, num_samples: int
) -> Tensor:
    masked = F.dropout(x.repeat(num_samples, 1), P)
    return F.cross_entropy(F.linear(masked, weight, bias), target.repeat(num_samples))


def _loss(
    shape: tuple[int, int],
    classes: int,
    device: str,
    compiled: bool = False,
    *,
    dtype: torch.dtype = torch.float32,
    goals: Sequence[Goal] = (),
) -> Case:
    head = _Head(shape, classes, device, dtype)
    peers = {"eager": head.step(_eager_loss, M), "eager, batched": head.step(_batched_loss, M)}
    if compiled:
        peers["torch.compile"] = head.step(_compile(_eager_loss), M)
    floors = _products(head.x.detach(), head.weight.detach())
    precision = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    return Case(
        f"multi_sample_dropout_cross_entropy, forward + backward, M = {M}, x {list(shape)}, "
        f"C = {classes}{precision}",
        ours=head.step(_fused_loss, M),
        peers=peers,
        floors=floors,
        best_of={"products": list(floors)},
        goals=goals,
        flops=3 * 2 * M * shape[0] * shape[1] * classes,
    )


def _products(x: Tensor, weight: Tensor) -> dict[str, Call]:
    """Return the products of a step for all M samples: logits, gradients of weight and input.

    No masks, no loss, nothing allocated; once with the samples as one tall matrix, once sample by
    sample, accumulating.
    """
    x_whole = x.repeat(M, 1)
    z_whole = torch.randn(M * x.shape[0], weight.shape[0]).to(x)
    grad_weight, grad_x, grad_x_whole = (torch.zeros_like(t) for t in (weight, x, x_whole))
    z = z_whole[: x.shape[0]].clone()
    # The logits stand in for their gradient: products of the same shape take the same time.

    def whole() -> None:
        torch.mm(x_whole, weight.T, out=z_whole)
        torch.mm(z_whole.T, x_whole, out=grad_weight)
        torch.mm(z_whole, weight, out=grad_x_whole)

    def by_sample() -> None:
        grad_weight.zero_()
        grad_x.zero_()
        for _ in range(M):
            torch.mm(x, weight.T, out=z)
            grad_weight.addmm_(z.T, x)
            grad_x.addmm_(z, weight)

    return {"products, whole": whole, "products, by sample": by_sample}


def _loss_memory_growth(device: str, *, with_eager: bool) -> Case:
    one, many = 1, 32
    head = _Head((1024, 1024), 1000, device)
    peers = {f"ours, M = {one}": head.step(_fused_loss, one)}
    if with_eager:
        peers |= {f"eager, M = {count}": head.step(_eager_loss, count) for count in (one, many)}
    return Case(
        f"multi_sample_dropout_cross_entropy, memory at M = {many}, x [1024, 1024], C = 1000",
        ours=head.step(_fused_loss, many),
        peers=peers,
        goals=[Goal(f"ours, M = {one}", at_most=1.2, quantity="memory")],
        timed=False,
    )


def _loss_memory(device: str, num_samples: int) -> Case:
    head = _Head((1024, 1024), 1000, device)
    return Case(
        f"multi_sample_dropout_cross_entropy, memory at M = {num_samples}",
        ours=head.step(_fused_loss, num_samples),
        peers={
            "eager": head.step(_eager_loss, num_samples),
            "eager, batched": head.step(_batched_loss, num_samples),
        },
        timed=False,
    )


# --- Both -----------------------------------------------------------------------------------------


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # fullgraph: past the recompilation limit an error, never a silent fall back to eager.
    return torch.compile(function, fullgraph=True, dynamic=False)


def _training_step(forward: Callable[[], Tensor], grad: Tensor | None, *leaves: Tensor) -> Call:
    def call() -> None:
        torch.autograd.backward(forward(), grad)
        for leaf in leaves:
            leaf.grad = None

    return call
