"""The operator contract and the method contract of docs/operators.md, written once for all.

A test file subclasses ``OperatorContract`` (or ``MethodContract``), sets a few attributes and holds
beside it only what is special to its operator (or method).
"""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import regularizers
from regularizers.backend import why_unavailable
from regularizers.ops._operator import Operator

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Kernels and references round in different places: a few units in the last place of the storage
# type. Half types accumulate in float32 on both sides and differ by the final rounding alone.
TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def can_run(backend):
    """Whether ``backend`` is there: without compiled kernels, only the references are."""
    return not why_unavailable(backend)


needs_kernels = pytest.mark.skipif(not can_run("cpp"), reason="the C++ kernels are not built")

# The last one compiles; the reference's formulas are compiled by a test of their own.
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@dataclass
class Sample:
    """One call: ``differentiable`` tensors come first, in order; the rest by keyword."""

    name: str
    differentiable: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *tensors: Tensor, **overrides: Any) -> Tensor:
        return self.call(*(tensors or self.differentiable), **{**self.options, **overrides})

    def leaves(self) -> tuple[Tensor, ...]:
        """Fresh leaves with the layout in memory of the originals."""
        return tuple(tensor.detach().requires_grad_() for tensor in self.differentiable)

    def clones(self) -> tuple[Tensor, ...]:
        """Fresh leaves that may be written to: gradcheck does, and refuses expanded tensors."""
        return tuple(tensor.detach().clone().requires_grad_() for tensor in self.differentiable)


