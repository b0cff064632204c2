"""One description of an operator, from which all its backends are registered with PyTorch."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from regularizers import backend

LIBRARY = torch.library.Library("regularizers", "FRAGMENT")
OPERATORS: dict[str, Operator] = {}


class Operator:
    """A fused operator: a schema, a reference, and the kernels that compute the same.

    ``regularizers::name`` picks the best kernel for a device by itself.
    ``regularizers::name_reference``, ``name_triton`` and ``name_cuda`` are operators of their own,
    so that a forced backend holds through compile, export and the backward pass: the autograd rule
    of each is handed the backend it belongs to. (On a CPU the automatic operator is the C++ one;
    forcing ``"cpp"`` only refuses to fall back.)

    Args:
        name: the operator's name in the namespace ``regularizers``.
        schema: arguments and results, ``"(Tensor x, ...) -> Tensor"``.
        fake: the shape rule, as for ``torch.library.register_fake``.
        reference: the specification in plain PyTorch; serves whatever has no kernel.
        triton: where the Triton kernel lives, ``"module:function"`` below
            ``regularizers.ops.triton``; imported at first use.
        cuda: whether csrc/cuda registers a kernel under ``name_cuda``; it goes before Triton.
        setup_context: as for ``torch.library.register_autograd``.
        backward: ``backward(backend, ctx, *grads)``, the autograd rule; ``backend`` is what
            ``Operator.kernel`` takes.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        triton: str | None = None,
        cuda: bool = False,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self._triton = triton
        self._kernels: dict[str | None, Any] = {}
        self._cuda_order = [
            kernel for kernel, exists in (("cuda", cuda), ("triton", triton is not None)) if exists
        ]
        OPERATORS[name] = self
        implementations: dict[str | None, Callable[..., Any] | None] = {
            None: reference,
            "reference": reference,
        }
        if triton is not None:
            implementations["triton"] = self._run_triton
        if cuda:
            implementations["cuda"] = None  # csrc/cuda brings it
        for which, implementation in implementations.items():
            self._register(which, schema, fake, implementation, setup_context, backward)
        LIBRARY.impl(name, self._run_on_cuda, "CUDA")
        # The C++ kernels registered when `backend` loaded them. Asked here, once: torch.compile
        # cannot trace the question.
        self._has_cpp: bool = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"regularizers::{name}", "CPU"
        )

    def _register(
        self,
        which: str | None,
        schema: str,
        fake: Callable[..., Any],
        implementation: Callable[..., Any] | None,
        setup_context: Callable[..., None] | None,
        backward: Callable[..., Any] | None,
    ) -> None:
        name = self.name if which is None else f"{self.name}_{which}"
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        if implementation is not None:
            LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"regularizers::{name}", fake, lib=LIBRARY)
        if backward is not None:
            torch.library.register_autograd(
                f"regularizers::{name}",
                functools.partial(backward, which),
                setup_context=setup_context,
                lib=LIBRARY,
            )
        self._kernels[which] = getattr(torch.ops.regularizers, name).default

    def __call__(self, *args: Any) -> Any:
        """Call the operator on the forced or the automatic backend."""
        forced = backend.forced_backend()
        if forced is not None:
            self._check_forced(forced, args[0].device)
        return self.kernel(forced)(*args)

    def kernel(self, which: str | None) -> Any:
        """Return the registered operator of a backend; None is the automatic one."""
        return self._kernels[None if which == "cpp" else which]

    @property
    def backends(self) -> list[str]:
        """Names of the backends that this operator has."""
        return ["reference", "cpp", *(name for name in ("triton", "cuda") if name in self._kernels)]

    def _check_forced(self, forced: str, device: torch.device) -> None:
        if forced not in self.backends:
            raise RuntimeError(
                f"backend {forced!r} cannot be used: {self.name} has {', '.join(self.backends)}"
            )
        kinds = {
            "cpp": ("cpu",),
            "cuda": ("cuda",),
            "triton": ("cuda", "cpu") if backend.interpreting() else ("cuda",),
        }
        if forced != "reference" and device.type not in kinds[forced]:
            raise RuntimeError(
                f"backend {forced!r} cannot be used: it has no kernel for tensors on {device}"
            )

    def serving(self, device_type: str) -> str:
        """Name the backend that serves a device while the choice is automatic."""
        if device_type == "cpu":
            return "cpp" if self._has_cpp else "reference"
        if device_type == "cuda":
            return next(
                (name for name in self._cuda_order if not backend.why_unavailable(name)),
                "reference",
            )
        return "reference"

    def _run_on_cuda(self, *args: Any) -> Any:
        return self._cuda_kernel(*args)

    @functools.cached_property
    def _cuda_kernel(self) -> Any:
        serving = self.serving("cuda")
        if serving == "cuda":
            return self._kernels["cuda"]
        return self._run_triton if serving == "triton" else self.reference

    def _run_triton(self, *args: Any) -> Any:
        return self._triton_kernel(*args)

    @functools.cached_property
    def _triton_kernel(self) -> Callable[..., Any]:
        assert self._triton is not None
        module, _, function = self._triton.partition(":")
        kernel: Callable[..., Any] = getattr(
            importlib.import_module(f"regularizers.ops.triton.{module}"), function
        )
        return kernel


def transformed() -> bool:
    """Tell whether functorch or forward-mode differentiation is at work: references only.

    A custom operator has no batching and no forward-mode rule: ``jvp`` through one gives a zero
    tangent and no error.
    """
    return forward_ad._current_level >= 0 or _inside_functorch()


def _inside_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# torch.compile is to ask while it traces, inside the transforms that it traces (it guards on their
# stack by itself); left to trace the call, it takes any answer for true. This is
# torch.compiler.assume_constant_result without its import of torch._dynamo, which takes seconds.
_inside_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def differentiate_backward(
    function: Callable[..., Tensor],
    grad_result: Tensor,
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Differentiate a backward pass through the reference: the rule for second derivatives.

    Args:
        function: the reference of the forward pass, ``function(*inputs) -> Tensor``.
        grad_result: the gradient that the backward pass was given.
        inputs: the tensors that it differentiated with respect to.
        cotangents: of the gradients of ``inputs``, which it returned; None where it returned none.

    Returns:
        The derivatives with respect to ``grad_result`` and to each of ``inputs``.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        grad_result, *inputs = (alias(tensor, create_graph) for tensor in (grad_result, *inputs))
        pairs = [(i, c) for i, c in zip(inputs, cotangents, strict=True) if c is not None]
        first = torch.autograd.grad(
            function(*inputs), [tensor for tensor, _ in pairs], grad_result, create_graph=True
        )
        return torch.autograd.grad(
            first,
            [grad_result, *inputs],
            [c.to(f.dtype) for (_, c), f in zip(pairs, first, strict=True)],
            create_graph=create_graph,
            allow_unused=True,
        )


def alias(tensor: Tensor, keep_history: bool) -> Tensor:
    """Return a tensor where derivatives stop, even if one input was computed from another."""
    if keep_history and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast asks for on a device, or None where it is off."""
    if not torch.amp.is_autocast_available(device.type):
        return None
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def full_precision(device: torch.device) -> torch.autocast:
    """Return a context in which autocast leaves products alone."""
    return torch.autocast(device.type, enabled=False)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that kernels compute and accumulate in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def loss_dtype(x: Tensor) -> torch.dtype:
    """Return the type of a loss of ``x``: its own, or the accumulation type under autocast."""
    return x.dtype if autocast_dtype(x.device) is None else accumulate_dtype(x.dtype)
