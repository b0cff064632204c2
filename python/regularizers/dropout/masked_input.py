"""Masked-input regularization: a second next-token loss on inputs with some tokens masked out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_not_negative,
    check_one_of,
    check_shape,
    check_tensor,
    known_range,
)
from regularizers._shared.randomness import draw_seed
from regularizers.ops.masked_linear_cross_entropy import multi_sample_dropout_cross_entropy
from regularizers.ops.philox import philox_words

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def mask_inputs(
    tokens: Tensor,
    mask_token_id: int,
    *,
    ratio_range: tuple[float, float] = (0.0, 0.5),
    num_masked: int | None = None,
    prefix: int = 8,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Replace a random part of every sequence by a mask token.

    .. math::
        r_i \sim U(r_{\min}, r_{\max}), \qquad
        \tilde x_{it} = \begin{cases} \text{mask} & \text{with probability } r_i,\ t \ge
        \text{prefix} \\ x_{it} & \text{else} \end{cases}

    One ratio a sequence, not one a batch; or, with ``num_masked``, exactly so many distinct
    positions of every sequence. Bits come from Philox stream i: word T for the ratio, word t for
    position t.

    Args:
        tokens: integers ``[B, T]`` without the mask token.
        mask_token_id: a token id of its own, which the vocabulary is enlarged by.
        ratio_range: least and largest ratio, 0 <= least <= largest <= 1.
        num_masked: mask this many positions in every sequence, and ignore ``ratio_range``.
        prefix: the first positions, never masked, fewer than T.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        ``(masked, is_masked)``: the new tokens and which of them are masks, both ``[B, T]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or (on a CPU, outside ``torch.compile``; elsewhere
            it is not looked for) the tokens contain the mask token.

    Example:
        >>> tokens = torch.arange(12)[None]
        >>> masked, is_masked = mask_inputs(tokens, 99, num_masked=3, prefix=2, seed=0)
        >>> masked.tolist()
        [[0, 1, 2, 3, 4, 5, 6, 99, 99, 9, 99, 11]]

    Source:
        "Data-Constrained Language Model Pretraining: Improved Regularization and Scaling Laws",
        2026, arXiv 2606.06888; from the authors' code, whose defaults these are (a comment there
        says 16 for the prefix, the trainer passes 8).
    """
    _check_tokens(tokens, mask_token_id, prefix)
    _check_ratios(ratio_range)
    length = tokens.shape[1]
    if num_masked is not None:
        check_at_least("num_masked", num_masked, 0)
        if num_masked > length - prefix:
            raise ValueError(
                f"num_masked must be at most T - prefix = {length - prefix}, got {num_masked}"
            )
    words = _row_words(tokens, draw_seed(seed, generator, tokens))
    if num_masked is None:
        is_masked = words[:, :-1] < _thresholds(words[:, -1:], ratio_range)
        is_masked &= torch.arange(length, device=tokens.device) >= prefix
    else:
        # The position below the word makes keys distinct: ties go to the smaller index.
        keys = (words[:, prefix:-1] << 31) | torch.arange(length - prefix, device=tokens.device)
        chosen = keys.topk(num_masked, largest=False).indices + prefix
        is_masked = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, chosen, True)
    return tokens.masked_fill(is_masked, mask_token_id), is_masked


def _row_words(tokens: Tensor, seed: Tensor) -> Tensor:
    """Return words ``[B, T + 1]``: one a position, and the last of every row for its ratio."""
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    return philox_words(seed, tokens.shape[1] + 1, stream=rows)


def _thresholds(word: Tensor, ratio_range: tuple[float, float]) -> Tensor:
    """Return 2^32 times a ratio uniform in a range, from a word each.

    In integers, so that every device and compiler gets the same masks; 24 bits of the word keep
    the product below 2^63.
    """
    least, largest = (round(ratio * 2**32) for ratio in ratio_range)
    return least + (((largest - least) * (word >> 8)) >> 24)


