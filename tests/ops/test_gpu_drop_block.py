"""drop_block and row_gate on a CUDA device: the masks of the CPU, repeatable bits, CUDA graphs."""

import pytest
import torch

from regularizers.ops import drop_block, row_gate
from tests.harness import DTYPES, TOLERANCES

pytestmark = pytest.mark.gpu


def _randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_blocks_are_those_of_the_cpu(dtype, shared):
    x = _randn(9, 5, 65, 33).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        for options in ({}, {"gamma": "exact", "normalize": "sample"}):
            call = lambda t, o=options: drop_block(t, 0.2, 7, shared_channels=shared, seed=3, **o)
            found = call(x.cuda().contiguous(memory_format=layout))
            expected = call(x)
            assert found.is_contiguous(memory_format=layout)
            assert torch.equal(found.cpu() == 0, expected == 0)
            torch.testing.assert_close(found.cpu(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_are_those_of_the_cpu(dtype):
    x, r = _randn(2, 300, 7, 501).to(dtype)
    found = row_gate(x.cuda(), 0.3, r.cuda(), seed=3, stream=2)
    torch.testing.assert_close(found.cpu(), row_gate(x, 0.3, r, seed=3, stream=2))


def test_a_cuda_graph_replays_with_fresh_seeds():
    x = torch.ones(64, 3, 20, 20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        row_gate(drop_block(x, 0.2, 5), 0.5)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = row_gate(drop_block(x, 0.2, 5), 0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)
