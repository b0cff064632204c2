"""Subsampled self-attention: in training, every query sees a random part of the keys."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_not_negative,
    check_one_of,
    check_same_device,
    check_tensor,
)
from regularizers._shared.randomness import draw_seed
from regularizers.ops._operator import transformed
from regularizers.ops.subsampled_attention import (
    SAMPLE_WORDS,
    check_bias,
    check_projections,
    gathered_attention,
)

Mode = Literal["unbiased", "local"]
MODES = ("unbiased", "local")
_OFFSET_STEP = 2  # steps 0 and 1 of a token are its jitter


def subsampled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_keys: int | None = None,
    keep_ratio: float | None = None,
    mode: Mode = "unbiased",
    window: int | None = None,
    sigma: float | None = None,
    grid: tuple[int, ...] | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    shared_across_batch: bool = False,
    always_include_self: bool | None = None,
    training: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Attend to n of N keys, drawn anew in every call, at n / N of the cost; dense in evaluation.

    .. math:: O_i = \sum_{j \in S_i} \operatorname{softmax}_{j \in S_i}
        (\mathrm{scale}\, q_i \cdot k_j + b_{ij})\, v_j

    ``"unbiased"``: a sample has one set S of n keys, uniform without replacement, for all queries
    and heads. The softmax over S renormalises by itself, nothing is rescaled: a ratio estimate of
    dense attention that converges to it as n grows to N. ("Unbiased" is the choice of keys.)

    ``"local"``: tokens are put in the order of their jittered places :func:`jitter_permutation`,
    the order is rotated by a random offset and cut into windows of w tokens, and every token
    attends to its window. Near tokens meet often, far ones seldom: never at sigma = 0, as often as
    any at sigma = infinity. The order is closed to a ring, so one window joins its two ends.

    With n = N (or w = N), and without ``training``, it is dense attention and draws nothing.

    Args:
        q: queries ``[B, H, Nq, E]``; float32, float64, bfloat16 or float16.
        k: keys ``[B, H, N, E]``.
        v: values ``[B, H, N, Ev]``.
        num_keys: how many keys a query sees, n in [1, N]; in the local mode the window.
        keep_ratio: n / N in (0, 1], in the place of ``num_keys``; n is rounded, and at least 1.
        mode: ``"unbiased"`` or ``"local"``.
        window: tokens of a window, in the place of ``num_keys``, in the local mode.
        sigma: standard deviation of the jitter, in tokens (with ``grid``: in its steps), at least
            0; None for half a window (with ``grid``: half its side). Local mode only.
        grid: rows and columns ``(R, C)`` of tokens that make up an image, R C = N; windows are
            then squares, whose side is the root of the window, rounded. Local mode only.
        is_causal: hide keys after the query; needs Nq = N.
        key_padding_mask: bool ``[B, N]``, True where a key is padding: never seen, never drawn. A
            sample with fewer than n other keys uses all of them.
        attn_bias: added to the logits, ``[B or 1, H or 1, Nq, N]``, by original places.
        scale: of the products; None for 1 / sqrt(E).
        shared_across_batch: draw once for all samples; not with ``key_padding_mask``.
        always_include_self: let every query see its own key, counted once, besides the drawn ones.
            None: as ``is_causal``, where a query would else see nothing now and then. In the local
            mode a token is in its own window anyway.
        training: draw keys; otherwise attend to all of them.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        ``[B, H, Nq, Ev]``, dtype of ``q``; under autocast the low type. A query that sees no key
        gets 0. Keys and values that no query sees have gradients of exactly 0.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a shape does not fit; not exactly one of ``num_keys``, ``keep_ratio`` and
            ``window`` is given, or it is out of range; ``sigma`` is negative; ``grid`` does not
            make up N; the local mode, causality or the own key is asked for with Nq other than N;
            or, on a CPU, a sample is all padding.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 64, 16)
        >>> subsampled_attention(q, k, v, keep_ratio=0.25).shape
        torch.Size([2, 4, 64, 16])
        >>> local = subsampled_attention(q, k, v, window=16, mode="local", is_causal=True)
        >>> dense = torch.nn.functional.scaled_dot_product_attention
        >>> same = subsampled_attention(q, k, v, keep_ratio=0.25, training=False)
        >>> torch.allclose(same, dense(q, k, v), atol=1e-5)
        True

    Source:
        M. S. Hussain, M. J. Zaki, D. Subramanian, "The Information Pathways Hypothesis:
        Transformers are Dynamic Self-Ensembles", 2023, arXiv 2306.01705, whose code was never
        published. One key set a sample follows the authors' later "source dropout"; the exact
        sampler of the local mode is reconstructed.
    """
    check_projections(q, k, v)
    tokens = k.shape[2]
    count, side = _count_keys(num_keys, keep_ratio, window, tokens, mode, grid)
    _check_local(mode, q, tokens, sigma, grid)
    if always_include_self is None:
        always_include_self = is_causal and mode == "unbiased"
    if (is_causal or always_include_self) and q.shape[2] != tokens:
        name = "is_causal" if is_causal else "always_include_self"
        raise ValueError(
            f"{name} must be False unless there are as many queries as keys, got {q.shape[2]} "
            f"queries and {tokens} keys"
        )
    if key_padding_mask is not None:
        _check_padding(key_padding_mask, q, tokens, shared_across_batch)
    if attn_bias is not None:
        check_bias(attn_bias, q, k)
    options = {"attn_bias": attn_bias, "is_causal": is_causal, "scale": scale}
    if not training or count == tokens:
        return _dense(q, k, v, key_padding_mask, attn_bias, is_causal, scale)
    bits = draw_seed(seed, generator, q)
    samples = 1 if shared_across_batch else q.shape[0]
    if mode == "unbiased":
        keys = _sample(samples, tokens, count, key_padding_mask, bits)
        own = None
        if always_include_self:
            own = _not_listed(keys, tokens)
            own = own if key_padding_mask is None else own & ~key_padding_mask
        return gathered_attention(q, k, v, keys, own=own, **options)  # type: ignore[arg-type]
    deviation = side / 2 if sigma is None else sigma
    order = _permutation(samples, tokens, deviation, bits, count, side, grid)
    queries = F.pad(order, (0, -tokens % count), value=-1).unflatten(1, (-1, count))
    keys = queries
    if key_padding_mask is not None:
        padded = key_padding_mask.gather(1, queries.clamp(min=0).flatten(1)).view_as(queries)
        keys = queries.masked_fill(padded, -1)
    return gathered_attention(q, k, v, keys, query_index=queries, **options)  # type: ignore[arg-type]


