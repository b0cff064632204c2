"""Intrinsic normal prototypes: what is normal in an image, found in the image itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_not_negative,
    check_positive,
    check_same_device,
    check_shape,
)
from regularizers._shared.directions import unit
from regularizers._shared.grid import token_grid
from regularizers.representation.inp_loss import (
    anomaly_map,
    check_tokens,
    coherence_loss,
    soft_mining_cosine_loss,
)


class INPExtractor(nn.Module):
    r"""Gather the prototypes of an image from its tokens, by cross-attention of learned queries.

    .. math::
        p \leftarrow p + \mathrm{Attn}(\mathrm{LN}\, p, \mathrm{LN}\, x, \mathrm{LN}\, x), \qquad
        p \leftarrow p + \mathrm{MLP}(\mathrm{LN}\, p)

    from learned :math:`p_0` of M rows, N(0, 1) at the beginning. Most tokens of an image are
    normal, and so are the few directions that sum them up, also where an anomaly is among them.

    Args:
        dim: features D of a token.
        num_prototypes: M, at least 1.
        num_heads: heads of attention; divides ``dim``.
        mlp_ratio: width of the MLP in units of ``dim``.
        depth: number of blocks.
        eps: of the layer norms.

    Shape:
        ``[B, N, D]`` to ``[B, M, D]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> extractor = INPExtractor(32, num_prototypes=6, num_heads=4)
        >>> extractor(torch.randn(2, 49, 32)).shape
        torch.Size([2, 6, 32])

    Source:
        W. Luo et al., "Exploring Intrinsic Normal Prototypes within a Single Image for Universal
        Anomaly Detection" (INP-Former), CVPR 2025, arXiv 2503.02424, authors' code: biases,
        ``eps``, and linear weights of deviation 0.01.
    """

    def __init__(
        self,
        dim: int,
        num_prototypes: int = 6,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        depth: int = 1,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        _check_sizes(dim, num_heads, mlp_ratio, eps)
        check_at_least("num_prototypes", num_prototypes, 1)
        check_at_least("depth", depth, 1)
        self.dim = dim
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, dim))
        self.blocks = nn.ModuleList(
            _ExtractorBlock(dim, num_heads, mlp_ratio, eps) for _ in range(depth)
        )
        self.apply(_small_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return the prototypes of every image."""
        check_tokens("x", x, self.dim)
        prototypes: Tensor = self.prototypes.to(x.dtype).expand(len(x), -1, -1)
        for block in self.blocks:
            prototypes = block(prototypes, x)
        return prototypes


class _ExtractorBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = _mlp(dim, mlp_ratio)

    def forward(self, prototypes: Tensor, x: Tensor) -> Tensor:
        q = _heads(self.q(self.norm(prototypes)), self.num_heads)
        k, v = (_heads(part, self.num_heads) for part in self.kv(self.norm(x)).chunk(2, -1))
        found = F.scaled_dot_product_attention(q, k, v)
        prototypes = prototypes + self.proj(found.transpose(1, 2).flatten(2))
        result: Tensor = prototypes + self.mlp(self.mlp_norm(prototypes))
        return result