def _check_tokens(tokens: Tensor, mask_token_id: int, prefix: int) -> None:
    check_tensor("tokens", tokens)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    check_shape("tokens", tokens, (None, None), "[B, T]")
    check_at_least("mask_token_id", mask_token_id, 0)
    check_at_least("prefix", prefix, 0)
    if prefix >= tokens.shape[1]:
        raise ValueError(f"prefix must be below T = {tokens.shape[1]}, got {prefix}")
    _check_absent("tokens", tokens, mask_token_id)


def _check_absent(name: str, tokens: Tensor, mask_token_id: int) -> None:
    found = known_range(tokens == mask_token_id)
    if found is not None and found[1]:
        raise ValueError(f"{name} must not contain mask_token_id = {mask_token_id}")


def _check_ratios(ratio_range: tuple[float, float]) -> None:
    least, largest = ratio_range
    if not 0.0 <= least <= largest <= 1.0:
        raise ValueError(f"ratio_range must be 0 <= least <= largest <= 1, got {ratio_range}")


def masked_input_loss(
    model: Callable[..., Tensor],
    tokens: Tensor,
    targets: Tensor,
    mask_token_id: int,
    *,
    weight: float = 0.4,
    ntp_weight: float = 1.0,
    positions: Literal["all", "masked"] = "all",
    right_window: int = 0,
    ratio_range: tuple[float, float] = (0.0, 0.5),
    num_masked: int | None = None,
    prefix: int = 8,
    ignore_index: int = -1,
    head: nn.Linear | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Add to the next-token loss the same loss with part of the input masked.

    .. math:: L = c_{\text{ntp}}\, \mathrm{CE}(f(x), y) + c\, \mathrm{CE}(f(\tilde x), y)

    with :math:`\tilde x` from :func:`mask_inputs`. Targets stay the true next tokens; inference
    does not change. Each cross-entropy is a mean over the targets that count, 0 if there is none.
    Two forward passes: a step costs twice as much. A pass with weight 0 is left out, so

    .. code-block:: python

        masked_input_loss(model, tokens, targets, mask_id, weight=0)[0].backward()
        masked_input_loss(model, tokens, targets, mask_id, ntp_weight=0)[0].backward()

    holds the activations of one pass at a time.

    Args:
        model: maps tokens ``[B, T]`` to logits ``[B, T, V]``, or to features ``[B, T, D]`` where
            ``head`` is given. Its embedding must know the mask token; its logits need not.
        tokens: integers ``[B, T]`` without the mask token.
        targets: int64 ``[B, T]``, the next token of every position; never the mask token.
        mask_token_id: as for :func:`mask_inputs`.
        weight: c of the masked pass, at least 0.
        ntp_weight: weight of the ordinary pass, at least 0.
        positions: which targets of the masked pass count: ``"all"`` (the paper's setting), or
            ``"masked"``: those of the rows just before a masked position, which predict it.
        right_window: in the masked pass every row may look this many positions ahead; only with
            ``positions="masked"``, since a visible target is no task. The model then gets
            ``attn_mask=causal_right_window_mask(T, right_window)``.
        ratio_range: as for :func:`mask_inputs`.
        num_masked: likewise.
        prefix: likewise.
        ignore_index: targets of this value do not count.
        head: last linear layer of the model, fused with the loss by
            :func:`regularizers.ops.multi_sample_dropout_cross_entropy`: logits are never stored.
        model_kwargs: further arguments of the model, in both passes.
        seed: as for :func:`mask_inputs`.
        generator: likewise.

    Returns:
        ``(total, ntp, aux)``, each with no dimensions; total = ntp_weight ntp + weight aux. A loss
        whose pass was left out is 0; the masked pass is left out, too, where nothing can be masked
        (largest ratio or ``num_masked`` 0).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, shapes differ, or ``right_window`` comes with
            ``positions="all"``.

    Example:
        >>> vocabulary, mask_id = 20, 20
        >>> model = nn.Sequential(nn.Embedding(vocabulary + 1, 16), nn.Linear(16, vocabulary))
        >>> text = torch.randint(vocabulary, (4, 33))
        >>> total, ntp, aux = masked_input_loss(model, text[:, :-1], text[:, 1:], mask_id)
        >>> total.backward()

    Source:
        "Data-Constrained Language Model Pretraining: Improved Regularization and Scaling Laws",
        2026, arXiv 2606.06888; from the authors' code. There weight 0.4 goes with weight decay
        0.4 to 3.2 (:func:`decay_parameter_groups`), dropout 0.1 and 16 to 32 epochs.
    """
    _check_tokens(tokens, mask_token_id, prefix)
    _check_ratios(ratio_range)
    check_tensor("targets", targets)
    if targets.shape != tokens.shape:
        raise ValueError(
            f"targets must have the shape of tokens {list(tokens.shape)}, got {list(targets.shape)}"
        )
    _check_absent("targets", targets, mask_token_id)
    check_not_negative("weight", weight)
    check_not_negative("ntp_weight", ntp_weight)
    check_one_of("positions", positions, ("all", "masked"))
    check_at_least("right_window", right_window, 0)
    if positions == "all" and right_window > 0:
        raise ValueError(
            f"right_window must be 0 with positions='all', whose targets it would show, "
            f"got {right_window}"
        )
    arguments = dict(model_kwargs or {})

    def loss(inputs: Tensor, counting: Tensor) -> Tensor:
        return _mean_cross_entropy(model(inputs, **arguments), counting, head, ignore_index)

    zero = torch.zeros((), device=tokens.device)
    ntp = loss(tokens, targets) if ntp_weight > 0 else zero
    aux = zero
    anything = ratio_range[1] > 0 if num_masked is None else num_masked > 0
    if weight > 0 and anything:
        masked, is_masked = mask_inputs(
            tokens,
            mask_token_id,
            ratio_range=ratio_range,
            num_masked=num_masked,
            prefix=prefix,
            seed=seed,
            generator=generator,
        )
        if positions == "masked":
            predicts_mask = F.pad(is_masked[:, 1:], (0, 1))
            targets = targets.masked_fill(~predicts_mask, ignore_index)
        if right_window > 0:
            arguments["attn_mask"] = causal_right_window_mask(
                tokens.shape[1], right_window, device=tokens.device
            )
        aux = loss(masked, targets)
    return ntp_weight * ntp + weight * aux, ntp, aux


def _mean_cross_entropy(
    output: Tensor, targets: Tensor, head: nn.Linear | None, ignore_index: int
) -> Tensor:
    """Return the mean over the targets that count; 0 where none does."""
    rows, flat = output.flatten(0, -2), targets.flatten()
    # A mean over nothing is NaN, its gradient too: then take any class, and nothing of its loss.
    some = (flat != ignore_index).any()
    flat = torch.where(some, flat, int(ignore_index == 0))
    if head is None:
        loss = F.cross_entropy(rows, flat, ignore_index=ignore_index)
    else:
        loss = multi_sample_dropout_cross_entropy(
            rows,
            head.weight,
            head.bias,
            flat,
            p=0.0,
            num_samples=1,
            ignore_index=ignore_index,
            seed=0,  # nothing is dropped: leave the generator alone
        )
    return torch.where(some, loss, 0)


def causal_right_window_mask(
    T: int, right_window: int, *, device: torch.device | str | None = None
) -> Tensor:
    r"""Return the causal attention mask, widened by some positions ahead.

    .. math:: M_{ij} = [\, j \le i + w \,]

    Args:
        T: length of the sequences, at least 1.
        right_window: w, at least 0; 0 is the causal mask.
        device: where the mask goes.

    Returns:
        bool ``[1, 1, T, T]``, True where row i may look at column j: the convention of
        ``scaled_dot_product_attention`` (``nn.MultiheadAttention`` takes the opposite).

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is out of range.

    Example:
        >>> causal_right_window_mask(4, 1)[0, 0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 1],
                [1, 1, 1, 1]], dtype=torch.int32)

    Source:
        As :func:`masked_input_loss`; from the authors' code.
    """
    check_at_least("T", T, 1)
    check_at_least("right_window", right_window, 0)
    return torch.ones(T, T, dtype=torch.bool, device=device).tril(right_window)[None, None]


def masked_diffusion_loss(
    per_token_loss_fn: Callable[[Tensor, Tensor], Tensor],
    tokens: Tensor,
    mask_token_id: int,
    *,
    eps: float = 1e-3,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the masked-diffusion loss of a bidirectional model, the paper's comparison.

    .. math::
        t_i \sim U(0, 1), \quad p_i = (1 - \epsilon) t_i + \epsilon, \qquad
        L = \frac{1}{B T} \sum_{i, t:\ \text{masked}} \frac{\mathrm{CE}_{it}}{p_i}

    Every token of sequence i is masked with probability :math:`p_i` and predicted in place.

    Args:
        per_token_loss_fn: ``(masked, tokens) -> losses``, all ``[B, T]``; usually the row-wise
            cross-entropy of a model without causal mask.
        tokens: integers ``[B, T]`` without the mask token.
        mask_token_id: as for :func:`mask_inputs`.
        eps: least probability, in (0, 1].
        seed: as for :func:`mask_inputs`.
        generator: likewise.

    Returns:
        The loss, with no dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``eps`` is out of range, the tokens contain the mask token, or the losses have
            another shape than the tokens.

    Example:
        >>> tokens = torch.randint(9, (64, 64))
        >>> constant = lambda masked, tokens: torch.full(tokens.shape, 2.0)
        >>> loss = masked_diffusion_loss(constant, tokens, 9)  # 2 in expectation

    Source:
        As :func:`masked_input_loss`; from the authors' code of the comparison.
    """
    _check_tokens(tokens, mask_token_id, 0)
    if not 0.0 < eps <= 1.0:
        raise ValueError(f"eps must lie in (0, 1], got {eps}")
    words = _row_words(tokens, draw_seed(seed, generator, tokens))
    threshold = _thresholds(words[:, -1:], (eps, 1.0))
    is_masked = words[:, :-1] < threshold
    losses = per_token_loss_fn(tokens.masked_fill(is_masked, mask_token_id), tokens)
    if losses.shape != tokens.shape:
        raise ValueError(
            f"per_token_loss_fn must return losses of shape {list(tokens.shape)}, "
            f"got {list(losses.shape)}"
        )
    probability = (threshold * 2.0**-32).to(losses.dtype)
    # Selected, not multiplied: an infinite loss of a visible token stays out.
    return torch.where(is_masked, losses / probability, 0).sum() / tokens.numel()


