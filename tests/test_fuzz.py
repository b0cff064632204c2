"""Random calls of every operator: the kernel does what the reference does, or refuses as it does.

``REGULARIZERS_FUZZ_CASES=200000 pytest tests/test_fuzz.py`` runs more cases than CI, and other ones
every time; a failure prints what reproduces it.
"""

import faulthandler
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import regularizers
from regularizers import ops
from tests.fuzzing import NO_KERNEL, TABLE, hypothesis_draws
from tests.harness import TOLERANCES, needs_kernels

CASES = int(os.environ.get("REGULARIZERS_FUZZ_CASES", "10000"))
FUZZ = settings(
    max_examples=-(-CASES // len(TABLE)),
    deadline=None,
    derandomize="REGULARIZERS_FUZZ_CASES" not in os.environ,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
LONGEST = 600  # seconds for all cases of an operator; 100 times what they take


@pytest.fixture(autouse=True)
def _no_hang():
    """End the process with a traceback where a kernel hangs: Python's signals do not reach it."""
    faulthandler.dump_traceback_later(max(LONGEST, CASES // 10), exit=True)
    torch.set_num_threads(1)  # results do not depend on it, and small cases gain nothing
    yield
    faulthandler.cancel_dump_traceback_later()


def outcome(sample, backend, gradients):
    """The result of a call and its gradients, or the type of the error that it raises."""
    tensors = sample.differentiable
    with regularizers.use_backend(backend):
        try:
            if not gradients or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
                return [sample(*tensors)]
            leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
            result = sample(*leaves)
        except (TypeError, ValueError) as error:
            return type(error)
        if not result.requires_grad:
            return [result]
        generator = torch.Generator().manual_seed(3)
        cotangent = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(result, wanted, cotangent.to(result), allow_unused=True)
    return [result.detach(), *found]


def compare(have, want, tolerance, scale, exact, both_ways, values):
    """Raise unless a tensor of the kernel is that of the reference; see ``Fuzzed``.

    ``both_ways``: whether the kernel may not be finite where the reference is not.
    """
    assert (have is None) == (want is None)
    if have is None:
        return
    assert (have.dtype, have.shape) == (want.dtype, want.shape)
    if not have.is_floating_point():
        assert torch.equal(have, want), f"kernel: {have}\nreference: {want}"
        return
    # The last rounding before the largest number may or may not be one to infinity.
    edge = 0.98 * torch.finfo(want.dtype).max
    wrong = ~have.isfinite() & (want.abs() < edge)
    if both_ways:
        wrong |= ~want.isfinite() & (have.abs() < edge)
    if exact:
        wrong |= have.isnan() != want.isnan()
    assert not wrong.any(), (
        f"at {wrong.nonzero()[0].tolist()}, kernel {have[wrong][0]}, reference {want[wrong][0]}"
    )
    if values:
        both = have.isfinite() & want.isfinite()
        torch.testing.assert_close(
            have[both], want[both], rtol=tolerance["rtol"], atol=tolerance["atol"] * scale
        )


def check(fuzzed, draws, sample):
    """Run a call on both backends and compare whatever comes out."""
    have, want = (outcome(sample, backend, fuzzed.gradients) for backend in ("cpp", "reference"))
    if isinstance(have, type) or isinstance(want, type):
        assert have == want, f"kernel: {have}\nreference: {want}"
        return
    scale = largest(sample.differentiable) ** fuzzed.degree
    # A wrong dtype among the arguments may be right: the coarsest says how they round.
    dtypes = {draws.dtype, *(tensor.dtype for tensor in sample.differentiable)}
    tolerance = TOLERANCES[max(dtypes.intersection(TOLERANCES), key=lambda d: torch.finfo(d).eps)]
    result, *gradients = zip(have, want, strict=True)
    note(f"result of {sample.options}")
    values = draws.tame or fuzzed.smooth
    compare(*result, tolerance, scale, fuzzed.exact, not fuzzed.reads_less, values)
    # Behind a result that is not finite, or a softmax of logits that are nothing but rounding, a
    # gradient means nothing. What is exact is exact there too.
    if fuzzed.exact or (draws.tame and result[1].isfinite().all()):
        for place, gradient in enumerate(gradients):
            note(f"gradient {place} of {sample.options}")
            compare(*gradient, tolerance, scale, fuzzed.exact, True, draws.tame)


def largest(tensors):
    """The largest finite number among the arguments, at least 1."""
    found = 1.0
    for tensor in tensors:
        if tensor.numel():
            found = max(found, tensor.double().nan_to_num(0, 0, 0).abs().max().item())
    return found


@needs_kernels
@pytest.mark.parametrize("name", TABLE)
def test_kernel_does_what_the_reference_does(name):
    fuzzed = TABLE[name]

    @FUZZ
    @given(st.data())
    def run(data):
        draws = hypothesis_draws(data.draw)
        check(fuzzed, draws, draws.spoil(fuzzed.build(draws)))

    run()


def test_the_table_holds_every_operator_that_has_a_kernel():
    assert sorted([*TABLE, *NO_KERNEL]) == ops.__all__
