"""Prefixes on a CUDA device: the values of the CPU, and no wait for the host."""

import pytest
import torch

from regularizers.dropout import NestedDropout
from regularizers.ops import expected_prefix_cross_entropy, prefix_accuracy, prefix_linear
from tests.harness import DTYPES, TOLERANCES

pytestmark = pytest.mark.gpu


def _classifier(rows, features, classes):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, features, generator=generator),
        torch.randn(classes, features, generator=generator) / features**0.5,
        torch.randn(classes, generator=generator),
    )


def _on_both(call, tensors):
    found = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
        result = call(*leaves)
        result.sum().backward()
        found.append([t.detach().cpu() for t in (result, *(leaf.grad for leaf in leaves))])
    return zip(*found, strict=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_agree_with_the_cpu(dtype):
    tensors = [t.to(dtype) for t in _classifier(300, 700, 130)]
    lengths = torch.randint(1, 701, (300,), generator=torch.Generator().manual_seed(1))
    for k in (lengths, torch.tensor(333)):
        for cpu, gpu in _on_both(lambda *t, k=k: prefix_linear(*t, k.to(t[0].device)), tensors):
            # Sums of up to 700 terms in another order.
            torch.testing.assert_close(
                gpu, cpu, rtol=10 * TOLERANCES[dtype]["rtol"], atol=10 * TOLERANCES[dtype]["atol"]
            )


def test_accuracies_and_losses_agree_with_the_cpu():
    x, weight, bias = _classifier(200, 300, 70)
    target = torch.randint(70, (200,), generator=torch.Generator().manual_seed(2))
    law = torch.full((300,), 1 / 300)
    found = prefix_accuracy(x.cuda(), weight.cuda(), bias.cuda(), target.cuda()).cpu()
    assert (found - prefix_accuracy(x, weight, bias, target)).abs().max() <= 2  # near ties

    def loss(*t):
        device = t[0].device
        return expected_prefix_cross_entropy(*t, target.to(device), law.to(device))

    for cpu, gpu in _on_both(loss, (x, weight, bias)):
        torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-5)


def test_drawing_and_multiplying_do_not_wait_for_the_host():
    layer = NestedDropout(64).cuda()
    x, weight, _ = (tensor.cuda() for tensor in _classifier(32, 64, 10))
    k = torch.randint(1, 65, (32,), device="cuda")
    prefix_linear(x, weight, None, k)  # compiled before
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefix_linear(x, weight, None, k)
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
