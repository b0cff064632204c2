"""Nested dropout over image tokens that are padded with copies of their tail."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
    known_range,
)
from regularizers.dropout.prefix import PrefixDistribution, prefix_mask
from regularizers.ops._operator import accumulate_dtype

Schedule = Literal["linear", "cosine", "constant"] | Callable[[Tensor], Tensor]


def sample_num_tokens(
    batch_size: int,
    *,
    num_tokens: int,
    num_pad: int,
    k_min: int,
    per_sample: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw how many of N tokens and M padding tokens are kept.

    .. math:: k \sim \mathrm{Uniform}\{k_{\min}, \dots, N + M\}

    A draw above N keeps all tokens, so all N are kept with probability
    :math:`(M + 1) / (N + M - k_{\min} + 1)`; the law of min(k, N) is
    ``PrefixDistribution.padded_uniform``. Without padding it is nested dropout with a uniform
    law, with ``k_min`` = N and no padding no dropout at all.

    Args:
        batch_size: B, at least 0.
        num_tokens: N, at least 1.
        num_pad: M, in [0, N].
        k_min: least number kept, in [1, N].
        per_sample: one draw a sample; otherwise one for the batch.
        seed: int or int64 tensor with no dimensions, on the CPU; drawn from the default generator
            when omitted.
        generator: CPU generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        int64 ``[B]`` on the CPU, values in [k_min, N + M]; all equal unless ``per_sample``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> sample_num_tokens(4, num_tokens=8, num_pad=4, k_min=2, per_sample=True, seed=0)
        tensor([ 6,  7,  2, 12])

    Source:
        "Improving Flexible Image Tokenizers for Autoregressive Image Generation" (ReTok), 2026,
        arXiv 2601.01535. The authors' training code is not released: the law is reconstructed.
    """
    check_at_least("batch_size", batch_size, 0)
    _check_sizes(num_tokens, num_pad, k_min)
    law = PrefixDistribution.uniform(k_min, num_tokens + num_pad)
    if per_sample:
        return law.sample((batch_size,), seed=seed, generator=generator)
    return law.sample(seed=seed, generator=generator).expand(batch_size)


def _check_sizes(num_tokens: int, num_pad: int, k_min: int) -> None:
    check_at_least("num_tokens", num_tokens, 1)
    check_at_least("num_pad", num_pad, 0)
    check_at_least("k_min", k_min, 1)
    for name, value in (("num_pad", num_pad), ("k_min", k_min)):
        if value > num_tokens:
            raise ValueError(f"{name} must be at most num_tokens = {num_tokens}, got {value}")