def sample_keys(
    batch: int,
    num_tokens: int,
    num_keys: int,
    *,
    key_padding_mask: Tensor | None = None,
    shared: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw the keys of unbiased subsampled attention: n of N, uniformly, without replacement.

    .. math:: S_b = \{\, j : \operatorname{word}(b, j) \text{ is among the } n \text{ smallest} \,\}

    Words are Philox words of stream b, element j; of equal ones the first counts. The same seed
    gives the same keys on every device and backend.

    Args:
        batch: number of samples B.
        num_tokens: number of keys N.
        num_keys: n in [1, N].
        key_padding_mask: bool ``[B, N]``, True where a key is padding and never drawn.
        shared: draw once for all samples.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from.
        device: where to draw; the device of ``key_padding_mask`` or of a seed tensor if omitted.

    Returns:
        int64 ``[B, n]``, or ``[1, n]`` where ``shared``: ascending, and -1 at the end of a sample
        that has fewer keys than n.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or, on a CPU, a sample is all padding.

    Example:
        >>> sample_keys(2, 10, 3, seed=0)
        tensor([[7, 8, 9],
                [2, 6, 7]])

    Source:
        As :func:`subsampled_attention`.
    """
    check_at_least("batch", batch, 1)
    check_at_least("num_tokens", num_tokens, 1)
    check_at_least("num_keys", num_keys, 1)
    if num_keys > num_tokens:
        raise ValueError(f"num_keys must lie in [1, {num_tokens}], got {num_keys}")
    like = _like(key_padding_mask, seed, device)
    if key_padding_mask is not None:
        _check_padding(key_padding_mask, like.new_empty(batch, 0), num_tokens, shared)
    bits = draw_seed(seed, generator, like)
    return _sample(1 if shared else batch, num_tokens, num_keys, key_padding_mask, bits)


def jitter_permutation(
    batch: int,
    num_tokens: int,
    sigma: float,
    *,
    window: int | None = None,
    grid: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw the order of tokens from which local subsampled attention cuts its windows.

    .. math:: \pi_b = \operatorname{argsort}_j (j + \sigma \varepsilon_{bj}),
        \qquad \varepsilon_{bj} \sim N(0, 1)

    With ``window`` the order is rotated by an offset, uniform in [0, w). With ``grid`` rows and
    columns are jittered each: tokens are sorted by their row, rotated, cut into bands as high as a
    window's side s, and sorted by their column inside a band, rotated again; s s tokens in
    sequence are then neighbours in both directions. (Where s does not divide the sides, some
    windows are cut from two bands.)

    Args:
        batch: number of samples B.
        num_tokens: number of tokens N.
        sigma: standard deviation of the jitter in tokens (of the grid), at least 0.
        window: tokens of a window; None for no rotation. With ``grid`` it must be a square.
        grid: rows and columns ``(R, C)`` with R C = N; needs ``window``.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from.
        device: where to draw; the device of a seed tensor if omitted.

    Returns:
        int64 ``[B, N]``: the token at each place of the order. Normal numbers are computed in
        float64 (Box-Muller on the words of steps 0 and 1), so that devices, whose logarithms
        differ in the last digit, agree but once in some 1e9 draws.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``sigma`` is negative, ``grid`` does not make up N, or ``window`` is out of
            range.

    Example:
        >>> jitter_permutation(1, 10, 1.0, seed=0)
        tensor([[0, 1, 3, 2, 4, 5, 7, 6, 9, 8]])

    Source:
        As :func:`subsampled_attention`; reconstructed.
    """
    check_at_least("batch", batch, 1)
    check_at_least("num_tokens", num_tokens, 1)
    check_not_negative("sigma", sigma)
    side = 1
    if window is not None:
        check_at_least("window", window, 1)
        if window > num_tokens:
            raise ValueError(f"window must lie in [1, {num_tokens}], got {window}")
    if grid is not None:
        _check_grid(grid, num_tokens)
        if window is None:
            raise ValueError("window must be given with grid")
        side = math.isqrt(window)
        if side**2 != window:
            raise ValueError(f"window must be the square of a side with grid, got {window}")
    bits = draw_seed(seed, generator, _like(None, seed, device))
    return _permutation(batch, num_tokens, sigma, bits, window, side, grid)


def _like(
    mask: Tensor | None, seed: int | Tensor | None, device: torch.device | str | None
) -> Tensor:
    """Return an empty tensor on the device where to draw."""
    for tensor in (mask, seed):
        if device is None and isinstance(tensor, Tensor):
            device = tensor.device
    return torch.empty(0, device=device)


def _count_keys(
    num_keys: int | None,
    keep_ratio: float | None,
    window: int | None,
    tokens: int,
    mode: str,
    grid: tuple[int, ...] | None,
) -> tuple[int, int]:
    """Return how many keys a query sees, and the side of a window."""
    check_one_of("mode", mode, MODES)
    if window is not None and mode != "local":
        raise ValueError(f"window must be None unless mode is 'local', got {window}")
    given = [name for name, value in _named(num_keys, keep_ratio, window) if value is not None]
    if len(given) != 1:
        raise ValueError(
            "exactly one of num_keys, keep_ratio and (in the local mode) window must be given, "
            f"got {', '.join(given) or 'none'}"
        )
    if keep_ratio is not None:
        check_keep_ratio(keep_ratio)
        count = max(1, round(keep_ratio * tokens))
    else:
        name, value = next(pair for pair in _named(num_keys, None, window) if pair[1] is not None)
        check_at_least(name, value, 1)  # type: ignore[arg-type]
        count = int(value)  # type: ignore[arg-type]
        if count > tokens:
            raise ValueError(f"{name} must lie in [1, {tokens}], got {count}")
    if grid is None or count == tokens:
        return count, count
    side = max(1, round(math.sqrt(count)))
    return min(side**2, tokens), side


def _named(
    num_keys: int | None, keep_ratio: float | None, window: int | None
) -> tuple[tuple[str, float | None], ...]:
    return ("num_keys", num_keys), ("keep_ratio", keep_ratio), ("window", window)


def check_keep_ratio(keep_ratio: float) -> None:
    """Raise unless ``keep_ratio`` lies in (0, 1]."""
    check_not_negative("keep_ratio", keep_ratio)
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}")


