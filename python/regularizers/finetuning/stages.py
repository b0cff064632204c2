"""Staged training: which parameters of a model learn in which part of a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from types import TracebackType

from torch import Tensor, nn

_SLACK = 1e-9  # fractions add up, and progress arrives at a boundary, with rounding errors


class StagedTraining:
    r"""Train parts of a model in stages: switch ``requires_grad`` by name as a run goes on.

    .. math:: \mathrm{stage}(t) = \min \{ s : t < f_1 + \dots + f_s \}, \qquad
        \theta \text{ learns at } t \iff \text{its name fits a pattern of stage}(t)

    for the progress t in [0, 1] of a run and the stages' shares f of it.

    A parameter that does not learn gets no gradient, and what it had is set to None, so every
    optimizer of ``torch.optim`` skips it entirely: no step, no weight decay, no decay of its
    moments, which wait as they are for a later stage. One optimizer over ``model.parameters()``,
    made once, therefore serves all stages, with any parameter groups: a group without a learning
    parameter does nothing, and its learning rate stays where it is, for schedulers to change.
    Optimizers over :meth:`trainable_parameters` alone have to be made anew at each stage, and
    forget their moments.

    What freezing does not stop: buffers. Batch norms of frozen parts in training mode go on
    averaging; put them into ``eval()``. ``DistributedDataParallel`` notes at its construction which
    parameters learn: wrap anew where :meth:`step` returns True. ``torch.compile`` compiles anew at
    a stage's first step, by itself.

    The paper's study finds no consistent gain from staged training at scale. Measure it.

    Args:
        model: any module. A tied parameter learns if one of its names fits.
        stages: pairs ``(fraction, patterns)``: a stage's share of the run, above 0, all adding up
            to 1; and names of parameters, or patterns as of a shell (``"head.*"``, ``"*.bias"``;
            ``"*"`` is everything), of which each must fit a parameter.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the fractions are out of range or do not add up to 1, a stage has no pattern, or
            a pattern fits no parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with StagedTraining(model, [(0.25, ["2.*"]), (0.75, ["*"])]) as stages:
        ...     for step in range(8):
        ...         if stages.step(step / 8):
        ...             print(step, [p.requires_grad for p in model.parameters()])
        0 [False, False, True, True]
        2 [True, True, True, True]

    Source:
        "Rethinking Visual-Language-Action Model Scaling: Alignment, Mixture, and Regularization",
        2026, arXiv 2602.09722; reconstructed: the abstract names multi-stage tuning, and this is
        its standard form.
    """

    def __init__(self, model: nn.Module, stages: Sequence[tuple[float, Sequence[str]]]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not stages:
            raise ValueError("stages must have one or more pairs (fraction, patterns), got none")
        fractions = [fraction for fraction, _ in stages]
        for number, fraction in enumerate(fractions):
            if not 0.0 < fraction <= 1.0:
                raise ValueError(f"stages[{number}] must have a fraction in (0, 1], got {fraction}")
        if abs(math.fsum(fractions) - 1) > _SLACK:
            raise ValueError(f"stages must have fractions that add up to 1, got {fractions}")
        named = [
            (name, parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.is_floating_point() or parameter.is_complex()
        ]
        self._learning = [
            _matching(f"stages[{number}]", patterns, named)
            for number, (_, patterns) in enumerate(stages)
        ]
        self._parameters = {id(parameter): parameter for _, parameter in named}
        self._before = {key: p.requires_grad for key, p in self._parameters.items()}
        self._ends = [end - _SLACK for end in accumulate(fractions)][:-1]
        self.stage: int | None = None

    def step(self, progress: float) -> bool:
        """Go to the stage of this progress; return whether it is another than before.

        Args:
            progress: how much of the run is done, in [0, 1], before a step: ``step / total``. It
                need not grow.

        Raises:
            ValueError: ``progress`` is outside [0, 1].
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress must lie in [0, 1], got {progress}")
        stage = bisect_right(self._ends, progress)
        if stage == self.stage:
            return False
        self.stage = stage
        for key, parameter in self._parameters.items():
            self._switch(parameter, key in self._learning[stage])
        return True

    def trainable_parameters(self) -> Iterator[Tensor]:
        """Yield the parameters that learn now, each once, in the order of the model."""
        return (p for p in self._parameters.values() if p.requires_grad)

    def restore(self) -> None:
        """Give every parameter the ``requires_grad`` that it had when this object was made."""
        self.stage = None
        for key, parameter in self._parameters.items():
            self._switch(parameter, self._before[key])

    @staticmethod
    def _switch(parameter: Tensor, learns: bool) -> None:
        parameter.requires_grad_(learns)
        if not learns:
            parameter.grad = None  # a stale gradient would go on moving it

    def __enter__(self) -> StagedTraining:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def _matching(
    name: str, patterns: Sequence[str], named: Sequence[tuple[str, nn.Parameter]]
) -> set[int]:
    """Return the ids of the parameters that fit one of the patterns."""
    if isinstance(patterns, str):
        raise TypeError(f"{name} must have a sequence of patterns, got one str")
    if not patterns:
        raise ValueError(f"{name} must have one or more patterns, got none")
    found: set[int] = set()
    for pattern in patterns:
        fitting = {id(parameter) for path, parameter in named if fnmatchcase(path, pattern)}
        if not fitting:
            raise ValueError(f"{name} must have patterns that fit parameters, got {pattern!r}")
        found |= fitting
    return found
