"""Subsampled self-attention in models: a layer, conversion, the training plan, the ensemble."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import check_at_least, check_one_of, check_probability
from regularizers._shared.modules import replace_modules
from regularizers.dropout.subsampled_attention import (
    MODES,
    Mode,
    check_keep_ratio,
    subsampled_attention,
)

AVERAGES = ("prob", "logit")


class SubsampledSelfAttention(nn.MultiheadAttention):
    r"""Multi-head attention whose queries see a random n of N keys while it trains.

    A ``torch.nn.MultiheadAttention`` in name and parameters (it loads its state dict), with
    :func:`subsampled_attention` inside: training costs n / N of dense attention, evaluation is
    torch's own dense pass, fast path of ``nn.TransformerEncoderLayer`` included. The default
    ``keep_ratio`` 1/4 is the paper's.

    What differs from ``nn.MultiheadAttention``: ``batch_first`` is True and ``need_weights`` False
    by default. What it does not have: dropout of attention weights (key sampling takes its place),
    ``add_bias_kv``, ``add_zero_attn``, ``kdim`` and ``vdim``; and while keys are sampled,
    ``need_weights`` and nested tensors.

    Args:
        embed_dim: features of queries, keys and values.
        num_heads: heads; divides ``embed_dim``.
        dropout: must be 0.
        bias: whether the projections have one.
        add_bias_kv: must be False.
        add_zero_attn: must be False.
        kdim: must be None or ``embed_dim``.
        vdim: must be None or ``embed_dim``.
        batch_first: whether tensors are ``[B, N, embed_dim]`` or ``[N, B, embed_dim]``.
        device: where the parameters go.
        dtype: their dtype.
        keep_ratio: n / N in (0, 1]; 1/4 if neither ``num_keys`` nor ``window`` is given.
        num_keys: n, in its place; shorter sequences are attended to densely.
        mode: ``"unbiased"`` or ``"local"`` (for text and images).
        window: tokens of a window in the local mode, in the place of ``num_keys``.
        sigma: jitter of the local mode, at least 0; None for half a window.
        grid: rows and columns of tokens, for windows in two dimensions.
        shared_across_batch: draw once for all samples of a batch.
        always_include_self: see :func:`subsampled_attention`.

    Attributes:
        sampling: None samples while training; True samples always, False never (dense).

    Shape:
        As ``nn.MultiheadAttention``: ``(query, key, value)`` ``[B, N, embed_dim]`` to
        ``(output, None)``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or not supported.

    Example:
        >>> attention = SubsampledSelfAttention(64, 4, keep_ratio=0.25)
        >>> x = torch.randn(2, 100, 64)
        >>> attention(x, x, x)[0].shape
        torch.Size([2, 100, 64])
        >>> attention.eval()(x, x, x, need_weights=True)[1].shape
        torch.Size([2, 100, 100])

    Source:
        M. S. Hussain, M. J. Zaki, D. Subramanian, 2023, arXiv 2306.01705; as
        :func:`subsampled_attention`.
    """

    # True until the parameters stand: torch asks for it while it makes them.
    _complete = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        keep_ratio: float | None = None,
        num_keys: int | None = None,
        mode: Mode = "unbiased",
        window: int | None = None,
        sigma: float | None = None,
        grid: tuple[int, ...] | None = None,
        shared_across_batch: bool = False,
        always_include_self: bool | None = None,
    ) -> None:
        for name, value, allowed in (
            ("dropout", dropout, (0,)),
            ("add_bias_kv", add_bias_kv, (False,)),
            ("add_zero_attn", add_zero_attn, (False,)),
            ("kdim", kdim, (None, embed_dim)),
            ("vdim", vdim, (None, embed_dim)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {allowed[-1]}: not supported, got {value}")
        check_at_least("embed_dim", embed_dim, 1)
        check_at_least("num_heads", num_heads, 1)
        if embed_dim % num_heads != 0:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim}, got {num_heads}")
        check_one_of("mode", mode, MODES)
        if keep_ratio is None and num_keys is None and window is None:
            keep_ratio = 0.25
        super().__init__(
            embed_dim, num_heads, bias=bias, batch_first=batch_first, device=device, dtype=dtype
        )
        self.keep_ratio, self.num_keys, self.window = keep_ratio, num_keys, window
        self.mode: Mode = mode
        self.sigma, self.grid = sigma, grid
        self.shared_across_batch = shared_across_batch
        self.always_include_self = always_include_self
        self.sampling: bool | None = None
        self.generator: torch.Generator | None = None  # of self_ensemble
        self._check_options()
        self._complete = True

    def _check_options(self) -> None:
        """Let the function look at the options, on a problem of fitting size."""
        tokens = self.grid[0] * self.grid[1] if self.grid else max(self.num_keys or 1, 1)
        tokens = max(tokens, self.window or 1)
        nothing = torch.empty(1, 1, tokens, 1)
        subsampled_attention(nothing, nothing, nothing, training=False, **self._options(tokens))

    @property
    def samples(self) -> bool:
        """Whether the next call samples keys."""
        return self.training if self.sampling is None else self.sampling

    # nn.TransformerEncoderLayer runs its fast path, which calls no self_attn, unless this is False.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return not (self._complete and self.samples)

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        pass

    def _options(self, tokens: int) -> dict[str, Any]:
        def fitting(count: int | None) -> int | None:
            return count if count is None else min(count, tokens)

        return {
            "keep_ratio": self.keep_ratio,
            "num_keys": fitting(self.num_keys),
            "window": fitting(self.window),
            "mode": self.mode,
            "sigma": self.sigma,
            "grid": self.grid,
            "shared_across_batch": self.shared_across_batch,
            "always_include_self": self.always_include_self,
        }

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the weights where they are asked for and attention is dense.

        Args:
            query: ``[B, Nq, embed_dim]`` (``[Nq, B, embed_dim]`` without ``batch_first``), or
                ``[Nq, embed_dim]``.
            key: likewise, ``[B, N, embed_dim]``.
            value: as ``key``.
            key_padding_mask: ``[B, N]``, True, or -inf in a floating-point mask, where a key is
                padding; sampling reads any other number as 0.
            need_weights: return the weights; not while keys are sampled.
            attn_mask: ``[Nq, N]`` or ``[B num_heads, Nq, N]``, True where a query must not see a
                key, or numbers to add to the logits.
            average_attn_weights: average the weights over the heads.
            is_causal: hide later keys; ``attn_mask`` is then taken for the causal mask, as torch
                does, and may be None.
        """
        if not self.samples:
            if is_causal and attn_mask is None:
                size = query.shape[-2 if self.batch_first or query.dim() == 2 else 0]
                attn_mask = nn.Transformer.generate_square_subsequent_mask(
                    size, device=query.device, dtype=query.dtype
                )
            dense: tuple[Tensor, Tensor | None] = super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
            return dense
        if need_weights:
            raise ValueError("need_weights must be False while keys are sampled, got True")
        if query.is_nested:
            raise ValueError("query must not be a nested tensor while keys are sampled")
        if query.dim() not in (2, 3):
            raise ValueError(f"query must have 2 or 3 dimensions, got {list(query.shape)}")
        return self._sampled(query, key, value, key_padding_mask, attn_mask, is_causal), None

    def _sampled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        unbatched = query.dim() == 2
        q, k, v = self._project(query, key, value)
        if key_padding_mask is not None:
            if key_padding_mask.is_floating_point():
                key_padding_mask = key_padding_mask.isneginf()
            key_padding_mask = key_padding_mask.unsqueeze(0) if unbatched else key_padding_mask
        bias = None if attn_mask is None or is_causal else self._bias(attn_mask, q)
        heads = subsampled_attention(
            q,
            k,
            v,
            **self._options(k.shape[2]),
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            attn_bias=bias,
            generator=self.generator,
        )
        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if unbatched:
            return out.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values as [B, H, N, head_dim]."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if key is query and value is query:
            projected = F.linear(query, weight, bias).chunk(3, -1)
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            pairs = zip((query, key, value), weight.chunk(3), biases, strict=True)
            projected = tuple(F.linear(x, w, b) for x, w, b in pairs)
        if query.dim() == 2:
            projected = tuple(x.unsqueeze(0) for x in projected)
        elif not self.batch_first:
            projected = tuple(x.transpose(0, 1) for x in projected)
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected]

    def _bias(self, attn_mask: Tensor, q: Tensor) -> Tensor:
        """Return a mask as numbers to add to the logits, [B or 1, H or 1, Nq, N]."""
        if attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=q.dtype)
            attn_mask = zeros.masked_fill(attn_mask, -torch.inf)
        attn_mask = attn_mask.to(q.dtype)
        if attn_mask.dim() == 2:
            return attn_mask[None, None]
        of_heads: Tensor = attn_mask.unflatten(0, (-1, self.num_heads))
        return of_heads

    def extra_repr(self) -> str:
        """Describe the configuration."""
        size = next(
            f"{name}={value}"
            for name, value in self._options(torch.iinfo(torch.int64).max).items()
            if value is not None
        )
        return f"{self.embed_dim}, {self.num_heads}, {size}, mode={self.mode!r}"