def forward_and_gradients(
    call: Callable[..., Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the result of a call and its gradients, for fresh leaves, under a fixed cotangent."""
    result = call(*leaves)
    if result.numel() == 0:
        return result, ()
    generator = torch.Generator().manual_seed(7)
    cotangent = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
    result.backward(cotangent)  # reentrant checkpointing refuses torch.autograd.grad
    return result.detach(), tuple(leaf.grad for leaf in leaves)


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter, with additions to the environment."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def in_forked_child(work: Callable[[], Tensor]) -> Tensor:
    """Run ``work`` in a forked process as a data-loader worker does: with one thread."""
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child() -> None:
        torch.set_num_threads(1)
        queue.put(work().tolist())

    process = context.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0, f"the forked child ended with {process.exitcode}"
    return torch.tensor(queue.get())


class GraphRecorder(list):
    """A compiler backend that keeps the graphs it is given and runs them as they are."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph


class OperatorContract:
    """What every operator passes. Subclasses set:

    samples: ``samples(dtype)`` gives small calls with a fixed seed: odd sizes, size 1,
        non-contiguous, options.
    empty: ``empty(dtype)`` gives calls with zero-size inputs, or none.
    operator_calls: pairs (operator, arguments) for opcheck.
    scheduled: the options that a schedule may change, with a range for each.
    bad_inputs: (exception, argument named in the message, call).
    bitwise_across_threads: whether the result is bit-identical for every thread count (no matrix
        product inside).
    autocast_dtype: dtype of the result of float32 inputs under a bfloat16 autocast.
    """

    bitwise_across_threads: bool
    autocast_dtype: torch.dtype
    scheduled: dict[str, tuple[float, float]]

    def samples(self, dtype: torch.dtype) -> list[Sample]:
        raise AssertionError("a subclass defines this")

    def empty(self, dtype: torch.dtype) -> list[Sample]:
        return []

    def operator_calls(self) -> list[tuple[Operator, tuple[Any, ...]]]:
        raise AssertionError("a subclass defines this")

    def bad_inputs(self) -> list[tuple[type[Exception], str, Callable[[], Any]]]:
        raise AssertionError("a subclass defines this")

    def test_opcheck_passes(self):
        for operator, arguments in self.operator_calls():
            for backend, checks in ((None, OPCHECKS), ("reference", OPCHECKS[:3])):
                kernel = operator.kernel(backend)
                results = torch.library.opcheck(kernel, arguments, test_utils=checks)
                assert set(results.values()) == {"SUCCESS"}

    @needs_kernels
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_kernel_agrees_with_reference(self, dtype):
        for sample in itertools.chain(self.samples(dtype), self.empty(dtype)):
            with regularizers.use_backend("cpp"):
                result, gradients = forward_and_gradients(sample, sample.leaves())
            with regularizers.use_backend("reference"):
                expected, expected_gradients = forward_and_gradients(sample, sample.leaves())
            context = f"{sample.name}: "
            assert result.stride() == expected.stride(), context
            for have, want in zip(
                (result, *gradients), (expected, *expected_gradients), strict=True
            ):
                torch.testing.assert_close(
                    have, want, **TOLERANCES[dtype], equal_nan=True, msg=lambda m, c=context: c + m
                )

    def test_backward_stays_on_the_backend_of_forward(self):
        sample = self.samples(torch.float64)[0]
        leaves = sample.leaves()
        with regularizers.use_backend("reference"):
            result = sample(*leaves)
        names = _graph_names(result.grad_fn)
        assert any("reference" in name for name in names), names
        result.sum().backward()  # outside of the block

    def test_gradcheck_first_and_second_order(self):
        for sample in self.samples(torch.float64):
            leaves = sample.clones()
            assert torch.autograd.gradcheck(sample, leaves), sample.name
            assert torch.autograd.gradgradcheck(sample, leaves), sample.name

    def test_forward_mode_agrees_with_reverse_mode(self):
        for sample in self.samples(torch.float64):
            forward = {"check_forward_ad": True, "check_backward_ad": False}
            assert torch.autograd.gradcheck(sample, sample.clones(), **forward), sample.name

    def test_functorch_transforms_agree_with_autograd(self):
        for sample in self.samples(torch.float64):
            primals = tuple(tensor.detach() for tensor in sample.clones())
            scalar = lambda *tensors, s=sample: s(*tensors).sum()
            every = tuple(range(len(primals)))
            expected = torch.autograd.grad(scalar(*(leaves := sample.leaves())), leaves)
            torch.testing.assert_close(torch.func.grad(scalar, every)(*primals), expected)

            doubled = tuple(torch.stack([tensor, 2 * tensor]) for tensor in primals)
            batched = torch.func.vmap(torch.func.grad(scalar, every))(*doubled)
            torch.testing.assert_close(tuple(gradient[0] for gradient in batched), expected)

            tangents = tuple(torch.randn_like(tensor) for tensor in primals)
            _, derivative = torch.func.jvp(scalar, primals, tangents)
            product = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
            torch.testing.assert_close(derivative, product)

    def test_compiles_to_one_graph_with_equal_results(self, fresh_dynamo):
        sample = self.samples(torch.float32)[0]
        compiled = torch.compile(sample, fullgraph=True)
        result, gradients = forward_and_gradients(compiled, sample.leaves())
        expected, expected_gradients = forward_and_gradients(sample, sample.leaves())
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(gradients, expected_gradients)

    def test_compiled_graph_holds_the_fused_operator_of_the_chosen_backend(self, fresh_dynamo):
        sample = self.samples(torch.float64)[0]
        operator = self.operator_calls()[0][0]
        for backend in (None, "reference"):
            graphs = GraphRecorder()
            with regularizers.use_backend(backend):
                torch.compile(sample, fullgraph=True, backend=graphs)(*sample.differentiable)
            targets = {node.target for node in graphs[0].graph.nodes}
            assert operator.kernel(backend) in targets, backend

    def test_backend_can_be_chosen_inside_and_around_a_compiled_function(self, fresh_dynamo):
        sample = self.samples(torch.float64)[0]
        expected = forward_and_gradients(sample, sample.leaves())

        def inside(*tensors):
            with regularizers.use_backend("reference"):
                return sample(*tensors)

        with regularizers.use_backend("reference"):
            around = torch.compile(sample, fullgraph=True, backend="aot_eager")
            found = around(*(leaves := sample.leaves()))
        assert any("Compiled" in name for name in _graph_names(found.grad_fn))
        torch.testing.assert_close(found.detach(), expected[0])
        compiled = torch.compile(inside, backend="aot_eager")
        torch.testing.assert_close(forward_and_gradients(compiled, leaves), expected)

    def test_a_schedule_compiles_one_graph(self, fresh_dynamo):
        sample = self.samples(torch.float64)[0]
        for name, (low, high) in self.scheduled.items():
            graphs = GraphRecorder()
            compiled = torch.compile(sample, fullgraph=True, backend=graphs)
            for step in range(20):
                value = low + (high - low) * step / 19
                rate = torch.tensor(value, dtype=torch.float64)
                result = compiled(*sample.differentiable, **{name: rate})
                torch.testing.assert_close(result, sample(**{name: value}))
            assert len(graphs) == 1, name
            torch._dynamo.reset()

    def test_numbers_and_sizes_may_vary_in_one_dynamic_graph(self, fresh_dynamo):
        sample = self.samples(torch.float64)[0]
        compiled = torch.compile(sample, fullgraph=True, dynamic=True, backend=GraphRecorder())
        for name, (low, high) in self.scheduled.items():
            for value in (low, (low + high) / 2, high):
                result = compiled(*sample.differentiable, **{name: value})
                torch.testing.assert_close(result, sample(**{name: value}))

    def test_exported_program_gives_equal_results_after_a_round_trip(self):
        sample = self.samples(torch.float32)[0]

        class Model(nn.Module):
            def forward(self, *tensors):
                return sample(*tensors)

        program = torch.export.export(Model(), sample.differentiable)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        torch.testing.assert_close(loaded(*sample.differentiable), sample())

    def test_autocast_gives_the_dtype_of_the_torch_counterpart(self):
        sample = self.samples(torch.float32)[0]
        with torch.autocast("cpu", torch.bfloat16):
            result, gradients = forward_and_gradients(sample, sample.leaves())
        assert result.dtype == self.autocast_dtype
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        torch.testing.assert_close(result.float(), sample(), **TOLERANCES[torch.bfloat16])

    def test_equal_calls_give_equal_bits(self):
        for sample in self.samples(torch.float32):
            assert torch.equal(sample(), sample()), sample.name

    def test_result_does_not_depend_on_the_number_of_threads(self):
        for sample in self.samples(torch.float32):
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(sample())
            if self.bitwise_across_threads:
                assert torch.equal(*results), sample.name
            torch.testing.assert_close(*results, **TOLERANCES[torch.float32])

    def test_works_in_a_forked_process(self):
        sample = self.samples(torch.float64)[0]
        expected = sample()
        torch.testing.assert_close(in_forked_child(sample).to(expected), expected)

    def test_bad_input_names_the_argument(self):
        for exception, name, call in self.bad_inputs():
            for backend in filter(can_run, ("cpp", "reference")):
                with regularizers.use_backend(backend), pytest.raises(exception, match=name):
                    call()


class RandomOperatorContract(OperatorContract):
    """What every operator with a ``seed`` and a ``generator`` passes besides."""

    def test_default_generator_reproduces_and_moves_on(self):
        sample = self.samples(torch.float32)[0]
        torch.manual_seed(3)
        first, second = sample(seed=None), sample(seed=None)
        torch.manual_seed(3)
        assert torch.equal(sample(seed=None), first)
        assert not torch.equal(first, second)

    def test_generator_reproduces_and_leaves_the_default_one_alone(self):
        sample = self.samples(torch.float32)[0]
        state = torch.get_rng_state()
        results = [sample(seed=None, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
        assert torch.equal(*results)
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_activation_checkpointing_regenerates_the_same_masks(self, use_reentrant):
        sample = self.samples(torch.float64)[0]
        for seed in (11, None):
            call = lambda *tensors, s=seed: sample(*tensors, seed=s)
            torch.manual_seed(9)
            expected = forward_and_gradients(call, sample.leaves())
            torch.manual_seed(9)
            again = lambda *tensors, c=call: checkpoint(c, *tensors, use_reentrant=use_reentrant)
            found = forward_and_gradients(again, sample.leaves())
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_generator_is_refused_inside_checkpointing(self, use_reentrant):
        sample = self.samples(torch.float64)[0]
        call = lambda *tensors: sample(*tensors, seed=None, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="generator"):
            checkpoint(call, *sample.leaves(), use_reentrant=use_reentrant)

    def test_generator_is_refused_inside_compile(self, fresh_dynamo):
        sample = self.samples(torch.float64)[0]
        generator = torch.Generator()
        call = lambda *tensors: sample(*tensors, seed=None, generator=generator)
        with pytest.raises(Exception, match="generator"):
            torch.compile(call, backend="eager", fullgraph=True)(*sample.differentiable)


def _graph_names(node: Any) -> set[str]:
    """Names of all autograd nodes behind a result."""
    found, queue = set(), [node]
    while queue:
        node = queue.pop()
        if node is not None:
            found.add(f"{node.name()} {type(node).__name__}")
            queue += [following for following, _ in node.next_functions]
    return found


class MethodContract:
    """What every module passes. Subclasses set:

    build: ``build(dtype)`` makes a fresh module in training mode, always with the same parameters.
    call: ``call(module, dtype)`` runs it on fixed inputs and returns a tensor that depends on its
        parameters.
    inert: ``inert(module)`` runs it in eval() and gives (result, what the same model without the
        method gives), or None.
    bad_inputs: (exception, argument named in the message, call).
    """

    def build(self, dtype: torch.dtype) -> nn.Module:
        raise AssertionError("a subclass defines this")

    def call(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        raise AssertionError("a subclass defines this")

    def inert(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        return None

    def bad_inputs(self) -> list[tuple[type[Exception], str, Callable[[], Any]]]:
        raise AssertionError("a subclass defines this")

    def _seeded_call(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(1)
        return self.call(module, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_runs_forward_and_backward_in_every_dtype(self, dtype):
        module = self.build(dtype)
        result = self._seeded_call(module, dtype)
        assert result.dtype == dtype
        result.sum().backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name

    def test_state_dict_round_trip_gives_equal_results(self):
        module, other = self.build(torch.float32), self.build(torch.float32)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1)
        other.load_state_dict(module.state_dict())
        assert torch.equal(
            self._seeded_call(module, torch.float32), self._seeded_call(other, torch.float32)
        )

    def test_copies_and_pickles_give_equal_results(self):
        module = self.build(torch.float32)
        expected = self._seeded_call(module, torch.float32)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(self._seeded_call(twin, torch.float32), expected)

    def test_compiles_to_one_graph(self, fresh_dynamo):
        module = self.build(torch.float32)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        self._seeded_call(compiled, torch.float32).sum().backward()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None for parameter in trained)

    def test_is_inert_in_evaluation(self):
        pair = self.inert(self.build(torch.float32).eval())
        if pair is not None:
            torch.testing.assert_close(*pair)

    def test_bad_input_names_the_argument(self):
        for exception, name, call in self.bad_inputs():
            with pytest.raises(exception, match=name):
                call()


def assert_equal_with_gradients(loss, expected, leaves):
    """Two losses and their gradients in ``leaves`` agree."""
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    )


def found_by_processes(process, world):
    """Return what ``process(rank)`` gives in each of ``world`` processes of one gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_in_group, (process, world, folder), nprocs=world)
        return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(world)]


def _run_in_group(rank, process, world, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    torch.save(process(rank), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.barrier()  # a process that leaves early aborts the other's threads
    torch.distributed.destroy_process_group()
