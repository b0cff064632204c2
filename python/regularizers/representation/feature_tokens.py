"""Rows of a table as tokens: one a feature, and regularization tokens in front of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_same_dtype,
    known_range,
)
from regularizers._shared.transformer import sinusoidal_positions


class RegularizationTokens(nn.Module):
    r"""Learned tokens that take part in attention and that no loss looks at ([REG]).

    .. math:: \mathrm{prepend}(x) = [r_1; \dots; r_R; x_1; \dots; x_N], \qquad
        \mathrm{strip}(\mathrm{prepend}(x)) = x

    The same for every sample before the first layer, with no bias; after it they depend on all
    features. In joint-embedding prediction they are in every context and never a target; the paper
    finds that they keep representations from collapsing.

    Args:
        num_tokens: R, at least 0.
        dim: features of a token.

    Shape:
        ``[*, N, dim]`` to ``[*, R + N, dim]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> tokens = RegularizationTokens(1, 8)
        >>> x = torch.randn(32, 5, 8)
        >>> tokens(x).shape
        torch.Size([32, 6, 8])
        >>> torch.equal(tokens.strip(tokens.prepend(x)), x)
        True

    Source:
        H. Thimonier et al., "T-JEPA: Augmentation-Free Self-Supervised Learning for Tabular Data",
        ICLR 2025, arXiv 2410.05016; authors' code read.
    """

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        check_at_least("num_tokens", num_tokens, 0)
        check_at_least("dim", dim, 1)
        self.num_tokens = num_tokens
        self.dim = dim
        # A parameter that no forward pass uses is an error under DistributedDataParallel.
        self.weight = nn.Parameter(_uniform(num_tokens, dim)) if num_tokens else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens with those of regularization in front."""
        return self.prepend(x)

    def prepend(self, x: Tensor) -> Tensor:
        """Put the tokens in front of each sequence."""
        self._check(x, 0)
        if self.weight is None:
            return x
        tokens = self.weight.to(x.dtype).expand(*x.shape[:-2], -1, -1)
        return torch.cat([tokens, x], dim=-2)

    def strip(self, x: Tensor) -> Tensor:
        """Take the tokens, or what layers have made of them, off again."""
        self._check(x, self.num_tokens)
        return x[..., self.num_tokens :, :]

    def _check(self, x: Tensor, least: int) -> None:
        check_floating("x", x)
        if x.dim() < 2 or x.shape[-1] != self.dim or x.shape[-2] < least:
            raise ValueError(
                f"x must have shape [..., tokens >= {least}, {self.dim}], got {list(x.shape)}"
            )

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"num_tokens={self.num_tokens}, dim={self.dim}"


