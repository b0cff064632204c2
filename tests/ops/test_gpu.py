"""Every operator on a CUDA device: the bits and values of the CPU, CUDA graphs, memory."""

import pytest
import torch

import regularizers
from regularizers import backend
from regularizers.ops import dropout_samples, multi_sample_dropout_cross_entropy
from tests.harness import DTYPES, TOLERANCES, Sample, forward_and_gradients

pytestmark = pytest.mark.gpu


def _backends(*names):
    """Backends of the GPU that this process has; the automatic choice always."""
    return [None, *(name for name in names if not backend.why_unavailable(name))]


def _problem(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = ((37, 70), (11, 70), (11,))
    tensors = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]
    target = torch.randint(11, (37,), generator=generator)
    target[5] = -100
    return *tensors, target.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_have_the_bits_of_the_cpu(dtype):
    layouts = [torch.randn(3, 5, 33).to(dtype), torch.randn(3, 33, 5).to(dtype).transpose(1, 2)]
    for x in layouts:
        expected = dropout_samples(x, 0.3, 5, seed=7)
        for name in _backends("triton", "cuda"):
            with regularizers.use_backend(name):
                found = dropout_samples(x.cuda(), 0.3, 5, seed=7)
            assert torch.equal(found.cpu(), expected), name
            assert found.stride() == expected.stride(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_agree_with_the_cpu(dtype):
    for reduction in ("mean", "sum", "none"):
        options = {"p": 0.4, "num_samples": 3, "seed": 5, "reduction": reduction}
        results = {}
        for device, names in (("cpu", [None]), ("cuda", _backends("triton"))):
            *tensors, target = _problem(device, dtype)
            sample = Sample("", tuple(tensors), multi_sample_dropout_cross_entropy)
            for name in names:
                with regularizers.use_backend(name):
                    loss, gradients = forward_and_gradients(
                        lambda x, w, b, y=target, o=options: multi_sample_dropout_cross_entropy(
                            x, w, b, y, label_smoothing=0.1, **o
                        ),
                        sample.leaves(),
                    )
                results[device, name] = [tensor.cpu() for tensor in (loss, *gradients)]
        expected = results.pop(("cpu", None))
        for key, found in results.items():
            for have, want in zip(found, expected, strict=True):
                torch.testing.assert_close(
                    have, want, **TOLERANCES[dtype], msg=lambda m, k=key: f"{k}: {m}"
                )


def test_a_cuda_graph_replays_with_fresh_seeds():
    x = torch.ones(64, 64, device="cuda")
    dropout_samples(x)  # compiles whatever compiles at first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = dropout_samples(x)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(result.clone())
    assert not torch.equal(*replays)


def test_nothing_waits_for_the_device():
    x, weight, bias, target = _problem("cuda")
    weight.requires_grad_()
    rate = torch.tensor(0.5, dtype=torch.float64, device="cuda")

    def step():
        dropout_samples(x, rate)
        multi_sample_dropout_cross_entropy(x, weight, bias, target, p=rate).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.grad.isfinite().all()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples():
    # Sheet of paper 30, fact 7.
    x = torch.randn(4096, 2048, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 2048, device="cuda", requires_grad=True)
    target = torch.randint(1000, (4096,), device="cuda")

    def peak(num_samples):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = multi_sample_dropout_cross_entropy(x, weight, None, target, num_samples=num_samples)
        torch.autograd.grad(loss, (x, weight))
        return torch.cuda.max_memory_allocated() - before

    peak(1)
    assert peak(32) < 1.2 * peak(1)