def convert_attention(
    model: nn.Module,
    *,
    where: Callable[[str, nn.MultiheadAttention], bool] | None = None,
    **options: Any,
) -> nn.Module:
    """Turn the ``nn.MultiheadAttention`` layers of any model into subsampled ones, in place.

    The new layers hold the very parameters of the old ones, so optimizers stay valid and the state
    dict keeps its names. Dropout of attention weights is given up: key sampling takes its place.
    Forward hooks on the old layers are not taken along.

    Args:
        model: any module; if it is an attention layer itself, use what is returned.
        where: ``where(name, layer)`` tells whether to convert a layer; None converts all.
            Cross-attention of a decoder works in the unbiased mode only.
        **options: of :class:`SubsampledSelfAttention`: ``keep_ratio``, ``mode``, ...

    Returns:
        The model.

    Raises:
        TypeError: an option is unknown or of the wrong type.
        ValueError: an option is out of range, a layer has parts that are not supported, or there
            is no layer to convert. The model is unchanged then.

    Example:
        >>> layer = nn.TransformerEncoderLayer(32, 2, batch_first=True)
        >>> model = convert_attention(nn.TransformerEncoder(layer, 2), keep_ratio=0.25)
        >>> model.layers[0].self_attn
        SubsampledSelfAttention(
          32, 2, keep_ratio=0.25, mode='unbiased'
          (out_proj): NonDynamicallyQuantizableLinear(in_features=32, out_features=32, bias=True)
        )

    Source:
        As :class:`SubsampledSelfAttention`.
    """
    converted: dict[nn.Module, SubsampledSelfAttention] = {}
    taken: list[tuple[nn.MultiheadAttention, SubsampledSelfAttention]] = []
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention and (where is None or where(name, module)):
            converted[module] = _converted(name, module, options)
            taken.append((module, converted[module]))
    if not converted:
        raise ValueError("model must have an nn.MultiheadAttention to convert, got none")
    for old, new in taken:
        new.in_proj_weight, new.in_proj_bias = old.in_proj_weight, old.in_proj_bias
        new.out_proj = old.out_proj
        new.training = old.training
    return replace_modules(model, lambda _, module: converted.get(module))


