"""AdamHD: AdamW with a decoupled Huber decay, quadratic for small weights and linear for large."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from regularizers._shared.checks import check_fraction, check_one_of, check_positive
from regularizers._shared.reductions import reduce_rows
from regularizers.optim._batch import Batch, State, global_sums, local
from regularizers.optim.base import MODES, DecoupledOptimizer, Group
from regularizers.optim.decay import huber_decay_

# A tensor that starts at zero (a bias, a LoRA factor) would switch its decay off for ever.
LEAST_DELTA = 1e-12


class AdamHD(DecoupledOptimizer):
    r"""Step by Adam, then shrink by the proximal step of a Huber penalty.

    A drop-in for ``torch.optim.AdamW`` (same arguments, groups, schedulers, ``GradScaler``, and
    checkpoints in both directions) **with the paper's defaults**: ``betas=(0.9, 0.95)``,
    ``weight_decay=0.1``, decay after the step.

    .. math::
        \tilde\theta &= \theta - \alpha \frac{\hat m}{\sqrt{\hat v} + \epsilon}, \qquad
            \tau = \alpha\lambda \\
        \theta &\leftarrow \tilde\theta - \mathrm{clip}\!\left(
            \tilde\theta \frac{\tau}{1 + \tau}, -\tau\delta, \tau\delta\right)

    Weights up to :math:`(1 + \tau)\delta` shrink in proportion, as under AdamW; larger ones by the
    constant :math:`\tau\delta`, so a run takes at most :math:`\lambda\delta\sum_t\alpha_t` from a
    large weight. At equal :math:`\lambda` this force is nowhere above AdamW's, and AdamW's bound
    :math:`|\theta| \le \max(|\theta_0|, 1/\lambda)` holds only for :math:`\lambda\delta \ge 1`.

    Each tensor has its threshold, tracked in the same pass over memory:

    .. math::
        \delta_0 = c\,\overline{|\theta_0|}, \qquad
        \delta_t = \beta_\delta \delta_{t-1} + (1 - \beta_\delta)\,c\,\overline{|\theta_t|}

    and step t uses :math:`\delta_{t-1}`. Shards of DTensors (FSDP2) have one threshold together, by
    one all-reduce of one vector a step.

    Args:
        params: parameters or groups; float32, float64, bfloat16 or float16.
        lr: learning rate :math:`\alpha`, at least 0; a number or a tensor of one element.
        betas: decay rates of the moments, each in [0, 1).
        eps: :math:`\epsilon`, at least 0.
        weight_decay: :math:`\lambda`, at least 0. Groups with 0 track no thresholds.
        amsgrad: divide by the largest second moment so far.
        delta: a fixed threshold above 0 (``inf``: L2 decay); tracked when omitted.
        delta_scale: c, above 0.
        delta_beta: :math:`\beta_\delta`, in [0, 1).
        decay_mode: ``"prox"``, or ``"gradient"`` for
            :math:`\tau\,\mathrm{clip}(\theta, -\delta, \delta)`.
        decay_order: ``"after"`` the Adam step, or ``"before"`` it, as AdamW.
        bias_correction: divide the moments by :math:`1 - \beta^t`.
        maximize: climb.
        foreach: as ``fused``; see :class:`DecoupledOptimizer`.
        capturable: accepted for AdamW's sake: a step can always be captured.
        differentiable: must be False.
        fused: False for the step in plain PyTorch.
        rounding: of bfloat16 and float16 parameters: ``"master"`` (a float32 copy in the state),
            ``"stochastic"`` (bfloat16) or ``"nearest"``.

    Raises:
        TypeError: complex or integer parameters; sparse gradients, at the step.
        ValueError: an option is out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 0.3]))
        >>> optimizer = AdamHD([w], lr=0.1, weight_decay=1.0, delta=0.5)
        >>> w.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> w.data  # 0.3 / 1.1, and 3 - 0.1 * 0.5
        tensor([2.9500, 0.2727])

    Source:
        AdamHD, 2025, arXiv 2511.14721. The update and its prox are the paper's; the constants of
        the threshold (c = 1, beta = 0.999) are reconstructed. Authors' code was not available.
    """

    penalty: ClassVar[str] = "huber"
    scalars: ClassVar[tuple[str, ...]] = ("step", "delta")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        amsgrad: bool = False,
        *,
        delta: float | None = None,
        delta_scale: float = 1.0,
        delta_beta: float = 0.999,
        decay_mode: Literal["prox", "gradient"] = "prox",
        decay_order: Literal["after", "before"] = "after",
        bias_correction: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rounding: Literal["master", "stochastic", "nearest"] = "master",
    ) -> None:
        if differentiable:
            raise ValueError("differentiable must be False: the step has no derivative")
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "delta": delta,
            "delta_scale": delta_scale,
            "delta_beta": delta_beta,
            "decay_mode": decay_mode,
            "decay_order": decay_order,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "fused": fused,
            "rounding": rounding,
        }
        super().__init__(params, options)

    def check_group(self, group: Group) -> None:
        """Raise unless the options of a group are sound."""
        super().check_group(group)
        delta = group["delta"]
        if delta is not None and not delta > 0:
            raise ValueError(f"delta must be above 0, got {delta}")
        check_positive("delta_scale", group["delta_scale"])
        check_fraction("delta_beta", group["delta_beta"])

    def needs_sums(self, group: Group) -> bool:
        """Thresholds are tracked unless they are given or nothing decays."""
        decay = group["weight_decay"]
        return group["delta"] is None and (isinstance(decay, Tensor) or decay != 0)

    def init_state(self, batch: Batch) -> None:
        """Begin the moments."""
        super().init_state(batch)
        for param, state in zip(batch.params, batch.states, strict=True):
            if "delta" in state:
                state["delta"] = state["delta"].to(param.device, torch.float64)

    def thresholds(self, batch: Batch) -> Tensor | None:
        """Return the thresholds of this step."""
        fixed = batch.group["delta"]
        if fixed is not None or not self.needs_sums(batch.group):
            value = 1.0 if fixed is None else fixed
            return torch.full_like(batch.counts, value)
        return batch.vector("delta")

    def _threshold(self, state: State, group: Group, like: Tensor) -> Tensor | None:
        fixed = group["delta"]
        if fixed is None and self.needs_sums(group):
            tracked: Tensor = state["delta"]
            return tracked
        return torch.tensor(1.0 if fixed is None else fixed, dtype=torch.float64).to(like.device)

    def before_step(self, batches: list[Batch]) -> None:
        """Begin the thresholds of parameters that have none, over all processes together."""
        fresh = [
            batch
            for batch in batches
            if self.needs_sums(batch.group) and any("delta" not in s for s in batch.states)
        ]
        for batch in fresh:
            for i, param in enumerate(batch.locals(batch.params)):
                batch.sums[i] = param.abs().sum(dtype=torch.float64)
        global_sums(fresh)
        for batch in fresh:
            start = (batch.group["delta_scale"] * batch.sums / batch.counts).clamp_(LEAST_DELTA)
            for state, delta in zip(batch.states, start.unbind(), strict=True):
                state.setdefault("delta", delta)
            batch.vectors.pop("delta", None)
            batch.vector("delta")

    def after_step(self, batches: list[Batch], found_inf: Tensor | None) -> None:
        """Move the thresholds on."""
        tracked = [batch for batch in batches if self.needs_sums(batch.group)]
        global_sums(tracked)
        for batch in tracked:
            group, deltas = batch.group, batch.vector("delta")
            target = group["delta_scale"] * batch.sums / batch.counts
            moved = deltas.lerp(target, 1 - group["delta_beta"]).clamp_(LEAST_DELTA)
            if found_inf is not None:
                moved = torch.where(found_inf.to(batch.device) != 0, deltas, moved)
            deltas.copy_(moved)


def huber_penalty(
    p: Tensor, delta: float | Tensor, *, reduction: Literal["sum", "mean", "none"] = "sum"
) -> Tensor:
    r"""Return the Huber penalty of a tensor, the function whose decay AdamHD takes.

    .. math:: H_\delta(a) = \tfrac12 a^2 \text{ for } |a| \le \delta, \qquad
        \delta |a| - \tfrac12 \delta^2 \text{ beyond}

    Args:
        p: ``[*]``, a floating-point tensor; differentiable.
        delta: the threshold, above 0.
        reduction: ``"sum"``, ``"mean"`` or ``"none"``.

    Returns:
        A tensor with no dimensions, or ``[*]`` for ``"none"``.

    Raises:
        ValueError: ``delta`` is not above 0, or ``reduction`` is unknown.

    Example:
        >>> huber_penalty(torch.tensor([0.5, -3.0]), 1.0, reduction="none")
        tensor([0.1250, 2.5000])

    Source:
        arXiv 2511.14721; P. Huber, 1964.
    """
    check_one_of("reduction", reduction, ("sum", "mean", "none"))
    if not isinstance(delta, Tensor) and not delta > 0:
        raise ValueError(f"delta must be above 0, got {delta}")
    size = p.abs()
    inner = size.clamp(max=delta)
    value = inner * (size - inner / 2)
    return reduce_rows(value, reduction)


class HuberDecay:
    r"""Any optimizer with a decoupled Huber decay after its step.

    ``step()`` steps the wrapped optimizer, then shrinks its parameters by :func:`huber_decay_` with
    :math:`\tau = \alpha\lambda`, the learning rate being that of each group. Give the wrapped
    optimizer no decay of its own. Everything else (``zero_grad``, ``param_groups``,
    ``state_dict``, ...) is the wrapped optimizer's; learning-rate schedulers are given that one.

    Args:
        optimizer: the optimizer to wrap.
        weight_decay: :math:`\lambda`, at least 0. A group may have its own under the key
            ``huber_decay``.
        delta: threshold above 0, for all tensors; when omitted, the mean absolute value of each
            tensor at the time of the step.
        mode: ``"prox"`` or ``"gradient"``.

    Raises:
        ValueError: ``weight_decay``, ``delta`` or ``mode`` is out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 0.2]))
        >>> optimizer = HuberDecay(torch.optim.SGD([w], lr=0.1), weight_decay=1.0, delta=0.5)
        >>> w.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> w.data
        tensor([1.9500, 0.1818])

    Source:
        The decay of arXiv 2511.14721 alone; the threshold without moving average is the library's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        weight_decay: float = 0.1,
        delta: float | None = None,
        mode: Literal["prox", "gradient"] = "prox",
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        if delta is not None and not delta > 0:
            raise ValueError(f"delta must be above 0, got {delta}")
        check_one_of("mode", mode, MODES)
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.delta = delta
        self.mode = mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step the wrapped optimizer, then decay."""
        loss = self.optimizer.step(closure)
        for group in self.optimizer.param_groups:
            strength = group["lr"] * group.get("huber_decay", self.weight_decay)
            for param in group["params"]:
                if param.grad is None:
                    continue
                delta: float | Tensor = self.delta or LEAST_DELTA
                if self.delta is None:
                    size: Any = param.abs().mean()
                    size = size.full_tensor() if hasattr(size, "full_tensor") else size
                    delta = size.clamp(min=LEAST_DELTA)
                huber_decay_(local(param), strength, delta, mode=self.mode)
        return loss

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapped optimizer has."""
        if name == "optimizer":  # not yet set: unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)
