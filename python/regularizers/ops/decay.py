"""One optimizer step over many tensors: Adam's update and the decoupled decay in one pass."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regularizers import backend
from regularizers._shared.checks import check_one_of, check_tensor
from regularizers._shared.scheduled import scheduled
from regularizers.ops._in_place import InPlaceOperator
from regularizers.ops._operator import LIBRARY, accumulate_dtype
from regularizers.ops.philox import philox_words
from regularizers.ops.tensor_table import Aligned, TensorTable, addresses

PENALTIES = ("none", "l2", "l1", "huber")
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Elements of a chunk. On a CPU: four streams of 64 KB, so that handing out a chunk costs nothing
# against working it off. On a GPU: 16 elements a thread of 256.
CHUNK_SIZES = {"cpu": 16384, "cuda": 4096}


def decoupled_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.0,
    penalty: str = "l2",
    prox: bool = False,
    decay_first: bool = True,
    deltas: Tensor | None = None,
    sums: Tensor | None = None,
    max_exp_avg_sqs: Sequence[Tensor] = (),
    masters: Sequence[Tensor] = (),
    references: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    maximize: bool = False,
    bias_correction: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    r"""Update parameters by Adam with a decoupled decay, all tensors in one pass, in place.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \alpha \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}, \qquad
        \tau = \alpha \lambda \\
        \theta &\leftarrow (\theta - u) - D_\tau(\theta - u - r)
        \quad\text{or, decay first,}\quad (\theta - D_\tau(\theta - r)) - u

    and D is the step of the penalty, :func:`decay_amount`. A float32 parameter costs 28 bytes of
    memory traffic, nothing else: read g, read and write p, m, v.

    Args:
        params: n tensors of one dtype and device; written.
        grads: gradients, of the same shapes and dtype.
        exp_avgs: first moments, float32 (float64 for float64); written.
        exp_avg_sqs: second moments, likewise; written.
        steps: float32 ``[n]``, how many steps each parameter has taken, this one included.
        lr: learning rate; a number or a 0-d tensor, as ``betas`` and ``weight_decay``.
        betas: decay rates of the moments.
        eps: added to the root.
        weight_decay: strength of the decay.
        penalty: ``"none"``, ``"l2"``, ``"l1"`` or ``"huber"``.
        prox: the proximal step instead of the gradient step.
        decay_first: decay the value before the step, as ``torch.optim.AdamW``; else that after it.
        deltas: float64 ``[n]``, the thresholds of ``"huber"``.
        sums: float64 ``[n]``; written: the sum of ``|param|`` after the step, before
            rounding, added up in a fixed order: the same bits for every number of threads.
        max_exp_avg_sqs: largest second moments so far (amsgrad); written. None: ``()``.
        masters: parameters in the dtype of the moments; written, and rounded to ``params``.
        references: what the decay pulls towards, in the dtype of ``params``; 0 when omitted.
        masks: bool, where the decay acts; everywhere when omitted.
        maximize: climb.
        bias_correction: divide the moments by :math:`1 - \beta^t`.
        grad_scale: float32 0-d, gradients are divided by it.
        found_inf: float32 0-d, nothing is written unless it is 0.
        seed: int64 0-d; round bfloat16 ``params`` stochastically with it. Tensor i is stream i.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: the lists differ in length or shape, or an option is unknown.
        RuntimeError: called under grad mode with tensors that require grad.

    Example:
        >>> p, g = torch.ones(3), torch.tensor([1.0, -1.0, 0.0])
        >>> m, v = torch.zeros(3), torch.zeros(3)
        >>> decoupled_adam_([p], [g], [m], [v], torch.ones(1), lr=0.1, weight_decay=0.1)
        >>> p
        tensor([0.8900, 1.0900, 0.9900])

    Source:
        Adam: D. Kingma, J. Ba, 2014, arXiv 1412.6980; decoupling: I. Loshchilov, F. Hutter, 2017,
        arXiv 1711.05101; agrees with ``torch.optim.AdamW``. Huber decay: arXiv 2511.14721.
    """
    check_one_of("penalty", penalty, PENALTIES)
    if not params:
        return
    columns = {
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "max_exp_avg_sqs": max_exp_avg_sqs,
        "masters": masters,
        "references": references,
        "masks": masks,
    }
    _check_columns(params, columns)
    _check_vectors(len(params), steps, deltas if penalty == "huber" else None, sums)
    if penalty == "huber" and deltas is None:
        raise ValueError("deltas must be given for the penalty 'huber'")
    if seed is not None and params[0].dtype != torch.bfloat16:
        raise ValueError(f"seed must come with bfloat16 params only, got {params[0].dtype}")
    like = params[0].detach()
    any_value = lambda name, value: None  # noqa: E731
    DECOUPLED_ADAM(
        list(params),
        *(list(column) for column in columns.values()),
        steps,
        deltas,
        sums,
        scheduled("lr", lr, like, any_value),
        scheduled("weight_decay", weight_decay, like, any_value),
        scheduled("betas[0]", betas[0], like, any_value),
        scheduled("betas[1]", betas[1], like, any_value),
        grad_scale,
        found_inf,
        seed,
        eps,
        penalty,
        prox,
        decay_first,
        maximize,
        bias_correction,
    )


def decay_amount(
    x: Tensor, tau: Tensor, penalty: str, *, prox: bool, delta: Tensor | None = None
) -> Tensor:
    r"""Return what a decay of strength :math:`\tau` takes away from ``x``.

    ========  ================================  ==========================================
    penalty   gradient                          prox
    ========  ================================  ==========================================
    l2        :math:`\tau x`                    :math:`x \tau / (1 + \tau)`
    l1        :math:`\tau\,\mathrm{sign}(x)`    :math:`\mathrm{clip}(x, -\tau, \tau)`
    huber     :math:`\tau\,\mathrm{clip}(x,     :math:`\mathrm{clip}(x \tau / (1 + \tau),
              -\delta, \delta)`                 -\tau\delta, \tau\delta)`
    ========  ================================  ==========================================

    Args:
        x: any tensor.
        tau: 0-d tensor, learning rate times weight decay.
        penalty: ``"none"``, ``"l2"``, ``"l1"`` or ``"huber"``.
        prox: the proximal step instead of the gradient step.
        delta: 0-d tensor, the threshold of ``"huber"``, above 0.

    Example:
        >>> x, tau = torch.tensor([0.5, 0.05]), torch.tensor(0.1)
        >>> x - decay_amount(x, tau, "huber", prox=True, delta=torch.tensor(0.1))
        tensor([0.4900, 0.0455])
    """
    if penalty == "none":
        return torch.zeros_like(x)
    if penalty == "l1":
        return x.clamp(-tau, tau) if prox else tau * x.sign()
    shrunk = x * (tau / (1 + tau) if prox else tau)
    if penalty == "l2":
        return shrunk
    assert delta is not None
    bound = torch.where(tau > 0, tau * delta, 0.0)  # 0 times an infinite delta is no bound
    return shrunk.clamp(-bound, bound)


def _check_columns(params: Sequence[Tensor], columns: dict[str, Sequence[Tensor]]) -> None:
    check_tensor("params", params[0])
    dtype, device = params[0].dtype, params[0].device
    if dtype not in TYPES:
        raise TypeError(f"params must be float32, float64, bfloat16 or float16, got {dtype}")
    wide = accumulate_dtype(dtype)
    due = {"grads": dtype, "references": dtype, "masks": torch.bool}
    optional = ("max_exp_avg_sqs", "masters", "references", "masks")
    for name, column in {"params": params, **columns}.items():
        if name in optional and not column:
            continue
        if len(column) != len(params):
            raise ValueError(f"{name} must hold {len(params)} tensors as params, got {len(column)}")
        want = dtype if name == "params" else due.get(name, wide)
        for tensor, param in zip(column, params, strict=True):
            check_tensor(name, tensor)
            if tensor.dtype != want:
                raise TypeError(f"{name} must be {want}, got {tensor.dtype}")
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{name} must have the shapes of params, "
                    f"got {list(tensor.shape)} for {list(param.shape)}"
                )
            if tensor.device != device:
                raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def _check_vectors(count: int, steps: Tensor, deltas: Tensor | None, sums: Tensor | None) -> None:
    vectors = (("steps", steps, torch.float32), ("deltas", deltas, torch.float64))
    for name, vector, dtype in (*vectors, ("sums", sums, torch.float64)):
        if vector is None:
            continue
        if vector.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {vector.dtype}")
        if vector.shape != (count,):
            raise ValueError(f"{name} must have shape [{count}], got {list(vector.shape)}")


def _reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    references: list[Tensor],
    masks: list[Tensor],
    steps: Tensor,
    deltas: Tensor | None,
    sums: Tensor | None,
    lr: Tensor,
    weight_decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: Tensor | None,
    eps: float,
    penalty: str,
    prox: bool,
    decay_first: bool,
    maximize: bool,
    bias_correction: bool,
) -> None:
    """Step one tensor after the other in plain PyTorch; the specification."""
    keep_old = None if found_inf is None else found_inf != 0

    def write(target: Tensor, value: Tensor) -> None:
        value = value.to(target.dtype)
        target.copy_(value if keep_old is None else torch.where(keep_old, target, value))

    for i, param in enumerate(params):
        wide = accumulate_dtype(param.dtype)
        x = masters[i] if masters else param.to(wide)
        g = grads[i].to(wide) * (-1 if maximize else 1)
        g = g if grad_scale is None else g / grad_scale
        m = beta1 * exp_avgs[i] + (1 - beta1) * g
        v = beta2 * exp_avg_sqs[i] + (1 - beta2) * g * g
        largest = torch.maximum(max_exp_avg_sqs[i], v) if max_exp_avg_sqs else v
        t = steps[i].double()
        correction1 = 1 - beta1**t if bias_correction else 1.0
        correction2 = (1 - beta2**t).sqrt() if bias_correction else 1.0
        update = lr / correction1 * m / (largest.sqrt() / correction2 + eps)
        base = x if decay_first else x - update
        amount = decay_amount(
            base - references[i].to(wide) if references else base,
            lr * weight_decay,
            penalty,
            prox=prox,
            delta=None if deltas is None else deltas[i],
        )
        if masks:
            amount = torch.where(masks[i], amount, 0)
        # A 0-d float32 tensor turns float64 where it meets a float64 scalar.
        new = ((x - amount) - update if decay_first else base - amount).to(wide)
        write(exp_avgs[i], m)
        write(exp_avg_sqs[i], v)
        if max_exp_avg_sqs:
            write(max_exp_avg_sqs[i], largest)
        if masters:
            write(masters[i], new)
        write(param, new if seed is None else stochastic_round(new, seed, i))
        if sums is not None:
            write(sums[i], new.abs().sum(dtype=torch.float64))


def stochastic_round(x: Tensor, seed: Tensor, stream: int = 0) -> Tensor:
    """Round float32 to bfloat16 upwards with the probability that keeps the mean; the reference.

    Args:
        x: float32 ``[*]``.
        seed: int64 0-d tensor; element e takes the low 16 bits of word e of the stream.
        stream: which stream.

    Example:
        >>> x = torch.full((10000,), 1.001)  # between 1 and 1.0078125
        >>> stochastic_round(x, torch.tensor(0)).unique()
        tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    words = philox_words(seed, x.numel(), stream=stream).reshape(x.shape) & 0xFFFF
    bits = x.contiguous().view(torch.int32)
    cut = ((bits + words.to(torch.int32)) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), cut, x).to(torch.bfloat16)


