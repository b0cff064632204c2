"""Little data, much compute: tuned strong decay, ensembles of logits, distillation of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_floating,
    check_module,
    check_one_of,
    check_positive,
    check_probability,
)
from regularizers._shared.reductions import Reduction
from regularizers.ops._operator import accumulate_dtype

Average = Literal["logits", "probs"]


class LocalOptimum(NamedTuple):
    """What :func:`locally_optimal` found: a setting, its value, and whether that is certified.

    Attributes:
        setting: the best setting, by coordinate.
        value: what it evaluates to.
        certified: whether every neighbour was evaluated and none is better; False on an edge of
            the grid, behind which nothing was tried.

    Example:
        >>> LocalOptimum({"lr": 0.1}, 1.5, True).setting
        {'lr': 0.1}
    """

    setting: dict[str, Any]
    value: float
    certified: bool


def locally_optimal(
    evaluate: Callable[[dict[str, Any]], float],
    grid: Mapping[str, Sequence[Any]],
    start: Mapping[str, Any],
    *,
    order: Sequence[str] | None = None,
) -> LocalOptimum:
    r"""Tune hyperparameters by coordinate descent until no neighbour on the grid is better.

    From a setting, its neighbours differ by one place on the grid in one coordinate. The best
    neighbour is accepted until none improves. No setting is evaluated twice.

    The recipe tunes learning rate, epochs and weight decay together, each on powers of 2: with
    little data the best decay is some 30 times the customary 0.1, with other epochs and learning
    rate than without it.

    Args:
        evaluate: the loss of a setting, lower is better; NaN counts as infinite.
        grid: the values of each coordinate, in order. One value fixes a coordinate.
        start: a setting on the grid.
        order: coordinates to visit in turn, all of them, accepting the best neighbour in one before
            the next; fewer evaluations. When omitted the best neighbour over all coordinates
            is accepted.

    Returns:
        ``(setting, value, certified)``.

    Raises:
        TypeError: ``grid`` or ``start`` is no mapping.
        ValueError: the grid is empty or lists a value twice, ``start`` has other coordinates or
            is off the grid, or ``order`` does not list every coordinate once.

    Example:
        >>> grid = {"lr": [2.0**-k for k in range(8, 0, -1)], "weight_decay": [0.1, 0.4, 1.6, 6.4]}
        >>> loss = lambda s: abs(s["lr"] - 0.0625) + abs(s["weight_decay"] - 1.6)
        >>> locally_optimal(loss, grid, {"lr": 2.0**-8, "weight_decay": 0.1})
        LocalOptimum(setting={'lr': 0.0625, 'weight_decay': 1.6}, value=0.0, certified=True)

    Source:
        "Pre-training under infinite compute", 2025, arXiv 2509.14786; order and ties are
        reconstructed.
    """
    for name, mapping in (("grid", grid), ("start", start)):
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{name} must be a mapping, got {type(mapping).__name__}")
    values = {name: list(column) for name, column in grid.items()}
    if not values or not all(values.values()):
        raise ValueError(f"grid must have at least one value in each coordinate, got {dict(grid)}")
    for name, column in values.items():
        if any(column[i] in column[:i] for i in range(len(column))):
            raise ValueError(f"grid must list each value of {name!r} once, got {column}")
    if set(start) != set(values):
        raise ValueError(f"start must have the coordinates {list(values)}, got {list(start)}")
    for name, value in start.items():
        if value not in values[name]:
            raise ValueError(f"start must lie on the grid {values[name]} in {name!r}, got {value}")
    if order is not None and sorted(order) != sorted(values):
        raise ValueError(f"order must list {list(values)} once each, got {list(order)}")
    names = list(values)
    known: dict[tuple[int, ...], float] = {}

    def setting(place: tuple[int, ...]) -> dict[str, Any]:
        return {name: values[name][i] for name, i in zip(names, place, strict=True)}

    def value_at(place: tuple[int, ...]) -> float:
        if place not in known:
            value = float(evaluate(setting(place)))
            known[place] = math.inf if math.isnan(value) else value
        return known[place]

    def best_neighbour(place: tuple[int, ...], coordinates: Iterable[int]) -> tuple[int, ...]:
        best = place
        for c in coordinates:
            for i in (place[c] - 1, place[c] + 1):
                if 0 <= i < len(values[names[c]]):
                    other = (*place[:c], i, *place[c + 1 :])
                    if value_at(other) < value_at(best):
                        best = other
        return best

    everywhere = range(len(names))
    sweeps = [everywhere] if order is None else [(names.index(name),) for name in order]
    place = tuple(values[name].index(start[name]) for name in names)
    value_at(place)
    while True:
        before = place
        for sweep in sweeps:
            place = best_neighbour(place, sweep)
        if place == before:
            break
    # A sweep without a move has evaluated every neighbour on the grid; only its edges remain.
    on_edge = any(
        len(values[names[c]]) > 1 and place[c] in (0, len(values[names[c]]) - 1) for c in everywhere
    )
    certified = not on_edge and math.isfinite(known[place])
    return LocalOptimum(setting(place), known[place], certified)


def member_setting(
    single: Mapping[str, Any], *, weight_decay: str = "weight_decay", epochs: str = "epochs"
) -> dict[str, Any]:
    r"""Return how to train a member of an ensemble, from the best setting of a single model.

    .. math:: \lambda \to \lambda / 2, \qquad epochs \to 2\, epochs

    Members that would overfit alone ensemble better. Give each its own initialisation and its own
    order of the data.

    Args:
        single: the tuned setting.
        weight_decay: name of the decay in it.
        epochs: name of the epochs in it.

    Returns:
        A new setting.

    Raises:
        ValueError: one of the names is not in ``single``.

    Example:
        >>> member_setting({"lr": 1e-3, "weight_decay": 1.6, "epochs": 8})
        {'lr': 0.001, 'weight_decay': 0.8, 'epochs': 16}

    Source:
        "Pre-training under infinite compute", 2025, arXiv 2509.14786; the factors are
        reconstructed.
    """
    for name in (weight_decay, epochs):
        if name not in single:
            raise ValueError(f"single must have {name!r}, got {list(single)}")
    return {**single, weight_decay: single[weight_decay] / 2, epochs: single[epochs] * 2}


class LogitEnsemble(nn.Module):
    r"""Several models as one: the mean of their logits.

    .. math:: z(x) = \tfrac{1}{K} \sum_k z_k(x)

    The softmax of it is the normalised geometric mean of the members' distributions.

    Args:
        members: K >= 1 modules that map the same input to logits ``[*, C]``.
        stack: hold copies of the members' tensors, stacked into ``[K, ...]``, and run them as one
            batched model with ``torch.func.vmap``, in training too (dropout draws apart for each
            member; batch normalisation that updates its statistics cannot be batched). All members
            must be of one architecture. Else members run one after another, which is faster on a
            CPU; stacking saves launches on a GPU.

    Shape:
        What the members take to ``[*, C]``.

    Raises:
        TypeError: a member is no module.
        ValueError: there are none, they differ in more than the values of their tensors and are to
            be stacked, or their logits have different shapes.

    Example:
        >>> ensemble = LogitEnsemble([torch.nn.Linear(4, 3) for _ in range(5)])
        >>> x = torch.randn(2, 4)
        >>> ensemble(x).shape, ensemble.member_logits(x).shape
        (torch.Size([2, 3]), torch.Size([5, 2, 3]))

    Source:
        "Pre-training under infinite compute", 2025, arXiv 2509.14786.
    """

    def __init__(self, members: Iterable[nn.Module], *, stack: bool = False) -> None:
        super().__init__()
        listed = list(members)
        if not listed:
            raise ValueError("members must hold at least one module, got none")
        for member in listed:
            check_module("members", member)
        if stack:
            for other in listed[1:]:
                if not _same_architecture(listed[0], other):
                    raise ValueError(
                        "members must differ in the values of their tensors only, to be stacked, "
                        "got others (or hooks, of which that cannot be known)"
                    )
        self.num_members = len(listed)
        self.members = None if stack else nn.ModuleList(listed)
        self.stacked = _stack(listed) if stack else None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean logits."""
        return self.member_logits(*args, **kwargs).mean(0)

    def member_logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits of each member, ``[K, *, C]``."""
        if self.stacked is not None:
            skeleton = self.stacked
            state = {**dict(skeleton.named_parameters()), **dict(skeleton.named_buffers())}

            def call(state: dict[str, Tensor]) -> Tensor:
                result: Tensor = torch.func.functional_call(skeleton, state, args, kwargs)
                return result

            stacked: Tensor = torch.func.vmap(call, randomness="different")(state)
            return stacked
        logits = [member(*args, **kwargs) for member in self.members or ()]
        for result in logits[1:]:
            if result.shape != logits[0].shape:
                raise ValueError(
                    f"members must give logits of one shape, got {list(logits[0].shape)} "
                    f"and {list(result.shape)}"
                )
        return torch.stack(logits)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"num_members={self.num_members}, stack={self.stacked is not None}"


def _stack(members: list[nn.Module]) -> nn.Module:
    """Return a copy of the first member that holds all members' tensors, ``[K, ...]`` each."""
    skeleton = copy.deepcopy(members[0])
    made: dict[Tensor, Tensor] = {}  # a tensor that stands in several places stays one
    for own, *places in zip(
        skeleton.modules(), *(member.modules() for member in members), strict=True
    ):
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(own, kind).items():
                if tensor is None:
                    continue
                if tensor not in made:
                    rows = torch.stack([getattr(place, kind)[name].detach() for place in places])
                    made[tensor] = (
                        nn.Parameter(rows, requires_grad=tensor.requires_grad)
                        if kind == "_parameters"
                        else rows
                    )
                getattr(own, kind)[name] = made[tensor]
    return skeleton


