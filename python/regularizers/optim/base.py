"""What every optimizer with a decoupled decay shares: AdamW as five hooks, and one fused pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from regularizers._shared.checks import (
    FLOATING,
    check_fraction,
    check_not_negative,
    check_one_of,
)
from regularizers._shared.randomness import draw_seed
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.decay import (
    PENALTIES,
    decay_amount,
    decoupled_adam_,
    launch,
    stochastic_round,
    table_kernel,
)
from regularizers.optim._batch import Batch, State, local

Group = dict[str, Any]
MODES = ("prox", "gradient")
ORDERS = ("after", "before")
ROUNDINGS = ("master", "stochastic", "nearest")


class DecoupledOptimizer(Optimizer):
    r"""Adam with a decoupled decay, made of hooks; the base of the library's optimizers.

    A step of a parameter calls, in this order,

    1. ``transform_grad(p, grad, group)``: the gradient that the moments see;
    2. ``update_moments(p, grad, state, group)``;
    3. ``direction(p, grad, state, group)``: the step per unit of learning rate;
    4. ``apply(p, direction, lr)``: :math:`\theta \leftarrow \theta - \alpha u`;
    5. ``decay(p, reference, lr, state, group)``: takes the decay of ``reference``, the value after
       the step (``decay_order="after"``) or before it, from ``p``.

    A subclass overrides the ones that differ. While only ``transform_grad`` and the penalty are its
    own, steps run as one fused pass over all tensors (:func:`regularizers.ops.decoupled_adam_`);
    else a parameter at a time. ``decay_strength(group)`` and ``penalty_of(group)`` say how strong
    the decay is and which, in both. ``init_state`` adds entries to the state; ``before_step`` and
    ``after_step`` see all that is stepped. A state entry ``reference`` (dtype of the parameter) or
    ``mask`` (bool) of a parameter's shape makes the decay pull there, or act only there.

    Hooks compute in float32 (float64 for float64 parameters), whatever the parameter's dtype, and
    moments are kept so, also by :meth:`load_state_dict`. How bfloat16 and float16 parameters are
    rounded once at the end is ``rounding``: ``"master"`` keeps a full-precision copy in the state,
    ``"stochastic"`` (bfloat16) rounds at random without bias, ``"nearest"`` loses small steps.

    ``fused=None`` and ``foreach=None`` choose the fused pass. ``foreach=True`` is the fused pass
    too, ``fused=False`` or ``foreach=False`` the hooks. On a GPU a step reads nothing back, so it
    can be captured in a CUDA graph after a first step outside; ``lr`` as a 0-d tensor of that GPU
    then stays adjustable. ``capturable`` is there for the users of ``torch.optim.AdamW`` and
    changes nothing.

    Under ``torch.compile`` a step runs as it is, between the graphs: there is nothing left to fuse.
    DTensor parameters (FSDP2, tensor parallelism) are stepped on their local shards.

    Example:
        >>> class SignedAdamW(DecoupledOptimizer):
        ...     def transform_grad(self, p, grad, group):
        ...         return grad.sign()
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> defaults = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        >>> optimizer = SignedAdamW([w], defaults)
        >>> w.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> w.data
        tensor([0.9000, 1.1000])
    """

    penalty: ClassVar[str] = "l2"
    scalars: ClassVar[tuple[str, ...]] = ("step",)  # entries of a state that are one number
    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf

    def __init__(self, params: Any, defaults: Group) -> None:
        """Check the options and set up the groups.

        Args:
            params: parameters or groups, as for every optimizer of torch.
            defaults: ``lr``, ``betas``, ``eps``, ``weight_decay`` and the subclass's own; what else
                the base knows (``amsgrad``, ``maximize``, ``decay_mode``, ``decay_order``,
                ``bias_correction``, ``rounding``, ``foreach``, ``fused``, ``capturable``) may be
                left out.
        """
        known = {
            "amsgrad": False,
            "maximize": False,
            "decay_mode": "gradient",
            "decay_order": "before",
            "bias_correction": True,
            "rounding": "master",
            "foreach": None,
            "fused": None,
            "capturable": False,
        }
        self._batches: dict[int, list[Batch]] = {}
        super().__init__(params, {**known, **defaults})

    def transform_grad(self, p: Tensor, grad: Tensor, group: Group) -> Tensor:
        """Return the gradient that the moments see; never write into ``grad``.

        It comes in full precision, without the factor of a ``GradScaler``, negated to climb.
        """
        return grad

    def update_moments(self, p: Tensor, grad: Tensor, state: State, group: Group) -> None:
        """Update the moments in ``state``."""
        beta1, beta2 = group["betas"]
        state["exp_avg"].mul_(beta1).add_(grad * (1 - beta1))
        state["exp_avg_sq"].mul_(beta2).add_(grad * grad * (1 - beta2))
        if group["amsgrad"]:
            largest = state["max_exp_avg_sq"]
            largest.copy_(torch.maximum(largest, state["exp_avg_sq"]))

    def direction(self, p: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
        """Return the step per unit of learning rate."""
        second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        if not group["bias_correction"]:
            plain: Tensor = state["exp_avg"] / (second.sqrt() + group["eps"])
            return plain
        beta1, beta2 = group["betas"]
        t = state["step"].double()
        root = (second / _like(1 - beta2**t, second)).sqrt()
        corrected: Tensor = state["exp_avg"] / _like(1 - beta1**t, second) / (root + group["eps"])
        return corrected

    def apply(self, p: Tensor, direction: Tensor, lr: Tensor) -> None:
        """Take the step."""
        p.sub_(direction * _like(lr, direction))

    def decay(self, p: Tensor, reference: Tensor, lr: Tensor, state: State, group: Group) -> None:
        """Take the decay of ``reference`` from ``p``."""
        offset = reference
        if "reference" in state:
            offset = reference - state["reference"].to(reference.dtype)
        amount = decay_amount(
            offset,
            _like(lr * self.decay_strength(group), offset),
            self.penalty_of(group),
            prox=group["decay_mode"] == "prox",
            delta=self._threshold(state, group, offset),
        )
        p.sub_(torch.where(state["mask"], amount, 0) if "mask" in state else amount)

    def decay_strength(self, group: Group) -> float | Tensor:
        """Return the strength of the decay per unit of learning rate."""
        strength: float | Tensor = group["weight_decay"]
        return strength

    def penalty_of(self, group: Group) -> str:
        """Return the penalty of a group."""
        return self.penalty

    def _threshold(self, state: State, group: Group, like: Tensor) -> Tensor | None:
        """Return the threshold of the penalty for one parameter, where it has one."""
        return None

    def thresholds(self, batch: Batch) -> Tensor | None:
        """Return the thresholds of the penalty, float64 ``[n]``, where it has them."""
        return None

    def needs_sums(self, group: Group) -> bool:
        """Whether :meth:`after_step` reads ``batch.sums``, the sums of absolute parameters."""
        return False

    def init_state(self, batch: Batch) -> None:
        """Add what the states of a batch lack, before the step; called where the batch is new."""
        for param, state in zip(batch.params, batch.states, strict=True):
            group, wide = batch.group, accumulate_dtype(param.dtype)
            # In float32, exact up to 2^24; torch's is float64 where that is the default dtype.
            step = torch.as_tensor(state.get("step", 0.0))
            if step is not state.get("step") or step.dtype != torch.float32:
                state["step"] = step.detach().to(param.device, torch.float32, copy=True)
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = zeros_beside(param, wide)
            if group["amsgrad"] and "max_exp_avg_sq" not in state:
                state["max_exp_avg_sq"] = zeros_beside(param, wide)
            if wide != param.dtype and group["rounding"] == "master" and "master" not in state:
                state["master"] = zeros_beside(param, wide).copy_(param)

    def before_step(self, batches: list[Batch]) -> None:
        """Do what concerns all parameters, before the step."""

    def after_step(self, batches: list[Batch], found_inf: Tensor | None) -> None:
        """Do what concerns all parameters, after the step."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        stepped = [
            batch for index in range(len(self.param_groups)) for batch in self._prepare(index)
        ]
        self.before_step(stepped)
        for batch in stepped:
            steps = batch.vector("step")
            found = None if found_inf is None else found_inf.to(batch.device, torch.float32)
            steps += 1 if found is None else (found == 0)
            if self._is_fused(batch.group):
                self._step_fused(batch, found)
            elif found is None or not bool(found):
                self._step_hooks(batch)
        self.after_step(stepped, found_inf)
        return loss

    def _is_fused(self, group: Group) -> bool:
        if group["fused"] is False or (group["foreach"] is False and not group["fused"]):
            return False
        own = ("update_moments", "direction", "apply", "decay")
        return all(getattr(type(self), hook) is getattr(DecoupledOptimizer, hook) for hook in own)

    def _prepare(self, index: int) -> list[Batch]:
        """Return the batches of a group with the gradients of this step."""
        group = self.param_groups[index]
        params, grads = [], []
        for param in group["params"]:
            grad = param.grad
            if grad is not None:
                params.append(param)
                grads.append(grad)
        state = self.state
        states = [state[param] for param in params]
        batches = self._batches.get(index, [])
        if len(batches) == 1 and batches[0].group is group and batches[0].fits(params, states):
            batches[0].grads = grads
            return self._checked(batches)
        buckets: dict[Any, list[int]] = {}
        for i, param in enumerate(params):
            buckets.setdefault((param.device, param.dtype), []).append(i)
        found = []
        for place, indices in enumerate(buckets.values()):
            chosen = [params[i] for i in indices]
            own = [states[i] for i in indices]
            old = batches[place] if place < len(batches) else None
            if old is not None and old.group is group and old.fits(chosen, own):
                batch = old
            else:
                batch = Batch(group, chosen, own)
                self.init_state(batch)
                batch.settle()
            batch.grads = [grads[i] for i in indices]
            found.append(batch)
        self._batches[index] = found
        return self._checked(found)

    def _checked(self, batches: list[Batch]) -> list[Batch]:
        for batch in batches:
            if any(grad.layout is not torch.strided for grad in batch.grads):
                raise TypeError(f"{type(self).__name__} takes no sparse gradients")
        return batches

    def _step_fused(self, batch: Batch, found_inf: Tensor | None) -> None:
        group, device = batch.group, batch.device
        grads = self._shards_of_grads(batch)
        as_seen = self._transforms()  # unscaled and turned around already
        beta1, beta2 = group["betas"]
        scalars = [
            as_scalar(value, device)
            for value in (group["lr"], self.decay_strength(group), beta1, beta2)
        ]
        maximize = group["maximize"] and not as_seen
        grad_scale: Tensor | None = None if as_seen else getattr(self, "grad_scale", None)
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, torch.float32)
        seed = None
        if batch.dtype == torch.bfloat16 and group["rounding"] == "stochastic":
            seed = draw_seed(None, None, batch.params[0])
        steps, deltas = batch.vector("step"), self.thresholds(batch)
        sums = batch.sums if self.needs_sums(group) else None
        prox, first = group["decay_mode"] == "prox", group["decay_order"] == "before"
        kernel = table_kernel(device)
        table = None if kernel is None else batch.table(grads)
        if kernel is None or table is None:
            columns = {f"{name}s": column for name, column in batch.columns().items()}
            decoupled_adam_(
                batch.locals(batch.params),
                grads,
                steps=steps,
                lr=scalars[0],
                weight_decay=scalars[1],
                betas=(scalars[2], scalars[3]),
                eps=group["eps"],
                penalty=self.penalty_of(group),
                prox=prox,
                decay_first=first,
                deltas=deltas,
                sums=sums,
                maximize=maximize,
                bias_correction=group["bias_correction"],
                grad_scale=grad_scale,
                found_inf=found_inf,
                seed=seed,
                **columns,
            )
            return
        launch(
            kernel,
            table,
            batch.dtype,
            steps,
            deltas,
            sums,
            *scalars,
            grad_scale,
            found_inf,
            seed,
            group["eps"],
            PENALTIES.index(self.penalty_of(group)),
            prox,
            first,
            maximize,
            group["bias_correction"],
        )
        torch.autograd.graph.increment_version(batch.params)

    def _transforms(self) -> bool:
        return type(self).transform_grad is not DecoupledOptimizer.transform_grad

    def _seen(self, grad: Tensor, param: Tensor, group: Group) -> Tensor:
        """Return what ``transform_grad`` makes of a gradient: in full precision and unscaled."""
        grad = grad.to(accumulate_dtype(param.dtype))
        grad = -grad if group["maximize"] else grad
        scale = getattr(self, "grad_scale", None)
        grad = grad if scale is None else grad / scale.to(grad.device)
        return self.transform_grad(param, grad, group)

    def _shards_of_grads(self, batch: Batch) -> list[Tensor]:
        """Return local gradients in the dtype of the parameters, transformed by the hook."""
        grads = batch.grads
        if self._transforms():
            grads = [
                self._seen(grad, param, batch.group)
                for param, grad in zip(batch.params, grads, strict=True)
            ]
        if batch.sharded:
            grads = [
                local(placed_as(grad, param))
                for param, grad in zip(batch.params, grads, strict=True)
            ]
        dtype = batch.dtype
        return [grad if grad.dtype is dtype else grad.to(dtype) for grad in grads]

    def _step_hooks(self, batch: Batch) -> None:
        """Step one parameter after the other by the hooks."""
        group = batch.group
        lr = as_scalar(group["lr"], batch.device)
        seed = None
        if batch.dtype == torch.bfloat16 and group["rounding"] == "stochastic":
            seed = draw_seed(None, None, batch.params[0])
        for i, (param, raw, state) in enumerate(
            zip(batch.params, batch.grads, batch.states, strict=True)
        ):
            wide = accumulate_dtype(param.dtype)
            # Not Tensor.detach(): hooks may know a parameter by its identity.
            p = state["master"] if "master" in state else param.to(wide)
            grad = self._seen(raw, param, group)
            self.update_moments(p, grad, state, group)
            direction = self.direction(p, grad, state, group)
            reference = p.clone() if group["decay_order"] == "before" else p
            self.apply(p, direction, lr)
            self.decay(p, reference, lr, state, group)
            if self.needs_sums(group):
                batch.sums[i] = local(p).abs().sum(dtype=torch.float64)
            if p is not param:
                rounded = p if seed is None else stochastic_round(local(p), seed, i)
                local(param).copy_(local(rounded))

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, after checking its options and parameters."""
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def check_group(self, group: Group) -> None:
        """Raise unless the options of a group are sound; a subclass adds its own."""
        _check_scalar("lr", group["lr"])
        _check_scalar("weight_decay", group["weight_decay"])
        check_not_negative("eps", group["eps"])
        for i, beta in enumerate(group["betas"]):
            if not isinstance(beta, Tensor):
                check_fraction(f"betas[{i}]", beta)
        check_one_of("decay_mode", group["decay_mode"], MODES)
        check_one_of("decay_order", group["decay_order"], ORDERS)
        check_one_of("rounding", group["rounding"], ROUNDINGS)
        if group["foreach"] and group["fused"]:
            raise ValueError("foreach and fused must not both be True")
        for param in group["params"]:
            if param.dtype not in FLOATING:
                raise TypeError(
                    f"params must be float32, float64, bfloat16 or float16, got {param.dtype}"
                )
            if group["rounding"] == "stochastic" and param.dtype == torch.float16:
                raise ValueError(
                    "rounding must be 'master' or 'nearest' for float16 params, got 'stochastic'"
                )

    def __setstate__(self, state: State) -> None:
        """Restore from a pickle or a checkpoint; older ones may lack options."""
        super().__setstate__(state)
        self._batches = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of ``torch.optim.AdamW``.

        State keeps its precision (torch's loader casts it to the parameter's dtype), and options
        that the checkpoint does not know keep the values of this optimizer's groups.
        """
        loaded: dict[str, Any] = {}

        # The last of the hooks before loading: it sees the dict as it is loaded.
        def complete(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            loaded.update(given)
            if len(given["param_groups"]) == len(self.param_groups):
                loaded["param_groups"] = [
                    {**{k: v for k, v in own.items() if k != "params"}, **group}
                    for own, group in zip(self.param_groups, given["param_groups"], strict=True)
                ]
            return loaded

        handle = self.register_load_state_dict_pre_hook(complete)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        numbers = (i for group in loaded["param_groups"] for i in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for number, param in zip(numbers, params, strict=True):
            for name, value in loaded["state"].get(number, {}).items():
                if isinstance(value, Tensor) and name in self.scalars:
                    self.state[param][name] = value.to(param.device, copy=True)
                elif isinstance(value, Tensor) and value.shape == param.shape:
                    self.state[param][name] = _as_state(name, value, param)


def _as_state(name: str, value: Tensor, param: Tensor) -> Tensor:
    """Return a loaded entry as a tensor of its own, in full precision, laid out as ``param``."""
    moment = value.is_floating_point() and name != "reference"
    dtype = accumulate_dtype(param.dtype) if moment else value.dtype
    return zeros_beside(param, dtype).copy_(value)


def zeros_beside(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros with the shape, the layout and the device of a parameter."""
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a scheduled option as the kernels take it: float64, no dimensions."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=device)


def _like(scalar: Any, tensor: Tensor) -> Any:
    """Return a 0-d tensor as a DTensor where it meets one."""
    if hasattr(tensor, "device_mesh") and isinstance(scalar, Tensor):
        from torch.distributed.tensor import DTensor, Replicate

        mesh: Any = tensor.device_mesh
        return DTensor.from_local(scalar, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return scalar


def placed_as(grad: Any, param: Any) -> Tensor:
    """Return a gradient sharded as its parameter is."""
    if hasattr(param, "placements") and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    placed: Tensor = grad
    return placed


def _check_scalar(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor of one element, got {list(value.shape)}"
            )
        return
    check_not_negative(name, value)