def _check_local(
    mode: str, q: Tensor, tokens: int, sigma: float | None, grid: tuple[int, ...] | None
) -> None:
    if mode != "local":
        for name, value in (("sigma", sigma), ("grid", grid)):
            if value is not None:
                raise ValueError(f"{name} must be None unless mode is 'local', got {value}")
        return
    if q.shape[2] != tokens:
        raise ValueError(
            "mode must not be 'local' unless there are as many queries as keys, got "
            f"{q.shape[2]} queries and {tokens} keys"
        )
    if sigma is not None:
        check_not_negative("sigma", sigma)
    if grid is not None:
        _check_grid(grid, tokens)


def _check_grid(grid: tuple[int, ...], tokens: int) -> None:
    fits = isinstance(grid, (tuple, list)) and len(grid) == 2
    if not fits or grid[0] * grid[1] != tokens:
        raise ValueError(f"grid must be (rows, columns) with {tokens} tokens in all, got {grid}")


def _check_padding(mask: Tensor, q: Tensor, tokens: int, shared: bool) -> None:
    check_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be bool, got {mask.dtype}")
    check_same_device("key_padding_mask", mask, "q", q)
    if mask.dim() != 2 or mask.shape[0] != q.shape[0] or mask.shape[1] != tokens:
        raise ValueError(
            f"key_padding_mask must have shape [B, N] = [{q.shape[0]}, {tokens}], "
            f"got {list(mask.shape)}"
        )
    if shared:
        raise ValueError("key_padding_mask must be None where one draw serves all samples")
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
        full = mask.all(1)
        if bool(full.any()):
            raise ValueError(
                "key_padding_mask must leave every sample a key, "
                f"got only padding in sample {int(full.long().argmax())}"
            )


