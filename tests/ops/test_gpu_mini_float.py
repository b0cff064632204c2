"""The small floating-point formats on a CUDA device: the codes and numbers of the CPU."""

import pytest
import torch

from regularizers.ops import mini_float_bias, mini_float_pack, mini_float_unpack
from tests.harness import DTYPES
from tests.ops.test_mini_float import FORMATS, int32, numbers_around

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_codes_and_numbers_are_those_of_the_cpu(form, dtype):
    (exp_bits, man_bits), options = form[:2], {"signed": form[2], "has_inf_nan": form[3]}
    for value in (-500, 7, 60, 140):
        bias = int32(value)
        x = numbers_around(form, bias, dtype)
        for dense in (True, False):
            codes = mini_float_pack(x, bias, exp_bits, man_bits, dense=dense, **options)
            found = mini_float_pack(
                x.cuda(), bias.cuda(), exp_bits, man_bits, dense=dense, **options
            )
            assert torch.equal(found.cpu(), codes)
            back = [
                mini_float_unpack(
                    c, bias.to(c.device), exp_bits, man_bits,
                    shape=tuple(x.shape), dense=dense, dtype=dtype, **options,
                ).cpu()
                for c in (codes, found)
            ]  # fmt: skip
            torch.testing.assert_close(*back, rtol=0, atol=0, equal_nan=True)


def test_a_cuda_graph_packs_what_is_there_at_its_replay():
    x = torch.randn(100_001, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mini_float_pack(x, mini_float_bias(x, 3), 3, 1)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bias = mini_float_bias(x, 3)
        packed = mini_float_pack(x, bias, 3, 1)
    x.mul_(torch.linspace(0, 40, x.numel(), device="cuda"))
    graph.replay()
    expected = mini_float_bias(x.cpu(), 3)
    assert torch.equal(bias.cpu(), expected)
    assert torch.equal(packed.cpu(), mini_float_pack(x.cpu(), expected, 3, 1))
