"""The fused optimizer step on a GPU: kernels against the reference, replay of a captured graph."""

import pytest
import torch
from torch import nn

import regularizers
from regularizers import backend
from regularizers.ops import decoupled_adam_
from regularizers.optim import AdamHD
from tests.harness import DTYPES, TOLERANCES
from tests.ops.test_decay import EXTRAS, OPTIONS, SIZES, problem

pytestmark = pytest.mark.gpu
BACKENDS = ("cuda", "triton")


def _on_gpu(arguments):
    move = lambda v: [t.cuda() for t in v] if isinstance(v, list) else v.cuda()
    return {name: move(value) for name, value in arguments.items()}


def _need(which):
    if backend.why_unavailable(which):
        pytest.skip(backend.why_unavailable(which))


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", BACKENDS)
def test_kernels_agree_with_the_reference(which, dtype, extras):
    _need(which)
    for penalty in ("l2", "l1", "huber"):
        results = []
        for name in (which, "reference"):
            arguments = _on_gpu(problem(dtype, SIZES, *extras))
            with regularizers.use_backend(name):
                decoupled_adam_(
                    **arguments, **OPTIONS, penalty=penalty, prox=True, decay_first=False, eps=1e-3
                )
            results.append(arguments)
        torch.testing.assert_close(*results, **TOLERANCES[dtype])


@pytest.mark.parametrize("which", BACKENDS)
def test_equal_steps_give_equal_bits(which):
    _need(which)
    results = []
    for _ in range(2):
        arguments = _on_gpu(problem(torch.float32, ((300_000,), (7,))))
        with regularizers.use_backend(which):
            decoupled_adam_(**arguments, **OPTIONS)
        results.append(arguments)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_captured_step_replays_with_new_gradients_and_learning_rates():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator).cuda() for size in ((70, 30), (5,))]
    grads = [[torch.randn(p.shape, generator=generator).cuda() for p in start] for _ in range(4)]
    ends = []
    for captured in (False, True):
        params = [nn.Parameter(p.clone()) for p in start]
        lr = torch.tensor(0.01, device="cuda")
        optimizer = AdamHD(params, lr=lr)
        for p, grad in zip(params, grads[0], strict=True):
            p.grad = grad.clone()
        optimizer.step()
        step = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for t in range(1, 4):
            lr.fill_(0.01 / t)
            for p, grad in zip(params, grads[t], strict=True):
                p.grad.copy_(grad)
            step()
        ends.append(params)
    torch.testing.assert_close(*ends, rtol=0, atol=0)