_PLAIN = (bool, int, float, str, bytes, set, torch.dtype, torch.device, torch.Size)


def _same_architecture(a: nn.Module, b: nn.Module) -> bool:
    """Tell whether two modules surely differ in the values of their tensors at most."""
    if type(a) is not type(b) or list(a._modules) != list(b._modules):
        return False
    for tensors in ("_parameters", "_buffers"):
        mine, others = getattr(a, tensors), getattr(b, tensors)
        if list(mine) != list(others):
            return False
        for x, y in zip(mine.values(), others.values(), strict=True):
            if (x is None) != (y is None):
                return False
            if x is not None and (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
                return False
    own = {"_parameters", "_buffers", "_modules"}
    if set(vars(a)) != set(vars(b)):
        return False
    if not all(
        _same_value(value, vars(b)[key]) for key, value in vars(a).items() if key not in own
    ):
        return False
    children = zip(a._modules.values(), b._modules.values(), strict=True)
    return all(x is y if x is None or y is None else _same_architecture(x, y) for x, y in children)


def _same_value(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same_value, a, b))
    if isinstance(a, dict):
        return not a and not b  # of hooks nothing can be said
    return isinstance(a, _PLAIN) and bool(a == b)


def ensemble_nll(
    member_logits: Tensor,
    target: Tensor,
    *,
    average: Average = "logits",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return the negative log likelihood of an ensemble.

    .. math:: -\log \mathrm{softmax}\Bigl(\tfrac1K \sum_k z_k\Bigr)_y \quad (\text{logits}),
        \qquad -\log \tfrac1K \sum_k \mathrm{softmax}(z_k)_y \quad (\text{probs})

    Either is at most the mean of the members' own. The first equals it only where the members agree
    up to a constant a row.

    Args:
        member_logits: ``[K, *, C]``.
        target: classes ``[*]``, int64; -100 is ignored as in ``F.cross_entropy``.
        average: ``"logits"``, the paper's, or ``"probs"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A tensor with no dimensions, or ``[*]``; at least float32.

    Raises:
        TypeError: ``member_logits`` is no floating-point tensor.
        ValueError: the shapes do not fit, or an option is unknown.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])
        >>> ensemble_nll(logits, torch.tensor([0])), ensemble_nll(logits[:1], torch.tensor([0]))
        (tensor(0.3133), tensor(0.1269))

    Source:
        "Pre-training under infinite compute", 2025, arXiv 2509.14786.
    """
    check_floating("member_logits", member_logits)
    check_one_of("average", average, ("logits", "probs"))
    check_one_of("reduction", reduction, ("mean", "sum", "none"))
    if member_logits.dim() < 2 or 0 in (member_logits.shape[0], member_logits.shape[-1]):
        raise ValueError(
            f"member_logits must have shape [K, *, C], K and C >= 1, "
            f"got {list(member_logits.shape)}"
        )
    _check_target(target, member_logits[0])
    logits = member_logits.to(accumulate_dtype(member_logits.dtype))
    if average == "logits":
        logs = logits.mean(0).log_softmax(-1)
    else:
        logs = logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
    classes = logs.shape[-1]
    nll = F.nll_loss(logs.reshape(-1, classes), target.reshape(-1), reduction=reduction)
    return nll.reshape(target.shape) if reduction == "none" else nll


def _check_target(target: Tensor, logits: Tensor) -> None:
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must have shape {list(logits.shape[:-1])}, got {list(target.shape)}"
        )


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distil an ensemble, or a model of the student's own size, into a student.

    .. math:: (1 - \alpha)\, \mathrm{CE}(z_s, y) + \alpha T^2\,
        \mathrm{KL}\bigl(\mathrm{softmax}(z_t / T) \,\Vert\, \mathrm{softmax}(z_s / T)\bigr)

    The teacher gets no gradient. Ensemble distillation: ``teacher_logits = ensemble(x)`` of a
    :class:`LogitEnsemble`. Self-distillation: a teacher of the student's size, trained before it
    on the same data, the student beginning afresh.

    Args:
        student_logits: ``[*, C]``.
        teacher_logits: the same shape.
        target: classes ``[*]``, int64; where -100, neither term counts.
        alpha: weight of the teacher, in [0, 1].
        temperature: T, above 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A tensor with no dimensions, or ``[*]``; at least float32.

    Raises:
        TypeError: the logits are no floating-point tensors.
        ValueError: the shapes do not fit, or a number is out of range.

    Example:
        >>> logits, target = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> distill_loss(logits, logits, target, alpha=0.5)
        tensor(0.0635)

    Source:
        G. Hinton, O. Vinyals, J. Dean, 2015, arXiv 1503.02531, as used by "Pre-training under
        infinite compute", 2025, arXiv 2509.14786.
    """
    check_floating("student_logits", student_logits)
    check_floating("teacher_logits", teacher_logits)
    if student_logits.dim() < 1 or teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have one shape [*, C], "
            f"got {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    _check_target(target, student_logits)
    check_probability("alpha", alpha)
    check_positive("temperature", temperature)
    check_one_of("reduction", reduction, ("mean", "sum", "none"))
    dtype = accumulate_dtype(student_logits.dtype)
    classes = student_logits.shape[-1]
    student = student_logits.to(dtype).reshape(-1, classes)
    teacher = teacher_logits.detach().to(dtype).reshape(-1, classes)
    flat = target.reshape(-1)
    hard = F.cross_entropy(student, flat, reduction="none")
    soft = F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    counted = flat != -100
    loss = (1 - alpha) * hard + alpha * temperature**2 * soft.where(counted, 0)
    if reduction == "none":
        return loss.reshape(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()
