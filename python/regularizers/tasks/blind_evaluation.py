"""Blind trials in groups: who runs and who judges a trial does not know which policy it is."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from regularizers._shared.checks import check_at_least

_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # no vowels: no words
_CODE_LENGTH = 5
T = TypeVar("T")


class BlindTrial(NamedTuple):
    """One trial of a schedule: everything that its executor and its judge are told.

    Example:
        >>> BlindTrial(group=0, task="place", code="LSLRB").task
        'place'
    """

    group: int
    task: str
    code: str


class Estimate(NamedTuple):
    """A mean and its interval.

    Example:
        >>> Estimate(0.5, 0.4, 0.6).high
        0.6
    """

    mean: float
    low: float
    high: float


class BlindResult(NamedTuple):
    """What a blind evaluation found.

    Attributes:
        scores: each policy's score.
        differences: for each pair of policies, in the order given, the score of the first less that
            of the second. Both met the same conditions in each group, so these intervals are
            narrower than those of the scores tell.
        identities: the policy behind each code.

    Example:
        >>> trial = GroupedBlindTrial(["base", "dropout"], ["pick"], 2, seed=0)
        >>> for entry in trial.schedule():
        ...     trial.record(entry.code, trial.policy_of(entry.code) == "base")
        >>> trial.unblind().differences["base", "dropout"]
        Estimate(mean=1.0, low=1.0, high=1.0)
    """

    scores: dict[str, Estimate]
    differences: dict[tuple[str, str], Estimate]
    identities: dict[str, str]


class GroupedBlindTrial:
    r"""Compare policies by blind trials in groups, each holding every policy once per task.

    .. math::
        \bar y_p = \frac1G \sum_{g=1}^{G} \frac{1}{|\mathrm{tasks}_g|}
        \sum_{t \in \mathrm{tasks}_g} y_{pgt}

    A group is what is done in one go under one set of conditions (light, wear, operator). Within a
    group all trials come in random order under codes that say nothing; outcomes are averaged within
    the group and then over groups, so conditions that drift from group to group fall on all
    policies alike. Intervals are percentiles over bootstrap samples of whole groups.

    Executor and judge get the :meth:`schedule`, a program that starts the policies asks
    :meth:`policy_of`, outcomes go to :meth:`record`, and :meth:`unblind` refuses until all are in.

    Args:
        policies: names of the policies, two or more.
        tasks: names of the tasks.
        trials_per_task: how often each policy meets each task.
        group_size: tasks in a group, a divisor of their number; all when omitted. A group then has
            ``group_size`` times the number of policies trials, and there are ``trials_per_task``
            times (number of tasks / ``group_size``) groups, the tasks parted anew each time.
        seed: of codes, order and groups: an int. Keep it from those who are to be blind.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: names repeat or are too few, a number is out of range, or ``group_size`` does
            not divide the number of tasks.

    Example:
        >>> trial = GroupedBlindTrial(["base", "dropout"], ["pick", "place"], 10, seed=0)
        >>> len(trial.schedule()), trial.schedule()[0]
        (40, BlindTrial(group=0, task='place', code='LSLRB'))
        >>> for group, task, code in trial.schedule():
        ...     trial.record(code, trial.policy_of(code) == "base" or group % 2)
        >>> trial.unblind().scores["dropout"].mean
        0.5

    Source:
        "Rethinking Visual-Language-Action Model Scaling: Alignment, Mixture, and Regularization",
        2026, arXiv 2602.09722; reconstructed from the abstract's "grouped blind ensemble". A code
        stands for one trial, not for a policy within a group: a judge who sees a code twice would
        learn from the first time.
    """

    def __init__(
        self,
        policies: Sequence[str],
        tasks: Sequence[str],
        trials_per_task: int,
        *,
        group_size: int | None = None,
        seed: int,
    ) -> None:
        _check_names("policies", policies, 2)
        _check_names("tasks", tasks, 1)
        check_at_least("trials_per_task", trials_per_task, 1)
        size = len(tasks) if group_size is None else group_size
        check_at_least("group_size", size, 1)
        if len(tasks) % size:
            raise ValueError(
                f"group_size must divide the number of tasks ({len(tasks)}), got {size}"
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        self.policies = tuple(policies)
        self.tasks = tuple(tasks)
        self._outcomes: dict[str, float] = {}
        self._draw(trials_per_task, size, random.Random(seed))

    def _draw(self, trials_per_task: int, size: int, generator: random.Random) -> None:
        codes = _codes(trials_per_task * len(self.tasks) * len(self.policies), generator)
        self._schedule: list[BlindTrial] = []
        self._policy: dict[str, str] = {}
        self.num_groups = trials_per_task * len(self.tasks) // size
        for group in range(self.num_groups):
            part = group * size % len(self.tasks)
            if part == 0:
                order = _shuffled(self.tasks, generator)
            pairs = itertools.product(order[part : part + size], self.policies)
            for task, policy in _shuffled(tuple(pairs), generator):
                code = codes.pop()
                self._schedule.append(BlindTrial(group, task, code))
                self._policy[code] = policy

    def schedule(self) -> list[BlindTrial]:
        """Return all trials in the order in which to run them, without the policies' names."""
        return list(self._schedule)

    def policy_of(self, code: str) -> str:
        """Return the policy to run for a code: for the program that starts it, not for people."""
        self._check_code(code)
        return self._policy[code]

    def record(self, code: str, outcome: float) -> None:
        """Note the outcome of a trial: success or failure, or any finite number.

        Raises:
            TypeError: the outcome is not a number.
            ValueError: the code is unknown or has an outcome, or the outcome is not finite.
        """
        self._check_code(code)
        if code in self._outcomes:
            raise ValueError(f"code must be one without an outcome, got {code!r} again")
        if isinstance(outcome, str) or not hasattr(outcome, "__float__"):
            raise TypeError(f"outcome must be a number, got {type(outcome).__name__}")
        value = float(outcome)
        if not math.isfinite(value):
            raise ValueError(f"outcome must be finite, got {value}")
        self._outcomes[code] = value

    @property
    def outcomes(self) -> dict[str, float]:
        """Outcomes so far by code; recorded again, they continue a trial with the same seed."""
        return dict(self._outcomes)

    @property
    def pending(self) -> list[BlindTrial]:
        """Trials without an outcome, in order."""
        return [trial for trial in self._schedule if trial.code not in self._outcomes]

    def unblind(
        self, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
    ) -> BlindResult:
        """Return scores, differences and who was who; only when every outcome is in.

        Args:
            confidence: of the intervals, in (0, 1).
            num_resamples: bootstrap samples of the groups.
            seed: of the bootstrap.

        Returns:
            A :class:`BlindResult`. With a single group the ends of intervals are NaN: one group
            says nothing of how much groups differ.

        Raises:
            RuntimeError: a trial has no outcome.
            ValueError: an argument is out of range.
        """
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
        check_at_least("num_resamples", num_resamples, 1)
        if self.pending:
            raise RuntimeError(
                f"unblind must wait for all outcomes: {len(self.pending)} of "
                f"{len(self._schedule)} are missing, the next is {self.pending[0].code}"
            )
        means = self._group_means()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(
            self.num_groups, (num_resamples, self.num_groups), generator=generator
        )
        # How often each group was drawn: a product in place of [resamples, groups, policies].
        counts = torch.zeros(num_resamples, self.num_groups, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        resampled = counts @ means / self.num_groups

        def estimate(values: Tensor, samples: Tensor) -> Estimate:
            if self.num_groups == 1:
                return Estimate(values.mean().item(), float("nan"), float("nan"))
            ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
            low, high = samples.quantile(ends).tolist()
            return Estimate(values.mean().item(), low, high)

        scores = {
            policy: estimate(means[:, index], resampled[:, index])
            for index, policy in enumerate(self.policies)
        }
        differences = {
            (self.policies[i], self.policies[j]): estimate(
                means[:, i] - means[:, j], resampled[:, i] - resampled[:, j]
            )
            for i, j in itertools.combinations(range(len(self.policies)), 2)
        }
        return BlindResult(scores, differences, dict(self._policy))

    def _group_means(self) -> Tensor:
        """Return the mean outcome ``[groups, policies]``."""
        sums = torch.zeros(self.num_groups, len(self.policies), dtype=torch.float64)
        for group, _, code in self._schedule:
            sums[group, self.policies.index(self._policy[code])] += self._outcomes[code]
        trials = len(self._schedule) // (self.num_groups * len(self.policies))
        return sums / trials

    def _check_code(self, code: str) -> None:
        if code not in self._policy:
            raise ValueError(f"code must be one of the schedule, got {code!r}")


# random.Random promises the same numbers in every version of Python for random() alone, and a
# trial that goes on another day has to find the same codes.
def _shuffled(items: Sequence[T], generator: random.Random) -> list[T]:
    return sorted(items, key=lambda _: generator.random())


def _codes(count: int, generator: random.Random) -> list[str]:
    """Return different random words, long enough that few are ever drawn twice."""
    length = _CODE_LENGTH
    while len(_LETTERS) ** length < 100 * count:
        length += 1
    codes: dict[str, None] = {}
    while len(codes) < count:
        letters = (int(generator.random() * len(_LETTERS)) for _ in range(length))
        codes["".join(_LETTERS[letter] for letter in letters)] = None
    return list(codes)


def _check_names(name: str, values: Sequence[str], least: int) -> None:
    if isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of names, got one str")
    if len(values) < least or len(set(values)) < len(values):
        raise ValueError(f"{name} must be {least} or more different names, got {list(values)}")