def _words(bits: Tensor, samples: int, tokens: int, step: int) -> Tensor:
    # The automatic kernel whatever is forced: the bits are the same.
    if transformed():
        words: Tensor = SAMPLE_WORDS.reference(bits, samples, tokens, step)
    else:
        words = SAMPLE_WORDS.kernel(None)(bits, samples, tokens, step)
    return words


def _sample(samples: int, tokens: int, count: int, padding: Tensor | None, bits: Tensor) -> Tensor:
    # A word and its place in one number: no ties, so any selection finds the same keys.
    place_bits = 31
    place = torch.arange(tokens, device=bits.device)
    ranked = (_words(bits, samples, tokens, 0) << place_bits) | place
    if padding is not None:
        ranked = ranked.masked_fill(padding, torch.iinfo(torch.int64).max)
    chosen = ranked.topk(count, 1, largest=False, sorted=False).values
    keys = torch.where(chosen == torch.iinfo(torch.int64).max, tokens, chosen & (2**place_bits - 1))
    keys = keys.sort(1).values
    return keys if padding is None else torch.where(keys == tokens, -1, keys)


def _not_listed(keys: Tensor, tokens: int) -> Tensor:
    """Return which tokens do not stand in the lists, bool [B or 1, N]."""
    spare = torch.where(keys < 0, tokens, keys)
    free = torch.ones(keys.shape[0], tokens + 1, dtype=torch.bool, device=keys.device)
    return free.scatter(1, spare, False)[:, :tokens]


def _permutation(
    samples: int,
    tokens: int,
    sigma: float,
    bits: Tensor,
    window: int | None,
    side: int,
    grid: tuple[int, ...] | None,
) -> Tensor:
    first, second = (_words(bits, samples, tokens, step) for step in (0, 1))
    radius = torch.sqrt(-2 * torch.log((first.double() + 0.5) * 2.0**-32))
    angle = second.double() * (math.tau * 2.0**-32)
    place = torch.arange(tokens, device=bits.device)
    offset = torch.zeros(samples, 2, dtype=torch.int64, device=bits.device)
    if window is not None:
        most = window if grid is None else side
        offset = (_words(bits, samples, 2, _OFFSET_STEP) * most) >> 32
    if grid is None:
        order = (place + sigma * radius * torch.cos(angle)).argsort(dim=1, stable=True)
        return order.gather(1, (place + offset[:, :1]) % tokens)
    columns = grid[1]
    by_row = (place // columns + sigma * radius * torch.cos(angle)).argsort(dim=1, stable=True)
    by_row = by_row.gather(1, (place + offset[:, :1] * columns) % tokens)
    column = (place % columns + sigma * radius * torch.sin(angle)).gather(1, by_row)
    # Sorted by column, then stably by band: sorted by column inside each band.
    by_column = column.argsort(dim=1, stable=True)
    length = side * columns
    in_band = by_column.gather(1, (by_column // length).argsort(dim=1, stable=True))
    begin = place // length * length
    size = (begin + length).clamp(max=tokens) - begin
    turned = begin + (place - begin + offset[:, 1:] * side) % size
    return by_row.gather(1, in_band.gather(1, turned))


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    if padding is None and (bias is None or not causal):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, scale=scale
        )
    # torch would need all of this in one mask of size Nq x N.
    keys = torch.arange(k.shape[2], device=q.device)[None]
    if padding is not None:
        keys = keys.masked_fill(padding, -1)
    return gathered_attention(q, k, v, keys, attn_bias=bias, is_causal=causal, scale=scale)
