"""Operators that write into their arguments: no autograd, and saved tensors notice the change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regularizers import backend
from regularizers.ops._operator import LIBRARY, Operator


class InPlaceOperator(Operator):
    """An operator that returns nothing and writes into the tensors its schema marks ``(a!)``.

    It has no derivative: under grad mode a tensor that requires grad is refused, never passed by.
    The version counters of what it writes go up, so that autograd finds stale saved tensors.

    Args:
        name: as for :class:`Operator`.
        schema: with results ``()``.
        reference: as for :class:`Operator`.
        triton: as for :class:`Operator`.
        cpp: serves CPU tensors, in Python over a C++ kernel; None where that was not compiled.
        cuda: serves CUDA tensors, in Python over a CUDA kernel.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., None],
        triton: str,
        cpp: Callable[..., None] | None,
        cuda: Callable[..., None],
    ) -> None:
        super().__init__(
            name, schema, fake=lambda *_: None, reference=reference, triton=triton, cuda=True
        )
        if cpp is not None:
            LIBRARY.impl(name, cpp, "CPU")
            self._has_cpp = True
        LIBRARY.impl(f"{name}_cuda", cuda, "CUDA")
        for operator in self._kernels.values():
            _below_autograd(operator)

    def __call__(self, *args: Any) -> None:
        """Call the operator, whose first argument is a list, on the forced or automatic backend."""
        forced = backend.forced_backend()
        if forced is not None:
            self._check_forced(forced, args[0][0].device)
        self.kernel(forced)(*args)


def _below_autograd(operator: Any) -> None:
    """Register what happens to an operator of this kind above its kernels."""
    arguments = operator._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]

    def refuse_grad(keys: Any, *args: Any) -> None:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(args)):
            raise RuntimeError(
                f"{operator.name()} writes into its arguments and has no derivative: "
                "call it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def note_change(keys: Any, *args: Any) -> None:
        torch.autograd.graph.increment_version(_tensors([args[i] for i in written]))
        with torch._C._AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    name = operator.name()
    LIBRARY.impl(name, refuse_grad, "Autograd", with_keyset=True)
    LIBRARY.impl(name, note_change, "ADInplaceOrView", with_keyset=True)


def _tensors(args: Any) -> list[Tensor]:
    found = []
    for argument in args:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += [tensor for tensor in argument if isinstance(tensor, Tensor)]
    return found