def _through_table(kernel: Callable[..., None]) -> Callable[..., None]:
    """Return the operator over lists that a kernel over a table serves."""

    def run(params: list[Tensor], *args: Any) -> None:
        columns, (steps, deltas, sums, *scalars) = args[:7], args[7:]
        aligned = Aligned(params)
        device = params[0].device
        table = TensorTable(
            [param.numel() for param in params], device, CHUNK_SIZES.get(device.type, 4096)
        )
        table.set("param", addresses(aligned.params))
        names = ("grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "reference", "mask")
        read_only = ("grad", "reference", "mask")
        for name, column in zip(names, columns, strict=True):
            if column:
                tensors = aligned.align(column, written=name not in read_only)
                table.set(name, addresses(tensors))
        *tensors, eps, penalty, prox, decay_first, maximize, bias_correction = scalars
        flags = (PENALTIES.index(penalty), prox, decay_first, maximize, bias_correction)
        launch(kernel, table, params[0].dtype, steps, deltas, sums, *tensors, eps, *flags)
        aligned.write_back()

    return run


def launch(
    kernel: Callable[..., None],
    table: TensorTable,
    dtype: torch.dtype,
    steps: Tensor,
    deltas: Tensor | None,
    sums: Tensor | None,
    *rest: Any,
) -> None:
    """Run a table kernel: the arguments of the schema below, with the table's own filled in."""
    partials = torch.empty(table.chunks.shape[0], dtype=torch.float64, device=table.device)
    kernel(
        table.rows,
        table.chunks,
        steps,
        deltas,
        partials,
        sums,
        *rest,
        TYPES.index(dtype),
        table.chunk_size,
    )


# The pass itself, for callers that keep their table: what is behind its addresses is theirs to keep
# alive, and a compiled graph cannot see that it is written. The list operator is for everyone else.
LIBRARY.define(
    "decoupled_adam_table(Tensor table, Tensor chunks, Tensor steps, Tensor? deltas, "
    "Tensor(a!) partials, Tensor(b!)? sums, Tensor lr, Tensor weight_decay, Tensor beta1, "
    "Tensor beta2, Tensor? grad_scale, Tensor? found_inf, Tensor? seed, float eps, int penalty, "
    "bool prox, bool decay_first, bool maximize, bool bias_correction, int type, int chunk_size) "
    "-> ()"
)


def _compiled_kernel(*args: Any) -> None:
    torch.ops.regularizers.decoupled_adam_table(*args)


def _triton_kernel(*args: Any) -> None:
    importlib.import_module("regularizers.ops.triton.decay").decoupled_adam_table(*args)


def table_kernel(device: torch.device) -> Callable[..., None] | None:
    """Return the kernel over a table that serves a device, or None where the reference does."""
    forced = backend.forced_backend()
    if forced is not None:
        DECOUPLED_ADAM._check_forced(forced, device)
    serving = forced or DECOUPLED_ADAM.serving(device.type)
    if serving == "triton":
        return _triton_kernel
    return None if serving == "reference" else _compiled_kernel


DECOUPLED_ADAM = InPlaceOperator(
    "decoupled_adam_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, Tensor[] references, Tensor[] masks, "
    "Tensor steps, Tensor? deltas, Tensor(f!)? sums, Tensor lr, Tensor weight_decay, "
    "Tensor beta1, Tensor beta2, Tensor? grad_scale, Tensor? found_inf, Tensor? seed, float eps, "
    "str penalty, bool prox, bool decay_first, bool maximize, bool bias_correction) -> ()",
    reference=_reference,
    triton="decay:decoupled_adam",
    cpp=_through_table(_compiled_kernel)
    if torch._C._dispatch_has_kernel_for_dispatch_key("regularizers::decoupled_adam_table", "CPU")
    else None,
    cuda=_through_table(_compiled_kernel),
)
