"""Modality dropout and ActionMAE: drop whole modalities at feature level and predict them back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_same_device,
    known_range,
)
from regularizers._shared.randomness import draw_seed
from regularizers._shared.transformer import Transformer, sinusoidal_positions
from regularizers.dropout._random_subsets import random_order, random_words, uniform_integer
from regularizers.ops._operator import loss_dtype


def modality_dropout(
    x: Tensor,
    *,
    num_keep: int | None = None,
    min_keep: int = 1,
    keep_all_allowed: bool = True,
    per_sample: bool = True,
    training: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Keep a random subset of each sample's modalities; take the others out of the sequence.

    .. math:: n \sim U\{n_{\min}, \dots, M\} \text{ once a batch}, \qquad
        S_b \sim U\{S \subseteq \{1..M\} : |S| = n\} \text{ independently}

    The kept tokens stay in the order of the modalities. What is left out comes back into its place
    with ``torch.cat([kept, filling], 1).gather(1, ids_restore[..., None].expand(-1, -1, D))``.

    Drawing n reads one number back from the device; give ``num_keep`` to avoid that, which
    ``torch.compile(fullgraph=True)`` demands, too. :class:`ModalityMAE` needs no such number.

    Args:
        x: one token a modality, ``[B, M, D]``.
        num_keep: n, in [1, M]; drawn when omitted.
        min_keep: smallest n to be drawn, in [1, M].
        keep_all_allowed: whether n = M may be drawn, as in the authors' code; otherwise at most
            M - 1, or ``min_keep`` if that is more (a single modality is always kept).
        per_sample: a subset for each sample; otherwise one for the whole batch.
        training: drop; otherwise everything is kept.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        ``(kept, ids_keep, ids_restore, missing)``: tokens ``[B, n, D]`` (``x`` itself if all are
        kept), their modalities ``[B, n]``, the place of each modality in the sequence "kept, then
        missing" ``[B, M]``, and which are missing, bool ``[B, M]``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or an argument is of the wrong type.
        ValueError: ``x`` is of the wrong shape, or ``num_keep`` or ``min_keep`` is out of range.

    Example:
        >>> x = torch.arange(6.0).view(2, 3, 1)
        >>> kept, ids_keep, ids_restore, missing = modality_dropout(x, num_keep=2, seed=1)
        >>> ids_keep.tolist(), missing.int().tolist()
        ([[0, 2], [0, 1]], [[0, 1, 0], [0, 0, 1]])
        >>> kept.flatten(1).tolist()
        [[0.0, 2.0], [3.0, 4.0]]

    Source:
        S. Woo et al., "Towards Good Practices for Missing Modality Robust Action Recognition",
        AAAI 2023, arXiv 2211.13916; authors' code read. There the kept tokens are shuffled; here
        they keep their order, which attention does not see.
    """
    check_tokens(x)
    batch, modalities, dim = x.shape
    _check_keep(modalities, num_keep, min_keep)
    if not training:
        order = torch.arange(modalities, device=x.device).expand(batch, -1)
        return x, order, order, torch.zeros_like(order, dtype=torch.bool)
    bits = draw_seed(seed, generator, x)
    if num_keep is None:
        num_keep = int(_draw_count(bits, modalities, min_keep, keep_all_allowed))
    missing = _missing(bits, batch, modalities, num_keep, per_sample)
    ids_keep_first = missing.int().argsort(dim=1, stable=True)
    ids_keep = ids_keep_first[:, :num_keep]
    ids_restore = ids_keep_first.argsort(dim=1)
    kept = x if num_keep == modalities else x.gather(1, ids_keep[..., None].expand(-1, -1, dim))
    return kept, ids_keep, ids_restore, missing


def _draw_count(bits: Tensor, modalities: int, min_keep: int, keep_all_allowed: bool) -> Tensor:
    """Return n, with no dimensions: stream 1 of the seed, element 0."""
    most = modalities if keep_all_allowed else max(modalities - 1, min_keep)
    return uniform_integer(random_words(bits, 1, 1, stream=1)[0, 0], min_keep, most)


def _missing(
    bits: Tensor, batch: int, modalities: int, num_keep: int | Tensor, per_sample: bool
) -> Tensor:
    """Return which modalities are missing ``[B, M]``: those of rank n and more in stream 0."""
    order = random_order(bits, batch if per_sample else 1, modalities)
    missing: Tensor = order.argsort(dim=1) >= num_keep
    return missing.expand(batch, -1)


def check_tokens(x: Tensor) -> None:
    """Raise unless ``x`` holds one token a modality."""
    check_floating("x", x)
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x must have shape [batch, modalities, dim], got {list(x.shape)}")


