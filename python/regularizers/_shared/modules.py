"""Walking a model: replace the modules that a method wraps or converts, run others behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def replace_modules(
    model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Put another module in the place of some modules of ``model``, in place; return the model.

    Modules are visited in the order of registration, parents before their children. What is put
    in is not visited itself, so a wrapper may hold the module that it replaces. A module that
    stands in several places stays one module in all of them.

    Args:
        model: any module; it may be replaced itself, so use what is returned.
        replacement: called with a module's qualified name (``""`` for the model) and the module;
            returns the module to put there, or None to leave it and visit its children.
    """
    done: dict[nn.Module, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> nn.Module:
        if module not in done:
            new = replacement(name, module)
            done[module] = module if new is None else new
            if new is None:
                # Not named_children(), which leaves out the second place of a shared module.
                for child_name, child in list(module._modules.items()):
                    if child is not None:
                        path = f"{name}.{child_name}" if name else child_name
                        module._modules[child_name] = visit(path, child)
        return done[module]

    return visit("", model)


def run_after(module: nn.Module, follower: nn.Module, name: str) -> None:
    """Make ``module`` return ``follower(output)`` from now on; the follower becomes its child.

    Names of parameters and keys of the state dict stay as they are. ``train()``, ``eval()`` and
    ``to()`` reach the follower with its parent.

    Args:
        module: any module that returns one tensor; a ``torch.nn.Sequential`` is appended to.
        follower: the module to run on what ``module`` returns.
        name: the follower's name among the children of ``module``, where that has names.

    Raises:
        ValueError: ``module`` has an attribute of that name already.
    """
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        module.append(follower)
        return
    if hasattr(module, name):
        raise ValueError(f"{type(module).__name__} has a {name!r} already")
    module.add_module(name, follower)
    module.register_forward_hook(functools.partial(_run_follower, name))


def _run_follower(name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
    return getattr(module, name)(output)
