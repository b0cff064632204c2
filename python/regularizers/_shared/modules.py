"""Walking a model: replace the modules that a method wraps or converts, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


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
