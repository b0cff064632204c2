"""Joint-embedding prediction for tables: latent features of hidden columns from visible ones."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from regularizers._shared.checks import check_at_least, check_floating, check_probability
from regularizers._shared.transformer import Transformer, sinusoidal_positions
from regularizers.dropout.feature_subset import sample_feature_masks
from regularizers.ops._operator import loss_dtype
from regularizers.representation.feature_tokens import FeatureTokenizer


def jepa_loss(pred: Tensor, target: Tensor) -> Tensor:
    r"""Compare predicted with actual embeddings; no gradient reaches the actual ones.

    .. math:: L = \operatorname{mean} (\mathrm{pred} - \operatorname{sg}(\mathrm{target}))^2

    Args:
        pred: predictions ``[*]``, such as ``[P B, n, E]``.
        target: what they should be, shape of ``pred``.

    Returns:
        The loss, with no dimensions; dtype of ``pred``, float32 under autocast.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ.

    Example:
        >>> jepa_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
        tensor(2.)

    Source:
        H. Thimonier et al., "T-JEPA: Augmentation-Free Self-Supervised Learning for Tabular Data",
        ICLR 2025, arXiv 2410.05016; authors' code read.
    """
    check_floating("pred", pred)
    check_floating("target", target)
    if pred.shape != target.shape:
        raise ValueError(
            f"target must have the shape of pred ({list(pred.shape)}), got {list(target.shape)}"
        )
    wide = torch.promote_types(pred.dtype, torch.float32)
    return F.mse_loss(pred.to(wide), target.detach().to(wide)).to(loss_dtype(pred))


@torch.no_grad()
def ema_update_(target: nn.Module, online: nn.Module, m: float) -> None:
    r"""Move a module's parameters towards those of another, in place.

    .. math:: \theta_{\mathrm{target}} \leftarrow m\, \theta_{\mathrm{target}}
        + (1 - m)\, \theta_{\mathrm{online}}

    Floating-point buffers move alike; others are copied. The target may be wider than the online
    module: in half precision itself, steps of 0.4 % of a difference round to nothing. Call it after
    the optimizer's step.

    Args:
        target: the module that follows.
        online: the module that is followed, with the same parameters and buffers.
        m: momentum in [0, 1]: 1 leaves the target, 0 makes it equal.

    Raises:
        ValueError: ``m`` is out of range, or the modules differ in names or shapes.

    Example:
        >>> online, target = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> _ = online.bias.data.fill_(1.0), target.bias.data.fill_(0.0)
        >>> ema_update_(target, online, 0.75)
        >>> target.bias.item()
        0.25

    Source:
        H. Thimonier et al., ICLR 2025, arXiv 2410.05016; authors' code read, which moves no
        buffers.
    """
    check_probability("m", m)
    follows, leads = (
        {**dict(x.named_parameters()), **dict(x.named_buffers())} for x in (target, online)
    )
    shapes = [{name: x.shape for name, x in group.items()} for group in (follows, leads)]
    if shapes[0] != shapes[1]:
        different = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise ValueError(
            f"target must have the parameters and buffers of online, differs in {different[0]!r}"
        )
    moving = [name for name, x in follows.items() if x.is_floating_point() or x.is_complex()]
    if moving:
        average = get_ema_multi_avg_fn(m)
        average(
            [follows[name] for name in moving],
            [leads[name].to(follows[name].dtype) for name in moving],
            0,
        )
    if m < 1:
        for name in follows.keys() - set(moving):
            follows[name].copy_(leads[name])


class FeaturePredictor(nn.Module):
    r"""Predict the embeddings of some features of a row from those of others.

    .. math:: \mathrm{transformer}([A h_c + s_c]_{c \in \mathrm{context}};
        [\mu + s_t]_{t \in \mathrm{target}}) \to B\,(\cdot)_t + b

    with fixed sinusoidal positions s and one learned mask token for all targets.

    Args:
        num_positions: number of positions, R + D for R regularization tokens and D features.
        dim: features E of an embedding.
        hidden_dim: width of the transformer; ``dim`` when omitted.
        depth: number of blocks.
        num_heads: heads of attention; divides ``hidden_dim``.

    Shape:
        ``[N, n, dim]``, int64 ``[N, n]`` and int64 ``[N, n']`` to ``[N, n', dim]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> predictor = FeaturePredictor(6, 8, depth=1)
        >>> context, places = torch.randn(4, 2, 8), torch.tensor([[0, 3]]).expand(4, -1)
        >>> predictor(context, places, torch.tensor([[1, 2, 4]]).expand(4, -1)).shape
        torch.Size([4, 3, 8])

    Source:
        H. Thimonier et al., ICLR 2025, arXiv 2410.05016; authors' code read. The blocks here are
        pre-norm with GELU and no dropout; any module that is called alike may take the place.
    """

    positions: Tensor

    def __init__(
        self,
        num_positions: int,
        dim: int,
        *,
        hidden_dim: int | None = None,
        depth: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        check_at_least("num_positions", num_positions, 1)
        check_at_least("dim", dim, 1)
        width = dim if hidden_dim is None else hidden_dim
        check_at_least("hidden_dim", width, 1)
        self.transformer = Transformer(width, depth, num_heads)
        self.embed = nn.Linear(dim, width)
        self.project = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.empty(width))
        for layer in (self.embed, self.project):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.register_buffer("positions", sinusoidal_positions(num_positions, width))

    def forward(
        self, context: Tensor, context_positions: Tensor, target_positions: Tensor
    ) -> Tensor:
        """Return the predicted embeddings at the target positions."""
        seen = self.embed(context)
        positions = self.positions.to(seen.dtype)
        seen = seen + positions[context_positions]
        asked = self.mask_token.to(seen.dtype) + positions[target_positions]
        tokens = self.transformer(torch.cat([seen, asked], dim=1))
        result: Tensor = self.project(tokens[:, seen.shape[1] :])
        return result


class TabularJEPAOutput(NamedTuple):
    """What a step of :class:`TabularJEPA` gives.

    Attributes:
        loss: with no dimensions.
        prediction: ``[P, C, B, n_target, E]``, for every target and context.
        target: shape of ``prediction``, without gradient.

    Example:
        >>> x = torch.zeros(1, 1, 2, 3, 4)
        >>> TabularJEPAOutput(jepa_loss(x, x), x, x).loss
        tensor(0.)
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor


