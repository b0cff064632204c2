"""Reading what named submodules return while a model runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn


class ActivationTap:
    """Context manager that keeps the outputs of named submodules of ``model``.

    The hooks are gone on exit, also after an error. A submodule that runs several times keeps its
    last output.

    Args:
        model: any module.
        names: qualified names of its submodules, as ``model.named_modules()`` gives them.

    Raises:
        ValueError: a name is unknown, or a tapped submodule returned something else than a tensor
            (when the output is asked for).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> with ActivationTap(model, ["0"]) as tap:
        ...     y = model(torch.ones(1, 2))
        >>> tap["0"].shape
        torch.Size([1, 3])
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._modules = _submodules(model, names)
        self._handles: list[Any] = []
        self._outputs: dict[str, Any] = {}

    def __enter__(self) -> ActivationTap:
        """Start to listen."""
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._keep(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks; the outputs stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._outputs[name] = output

        return hook

    def __getitem__(self, name: str) -> Tensor:
        """Return the last output of a tapped submodule."""
        return _tensor(self._outputs, name)


class StandingTap:
    """Hooks on named submodules that stand for good and listen during :meth:`run` alone.

    ``torch.compile`` traces through it, where hooks that come and go break the graph, and a model
    is copied and pickled together with it. Otherwise as :class:`ActivationTap`.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._listening = False
        self._outputs: dict[str, Any] = {}
        for name, module in _submodules(model, names).items():
            module.register_forward_hook(functools.partial(self._keep, name))

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """Return what ``call`` returns, and what the submodules returned meanwhile."""
        self._listening = True
        try:
            result = call(*args, **kwargs)
            return result, [_tensor(self._outputs, name) for name in self._names]
        finally:
            self._listening = False
            self._outputs.clear()

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._listening:
            self._outputs[name] = output


def _submodules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(f"tap names no submodule of the model, got {name!r}")
    return {name: modules[name] for name in names}


def _tensor(outputs: dict[str, Any], name: str) -> Tensor:
    if name not in outputs:
        raise ValueError(f"tap {name!r} did not run")
    output = outputs[name]
    if not isinstance(output, Tensor):
        raise ValueError(f"tap {name!r} must return a tensor, got {type(output).__name__}")
    return output