def _check_keep(modalities: int, num_keep: int | None, min_keep: int) -> None:
    check_at_least("min_keep", min_keep, 1)
    if min_keep > modalities:
        raise ValueError(f"min_keep must lie in [1, {modalities}], got {min_keep}")
    if num_keep is not None:
        check_at_least("num_keep", num_keep, 1)
        if num_keep > modalities:
            raise ValueError(f"num_keep must lie in [1, {modalities}], got {num_keep}")


class ModalityMAE(nn.Module):
    r"""Learn to predict missing modalities from those that are there (ActionMAE).

    .. math::
        L = \frac{\sum_{bm} \mathrm{missing}_{bm} \frac1D \|\hat x_{bm} - t_{bm}\|^2}
        {\sum_{bm} \mathrm{missing}_{bm}}, \qquad
        t = \frac{x - \bar x}{\sqrt{\mathrm{var}(x) + 10^{-6}}}

    An encoder sees learned memory tokens and the tokens of the present modalities with their
    positions, and nothing of the missing ones. A decoder gets what the encoder made of them, with
    one shared mask token at the missing places and positions everywhere, and predicts all M tokens.
    If a sample has all its modalities, it passes through unchanged and has no loss; otherwise *all*
    its tokens are the predicted ones, those of the present modalities too. They go to a fusion head
    (:class:`SumFusion`, :class:`ConcatFusion`, :class:`TransformerFusion`); the total loss is this
    one plus the head's cross-entropy (label smoothing 0.1 in the paper), weights 1 and 1.

    In training, without ``present``, modalities are dropped as by :func:`modality_dropout`. In
    evaluation, without ``present``, all are there and the module does nothing.

    Args:
        num_modalities: M, at least 1.
        dim: features D of a token.
        depth: blocks of the encoder, and of the decoder.
        num_heads: heads of attention; divides ``dim``.
        num_memory_tokens: learned tokens beside the modalities.
        normalize_target: normalise each target over its features, as above.
        detach_target: let no gradient into ``x`` through the target; the authors' code lets it.
        min_keep: smallest number of modalities to be kept.
        keep_all_allowed: whether all may be kept in training.

    Shape:
        ``[B, M, D]`` to ``([B, M, D], [], [B, M])``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape, or a sample has no modality
            at all (checked where that costs no synchronisation: on CPU tensors outside of
            ``torch.compile``).

    Example:
        >>> from regularizers.dropout import SumFusion
        >>> mae, head = ModalityMAE(3, 16, num_memory_tokens=2), SumFusion(3, 16, 5)
        >>> x, y = torch.randn(8, 3, 16), torch.randint(5, (8,))
        >>> tokens, loss, missing = mae(x)
        >>> (loss + F.cross_entropy(head(tokens), y, label_smoothing=0.1)).backward()
        >>> tokens, loss, missing = mae.eval()(x, present=[0, 2])
        >>> tokens.shape, missing[0].tolist()
        (torch.Size([8, 3, 16]), [False, True, False])

    Source:
        S. Woo et al., AAAI 2023, arXiv 2211.13916; authors' code read. Two things of the code are
        not kept: it computes positions and never adds them, so that all missing modalities of a
        sample get one prediction, and its evaluation puts the kept tokens into the first places
        whichever modalities they are. "All present" holds per sample here; in training the code's
        rule, one number of modalities for the whole batch, makes that the same.
    """

    positions: Tensor

    def __init__(
        self,
        num_modalities: int,
        dim: int = 512,
        *,
        depth: int = 2,
        num_heads: int = 8,
        num_memory_tokens: int = 10,
        normalize_target: bool = True,
        detach_target: bool = False,
        min_keep: int = 1,
        keep_all_allowed: bool = True,
    ) -> None:
        super().__init__()
        check_at_least("num_modalities", num_modalities, 1)
        check_at_least("dim", dim, 2)
        check_at_least("num_memory_tokens", num_memory_tokens, 0)
        _check_keep(num_modalities, None, min_keep)
        self.num_modalities = num_modalities
        self.dim = dim
        self.normalize_target = normalize_target
        self.detach_target = detach_target
        self.min_keep = min_keep
        self.keep_all_allowed = keep_all_allowed
        self.memory = nn.Parameter(torch.randn(num_memory_tokens, dim) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.encoder = Transformer(dim, depth, num_heads)
        self.decoder = Transformer(dim, depth, num_heads)
        self.predict = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.predict.weight)
        nn.init.zeros_(self.predict.bias)
        positions = sinusoidal_positions(num_modalities, dim)
        self.register_buffer("positions", positions)

    def forward(
        self,
        x: Tensor,
        present: Tensor | Sequence[int] | None = None,
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens for the fusion, the loss, and which modalities were missing.

        Args:
            x: tokens ``[B, M, D]``. What stands at missing places reaches nothing but the loss,
                which says nothing where that is not known.
            present: which modalities are there: bool ``[B, M]``, or their numbers for all samples;
                None for a random draw in training and for all in evaluation.
            seed: of that draw: int or int64 tensor with no dimensions.
            generator: to draw the seed from; not inside ``torch.compile`` or checkpointing.

        Returns:
            ``(tokens, loss, missing)``: ``[B, M, D]``; no dimensions, exactly 0 if nothing is
            missing; bool ``[B, M]``.
        """
        check_tokens(x)
        if x.shape[1:] != (self.num_modalities, self.dim):
            raise ValueError(
                f"x must have shape [batch, {self.num_modalities}, {self.dim}], got {list(x.shape)}"
            )
        if present is not None:
            if seed is not None or generator is not None:
                raise ValueError("present must not be given together with seed or generator")
            missing = ~self._as_mask(x, present)
        elif self.training:
            bits = draw_seed(seed, generator, x)
            count = _draw_count(bits, self.num_modalities, self.min_keep, self.keep_all_allowed)
            missing = _missing(bits, x.shape[0], self.num_modalities, count, per_sample=True)
        else:
            missing = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            return x, torch.zeros((), dtype=loss_dtype(x), device=x.device), missing
        predicted = self._reconstruct(x, missing)
        loss = self._loss(x, predicted, missing)
        complete = ~missing.any(1)[:, None, None]
        return torch.where(complete, x, predicted), loss, missing

    def _as_mask(self, x: Tensor, present: Tensor | Sequence[int]) -> Tensor:
        if not isinstance(present, Tensor):
            chosen = list(present)
            for modality in chosen:
                check_at_least("present", modality, 0)
            if not chosen or len(set(chosen)) < len(chosen) or max(chosen) >= self.num_modalities:
                raise ValueError(
                    f"present must hold one or more different modalities in "
                    f"[0, {self.num_modalities}), got {chosen}"
                )
            row = torch.zeros(self.num_modalities, dtype=torch.bool, device=x.device)
            for modality in chosen:
                row[modality] = True  # filled on the device, so that CUDA graphs capture it
            return row.expand(x.shape[:2])
        if present.dtype != torch.bool:
            raise TypeError(f"present must be a bool tensor, got {present.dtype}")
        if present.shape != x.shape[:2]:
            raise ValueError(
                f"present must have shape {list(x.shape[:2])}, got {list(present.shape)}"
            )
        check_same_device("present", present, "x", x)
        fewest = known_range(present.sum(1))
        if fewest is not None and fewest[0] < 1:
            raise ValueError("present must leave every sample a modality, got a row of False")
        return present

    def _reconstruct(self, x: Tensor, missing: Tensor) -> Tensor:
        batch, extra = x.shape[0], len(self.memory)
        positions = self.positions.to(x.dtype)
        memory = self.memory.to(x.dtype).expand(batch, -1, -1)
        # Whatever stands at a missing place, a NaN too, is replaced before attention leaves it out.
        tokens = torch.where(missing[..., None], 0, x) + positions
        present = F.pad(~missing, (extra, 0), value=True)
        encoded = self.encoder(torch.cat([memory, tokens], dim=1), present)
        modalities = torch.where(
            missing[..., None], self.mask_token.to(encoded.dtype), encoded[:, extra:]
        )
        decoded = self.decoder(torch.cat([encoded[:, :extra], modalities + positions], dim=1))
        predicted: Tensor = self.predict(decoded[:, extra:])
        return predicted.to(x.dtype)

    def _loss(self, x: Tensor, predicted: Tensor, missing: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        target = (x.detach() if self.detach_target else x).to(wide)
        if self.normalize_target:
            target = target - target.mean(-1, keepdim=True)
            variance = target.square().sum(-1, keepdim=True) / (self.dim - 1)
            target = target / (variance + 1e-6).sqrt()
        errors = (predicted.to(wide) - target).square().mean(-1)
        # Selected, not multiplied: a present token without a loss must not bring in its NaN.
        total = torch.where(missing, errors, 0).sum()
        return (total / missing.sum().clamp(min=1)).to(loss_dtype(x))

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"num_modalities={self.num_modalities}, dim={self.dim}, "
            f"num_memory_tokens={len(self.memory)}, normalize_target={self.normalize_target}, "
            f"detach_target={self.detach_target}"
        )
