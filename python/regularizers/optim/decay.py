"""Decoupled decay as functions of a parameter, for any optimizer, and schedules of its strength."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
    check_same_device,
)
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.decay import decay_amount

Mode = Literal["prox", "gradient"]
MODES = ("prox", "gradient")


def l2_decay_(p: Tensor, lr_times_wd: float | Tensor, *, mode: Mode = "gradient") -> Tensor:
    r"""Shrink a parameter in place as weight decay does.

    .. math:: p \leftarrow p - \tau p \quad\text{or, prox,}\quad p / (1 + \tau)

    Args:
        p: ``[*]``, a floating-point tensor; written.
        lr_times_wd: :math:`\tau`, learning rate times strength, at least 0; a number or a 0-d
            tensor.
        mode: ``"gradient"`` (as ``torch.optim.AdamW``) or ``"prox"``.

    Returns:
        ``p``.

    Raises:
        TypeError: ``p`` is not a floating-point tensor.
        ValueError: ``lr_times_wd`` is negative, or ``mode`` is unknown.

    Example:
        >>> l2_decay_(torch.tensor([1.0, -2.0]), 0.1)
        tensor([ 0.9000, -1.8000])

    Source:
        I. Loshchilov, F. Hutter, 2017, arXiv 1711.05101.
    """
    return _decay_(p, lr_times_wd, "l2", mode)


def l1_decay_(p: Tensor, lr_times_wd: float | Tensor, *, mode: Mode = "prox") -> Tensor:
    r"""Pull a parameter towards zero by a constant, in place: soft thresholding.

    .. math:: p \leftarrow p - \mathrm{clip}(p, -\tau, \tau)
        \quad\text{or, gradient,}\quad p - \tau\,\mathrm{sign}(p)

    The gradient form jumps over zero; the prox stops there.

    Args:
        p: as :func:`l2_decay_`.
        lr_times_wd: as :func:`l2_decay_`.
        mode: ``"prox"`` or ``"gradient"``.

    Returns:
        ``p``.

    Raises:
        TypeError: ``p`` is not a floating-point tensor.
        ValueError: ``lr_times_wd`` is negative, or ``mode`` is unknown.

    Example:
        >>> l1_decay_(torch.tensor([1.0, -0.05]), 0.1)
        tensor([0.9000, 0.0000])

    Source:
        The limit of :func:`huber_decay_` for small thresholds, arXiv 2511.14721.
    """
    return _decay_(p, lr_times_wd, "l1", mode)


def huber_decay_(
    p: Tensor, lr_times_wd: float | Tensor, delta: float | Tensor, *, mode: Mode = "prox"
) -> Tensor:
    r"""Shrink small entries in proportion and large ones by a constant, in place.

    .. math::
        p \leftarrow p - \mathrm{clip}\!\left(\frac{\tau}{1 + \tau} p, -\tau\delta, \tau\delta
        \right) \quad\text{or, gradient,}\quad p - \tau\,\mathrm{clip}(p, -\delta, \delta)

    The prox minimises :math:`\frac12 (z - p)^2 + \tau H_\delta(z)`; its kink is at
    :math:`(1 + \tau)\delta`. No entry moves by more than :math:`\tau\delta`, and no sign changes
    (the gradient form does change signs for :math:`\tau > 1`).

    Args:
        p: as :func:`l2_decay_`.
        lr_times_wd: as :func:`l2_decay_`.
        delta: threshold, above 0; a number (``inf``: L2) or a 0-d tensor.
        mode: ``"prox"`` or ``"gradient"``.

    Returns:
        ``p``.

    Raises:
        TypeError: ``p`` is not a floating-point tensor.
        ValueError: ``lr_times_wd`` is negative, ``delta`` is not above 0, or ``mode`` is unknown.

    Example:
        >>> huber_decay_(torch.tensor([0.5, 0.05, -0.5]), 0.1, 0.1)
        tensor([ 0.4900,  0.0455, -0.4900])

    Source:
        AdamHD, 2025, arXiv 2511.14721; the formula is the paper's.
    """
    return _decay_(p, lr_times_wd, "huber", mode, delta=_positive("delta", delta))


def delta_decay_(
    p: Tensor,
    reference: Tensor,
    lr_times_wd: float | Tensor,
    *,
    penalty: Literal["l2", "l1", "huber"] = "l2",
    delta: float | Tensor | None = None,
    mode: Mode = "gradient",
    mask: Tensor | None = None,
) -> Tensor:
    r"""Pull a parameter towards a reference, in place: decay of the difference.

    .. math:: p \leftarrow p - D_\tau(p - r)

    with D the step of the penalty as in the functions beside this one.

    Args:
        p: as :func:`l2_decay_`.
        reference: r, the shape of ``p``; the pretrained value, for example.
        lr_times_wd: as :func:`l2_decay_`.
        penalty: ``"l2"``, ``"l1"`` or ``"huber"``.
        delta: threshold of ``"huber"``.
        mode: ``"gradient"`` or ``"prox"``.
        mask: bool, the shape of ``p``: where to pull; everywhere when omitted.

    Returns:
        ``p``.

    Raises:
        TypeError: ``p`` is not a floating-point tensor, or ``mask`` not a bool one.
        ValueError: shapes or devices differ, or an option is out of its range.

    Example:
        >>> delta_decay_(torch.tensor([1.0, 3.0]), torch.ones(2), 0.5)
        tensor([1., 2.])

    Source:
        AdamR of DAREx, 2024, arXiv 2410.09344 (L2 and L1 towards the pretrained weights); L2-SP,
        X. Li, Y. Grandvalet, F. Davoine, 2018, arXiv 1802.01483.
    """
    check_one_of("penalty", penalty, ("l2", "l1", "huber"))
    if (delta is None) == (penalty == "huber"):
        raise ValueError("delta must be given for the penalty 'huber', and only for it")
    check_floating("reference", reference)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
    for name, tensor in (("reference", reference), ("mask", mask)):
        if tensor is not None:
            if tensor.shape != p.shape:
                raise ValueError(
                    f"{name} must have the shape of p, {list(p.shape)}, got {list(tensor.shape)}"
                )
            check_same_device(name, tensor, "p", p)
    threshold = None if delta is None else _positive("delta", delta)
    return _decay_(p, lr_times_wd, penalty, mode, delta=threshold, reference=reference, mask=mask)


def _positive(name: str, value: float | Tensor) -> float | Tensor:
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return value


@torch.no_grad()
def _decay_(
    p: Tensor,
    strength: float | Tensor,
    penalty: str,
    mode: str,
    *,
    delta: float | Tensor | None = None,
    reference: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    check_floating("p", p)
    check_one_of("mode", mode, MODES)
    if not isinstance(strength, Tensor):
        check_not_negative("lr_times_wd", strength)
    wide = accumulate_dtype(p.dtype)
    x = p.to(wide)
    amount = decay_amount(
        x if reference is None else x - reference.to(wide),
        torch.as_tensor(strength, dtype=wide, device=p.device),
        penalty,
        prox=mode == "prox",
        delta=None if delta is None else torch.as_tensor(delta, dtype=wide, device=p.device),
    )
    if mask is not None:
        amount = torch.where(mask, amount, 0)
    return p.copy_(x - amount)


class WeightDecayScheduler:
    r"""Change the weight decay of an optimizer's groups over a run.

    .. math::
        \lambda_t = \lambda_T + (\lambda_0 - \lambda_T)\, s(t / T), \qquad
        s(x) = \begin{cases} (1 + \cos \pi x) / 2 & \text{cosine} \\ 1 - x & \text{linear} \\
        (1 - x)^q & \text{poly} \end{cases}

    ``step()``, ``get_last_lr()`` (here :meth:`get_last_decay`), ``state_dict()`` and
    ``load_state_dict()`` are used as those of a learning-rate scheduler: step after the optimizer.
    The first step of a run uses :math:`\lambda_0`, and from step T on :math:`\lambda_T` stays.
    Groups with zero decay keep it. A ``weight_decay`` that is a tensor is written in place.

    Args:
        optimizer: any optimizer whose groups have a ``weight_decay``.
        total_steps: T, at least 1.
        final: :math:`\lambda_T`, at least 0.
        kind: ``"cosine"``, ``"linear"`` or ``"poly"``.
        power: q of ``"poly"``, above 0.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: a group has no ``weight_decay``, or an option is out of its range.

    Example:
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], weight_decay=0.2)
        >>> scheduler = WeightDecayScheduler(optimizer, 4, kind="linear")
        >>> for _ in range(2):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["weight_decay"]
        0.1

    Source:
        The annealed decay of SoMA, 2024, arXiv 2412.04077, among others. Its released scheduler
        never reaches step T and lets groups without decay rise; here both are as written above.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        final: float = 0.0,
        kind: Literal["cosine", "linear", "poly"] = "cosine",
        power: float = 0.9,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        check_at_least("total_steps", total_steps, 1)
        check_not_negative("final", final)
        check_one_of("kind", kind, ("cosine", "linear", "poly"))
        check_positive("power", power)
        for group in optimizer.param_groups:
            if "weight_decay" not in group:
                raise ValueError("optimizer must have a weight_decay in each of its groups")
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.final = final
        self.kind = kind
        self.power = power
        self.last_step = 0
        self.base_decays = [float(group["weight_decay"]) for group in optimizer.param_groups]

    def _remaining(self) -> float:
        x = min(self.last_step / self.total_steps, 1.0)
        if self.kind == "cosine":
            return (1 + math.cos(math.pi * x)) / 2
        return math.pow(1 - x, 1.0 if self.kind == "linear" else self.power)

    def get_last_decay(self) -> list[float]:
        """Return the decay of each group now."""
        return [
            self.final + (base - self.final) * self._remaining() if base else 0.0
            for base in self.base_decays
        ]

    def step(self) -> None:
        """Move on by one step and set the groups."""
        self.last_step += 1
        self._set()

    def _set(self) -> None:
        for group, value in zip(self.optimizer.param_groups, self.get_last_decay(), strict=True):
            if isinstance(group["weight_decay"], Tensor):
                group["weight_decay"].fill_(value)
            else:
                group["weight_decay"] = value

    def state_dict(self) -> dict[str, Any]:
        """Return all but the optimizer."""
        return {name: value for name, value in self.__dict__.items() if name != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved scheduler was."""
        self.__dict__.update(state_dict)
        self._set()