def _converted(
    name: str, module: nn.MultiheadAttention, options: dict[str, Any]
) -> SubsampledSelfAttention:
    """Make the twin of a layer, without parameters of its own."""
    try:
        return SubsampledSelfAttention(
            module.embed_dim,
            module.num_heads,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device="meta",
            **options,
        )
    except (TypeError, ValueError) as error:
        error.args = (f"{error} (in the layer {name!r})",)
        raise


class SSASchedule:
    r"""Train on sampled keys first, densely at the end.

    .. math:: \text{sampled for } t < 1 - f, \qquad \text{dense for } t \ge 1 - f

    Args:
        model: with :class:`SubsampledSelfAttention` layers.
        finetune_fraction: f in [0, 1], the part of training that is dense; the paper's 0.1.
        keep_ratio: n / N in (0, 1] to write into all layers; None leaves each its own size.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or the model has no such layer.

    Example:
        >>> model = nn.TransformerEncoderLayer(32, 2, batch_first=True)
        >>> schedule = SSASchedule(convert_attention(model), finetune_fraction=0.1)
        >>> for epoch in range(10):
        ...     schedule.set_progress(epoch / 10)
        >>> schedule.dense
        True

    Source:
        M. S. Hussain, M. J. Zaki, D. Subramanian, 2023, arXiv 2306.01705: dense fine-tuning follows
        the abstract; the fraction is reconstructed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        finetune_fraction: float = 0.1,
        keep_ratio: float | None = None,
    ) -> None:
        check_probability("finetune_fraction", finetune_fraction)
        if keep_ratio is not None:
            check_keep_ratio(keep_ratio)
        self.layers = _layers(model)
        self.finetune_fraction = finetune_fraction
        if keep_ratio is not None:
            for layer in self.layers:
                layer.keep_ratio, layer.num_keys, layer.window = keep_ratio, None, None
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Tell how much of training is done, in [0, 1]."""
        check_probability("progress", progress)
        self.dense = progress >= 1 - self.finetune_fraction
        for layer in self.layers:
            layer.sampling = False if self.dense else None