class FeatureTokenizer(nn.Module):
    r"""Make a token of each feature of a table's row, behind regularization tokens.

    .. math::
        z_j = \begin{cases} w_j x_j + b_j & \text{numerical} \\
        E_j[x_j] + b_j & \text{categorical} \end{cases}, \qquad
        \mathrm{out} = [r_1; \dots; r_R; z_1; \dots; z_D] + s

    with sinusoidal positions s of base 100. Numerical features come first, then categorical ones;
    feature j is token R + j. Scale numerical features to unit variance first.

    Args:
        num_numerical: number of numerical features.
        cardinalities: number of values of each categorical feature.
        dim: features of a token.
        num_reg_tokens: R, at least 0.

    Shape:
        ``[B, num_numerical]`` and int64 ``[B, len(cardinalities)]`` to ``[B, R + D, dim]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape, or a category is not below
            its cardinality (a device-side assertion on CUDA, an ``IndexError`` when compiled).

    Example:
        >>> tokenizer = FeatureTokenizer(3, [2, 5], 8)
        >>> tokenizer(torch.randn(4, 3), torch.tensor([[0, 4], [1, 0], [1, 2], [0, 3]])).shape
        torch.Size([4, 6, 8])

    Source:
        H. Thimonier et al., ICLR 2025, arXiv 2410.05016; authors' code read. Its optional
        embeddings of a feature's type and number are left out: bias and position carry them.
    """

    offsets: Tensor
    sizes: Tensor
    positions: Tensor

    def __init__(
        self,
        num_numerical: int,
        cardinalities: Sequence[int],
        dim: int,
        *,
        num_reg_tokens: int = 1,
    ) -> None:
        super().__init__()
        check_at_least("num_numerical", num_numerical, 0)
        for size in cardinalities:
            check_at_least("cardinalities", size, 1)
        self.num_numerical = num_numerical
        self.num_features = num_numerical + len(cardinalities)
        if self.num_features < 1:
            raise ValueError("num_numerical must be at least 1 without categorical features, got 0")
        self.reg_tokens = RegularizationTokens(num_reg_tokens, dim)
        self.weight = nn.Parameter(_uniform(num_numerical, dim)) if num_numerical else None
        self.bias = nn.Parameter(_uniform(self.num_features, dim))
        # One table for all features, one lookup for a row.
        self.table = nn.Parameter(_uniform(sum(cardinalities), dim)) if cardinalities else None
        sizes = torch.tensor(list(cardinalities), dtype=torch.int64)
        self.register_buffer("sizes", sizes)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes)
        positions = sinusoidal_positions(num_reg_tokens + self.num_features, dim, base=100.0)
        self.register_buffer("positions", positions)

    @property
    def num_reg_tokens(self) -> int:
        """The number R of regularization tokens."""
        return self.reg_tokens.num_tokens

    def forward(self, numerical: Tensor | None = None, categorical: Tensor | None = None) -> Tensor:
        """Return the tokens; either kind of features may be None where there are none."""
        self._check(numerical, categorical)
        kinds = []
        if numerical is not None and self.weight is not None:
            kinds.append(self.weight * numerical[..., None])
        if categorical is not None and self.table is not None:
            # A category out of range becomes a row that is not there, never another feature's.
            known = (categorical >= 0) & (categorical < self.sizes)
            rows = torch.where(known, categorical + self.offsets, len(self.table))
            kinds.append(F.embedding(rows, self.table))
        tokens = torch.cat(kinds, dim=1) + self.bias
        return self.reg_tokens.prepend(tokens) + self.positions.to(tokens.dtype)

    def _check(self, numerical: Tensor | None, categorical: Tensor | None) -> None:
        num_categorical = len(self.sizes)
        if (numerical is None) != (self.num_numerical == 0):
            raise ValueError(f"numerical must have {self.num_numerical} features")
        if (categorical is None) != (num_categorical == 0):
            raise ValueError(f"categorical must have {num_categorical} features")
        if numerical is not None:
            check_floating("numerical", numerical)
            check_same_dtype("numerical", numerical, "the tokenizer", self.bias)
            if numerical.dim() != 2 or numerical.shape[1] != self.num_numerical:
                raise ValueError(
                    f"numerical must have shape [batch, {self.num_numerical}], "
                    f"got {list(numerical.shape)}"
                )
        if categorical is not None:
            if not isinstance(categorical, Tensor) or categorical.dtype != torch.int64:
                raise TypeError(f"categorical must be an int64 tensor, got {_kind(categorical)}")
            if categorical.dim() != 2 or categorical.shape[1] != num_categorical:
                raise ValueError(
                    f"categorical must have shape [batch, {num_categorical}], "
                    f"got {list(categorical.shape)}"
                )
            if numerical is not None and len(numerical) != len(categorical):
                raise ValueError(
                    f"categorical must have the {len(numerical)} rows of numerical, "
                    f"got {len(categorical)}"
                )
            if known_range(categorical) is not None:
                bad = ((categorical < 0) | (categorical >= self.sizes)).any(0)
                if bad.any():
                    feature = int(bad.int().argmax())
                    raise ValueError(
                        f"categorical must hold values in [0, {int(self.sizes[feature])}) for "
                        f"feature {feature}, got {categorical[:, feature].unique().tolist()}"
                    )

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"num_numerical={self.num_numerical}, cardinalities={self.sizes.tolist()}, "
            f"dim={self.bias.shape[1]}"
        )


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _uniform(count: int, dim: int) -> Tensor:
    """Return ``[count, dim]`` as ``torch.nn.Linear`` initialises weights of ``dim`` inputs."""
    return (torch.rand(count, dim) * 2 - 1) / math.sqrt(dim)
