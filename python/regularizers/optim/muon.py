"""Muon: momentum orthogonalised by Newton-Schulz for matrices, AdamW for all other parameters."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_fraction,
    check_module,
    check_one_of,
)
from regularizers._shared.randomness import draw_seed
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.decay import stochastic_round
from regularizers.optim._batch import Batch, local
from regularizers.optim.base import DecoupledOptimizer, Group, as_scalar, placed_as, zeros_beside
from regularizers.optim.spectral import COEFFICIENTS, check_coefficients, iterate, normalised

ADJUSTMENTS = ("original", "match_rms_adamw", "none")
EXCLUDED = ("*embed*", "lm_head", "head", "heads")
# Matrices of one shape share products up to so many elements: on a CPU beyond that a product alone
# is as fast, a GPU is filled by it.
STACK_ELEMENTS = {"cpu": 1 << 17}
MOST_STACK_ELEMENTS = 1 << 24


class Muon(DecoupledOptimizer):
    r"""Step matrices along their orthogonalised momentum, and everything else by AdamW.

    Takes the positional arguments and the checkpoints of ``torch.optim.Muon``, **with other
    defaults** (``lr=0.02``, ``weight_decay=0.0``; torch has 1e-3 and 0.1), and takes, beyond it,
    convolutions, stacked experts, fused projections and the parameters that are no matrices.

    .. math::
        M &\leftarrow M + (1 - \mu)(G - M), \qquad
            U = (1 - \mu) G + \mu M \text{ (Nesterov) or } M \\
        W &\leftarrow (1 - \eta\lambda) W - \eta\, s\, \mathrm{NS}(U), \qquad
            s = \sqrt{\max(1, m / n)}

    No singular value of NS(U) is above 1.21 (see :func:`newton_schulz`), so a step changes the
    spectral norm of W by at most :math:`1.21\,\eta s`, and with decay it stays below
    :math:`\max(\lVert W_0 \rVert_2, 1.21\,s / \lambda)`: that is the regularization.

    A group says what its parameters are:

    * ``use_muon``: True (the default) for matrices, False for AdamW with the options ``aux``.
    * ``expert_dim``: the dimension that counts experts, each a matrix with a norm of its own.
      Without it a parameter ``[o, i, h, w]`` is the matrix ``[o, i h w]``.
    * ``chunks``: into how many equal parts, or parts of which sizes, the rows of a fused projection
      fall (query, key, value); each part is orthogonalised on its own.

    :func:`muon_param_groups` makes such groups of a model. Parameters without gradient are not
    touched, neither by their momentum nor by decay. Matrices of one shape, also transposed, share
    their products. Shards of DTensors (FSDP2) step on their own; the update of a sharded matrix is
    gathered and orthogonalised by every process, except that experts sharded by expert stay apart.
    ``p.grad`` is not written.

    Args:
        params: parameters or groups; float32, float64, bfloat16 or float16.
        lr: :math:`\eta`, at least 0; a number or a tensor of one element.
        weight_decay: :math:`\lambda`, at least 0.
        momentum: :math:`\mu`, in [0, 1).
        nesterov: look ahead by one gradient.
        ns_coefficients: (a, b, c) of :func:`newton_schulz`.
        eps: of :func:`newton_schulz`.
        ns_steps: iterations, at least 1.
        adjust_lr_fn: s: ``"original"`` (or None), ``"match_rms_adamw"`` for
            :math:`0.2 \sqrt{\max(m, n)}`, with which learning rates of AdamW carry over, ``"none"``
            for 1.
        aux: options of the groups with ``use_muon=False``, over lr=3e-4, betas=(0.9, 0.95),
            eps=1e-10, weight_decay=0; a group's own come first.
        ns_dtype: what :func:`newton_schulz` multiplies in.
        legacy_conv_scale: take s of a filter ``[o, i, h, w]`` from h and w, as the authors' code
            does, not from the matrix ``[o, i h w]``.
        maximize: climb.
        rounding: of bfloat16 and float16 parameters, as :class:`DecoupledOptimizer`.

    Raises:
        TypeError: complex or integer parameters, unknown entries of ``aux``; sparse gradients, at
            the step.
        ValueError: an option is out of its range; a Muon group has a parameter with fewer than two
            dimensions or without elements, or ``chunks`` do not divide its rows.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Muon([w], lr=0.1, ns_dtype=None)
        >>> w.grad = torch.diag(torch.tensor([3.0, 0.1]))
        >>> optimizer.step()
        >>> w.data  # the small singular value steps as far as the large one
        tensor([[-0.0697,  0.0000],
                [ 0.0000, -0.1129]])

    Source:
        Muon: Training and Trade-offs with Latent Attention and MoE, 2025, arXiv 2509.24406; the
        algorithm from K. Jordan's code, github.com/KellerJordan/Muon. Departures from that code:
        gradients are not overwritten, missing ones are skipped (there they count as zero and the
        decay acts), and filters take s from their flattened shape.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw", "none"] | None = None,
        *,
        aux: dict[str, Any] | None = None,
        ns_dtype: torch.dtype | None = torch.bfloat16,
        legacy_conv_scale: bool = False,
        maximize: bool = False,
        rounding: Literal["master", "stochastic", "nearest"] = "master",
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "legacy_conv_scale": legacy_conv_scale,
            "use_muon": True,
            "expert_dim": None,
            "chunks": None,
            "betas": (0.9, 0.95),
            "maximize": maximize,
            "rounding": rounding,
        }
        self._aux = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        known = {*options, "amsgrad", "decay_mode", "decay_order", "bias_correction", "fused"}
        for name in aux or {}:
            if name not in known:
                raise TypeError(f"aux must hold options of AdamW, got {name!r}")
        self._aux.update(aux or {})
        super().__init__(params, options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, after checking its options and parameters."""
        if not param_group.get("use_muon", True):
            param_group = {**self._aux, **param_group}
        super().add_param_group(param_group)

    def check_group(self, group: Group) -> None:
        """Raise unless the options of a group are sound and Muon's parameters are matrices."""
        super().check_group(group)
        if not group["use_muon"]:
            return
        check_fraction("momentum", group["momentum"])
        check_at_least("ns_steps", group["ns_steps"], 1)
        check_coefficients("ns_coefficients", group["ns_coefficients"])
        check_one_of("adjust_lr_fn", group["adjust_lr_fn"] or "original", ADJUSTMENTS)
        for param in group["params"]:
            _check_matrix(param, group)

    def init_state(self, batch: Batch) -> None:
        """Begin the momentum of matrices, the moments of the others."""
        if not batch.group["use_muon"]:
            super().init_state(batch)
            return
        for param, state in zip(batch.params, batch.states, strict=True):
            wide = accumulate_dtype(param.dtype)
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=param.device))
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = zeros_beside(param, wide)
            master = wide != param.dtype and batch.group["rounding"] == "master"
            if master and "master" not in state:
                state["master"] = zeros_beside(param, wide).copy_(param)

    def _is_fused(self, group: Group) -> bool:
        return not group["use_muon"] and super()._is_fused(group)

    def _step_hooks(self, batch: Batch) -> None:
        group = batch.group
        if not group["use_muon"]:
            super()._step_hooks(batch)
            return
        lr = as_scalar(group["lr"], batch.device)
        shrink = 1 - lr * group["weight_decay"]
        seed = None
        if batch.dtype == torch.bfloat16 and group["rounding"] == "stochastic":
            seed = draw_seed(None, None, batch.params[0])
        for members in _bins(batch.params, group):
            steps = _orthogonalised(self._updates(batch, members), group)
            for i, step in zip(members, steps, strict=True):
                param, state = local(batch.params[i]), batch.states[i]
                p = local(state["master"]) if "master" in state else param.to(step.dtype)
                p.mul_(shrink).addcmul_(step, lr.to(p.dtype), value=-1)
                if p is not param:
                    param.copy_(p if seed is None else stochastic_round(p, seed, i))

    def _updates(self, batch: Batch, members: list[int]) -> list[Any]:
        """Move some momenta on; return what is to be orthogonalised, placed as the parameters."""
        group, momentum = batch.group, batch.group["momentum"]
        params = [batch.params[i] for i in members]
        buffers = [local(batch.states[i]["momentum_buffer"]) for i in members]
        grads = [
            local(placed_as(self._seen(batch.grads[i], param, group), param))
            for param, i in zip(params, members, strict=True)
        ]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
        return [_placed(update, param) for update, param in zip(ahead, params, strict=True)]