def self_ensemble(
    model: nn.Module,
    *inputs: Any,
    num_samples: int = 8,
    average: str = "prob",
    generator: torch.Generator | None = None,
    **named_inputs: Any,
) -> Tensor:
    r"""Average the predictions of sub-models: several passes with sampled keys.

    .. math:: \bar p = \frac{1}{M} \sum_{s=1}^{M} \operatorname{softmax}(z_s)
        \qquad \text{or} \qquad \bar z = \frac{1}{M} \sum_{s=1}^{M} z_s

    The model runs in evaluation mode, every other dropout off, with its
    :class:`SubsampledSelfAttention` layers sampling. Every module is left in the mode it was in,
    also after an error. Wrap the call in ``torch.no_grad()`` where no gradient is wanted.

    Args:
        model: with :class:`SubsampledSelfAttention` layers; returns logits ``[*, C]``.
        *inputs: of the model.
        num_samples: number of passes M, at least 1.
        average: ``"prob"`` for the mean of probabilities, ``"logit"`` for that of logits.
        generator: generator to draw the seeds from; the default one when omitted.
        **named_inputs: of the model, by name.

    Returns:
        Mean probabilities or mean logits, ``[*, C]``.

    Raises:
        TypeError: ``num_samples`` is not an int.
        ValueError: ``num_samples`` is below 1, ``average`` is unknown, or the model has no such
            layer.

    Example:
        >>> layer = nn.TransformerEncoderLayer(32, 2, batch_first=True)
        >>> model = nn.Sequential(convert_attention(layer), nn.Flatten(), nn.Linear(320, 5))
        >>> probabilities = self_ensemble(model, torch.randn(3, 10, 32), num_samples=4)
        >>> probabilities.shape
        torch.Size([3, 5])

    Source:
        M. S. Hussain, M. J. Zaki, D. Subramanian, 2023, arXiv 2306.01705: follows the abstract.
    """
    check_at_least("num_samples", num_samples, 1)
    check_one_of("average", average, AVERAGES)
    layers = _layers(model)
    training = {module: module.training for module in model.modules()}
    sampling = {layer: layer.sampling for layer in layers}
    # Torch's fast path would turn padded input into nested tensors before a layer can refuse them.
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        for layer in layers:
            layer.sampling, layer.generator = True, generator
        total: Tensor | None = None
        for _ in range(num_samples):
            logits = model(*inputs, **named_inputs)
            part: Tensor = logits.softmax(-1) if average == "prob" else logits
            total = part if total is None else total + part
        assert total is not None
        return total / num_samples
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in training.items():
            module.training = mode
        for layer, choice in sampling.items():
            layer.sampling, layer.generator = choice, None


def _layers(model: nn.Module) -> list[SubsampledSelfAttention]:
    layers = [module for module in model.modules() if isinstance(module, SubsampledSelfAttention)]
    if not layers:
        raise ValueError("model must have SubsampledSelfAttention layers, got none")
    return layers