def decay_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    r"""Split parameters into those that decay and those that do not, for an optimizer.

    .. math:: \theta \leftarrow \theta - \eta\, \lambda\, \theta \quad
        \text{only for weight matrices and kernels}

    Embeddings, norms and vectors (biases, gains, scales) do not decay: with the strong decay that
    the paper uses they would vanish. A matrix tied to an embedding counts as embedding.

    Args:
        model: any module; frozen parameters are left out.
        weight_decay: decay of the first group, at least 0. The paper takes 0.4, 0.8, 1.6, 1.6 and
            3.2 for 72M, 140M, 257M, 664M and 1.4B parameters, with learning rates 1e-2, 3e-3 and
            1e-3 for the rest.

    Returns:
        Two groups, ``{"params": [...], "weight_decay": ...}``: decaying and not; one may be empty.

    Raises:
        TypeError: ``model`` is not a module, or ``weight_decay`` not a number.
        ValueError: ``weight_decay`` is below 0.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9))
        >>> decaying, others = decay_parameter_groups(model, 0.8)
        >>> [tuple(parameter.shape) for parameter in decaying["params"]]
        [(9, 4)]
        >>> optimizer = torch.optim.AdamW([decaying, others], lr=3e-3)

    Source:
        As :func:`masked_input_loss`. The authors' code exempts embeddings, its RMS norm and biases;
        that every vector is exempt, so that norms of other classes are, is our addition.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_not_negative("weight_decay", weight_decay)
    exempt = {
        parameter
        for module in model.modules()
        if isinstance(module, (*_NORMS, *_EMBEDDINGS))
        for parameter in module.parameters(recurse=False)
    }
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            vector = parameter.dim() < 2
            (others if vector or parameter in exempt else decaying).append(parameter)
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
