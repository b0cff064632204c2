"""Benchmarks of the fused optimizer step: large tensors, ten thousand small ones, half types.

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers.optim import AdamHD

NUMBERS = 2**24
LR, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.95), 1e-8
BYTES = 28  # read p, g, m, v and write p, m, v in float32


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the compiled peer and takes a quarter of the size."""
    numbers = NUMBERS if device == "cpu" else 16 * NUMBERS
    numbers = numbers // 4 if quick else numbers
    large = [Goal("AdamW(fused=True)", at_most=1.05), Goal("foreach", at_most=1 / 4)]
    if not quick:
        large.append(Goal("torch.compile", at_most=1.0))
    small = [Goal("AdamW(fused=True)", at_most=1.1)]
    found = []
    for delta in (None, 0.5):
        for count in (16, 4):
            sizes = [numbers // count] * count
            found.append(_step(sizes, delta, device, compiled=not quick, goals=large))
        found.append(_step([64] * 10_000, delta, device, compiled=False, goals=small))
    found.append(_half([numbers // 16] * 16, device))
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    numbers = (2**12, 2**16, 2**20) if quick else tuple(2**k for k in range(12, 25, 2))
    counts = (1, 16, 256) if quick else (1, 4, 16, 64, 256, 1024, 4096)
    return [
        ScalingCurve(
            "step-over-numbers",
            "a step of AdamHD, threshold tracked, 16 tensors",
            "parameters",
            numbers,
            lambda n: _step([n // 16] * 16, None, device),
        ),
        ScalingCurve(
            "step-over-tensors",
            "a step of AdamHD, threshold tracked, 2^20 parameters",
            "tensors",
            counts,
            lambda count: _step([2**20 // count] * count, None, device),
        ),
    ]


def _parameters(sizes: Sequence[int], device: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    params = []
    for size in sizes:
        param = torch.nn.Parameter(torch.randn(size, device=device, dtype=dtype))
        param.grad = torch.randn(size, device=device, dtype=dtype)
        params.append(param)
    return params


class ForeachStep:
    """The same step written with ``torch._foreach_*``, as torch writes its own optimizers."""

    def __init__(self, params: Sequence[Tensor], delta: float | None) -> None:
        self.params = [param.detach() for param in params]
        self.grads = [param.grad for param in params]
        self.exp_avgs = [torch.zeros_like(param) for param in self.params]
        self.exp_avg_sqs = [torch.zeros_like(param) for param in self.params]
        self.delta = delta
        self.deltas = torch.tensor([0.5] * len(self.params), device=self.params[0].device)
        self.counts = torch.tensor([p.numel() for p in self.params], device=self.deltas.device)
        self.time = 0

    def __call__(self) -> None:
        """Take a step."""
        self.time += 1
        tau = LR * DECAY
        torch._foreach_lerp_(self.exp_avgs, self.grads, 1 - BETAS[0])
        torch._foreach_mul_(self.exp_avg_sqs, BETAS[1])
        torch._foreach_addcmul_(self.exp_avg_sqs, self.grads, self.grads, 1 - BETAS[1])
        roots = torch._foreach_sqrt(self.exp_avg_sqs)
        torch._foreach_div_(roots, (1 - BETAS[1] ** self.time) ** 0.5)
        torch._foreach_add_(roots, EPS)
        torch._foreach_addcdiv_(
            self.params, self.exp_avgs, roots, -LR / (1 - BETAS[0] ** self.time)
        )
        decay = torch._foreach_mul(self.params, tau / (1 + tau))
        bounds = [tau * self.delta] * len(self.params) if self.delta else None
        bounds = bounds or (tau * self.deltas).tolist()
        torch._foreach_clamp_max_(decay, bounds)
        torch._foreach_clamp_min_(decay, [-bound for bound in bounds])
        torch._foreach_sub_(self.params, decay)
        if self.delta is None:
            sums = torch.stack(torch._foreach_norm(self.params, 1))
            self.deltas.lerp_(sums / self.counts, 1e-3)


def _plain_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    deltas: Tensor,
    time: Tensor,
    tracked: bool,
) -> None:
    """Take the same step a tensor at a time, for torch.compile to fuse."""
    tau = LR * DECAY
    step_size, root = LR / (1 - BETAS[0] ** time), (1 - BETAS[1] ** time).sqrt()
    means = []
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        m.lerp_(g, 1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        x = p - step_size * m / (v.sqrt() / root + EPS)
        bound = tau * deltas[i]
        p.copy_(x - (x * (tau / (1 + tau))).clamp(-bound, bound))
        if tracked:
            means.append(p.abs().mean())
    if tracked:
        deltas.lerp_(torch.stack(means), 1e-3)


def _compiled_step(params: Sequence[Tensor], delta: float | None) -> Call:
    function = torch.compile(_plain_step, fullgraph=True, dynamic=False)
    values = [param.detach() for param in params]
    grads = [param.grad for param in params]
    moments = [[torch.zeros_like(value) for value in values] for _ in range(2)]
    deltas = torch.full((len(values),), delta or 0.5, device=values[0].device)
    time = torch.zeros((), device=values[0].device)

    def step() -> None:
        time.add_(1)
        function(values, grads, *moments, deltas, time, delta is None)

    return step


def _copy(sizes: Sequence[int], device: str, bytes_each: int) -> Call:
    """Read and write as many bytes as the step does, half each."""
    source = torch.empty(sum(sizes) * bytes_each // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _step(
    sizes: Sequence[int],
    delta: float | None,
    device: str,
    compiled: bool = False,
    goals: Sequence[Goal] = (),
) -> Case:

    def make() -> list[torch.nn.Parameter]:
        return _parameters(sizes, device, torch.float32)

    ours = AdamHD(make(), lr=LR, weight_decay=DECAY, delta=delta)
    fused = torch.optim.AdamW(make(), lr=LR, weight_decay=DECAY, betas=BETAS, fused=True)
    peers: dict[str, Call] = {
        "AdamW(fused=True)": fused.step,
        "foreach": ForeachStep(make(), delta),
    }
    if compiled:
        peers["torch.compile"] = _compiled_step(make(), delta)
    threshold = "tracked" if delta is None else "fixed"
    return Case(
        f"AdamHD, threshold {threshold}, {len(sizes)} tensors of {sizes[0]}",
        ours=ours.step,
        peers=peers,
        floors={"copy": _copy(sizes, device, BYTES)},
        goals=goals,
        bytes_moved=BYTES * sum(sizes),
    )


def _half(sizes: Sequence[int], device: str) -> Case:
    """bfloat16 parameters, rounded at random: 2 + 2 + 4 + 4 bytes read, 2 + 4 + 4 written."""
    ours = AdamHD(_parameters(sizes, device, torch.bfloat16), rounding="stochastic")
    master = AdamHD(_parameters(sizes, device, torch.bfloat16), rounding="master")
    return Case(
        f"AdamHD, bfloat16, stochastic rounding, {len(sizes)} tensors of {sizes[0]}",
        ours=ours.step,
        peers={"rounding='master'": master.step},
        floors={"copy": _copy(sizes, device, 22)},
        bytes_moved=22 * sum(sizes),
    )