class TabularJEPA(nn.Module):
    r"""Learn representations of table rows by predicting latent features from other features.

    .. math:: L = \operatorname{mean} \big( \mathrm{predictor}(f_\theta([\mathrm{REG}; x_c]), t)
        - \operatorname{sg}(f_\xi([\mathrm{REG}; x])_t) \big)^2, \qquad
        \xi \leftarrow m \xi + (1 - m) \theta

    The context encoder :math:`f_\theta` gets the regularization tokens and the tokens of the
    context features; the others are not in its sequence, rather than zero. The target encoder
    :math:`f_\xi`, a moving average, gets everything; its outputs at the target features are what
    is predicted. Tokenizer and encoder are averaged together, and the average is always in
    ``eval()``.

    A step: ``loss``, ``backward``, the optimizer's step over the parameters that require gradients,
    then :meth:`update_target`.

    Args:
        tokenizer: a :class:`FeatureTokenizer`, or a module like it: rows to ``[B, R + D, E]``, with
            ``num_features`` and ``num_reg_tokens``.
        encoder: any module ``[B, N, E]`` to ``[B, N, E]`` for any N, such as
            ``torch.nn.TransformerEncoder`` with ``batch_first=True``.
        predictor: a :class:`FeaturePredictor` of R + D positions, or a module called like it.
        context_share: smallest and largest share of the features in a context.
        target_share: the same for a target.
        num_contexts: C.
        num_targets: P.
        momentum: m at the start and at the end of training, linear in between.
        match_reference: as the authors' code, where numbers of features are taken for places in a
            sequence that begins with the regularization tokens: these are seen and predicted as if
            they were features, the last R features never are, and a sample's P targets are equal.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        >>> model = TabularJEPA(
        ...     FeatureTokenizer(10, [], 16),
        ...     nn.TransformerEncoder(layer, 2),
        ...     FeaturePredictor(1 + 10, 16, depth=1),
        ... )
        >>> learning = [p for p in model.parameters() if p.requires_grad]
        >>> optimizer = torch.optim.AdamW(learning, lr=1e-3)
        >>> for step in range(3):
        ...     model(torch.randn(32, 10)).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     model.update_target(step / 3)
        >>> model.encode(torch.randn(4, 10)).shape
        torch.Size([4, 10, 16])

    Source:
        H. Thimonier et al., ICLR 2025, arXiv 2410.05016; authors' code read. Default are the stated
        design's masks, not those that the code makes of it; see ``match_reference``.
    """

    def __init__(
        self,
        tokenizer: FeatureTokenizer,
        encoder: nn.Module,
        predictor: nn.Module,
        *,
        context_share: tuple[float, float] = (0.2, 0.4),
        target_share: tuple[float, float] = (0.2, 0.4),
        num_contexts: int = 1,
        num_targets: int = 4,
        momentum: tuple[float, float] = (0.996, 1.0),
        match_reference: bool = False,
    ) -> None:
        super().__init__()
        for name, module in (
            ("tokenizer", tokenizer),
            ("encoder", encoder),
            ("predictor", predictor),
        ):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        for value in momentum:
            check_probability("momentum", value)
        self.masking = {
            "context_share": context_share,
            "target_share": target_share,
            "num_contexts": num_contexts,
            "num_targets": num_targets,
        }
        self.momentum = momentum
        self.match_reference = match_reference
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.predictor = predictor
        self.target_tokenizer = copy.deepcopy(tokenizer).requires_grad_(False)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        # Raises now where the shares do not fit the number of features.
        self.sample_masks(1, seed=0, device="cpu")
        self.train()

    def train(self, mode: bool = True) -> TabularJEPA:
        """Switch the mode of everything but the averages, which stay in evaluation."""
        super().train(mode)
        self.target_tokenizer.eval()
        self.target_encoder.eval()
        return self

    def sample_masks(
        self,
        batch: int,
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw masks as :func:`regularizers.dropout.sample_feature_masks` for this model."""
        return sample_feature_masks(
            batch,
            self.tokenizer.num_features,
            **self.masking,  # type: ignore[arg-type]
            match_reference=self.match_reference,
            seed=seed,
            generator=generator,
            device=device,
        )

    def forward(
        self,
        numerical: Tensor | None = None,
        categorical: Tensor | None = None,
        *,
        masks: tuple[Tensor, Tensor] | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TabularJEPAOutput:
        """Return the loss, the predictions and the targets.

        Args:
            numerical: as the tokenizer takes them, ``[B, ...]``.
            categorical: likewise.
            masks: contexts ``[C, B, n]`` and targets ``[P, B, n']``, from :meth:`sample_masks`;
                drawn when omitted. ``torch.compile(fullgraph=True)`` needs them.
            seed: to draw masks with: int or int64 tensor with no dimensions.
            generator: to draw the seed from.
        """
        tokens = self.tokenizer(numerical, categorical)
        batch = len(tokens)
        if masks is None:
            masks = self.sample_masks(batch, seed=seed, generator=generator, device=tokens.device)
        elif seed is not None or generator is not None:
            raise ValueError("masks must not be given together with seed or generator")
        contexts, targets = (self._places(*item, batch) for item in zip(_NAMES, masks, strict=True))
        if not self.match_reference:
            always = torch.arange(self.tokenizer.num_reg_tokens, device=tokens.device)
            contexts = torch.cat([always.expand(*contexts.shape[:2], -1), contexts], dim=2)
        pairs = (len(targets), len(contexts), batch)  # P, C, B
        encoded = self.encoder(_gather(tokens.expand(len(contexts), -1, -1, -1), contexts))
        seen = encoded.unflatten(0, pairs[1:]).expand(pairs[0], -1, -1, -1, -1)
        asked = targets[:, None].expand(*pairs, -1)
        prediction = self.predictor(
            seen.flatten(0, 2),
            contexts.expand(pairs[0], -1, -1, -1).flatten(0, 2),
            asked.flatten(0, 2),
        ).unflatten(0, pairs)
        with torch.no_grad():
            full = self.target_encoder(self.target_tokenizer(numerical, categorical))
            target = _gather(full.expand(len(targets), -1, -1, -1), targets)
        target = target.unflatten(0, (pairs[0], 1, batch)).expand_as(prediction)
        return TabularJEPAOutput(jepa_loss(prediction, target), prediction, target)

    def _places(self, name: str, mask: Tensor, batch: int) -> Tensor:
        """Return the places in the sequence that a mask's features have."""
        if mask.dtype != torch.int64 or mask.dim() != 3 or mask.shape[1] != batch:
            raise ValueError(
                f"masks must have {name} of type int64 and shape [sets, {batch}, features], "
                f"got {mask.dtype} and {list(mask.shape)}"
            )
        return mask if self.match_reference else mask + self.tokenizer.num_reg_tokens

    def encode(
        self,
        numerical: Tensor | None = None,
        categorical: Tensor | None = None,
        *,
        target: bool = False,
    ) -> Tensor:
        """Return a representation ``[B, D, E]`` of whole rows, regularization tokens taken off.

        Differentiable, for fine-tuning; call it under ``torch.no_grad()`` and in ``eval()`` for
        features alone.

        Args:
            numerical: as the tokenizer takes them.
            categorical: likewise.
            target: by the average instead of the context encoder.
        """
        tokenizer = self.target_tokenizer if target else self.tokenizer
        encoder = self.target_encoder if target else self.encoder
        encoded: Tensor = encoder(tokenizer(numerical, categorical))
        return encoded[:, tokenizer.num_reg_tokens :]

    def update_target(self, progress: float) -> None:
        """Move the averages, after the optimizer's step, at this progress in [0, 1] of training."""
        check_probability("progress", progress)
        start, end = self.momentum
        m = start + (end - start) * progress
        ema_update_(self.target_tokenizer, self.tokenizer, m)
        ema_update_(self.target_encoder, self.encoder, m)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        options = ", ".join(f"{name}={value}" for name, value in self.masking.items())
        return f"{options}, momentum={self.momentum}, match_reference={self.match_reference}"


_NAMES = ("contexts", "targets")


def _gather(x: Tensor, places: Tensor) -> Tensor:
    """Return the tokens of ``[S, B, N, E]`` at ``[S, B, n]`` as ``[S B, n, E]``."""
    index = places[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, index).flatten(0, 1)