def _bins(params: Sequence[Tensor], group: Group) -> list[list[int]]:
    """Return the parameters that are orthogonalised together: of equal shapes, and not too many.

    Shapes are those of whole tensors, so that all processes of a mesh gather in one order.
    """
    open_bins: dict[frozenset[tuple[int, int]], list[int]] = {}
    filled: dict[frozenset[tuple[int, int]], int] = {}
    room = STACK_ELEMENTS.get(params[0].device.type, MOST_STACK_ELEMENTS)
    bins = []
    for i, param in enumerate(params):
        rows, columns = _matrix_shape(param, group)
        sizes = _sizes(rows, group["chunks"])
        key = frozenset((min(size, columns), max(size, columns)) for size in sizes)
        if key not in open_bins or filled[key] + param.numel() > room:
            open_bins[key], filled[key] = [], 0
            bins.append(open_bins[key])
        open_bins[key].append(i)
        filled[key] += param.numel()
    return bins


def _orthogonalised(updates: list[Any], group: Group) -> list[Tensor]:
    """Return the scaled orthogonal steps of some updates, as this process's shards."""
    wholes = [_whole(update, group) for update in updates]
    chunks = [_matrices(whole, group) for whole in wholes]
    flat = [part for own in chunks for part in own]
    stacks: dict[frozenset[int], list[int]] = {}
    for i, part in enumerate(flat):
        stacks.setdefault(frozenset(part.shape[1:]), []).append(i)
    for members in stacks.values():
        parts = [flat[i] for i in members]
        dtype = group["ns_dtype"] or parts[0].dtype
        lying = [normalised(part, group["eps"], dtype) for part in parts]
        stack = lying[0] if len(lying) == 1 else torch.cat(lying)
        result = iterate(stack, group["ns_steps"], group["ns_coefficients"])
        pieces = result.split([len(part) for part in parts])
        for i, part, piece in zip(members, parts, pieces, strict=True):
            m, n = part.shape[1:]
            flat[i] = (piece.mT if m > n else piece).to(part.dtype)
    steps, begin = [], 0
    for update, whole, own in zip(updates, wholes, chunks, strict=True):
        rows = [part.mul_(_scale(part, whole, group)) for part in flat[begin : begin + len(own)]]
        begin += len(own)
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        steps.append(_shard(_as_parameter(joined, whole, group), update, group))
    return steps


