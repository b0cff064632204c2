"""Reading what named submodules return while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
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
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules:
                raise ValueError(f"tap names no submodule of the model, got {name!r}")
        self._modules = {name: modules[name] for name in names}
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
        if name not in self._outputs:
            raise ValueError(f"tap {name!r} did not run")
        output = self._outputs[name]
        if not isinstance(output, Tensor):
            raise ValueError(f"tap {name!r} must return a tensor, got {type(output).__name__}")
        return output
