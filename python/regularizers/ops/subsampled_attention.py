"""Gathered attention: every query attends to a list of keys, and only those are read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_same_device,
    check_same_dtype,
    check_tensor,
)
from regularizers.ops._operator import (
    Operator,
    accumulate_dtype,
    autocast_dtype,
    differentiate_backward,
    transformed,
)
from regularizers.ops.philox import philox_words


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_index: Tensor,
    *,
    query_index: Tensor | None = None,
    own: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    r"""Attend to the keys of a list: the cost of attention to n keys, whatever N is.

    .. math:: O_i = \sum_{j \in S_i} \frac{\exp(\mathrm{scale}\, q_i \cdot k_j + b_{ij})}
        {\sum_{l \in S_i} \exp(\mathrm{scale}\, q_i \cdot k_l + b_{il})} v_j

    All heads share the lists. With one list a sample, :math:`S_i` is that list for every query.
    With G lists, ``query_index`` says which queries see which list: the queries of its row g see
    the keys of row g (windows). A query that sees no key gets 0.

    The kernel gathers keys and values a tile at a time and keeps the softmax running, so memory is
    that of the inputs and nothing of size Nq x n is stored; the backward pass computes the weights
    again. Gradients of keys and values outside the lists are exactly 0.

    Args:
        q: ``[B, H, Nq, E]``; float32, float64, bfloat16 or float16. Any strides.
        k: ``[B, H, N, E]``.
        v: ``[B, H, N, Ev]``.
        key_index: int64 ``[B, n]`` or ``[B, G, n]``, or with 1 in the place of B for all samples
            alike; -1 stands for no key. A key stands in the lists of a sample at most once.
        query_index: int64 ``[B, G, m]``, or with 1 in the place of B: the queries of each list, -1
            for none. Every query stands in it once. None: all queries see the only list.
        own: bool ``[B, N]`` or ``[1, N]``: queries that see their own key (j = i) besides the list,
            in which it must not stand. Only with Nq = N and without ``query_index``.
        attn_bias: added to the logits, ``[B or 1, H or 1, Nq, N]``; read only where a query sees a
            key. Its gradient is made for every sample and head before it is summed.
        is_causal: hide key j from query i where j > i.
        scale: of the products; None for 1 / sqrt(E).

    Returns:
        ``[B, H, Nq, Ev]``, dtype of ``q``; in memory ``[B, Nq, H, Ev]``, ready for the projection
        that follows. Under autocast the low type, as ``scaled_dot_product_attention``.

    Raises:
        TypeError: a tensor is of the wrong type.
        ValueError: a shape or device does not fit; on a CPU also: an index is out of range or
            stands twice. Indices on CUDA are not checked.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 100, 16)
        >>> index = torch.tensor([[3, 14, 15, 92]])
        >>> out = gathered_attention(q, k, v, index)
        >>> dense = torch.nn.functional.scaled_dot_product_attention
        >>> torch.allclose(out, dense(q, k[:, :, index[0]], v[:, :, index[0]]), atol=1e-5)
        True

    Source:
        The operator under subsampled attention (2023, arXiv 2306.01705). The running softmax and
        the recomputing backward pass are those of FlashAttention (T. Dao et al., 2022, arXiv
        2205.14135).
    """
    check_projections(q, k, v)
    key_index = _lists("key_index", key_index, q)
    if query_index is not None:
        query_index = _lists("query_index", query_index, q)
        if query_index.shape[1] != key_index.shape[1]:
            raise ValueError(
                "query_index must have a row for each of the lists of key_index "
                f"({key_index.shape[1]}), got {query_index.shape[1]}"
            )
    elif key_index.shape[1] != 1:
        raise ValueError("query_index must be given where key_index has more lists than one")
    if own is not None:
        _check_own(own, q, k, query_index)
    if attn_bias is not None:
        check_bias(attn_bias, q, k)
    low = autocast_dtype(q.device)
    if low is not None and q.dtype != torch.float64:
        q, k, v = q.to(low), k.to(low), v.to(low)
        attn_bias = None if attn_bias is None else attn_bias.to(low)
    if transformed():
        return _attention(q, k, v, attn_bias, key_index, query_index, own, is_causal, scale)[0]
    result: Tensor = ATTENTION(q, k, v, attn_bias, key_index, query_index, own, is_causal, scale)[0]
    return result


def check_projections(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the shapes of queries, keys and values against each other."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have shape [B, H, tokens, features], got {list(tensor.shape)}"
            )
        check_same_dtype(name, tensor, "q", q)
        check_same_device(name, tensor, "q", q)
        if tensor.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} must have the samples and heads of q {list(q.shape[:2])}, "
                f"got {list(tensor.shape[:2])}"
            )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have the features of q ({q.shape[3]}), got {k.shape[3]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v must have the tokens of k ({k.shape[2]}), got {v.shape[2]}")


def _lists(name: str, index: Tensor, q: Tensor) -> Tensor:
    """Return lists of indices as [B or 1, G, n]."""
    check_tensor(name, index)
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {index.dtype}")
    check_same_device(name, index, "q", q)
    lists = index.unsqueeze(1) if index.dim() == 2 else index
    if lists.dim() != 3 or (lists.shape[0] != 1 and lists.shape[0] != q.shape[0]):
        raise ValueError(
            f"{name} must have shape [B or 1, entries] or [B or 1, lists, entries] for B = "
            f"{q.shape[0]}, got {list(index.shape)}"
        )
    return lists


def _check_own(own: Tensor, q: Tensor, k: Tensor, query_index: Tensor | None) -> None:
    check_tensor("own", own)
    if own.dtype != torch.bool:
        raise TypeError(f"own must be bool, got {own.dtype}")
    check_same_device("own", own, "q", q)
    if query_index is not None:
        raise ValueError("own must be None where query_index is given")
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"own must be None unless there are as many queries as keys, got {q.shape[2]} queries "
            f"and {k.shape[2]} keys"
        )
    fits = own.dim() == 2 and own.shape[1] == k.shape[2]
    if not fits or (own.shape[0] != 1 and own.shape[0] != q.shape[0]):
        raise ValueError(f"own must have shape [B or 1, {k.shape[2]}], got {list(own.shape)}")


def check_bias(attn_bias: Tensor, q: Tensor, k: Tensor) -> None:
    """Check the type and the shape of what is added to the scores."""
    check_floating("attn_bias", attn_bias)
    check_same_dtype("attn_bias", attn_bias, "q", q)
    check_same_device("attn_bias", attn_bias, "q", q)
    fits = attn_bias.dim() == 4 and attn_bias.shape[2:] == (q.shape[2], k.shape[2])
    if not fits or any(
        have != 1 and have != want
        for have, want in zip(attn_bias.shape[:2], q.shape[:2], strict=True)
    ):
        raise ValueError(
            f"attn_bias must have shape [B or 1, H or 1, Nq, N] for q {list(q.shape)} and "
            f"{k.shape[2]} keys, got {list(attn_bias.shape)}"
        )


class _Lists:
    """Lists in the form that the reference works with: one row a list, absent entries apart.

    Entries are sent to a spare row at the end where they are absent, so that writing back needs no
    selection.
    """

    def __init__(self, key_index: Tensor, query_index: Tensor | None, q: Tensor, k: Tensor) -> None:
        self.queries, self.keys = q.shape[2], k.shape[2]
        if query_index is None:
            query_index = torch.arange(self.queries, device=q.device)[None, None]
        self.row, self.key = query_index, key_index
        self.cell = query_index.clamp(min=0)[..., None] * self.keys
        self.cell = self.cell + key_index.clamp(min=0)[..., None, :]  # [B or 1, G, m, n]
        self.present = (query_index >= 0)[..., None] & (key_index >= 0)[..., None, :]

    def visible(self, causal: bool) -> Tensor:
        """Return which keys of its list a query sees, [B or 1, 1, G, m, n]."""
        seen = self.present
        if causal:
            seen = seen & (self.key[..., None, :] <= self.row[..., None])
        return seen.unsqueeze(1)

    @staticmethod
    def take(x: Tensor, index: Tensor) -> Tensor:
        """Gather rows: x [B, H, N, ...] and an index [B or 1, ...] give [B, H, index, ...]."""
        flat = index.clamp(min=0).flatten(1)[:, None]
        if x.dim() == 4:
            flat = flat.unsqueeze(-1)
        shape = (*x.shape[:2], -1, *x.shape[3:])
        rows: Tensor = x.gather(2, flat.expand(shape))
        return rows.view(*x.shape[:2], *index.shape[1:], *x.shape[3:])

    @staticmethod
    def put(rows: Tensor, index: Tensor, size: int) -> Tensor:
        """Write rows [B, H, index, ...] to [B, H, size, ...], zero elsewhere."""
        spare = torch.where(index < 0, size, index).flatten(1)[:, None]
        flat = rows.flatten(2, index.dim())
        if flat.dim() == 4:
            spare = spare.unsqueeze(-1)
        out = flat.new_zeros(*flat.shape[:2], size + 1, *flat.shape[3:])
        written: Tensor = out.scatter(2, spare.expand(flat.shape), flat)
        return written.narrow(2, 0, size)


def _logits(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    lists: _Lists,
    own: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Return the logits [B, H, G, m, n] of the lists, -inf where unseen; ``own`` adds a column."""
    logits = lists.take(q, lists.row) @ lists.take(k, lists.key).mT * scale
    if bias is not None:
        bias = bias.expand(*q.shape[:2], *bias.shape[2:])
        logits = logits + lists.take(bias.flatten(2), lists.cell)
    logits = logits.masked_fill(~lists.visible(causal), -math.inf)
    if own is None:
        return logits
    column = (q * k).sum(-1) * scale
    if bias is not None:
        column = column + bias.diagonal(dim1=2, dim2=3)
    column = column.masked_fill(~own[:, None], -math.inf)
    return torch.cat([logits, column[:, :, None, :, None]], -1)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_index: Tensor,
    query_index: Tensor | None,
    own: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend in plain PyTorch, and return the log-sum-exp [B, H, Nq] too; the specification."""
    dtype, factor = q.dtype, _scale(scale, q)
    q, k, v = (tensor.to(accumulate_dtype(dtype)) for tensor in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype)
    lists = _Lists(key_index, query_index, q, k)
    logits = _logits(q, k, bias, lists, own, causal, factor)
    seen = logits > -math.inf
    # The softmax of a row that sees nothing would be NaN, and so would its derivatives.
    empty = ~(seen | logits.isnan()).any(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    n = key_index.shape[-1]
    out = weights[..., :n] @ lists.take(v, key_index)
    if own is not None:
        out = out + weights[..., n:] * v.unsqueeze(2)
    lse = logits.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    if query_index is None:
        return out.squeeze(2).to(dtype), lse.squeeze(2)
    size = q.shape[2]
    return lists.put(out, query_index, size).to(dtype), lists.put(lse, query_index, size)


def _scale(scale: float | None, q: Tensor) -> float:
    return 1 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_index: Tensor,
    query_index: Tensor | None,
    own: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    _check_lists(q, k, key_index, query_index, own)
    out, lse = _attention(q, k, v, bias, key_index, query_index, own, causal, scale)
    return _token_major(q, v.shape[3]).copy_(out), lse.contiguous()


def _check_lists(
    q: Tensor, k: Tensor, key_index: Tensor, query_index: Tensor | None, own: Tensor | None
) -> None:
    """Check what the lists hold where that costs no synchronisation."""
    if q.device.type != "cpu":
        return
    listed = _count("key_index", key_index, k.shape[2])
    if query_index is not None and not bool((_count("query_index", query_index, q.shape[2])).all()):
        raise ValueError("query_index must name every query of a sample once")
    if own is not None and bool((own & listed).any()):
        raise ValueError("own must be False for the keys of key_index")


def _count(name: str, index: Tensor, size: int) -> Tensor:
    """Return which of ``size`` places an index names, [B or 1, size]."""
    flat = index.flatten(1)
    if bool(((flat < -1) | (flat >= size)).any()):
        raise ValueError(f"{name} must lie in [-1, {size}), got {flat.min()} to {flat.max()}")
    times = flat.new_zeros(flat.shape[0], size + 1)
    times.scatter_add_(1, torch.where(flat < 0, size, flat), torch.ones_like(flat))
    if bool((times[:, :size] > 1).any()):
        raise ValueError(f"{name} must name a place of a sample at most once")
    return times[:, :size] > 0


def _token_major(like: Tensor, features: int) -> Tensor:
    """Return an empty [B, H, tokens, features] that lies as [B, tokens, H, features] in memory."""
    batch, heads, tokens, _ = like.shape
    return like.new_empty(batch, tokens, heads, features).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    return _token_major(q, v.shape[3]), lse


def _backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_index: Tensor,
    query_index: Tensor | None,
    own: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With p the weights: dS = p (dO V' - sum(dO O)), dQ = dS K, dK = dS' Q, dV = p' dO."""
    dtype, factor = q.dtype, _scale(scale, q)
    grad, q, k, v, out = (t.to(accumulate_dtype(dtype)) for t in (grad, q, k, v, out))
    lists = _Lists(key_index, query_index, q, k)
    wide_bias = None if bias is None else bias.to(q.dtype)
    logits = _logits(q, k, wide_bias, lists, own, causal, factor)
    lse = lists.take(lse, lists.row).unsqueeze(-1)
    p = (logits - lse).exp().masked_fill(logits == -math.inf, 0)
    n = key_index.shape[-1]
    delta = (grad * out).sum(-1)
    rows = [lists.take(tensor, lists.row) for tensor in (q, grad, delta)]
    row_q, row_grad, row_delta = rows
    ds = p[..., :n] * (row_grad @ lists.take(v, key_index).mT - row_delta.unsqueeze(-1))
    grad_q = lists.put(ds @ lists.take(k, key_index), lists.row, q.shape[2])
    grad_k = lists.put(ds.mT @ row_q, key_index, k.shape[2])
    grad_v = lists.put(p[..., :n].mT @ row_grad, key_index, k.shape[2])
    cells = torch.where(lists.present, lists.cell, -1)
    grad_bias = lists.put(ds, cells, q.shape[2] * k.shape[2]) if wants_bias else q.new_empty(0)
    if own is not None:
        p_own = p[:, :, 0, :, n:]
        ds_own = p_own * ((grad * v).sum(-1) - delta).unsqueeze(-1)
        grad_q, grad_k = grad_q + ds_own * k, grad_k + ds_own * q
        grad_v = grad_v + p_own * grad
        if wants_bias:
            grad_bias[..., :: k.shape[2] + 1] += ds_own.squeeze(-1)
    result = _backward_fake(grad.to(dtype), q, k, v, bias, *(None,) * 7, wants_bias)
    for to, value in zip(
        result, (grad_q * factor, grad_k * factor, grad_v, grad_bias), strict=True
    ):
        to.copy_(value.view(to.shape))
    return result


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wants_bias = rest[-1]
    grads = [_token_major(t, t.shape[3]).to(grad.dtype) for t in (q, k, v)]
    batch, heads, queries, _ = q.shape
    shape = (batch, heads, queries, k.shape[2]) if wants_bias else (0,)
    return grads[0], grads[1], grads[2], grad.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, causal, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)
    ctx.causal, ctx.scale = causal, scale
    ctx.wants_bias = tensors[3] is not None and tensors[3].requires_grad