def _matrix_shape(param: Tensor, group: Group) -> tuple[int, int]:
    """Return rows and columns of the matrix that a parameter, or each of its experts, is."""
    shape = list(param.shape)
    if group["expert_dim"] is not None:
        shape.pop(group["expert_dim"])
    return shape[0], math.prod(shape[1:])


def _matrices(update: Tensor, group: Group) -> list[Tensor]:
    """Return the matrices ``[k, m, n]`` of the k experts of an update, chunk by chunk."""
    dim = group["expert_dim"]
    stack = update.unsqueeze(0) if dim is None else update.movedim(dim, 0)
    stack = stack.flatten(2)
    return list(stack.split(_sizes(stack.shape[1], group["chunks"]), dim=1))


def _as_parameter(rows: Tensor, like: Tensor, group: Group) -> Tensor:
    """Return matrices ``[k, m, n]`` in the shape that they were made from."""
    dim = group["expert_dim"]
    if dim is None:
        return rows.reshape(like.shape)
    return rows.reshape(like.movedim(dim, 0).shape).movedim(0, dim)


def _sizes(rows: int, chunks: int | Sequence[int] | None) -> list[int]:
    if chunks is None:
        return [rows]
    return [rows // chunks] * chunks if isinstance(chunks, int) else list(chunks)


def _scale(part: Tensor, whole: Tensor, group: Group) -> float:
    """Return s for matrices ``[k, m, n]``."""
    m, n = part.shape[1:]
    if group["legacy_conv_scale"] and whole.dim() == 4 and group["expert_dim"] is None:
        m, n = whole.shape[2:]
    rule = group["adjust_lr_fn"]
    if rule == "none":
        return 1.0
    return 0.2 * math.sqrt(max(m, n)) if rule == "match_rms_adamw" else math.sqrt(max(1.0, m / n))


def _placed(update: Tensor, param: Any) -> Any:
    """Return a local update as a DTensor where its parameter is one."""
    if not hasattr(param, "device_mesh"):
        return update
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        update,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def _holds_whole_matrices(update: Any, group: Group) -> bool:
    dim = group["expert_dim"]
    dim = None if dim is None else dim % update.dim()
    return all(
        placement.is_replicate() or (dim is not None and placement.is_shard(dim))
        for placement in update.placements
    )


def _whole(update: Any, group: Group) -> Tensor:
    """Return an update with whole matrices, gathered from the other processes if it must be."""
    if not hasattr(update, "device_mesh"):
        whole: Tensor = update
        return whole
    if _holds_whole_matrices(update, group):
        return local(update)
    gathered: Tensor = update.full_tensor()
    return gathered


def _shard(step: Tensor, update: Any, group: Group) -> Tensor:
    """Return this process's part of a step made from :func:`_whole`."""
    if not hasattr(update, "device_mesh") or _holds_whole_matrices(update, group):
        return step
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = update.device_mesh, update.placements
    # Every process has the step: without a source rank nothing is sent.
    return local(distribute_tensor(step, mesh, placements, src_data_rank=None))


def _check_matrix(param: Tensor, group: Group) -> None:
    """Raise unless a parameter of a Muon group is a matrix, or a stack of them."""
    dim, chunks = group["expert_dim"], group["chunks"]
    shape = list(param.shape)
    if len(shape) < (2 if dim is None else 3):
        what = "two dimensions" if dim is None else "three dimensions with expert_dim"
        raise ValueError(
            f"params of a Muon group must have at least {what}, got {shape}; "
            "others belong in a group with use_muon=False"
        )
    if dim is not None and not -len(shape) <= dim < len(shape):
        raise ValueError(f"expert_dim must be a dimension of {shape}, got {dim}")
    if param.numel() == 0:
        raise ValueError(f"params of a Muon group must not be empty, got {shape}")
    if chunks is not None:
        rows, _ = _matrix_shape(param, group)
        sizes = _sizes(rows, chunks) if chunks else []
        if sum(sizes) != rows or min(sizes) < 1:
            raise ValueError(f"chunks must divide the {rows} rows of {shape}, got {chunks}")


def muon_param_groups(
    model: nn.Module,
    *,
    exclude: Sequence[str] = EXCLUDED,
    expert_dim: dict[str, int] | None = None,
    chunks: dict[str, int | Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    r"""Sort the parameters of a model into groups for :class:`Muon`.

    Matrices and filters go to Muon, all else to AdamW: parameters with fewer than two dimensions,
    embeddings, and what ``exclude`` names. The down and up projections of latent attention (MLA)
    are matrices like others. Parameters that need no gradient are left out.

    Patterns are those of ``fnmatch``. In ``exclude`` they are compared with each component of a
    name (``"head"`` fits ``head.weight``, not ``multi_head.weight``), in ``expert_dim`` and
    ``chunks`` with the end of the name (``"experts.w1"`` fits ``blocks.0.experts.w1``).

    Args:
        model: any module.
        exclude: names of modules or parameters for AdamW: embeddings and the output layer.
        expert_dim: which dimension of a stack of experts counts them, by name: a Mixture-of-Experts
            layer with a weight ``[E, m, n]`` has 0.
        chunks: parts of fused projections, by name. Without an entry, ``in_proj_weight`` (of
            ``torch.nn.MultiheadAttention``) and ``qkv.weight`` (of timm) are three equal parts
            where they have three times as many rows as columns.

    Returns:
        A list of groups, each with ``params``, ``param_names`` and ``use_muon``, and
        ``expert_dim`` and ``chunks`` where these apply.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a name in ``expert_dim`` or ``chunks`` fits no parameter.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.LayerNorm(8))
        >>> for group in muon_param_groups(model):
        ...     print(group["use_muon"], group["param_names"])
        True ['1.weight']
        False ['0.weight', '1.bias', '2.weight', '2.bias']
        >>> optimizer = Muon(muon_param_groups(model), lr=0.02)

    Source:
        arXiv 2509.24406 (which parameters); the patterns are the library's.
    """
    check_module("model", model)
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for p in module.parameters(recurse=False)
    }
    wanted = {**(expert_dim or {}), **(chunks or {})}
    groups: dict[Any, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        for pattern in [pattern for pattern in wanted if _ends_with(name, pattern)]:
            del wanted[pattern]
        if not param.requires_grad:
            continue
        excluded = any(
            fnmatch.fnmatchcase(part, pattern) for part in name.split(".") for pattern in exclude
        )
        matrix = param.dim() >= 2 and param.numel() > 0 and not excluded
        options: dict[str, Any] = {"use_muon": matrix and id(param) not in embeddings}
        if options["use_muon"]:
            dim, parts = _option(name, expert_dim), _option(name, chunks)
            if parts is None and _is_fused_attention(name, param):
                parts = 3
            if dim is not None:
                options["expert_dim"] = dim
            if parts is not None:
                options["chunks"] = parts
        group = groups.setdefault(repr(options), {"params": [], "param_names": [], **options})
        group["params"].append(param)
        group["param_names"].append(name)
    if wanted:
        raise ValueError(f"expert_dim and chunks must name parameters, got {sorted(wanted)}")
    return sorted(groups.values(), key=lambda group: not group["use_muon"])


def _ends_with(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _option(name: str, options: dict[str, Any] | None) -> Any:
    return next((v for pattern, v in (options or {}).items() if _ends_with(name, pattern)), None)


def _is_fused_attention(name: str, param: Tensor) -> bool:
    fused = name.endswith(("in_proj_weight", "qkv.weight"))
    return fused and param.dim() == 2 and param.shape[0] == 3 * param.shape[1]