class RedundantTokenPadding(nn.Module):
    r"""Pad N token queries with copies of the last M, and keep a random prefix of all.

    .. math:: q_{N + j} = q_{N - M + j}, \quad j = 1, \dots, M, \qquad
        k \sim \mathrm{Uniform}\{k_{\min}, \dots, N + M\}

    Every copy has a learned position of its own. The encoder attends over all N + M tokens, in
    ``eval()`` too; the decoder gets the first k of them in training and the first N in ``eval()``.
    Truncation can so fall into the padding, and the tail of the tokens is kept more often than by
    nested dropout: token i with probability :math:`(N + M - i + 1) / (N + M - k_{\min} + 1)` for
    :math:`i > k_{\min}`.

    Use one for the queries of the encoder; where the decoder has positions of its own, a
    second one holds them (``positions``).

    Args:
        embed_dim: E, size of queries and positions.
        num_tokens: N.
        num_pad: M, in [0, N].
        k_min: least number of tokens kept, in [1, N].
        per_sample: draw k for every sample, not for the batch.
        init_std: standard deviation of new positions; None: :math:`E^{-1/2}`.
        device: where the parameters go.
        dtype: their dtype.

    Parameters are ``pos`` ``[N, E]`` and ``pos_pad`` ``[M, E]``. Calling the module is
    :meth:`expand_queries`.

    Shape:
        ``[B, N, E]`` to queries ``[B, N + M, E]`` and positions ``[N + M, E]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> padding = RedundantTokenPadding(16, num_tokens=8, num_pad=4, k_min=2)
        >>> encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> queries, positions = padding(torch.randn(3, 8, 16))
        >>> tokens, ignored, k = padding.truncate(encoder(queries + positions))
        >>> tokens.shape == (3, k, 16), ignored is None
        (True, True)

    Source:
        "Improving Flexible Image Tokenizers for Autoregressive Image Generation" (ReTok), 2026,
        arXiv 2601.01535. Padding and positions from the authors' code (N = 256, M = 224), where
        positions are handed to every block apart from the queries; the law of k is reconstructed.
    """

    _law: PrefixDistribution

    def __init__(
        self,
        embed_dim: int,
        *,
        num_tokens: int = 256,
        num_pad: int = 224,
        k_min: int = 32,
        per_sample: bool = False,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("embed_dim", embed_dim, 1)
        _check_sizes(num_tokens, num_pad, k_min)
        if init_std is not None:
            check_positive("init_std", init_std)
        self.embed_dim = embed_dim
        self.num_tokens = num_tokens
        self.num_pad = num_pad
        self.k_min = k_min
        self.per_sample = per_sample
        self.init_std = 1 / math.sqrt(embed_dim) if init_std is None else init_std
        # Not a submodule, so that it stays on the CPU, where reading a length waits for nothing.
        self.__dict__["_law"] = PrefixDistribution.uniform(k_min, num_tokens + num_pad)
        self.pos = nn.Parameter(torch.empty(num_tokens, embed_dim, device=device, dtype=dtype))
        self.pos_pad = nn.Parameter(torch.empty(num_pad, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new positions."""
        nn.init.normal_(self.pos, std=self.init_std)
        if self.num_pad:
            nn.init.normal_(self.pos_pad, std=self.init_std)

    @property
    def positions(self) -> Tensor:
        """Positions of tokens and padding, ``[N + M, E]``."""
        return torch.cat([self.pos, self.pos_pad])

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`expand_queries`."""
        return self.expand_queries(q)

    def expand_queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries with copies of the last M behind them, and the positions of all.

        Add them, or hand the positions to every block apart. Copy before any projection that the
        queries share.
        """
        check_floating("q", q)
        check_shape("q", q, (None, self.num_tokens, self.embed_dim), "[B, num_tokens, embed_dim]")
        copies = q[:, self.num_tokens - self.num_pad :]
        return (torch.cat([q, copies], 1) if self.num_pad else q), self.positions

    def truncate(
        self,
        tokens: Tensor,
        k: int | Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None, int | Tensor]:
        """Keep the first k tokens, after the encoder and before the decoder.

        Args:
            tokens: ``[B, N + M, E']``, of any size E'.
            k: how many to keep, at most N + M (N in ``eval()``): an int, or int64 ``[B]``. None:
                drawn in training (on the CPU, so no device is waited for), N in ``eval()``.
            seed: as for :func:`sample_num_tokens`.
            generator: likewise.

        Returns:
            ``(tokens, key_padding_mask, k)``. One k: tokens cut to ``[B, k, E']``, no mask, an int.
            One k a sample: tokens ``[B, N + M, E']`` with zeros beyond k, the mask ``[B, N + M]``
            that is True beyond k, as ``nn.MultiheadAttention`` takes it, and int64 ``[B]``.
        """
        check_tensor("tokens", tokens)
        total = self.num_tokens + self.num_pad
        check_shape("tokens", tokens, (None, total, None), "[B, num_tokens + num_pad, E]")
        most = total if self.training else self.num_tokens
        if k is None and self.training:
            shape = (tokens.shape[0],) if self.per_sample else ()
            drawn = self._law.sample(shape, seed=seed, generator=generator)
            k = drawn.to(tokens.device, non_blocking=True) if self.per_sample else int(drawn)
        elif k is None:
            k = self.num_tokens
        if not isinstance(k, Tensor):
            check_at_least("k", k, 1)
            if k > most:
                raise ValueError(f"k must be at most {most}, got {k}")
            return prefix_mask(tokens, k, 1, truncate=True), None, k
        check_shape("k", k, (tokens.shape[0],), "[B] of tokens")
        found = known_range(k)
        if found is not None and found[1] > most:
            raise ValueError(f"k must be at most {most}, got {found[1]}")
        kept = prefix_mask(tokens, k, 1)
        return kept, torch.arange(total, device=k.device) >= k[:, None], k

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"embed_dim={self.embed_dim}, num_tokens={self.num_tokens}, num_pad={self.num_pad}, "
            f"k_min={self.k_min}, per_sample={self.per_sample}"
        )


def hierarchical_semantic_loss(
    features: Tensor,
    target: Tensor,
    num_kept: int | Tensor,
    *,
    num_tokens: int,
    k_min: int = 1,
    weight_max: float = 1.0,
    weight_min: float = 0.0,
    schedule: Schedule = "linear",
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""Align decoder features with those of a frozen model, the less so the more tokens are kept.

    .. math:: L = \frac1B \sum_b w(u_b) \frac1L \sum_l -\cos(f_{bl}, g_{bl}), \qquad
        u_b = \mathrm{clip}\Big(\frac{\min(k_b, N) - k_{\min}}{N - k_{\min}}, 0, 1\Big)

    So early tokens carry the meaning, and late ones are free for detail. The target is a constant.
    Half-precision inputs are compared in float32.

    Args:
        features: f ``[B, L, F]``, patches of the decoder behind a :class:`SemanticProjector`.
        target: g ``[B, L, F]``, patches of the frozen model.
        num_kept: k, an int or int64 ``[B]``, as :meth:`RedundantTokenPadding.truncate` gives it.
        num_tokens: N.
        k_min: in [1, N]; with N nothing is ever dropped, and the weight is ``weight_max``.
        weight_max: weight at u = 0.
        weight_min: weight at u = 1, in [0, weight_max].
        schedule: ``"linear"``, ``"cosine"`` (half a period), ``"constant"`` (``weight_max``
            always: the base tokenizer), or a callable from u ``[B]`` to weights ``[B]``.
        reduction: over the batch; the weights are not normalised by their sum.

    Returns:
        The loss, with no dimensions, or ``[B]`` for ``reduction="none"``; in
        [-weight_max, weight_max].

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes differ, or an argument is out of range.

    Example:
        >>> features = torch.randn(2, 9, 4)
        >>> hierarchical_semantic_loss(features, 3 * features, 32, num_tokens=256, k_min=32)
        tensor(-1.)
        >>> hierarchical_semantic_loss(features, features, 144, num_tokens=256, k_min=32)
        tensor(-0.5000)

    Source:
        As :class:`RedundantTokenPadding`. The cosine and its means are from the authors' code,
        where the sum of losses takes it with weight 0.5 and the features come from decoder block
        3; how the weight falls is reconstructed.
    """
    check_floating("features", features)
    check_floating("target", target)
    check_shape("features", features, (None, None, None), "[B, L, F]")
    if target.shape != features.shape:
        raise ValueError(
            f"target must have the shape of features {list(features.shape)}, "
            f"got {list(target.shape)}"
        )
    _check_sizes(num_tokens, 0, k_min)
    check_not_negative("weight_min", weight_min)
    check_not_negative("weight_max", weight_max)
    if weight_min > weight_max:
        raise ValueError(f"weight_min must be at most weight_max = {weight_max}, got {weight_min}")
    if not callable(schedule):
        check_one_of("schedule", schedule, ("linear", "cosine", "constant"))
    check_one_of("reduction", reduction, ("mean", "sum", "none"))
    wide = accumulate_dtype(features.dtype)
    similarity = F.cosine_similarity(features.to(wide), target.detach().to(wide), dim=-1).mean(1)
    u = _progress(num_kept, num_tokens, k_min, similarity)
    losses = -_weight(u, weight_max, weight_min, schedule) * similarity
    if reduction == "none":
        return losses.to(features.dtype)
    return (losses.mean() if reduction == "mean" else losses.sum()).to(features.dtype)


def _progress(num_kept: int | Tensor, num_tokens: int, k_min: int, like: Tensor) -> Tensor:
    """Return u ``[B]``: 0 up to k_min tokens, 1 from num_tokens on."""
    if isinstance(num_kept, Tensor):
        if num_kept.dtype != torch.int64:
            raise TypeError(f"num_kept must be an int or an int64 tensor, got {num_kept.dtype}")
        check_shape("num_kept", num_kept, (like.shape[0],), "[B] of features")
        check_same_device("num_kept", num_kept, "features", like)
        found = known_range(num_kept)
        if found is not None:
            check_at_least("num_kept", int(found[0]), 1)
        k = num_kept.to(like.dtype)
    else:
        check_at_least("num_kept", num_kept, 1)
        k = torch.full_like(like, num_kept)
    return ((k.clamp(max=num_tokens) - k_min) / max(num_tokens - k_min, 1)).clamp(min=0)


def _weight(u: Tensor, weight_max: float, weight_min: float, schedule: Schedule) -> Tensor:
    if callable(schedule):
        return schedule(u)
    span = weight_max - weight_min
    if schedule == "linear":
        return weight_max - span * u
    if schedule == "cosine":
        return weight_min + span * (1 + torch.cos(math.pi * u)) / 2
    return torch.full_like(u, weight_max)


class SemanticProjector(nn.Module):
    r"""Project decoder features to those of a frozen model: three linear layers with SiLU between.

    .. math:: W_3\, \mathrm{SiLU}(W_2\, \mathrm{SiLU}(W_1 x))

    with biases, and 4 ``dim`` units inside.

    Args:
        dim: size of the decoder's features.
        out_dim: size of the frozen model's.

    Shape:
        ``[*, dim]`` to ``[*, out_dim]``.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is below 1.

    Example:
        >>> SemanticProjector(16, 768)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 9, 768])

    Source:
        As :class:`RedundantTokenPadding`; from the authors' code.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("out_dim", out_dim, 1)
        self.layers = nn.Sequential(
            nn.Linear(dim, 4 * dim),
            nn.SiLU(),
            nn.Linear(4 * dim, 4 * dim),
            nn.SiLU(),
            nn.Linear(4 * dim, out_dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the projected features."""
        projected: Tensor = self.layers(features)
        return projected


def freeze_for_decoder_finetune(
    model: nn.Module, decoder_prefix: str | Sequence[str]
) -> list[nn.Parameter]:
    """Freeze a tokenizer but for its decoder, to tune that on the reconstruction from N tokens.

    Everything goes to ``eval()``, so that codebooks and batch norms stop moving as well, and only
    the decoder back to ``train()``; a :class:`RedundantTokenPadding` stays in ``eval()`` even
    there, and keeps exactly N tokens. Call it again after any ``model.train()``.

    Args:
        model: the tokenizer.
        decoder_prefix: qualified name of the decoder, or several.

    Returns:
        The parameters left to train.

    Raises:
        ValueError: no parameter has such a name; then nothing is changed.

    Example:
        >>> tokenizer = nn.ModuleDict({"encoder": nn.Linear(4, 2), "decoder": nn.Linear(2, 4)})
        >>> trained = freeze_for_decoder_finetune(tokenizer, "decoder")
        >>> len(trained), tokenizer["encoder"].weight.requires_grad
        (2, False)

    Source:
        As :class:`RedundantTokenPadding`: the paper's third step, from its description.
    """
    prefixes = (decoder_prefix,) if isinstance(decoder_prefix, str) else tuple(decoder_prefix)

    def inside(name: str) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)

    chosen = [parameter for name, parameter in model.named_parameters() if inside(name)]
    if not chosen:
        raise ValueError(f"decoder_prefix must name parameters of the model, got {decoder_prefix}")
    model.requires_grad_(False)
    model.eval()
    for parameter in chosen:
        parameter.requires_grad_(True)
    for name, module in model.named_modules():
        # One by one, and not by train(), which would reach the padding.
        if inside(name) and not isinstance(module, RedundantTokenPadding):
            module.training = True
    return chosen