def _rule(which: str | None, ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    options = (ctx.causal, ctx.scale, ctx.wants_bias)
    *grads, grad_bias = ATTENTION_BACKWARD.kernel(which)(grad, *tensors, out, lse, *options)
    bias = tensors[3]
    return *grads, grad_bias.sum_to_size(bias.shape) if ctx.wants_bias else None, *(None,) * 5


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _, _, causal, scale, wants_bias = inputs
    ctx.save_for_backward(*tensors)
    ctx.causal, ctx.scale, ctx.wants_bias = causal, scale, wants_bias


def _backward_rule(_: str | None, ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """Differentiate through the reference; with a bias, through the bias of every head."""
    grad, q, k, v, bias, key_index, query_index, own = ctx.saved_tensors

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = bias) -> Tensor:
        lists = (key_index, query_index, own)
        return _attention(q, k, v, bias, *lists, ctx.causal, ctx.scale)[0]

    inputs = [q, k, v]
    if ctx.wants_bias:
        inputs.append(bias.expand(*q.shape[:2], *bias.shape[2:]))
    found = differentiate_backward(function, grad, inputs, cotangents[: len(inputs)])
    grad_bias = None
    if ctx.wants_bias and found[4] is not None:
        grad_bias = found[4].sum_to_size(bias.shape)
    return *found[:4], grad_bias, *(None,) * 8


ATTENTION = Operator(
    "gathered_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor key_index, Tensor? query_index, "
    "Tensor? own, bool causal, float? scale) -> (Tensor out, Tensor lse)",
    fake=_fake,
    reference=_reference,
    triton="subsampled_attention:gathered_attention",
    setup_context=_setup_context,
    backward=_rule,
)
ATTENTION_BACKWARD = Operator(
    "gathered_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor key_index, "
    "Tensor? query_index, Tensor? own, Tensor out, Tensor lse, bool causal, float? scale, "
    "bool wants_bias) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    fake=_backward_fake,
    reference=_backward_reference,
    triton="subsampled_attention:gathered_attention_backward",
    setup_context=_backward_context,
    backward=_backward_rule,
)


def _sample_words(seed: Tensor, samples: int, elements: int, step: int) -> Tensor:
    return philox_words(
        seed, elements, stream=torch.arange(samples, device=seed.device), step=step
    ).contiguous()


# The words of elements 0, 1, ... of streams 0, 1, ...: what the draws of a batch are made of.
SAMPLE_WORDS = Operator(
    "philox_sample_words",
    "(Tensor seed, SymInt samples, SymInt elements, SymInt step) -> Tensor",
    fake=lambda seed, samples, elements, step: seed.new_empty(samples, elements),
    reference=_sample_words,
    triton="subsampled_attention:philox_sample_words",
)