class INPDecoderBlock(nn.Module):
    r"""Rebuild tokens from prototypes alone: linear attention with a ReLU and no shortcut.

    .. math::
        a_h = \mathrm{ReLU}\Big(s_h \frac{q_h}{\|q_h\|} \cdot \frac{k_h}{\|k_h\|}\Big), \qquad
        y = \mathrm{proj}(a v), \qquad \mathrm{out} = y + \mathrm{MLP}(\mathrm{LN}\, y)

    with q from LN x, k and v from LN p, and a learned scale :math:`s_h` a head, 1 at the
    beginning. The tokens x only say which prototypes to add up. A residual :math:`x + y` would
    hand an anomaly through, and there would be no error to find it by.

    Args:
        dim: features D of a token.
        num_heads: heads of attention; divides ``dim``.
        mlp_ratio: width of the MLP in units of ``dim``.
        eps: of the layer norms.

    Shape:
        tokens ``[B, N, D]`` and prototypes ``[B, M, D]`` to ``[B, N, D]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> block = INPDecoderBlock(32, num_heads=4)
        >>> block(torch.randn(2, 49, 32), torch.randn(2, 6, 32)).shape
        torch.Size([2, 49, 32])

    Source:
        W. Luo et al., CVPR 2025, arXiv 2503.02424, authors' code.
    """

    def __init__(
        self, dim: int, *, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-8
    ) -> None:
        super().__init__()
        _check_sizes(dim, num_heads, mlp_ratio, eps)
        self.dim = dim
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.scale = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.proj = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = _mlp(dim, mlp_ratio)
        self.apply(_small_weights)

    def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
        """Return the rebuilt tokens."""
        check_tokens("x", x, self.dim)
        check_tokens("prototypes", prototypes, self.dim, len(x))
        check_same_device("prototypes", prototypes, "x", x)
        q = _heads(self.q(self.norm(x)), self.num_heads)
        k, v = (
            _heads(part, self.num_heads) for part in self.kv(self.norm(prototypes)).chunk(2, -1)
        )
        attention = (unit(q).to(v.dtype) @ unit(k).to(v.dtype).mT * self.scale).relu()
        y = self.proj((attention @ v).transpose(1, 2).flatten(2))
        result: Tensor = y + self.mlp(self.mlp_norm(y))
        return result


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Turn ``[B, N, D]`` into ``[B, H, N, D / H]``."""
    divided: Tensor = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return divided


def _mlp(dim: int, mlp_ratio: float) -> nn.Sequential:
    hidden = max(1, int(mlp_ratio * dim))
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def _small_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
        nn.init.zeros_(module.bias)


def _check_sizes(dim: int, num_heads: int, mlp_ratio: float, eps: float) -> None:
    check_at_least("dim", dim, 1)
    check_at_least("num_heads", num_heads, 1)
    check_positive("mlp_ratio", mlp_ratio)
    check_positive("eps", eps)
    if dim % num_heads:
        raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")


class INPOutput(NamedTuple):
    """What :class:`INPFormer` returns.

    Attributes:
        encoder_feats: fused maps of the encoder, ``[B, D, h, w]`` each.
        decoder_feats: their reconstructions, of the same shapes.
        coherence: the coherence loss of the prototypes.
        prototypes: ``[B, M, D]``.

    Example:
        >>> output = INPFormer(16, num_heads=2, decoder_depth=2, groups=1)([torch.randn(1, 9, 16)])
        >>> output.prototypes.shape
        torch.Size([1, 6, 16])
    """

    encoder_feats: list[Tensor]
    decoder_feats: list[Tensor]
    coherence: Tensor
    prototypes: Tensor


class INPFormer(nn.Module):
    r"""The trained part of INP-Former, on top of the token features of any frozen encoder.

    The mean x of the given layers makes the prototypes p; a bottleneck MLP and a chain of decoder
    blocks rebuild x from p. Layers of the encoder and blocks of the decoder, the latter in reverse,
    are averaged in ``groups`` runs of equal length and compared as maps.

    .. math:: L = L_{\text{soft mining}} + 0.2\, L_{\text{coherence}}

    Args:
        dim: features D of a token.
        num_heads: heads of attention; divides ``dim``.
        num_prototypes: M.
        decoder_depth: number of decoder blocks, a multiple of ``groups``.
        groups: number of pairs of maps to compare.
        mlp_ratio: width of the MLPs in units of ``dim``.
        coherence_weight: of the coherence loss, at least 0.
        power: of :func:`soft_mining_cosine_loss`.

    Shape:
        a list of ``[B, N, D]``, one a layer of the encoder (patch tokens only), their number a
        multiple of ``groups``, to an :class:`INPOutput`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> model = INPFormer(32, num_heads=4, decoder_depth=4)
        >>> layers = [torch.randn(2, 49, 32) for _ in range(8)]  # of a frozen encoder
        >>> model.loss(model(layers)).backward()
        >>> model.score(model(layers), size=(56, 56)).shape
        torch.Size([2, 1, 56, 56])

    Source:
        W. Luo et al., CVPR 2025, arXiv 2503.02424: eight layers of DINOv2, eight blocks, two
        groups, trained with StableAdamW at 1e-3 falling to 1e-4 and gradients clipped at 0.1.
        How the parts are joined is reconstructed from the description of the authors' code.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_prototypes: int = 6,
        decoder_depth: int = 8,
        groups: int = 2,
        mlp_ratio: float = 4.0,
        coherence_weight: float = 0.2,
        power: float = 3.0,
    ) -> None:
        super().__init__()
        check_at_least("groups", groups, 1)
        check_at_least("decoder_depth", decoder_depth, 1)
        if decoder_depth % groups:
            raise ValueError(
                f"decoder_depth must be a multiple of groups = {groups}, got {decoder_depth}"
            )
        check_not_negative("coherence_weight", coherence_weight)
        check_not_negative("power", power)
        self.groups = groups
        self.coherence_weight = coherence_weight
        self.power = power
        self.extractor = INPExtractor(dim, num_prototypes, num_heads=num_heads, mlp_ratio=mlp_ratio)
        self.bottleneck = _mlp(dim, mlp_ratio)
        self.bottleneck.apply(_small_weights)
        self.decoder = nn.ModuleList(
            INPDecoderBlock(dim, num_heads=num_heads, mlp_ratio=mlp_ratio)
            for _ in range(decoder_depth)
        )

    def forward(
        self, layers: Sequence[Tensor], *, grid: tuple[int, int] | None = None
    ) -> INPOutput:
        """Return maps, reconstructions, the coherence loss and the prototypes.

        Args:
            layers: token features of the encoder, ``[B, N, D]`` each; detached.
            grid: rows and columns of the tokens; None for a square.
        """
        if len(layers) == 0 or len(layers) % self.groups:
            raise ValueError(
                f"layers must be a multiple of groups = {self.groups}, one at least, "
                f"got {len(layers)}"
            )
        for layer in layers:
            check_tokens("layers", layer, self.extractor.dim)
            check_shape("layers", layer, tuple(layers[0].shape), "one for all")
        grid = token_grid("grid", grid, layers[0].shape[1])
        layers = [layer.detach() for layer in layers]
        fused = torch.stack(layers).mean(0)
        prototypes = self.extractor(fused)
        rebuilt = []
        y = self.bottleneck(fused)
        for block in self.decoder:
            y = block(y, prototypes)
            rebuilt.append(y)
        return INPOutput(
            self._maps(layers, grid),
            self._maps(rebuilt[::-1], grid),
            coherence_loss(fused, prototypes),
            prototypes,
        )

    def _maps(self, layers: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        run = len(layers) // self.groups
        return [
            torch.stack(list(layers[start : start + run])).mean(0).mT.unflatten(2, grid)
            for start in range(0, len(layers), run)
        ]

    def loss(self, output: INPOutput, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
        """Return the loss of a batch of normal images.

        Args:
            output: what :meth:`forward` returned.
            process_group: as for :func:`soft_mining_cosine_loss`.
        """
        mined = soft_mining_cosine_loss(
            output.encoder_feats,
            output.decoder_feats,
            power=self.power,
            process_group=process_group,
        )
        return mined + self.coherence_weight * output.coherence

    @torch.no_grad()
    def score(self, output: INPOutput, *, size: int | tuple[int, int]) -> Tensor:
        """Return the anomaly map ``[B, 1, H, W]``."""
        return anomaly_map(output.encoder_feats, output.decoder_feats, size=size)
