"""AdamR: Adam that decays towards the pretrained weights, in proportion to the gradients' size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from regularizers.ops._operator import accumulate_dtype
from regularizers.optim._batch import Batch, global_sums
from regularizers.optim.base import DecoupledOptimizer, Group

SUM = "exp_avg_sq_sum"


class AdamR(DecoupledOptimizer):
    r"""Step by Adam after a decay towards a reference, its strength set by all second moments.

    .. math::
        \bar\sigma &= \Big(\frac1n \sum \hat v\Big)^{1/2} \text{ over all } n
            \text{ numbers of all parameters } (1 \text{ where it is } 0) \\
        \theta &\leftarrow \theta - \lambda \frac{\alpha}{\bar\sigma} (\theta - \theta_0)
            - \alpha \frac{\hat m}{\sqrt{\hat v} + \epsilon}

    Fine-tuning with it keeps deltas small, so that :func:`darex` may drop more of them. All moments
    of a step are known before the first decay: the sums of :math:`\hat v` follow those of
    :math:`g^2`, so a step is one more read of the gradients and then the fused pass.

    Args:
        params: parameters or groups; float32, float64, bfloat16 or float16. A group with
            ``weight_decay=0`` (a classifier) is Adam's; it counts in the mean.
        reference: :math:`\theta_0`, a tensor for each of ``params`` in their order; the values
            before the first step when omitted. Copied, and saved with the state.
        lr: :math:`\alpha`, at least 0; a number or a tensor of one element.
        betas: decay rates of the moments, each in [0, 1).
        eps: :math:`\epsilon`, at least 0.
        weight_decay: :math:`\lambda`, at least 0.
        l1: decay by :math:`\mathrm{sign}(\theta - \theta_0)` instead of the difference.
        amsgrad: divide by the largest second moment so far; the mean is over the present ones.
        decay_mode: ``"gradient"``, or ``"prox"``, whose L1 stops at the reference.
        maximize: climb.
        foreach: as ``fused``; see :class:`DecoupledOptimizer`.
        capturable: changes nothing.
        fused: False for the step in plain PyTorch.
        rounding: of half-type parameters, see :class:`DecoupledOptimizer`.

    Raises:
        TypeError: complex or integer parameters; sparse gradients, at the step.
        ValueError: an option is out of its range, or ``reference`` does not fit ``params``.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
        >>> optimizer = AdamR([w], [torch.ones(2)], lr=0.1, weight_decay=1.0)
        >>> w.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> w.data
        tensor([1.9000, 1.0000])

    Source:
        DAREx, ICLR 2025, arXiv 2410.09344, as in the authors' ``AdamR.py``, whose reference is
        copied at every step.
    """

    scalars: ClassVar[tuple[str, ...]] = ("step", SUM)

    def __init__(
        self,
        params: Any,
        reference: Iterable[Tensor] | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-4,
        l1: bool = False,
        amsgrad: bool = False,
        *,
        decay_mode: Literal["gradient", "prox"] = "gradient",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        rounding: Literal["master", "stochastic", "nearest"] = "master",
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "l1": l1,
            "amsgrad": amsgrad,
            "decay_mode": decay_mode,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "fused": fused,
            "rounding": rounding,
        }
        super().__init__(params, options)
        if reference is not None:
            self._refer(list(reference))

    def _refer(self, reference: list[Tensor]) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        if len(reference) != len(params):
            raise ValueError(
                f"reference must have a tensor for each of {len(params)} parameters, "
                f"got {len(reference)}"
            )
        for param, value in zip(params, reference, strict=True):
            if value.shape != param.shape:
                raise ValueError(
                    f"reference must have the shapes of params, got {list(value.shape)} for a "
                    f"parameter of shape {list(param.shape)}"
                )
        for param, value in zip(params, reference, strict=True):
            self.state[param]["reference"] = _like_parameter(param).copy_(value.detach())

    def init_state(self, batch: Batch) -> None:
        """Begin the moments, their sums, and references that were not given."""
        super().init_state(batch)
        for param, state in zip(batch.params, batch.states, strict=True):
            if "reference" not in state:
                state["reference"] = _like_parameter(param).copy_(param.detach())
            if SUM in state:
                state[SUM] = state[SUM].to(param.device, torch.float64)

    def before_step(self, batches: list[Batch]) -> None:
        """Find the mean second moment of this step, before any parameter is stepped."""
        fresh = [batch for batch in batches if any(SUM not in s for s in batch.states)]
        for batch in fresh:  # new parameters, or a checkpoint of Adam
            moments = batch.locals([state["exp_avg_sq"] for state in batch.states])
            batch.sums.copy_(torch.stack([v.sum(dtype=torch.float64) for v in moments]))
        global_sums(fresh)
        for batch in fresh:
            for state, own in zip(batch.states, batch.sums.clone().unbind(), strict=True):
                state.setdefault(SUM, own)
            batch.vectors.pop(SUM, None)
        scale = None if self._transforms() else getattr(self, "grad_scale", None)
        for batch in batches:
            # Summed in float32: with float64 as their dtype norms would first copy the gradients.
            wide = accumulate_dtype(batch.dtype)
            grads = self._shards_of_grads(batch)
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype=wide)).double()
            norms = norms if scale is None else norms / scale.to(batch.device)
            batch.sums.copy_(norms.square())
        global_sums(batches)
        total: Tensor | None = None
        count = 0.0
        for batch in batches:
            beta2 = batch.group["betas"][1]
            sums, steps = batch.vector(SUM), batch.vector("step").double() + 1
            moved = beta2 * sums + (1 - beta2) * batch.sums
            if (found_inf := getattr(self, "found_inf", None)) is not None:
                moved = torch.where(found_inf.to(batch.device) != 0, sums, moved)
            sums.copy_(moved)
            corrected = (moved / (1 - beta2**steps)).sum()
            total = corrected if total is None else total + corrected.to(total.device)
            count += sum(param.numel() for param in batch.params)
        if total is not None:
            sigma = (total / max(count, 1.0)).sqrt()
            self._sigma = torch.where(sigma == 0, 1.0, sigma)

    def decay_strength(self, group: Group) -> float | Tensor:
        r"""Return :math:`\lambda / \bar\sigma`."""
        strength: Tensor = group["weight_decay"] / self._sigma
        return strength

    def penalty_of(self, group: Group) -> str:
        """Return the penalty of a group."""
        return "l1" if group["l1"] else "l2"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of Adam, whose references stay those of now."""
        params = [param for group in self.param_groups for param in group["params"]]
        own = {
            p: self.state[p]["reference"] for p in params if "reference" in self.state.get(p, {})
        }
        super().load_state_dict(state_dict)
        for param, reference in own.items():
            self.state[param].setdefault("reference", reference)


def _like_parameter(param: Tensor) -> Tensor:
    return torch.zeros_like(param.detach(), memory_format=torch.preserve_format)
