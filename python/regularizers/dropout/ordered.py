"""Linear and convolution layers as two ordered low-rank factors: rank b keeps the first b columns.

How models of such layers are made and trained stands in ``ordered_training.py``.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import check_at_least, check_floating, check_not_negative
from regularizers.ops._operator import accumulate_dtype


class OrderedLowRankLayer(nn.Module):
    r"""What both ordered low-rank layers share: factors, norms of their components, shrinking.

    .. math:: W \approx U_{:, :b} V_{:, :b}^\top, \qquad
        \mathrm{importance}_b = \|V_{:, b:}\|_F \|U_{:, b:}\|_F

    Made as :class:`OrderedLowRankLinear` or :class:`OrderedLowRankConv2d`.

    Attributes:
        factor_in: :math:`V^\top`, ``[r, *in]``.
        factor_out: U, ``[out, r]``.
        active_rank: the rank that the layer has been shrunk to; in the state dict.
        sampled_rank: overrides ``active_rank`` where it is not None; :func:`sampled_ranks` sets it.

    Example:
        >>> layer = OrderedLowRankLinear(8, 6)
        >>> isinstance(layer, OrderedLowRankLayer), layer.importance().shape
        (True, torch.Size([6]))

    Source:
        As :class:`OrderedLowRankLinear`.
    """

    factor_in: nn.Parameter
    factor_out: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        fan_in: int,
        kernel: tuple[int, ...],
        out: int,
        bias: bool,
        rank: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        full = min(fan_in, out)
        if rank is None:
            rank = full
        check_at_least("rank", rank, 0)
        if rank > full:
            raise ValueError(f"rank must be at most {full}, the rank of a dense layer, got {rank}")
        self.factor_in = nn.Parameter(torch.empty(rank, *kernel, device=device, dtype=dtype))
        self.factor_out = nn.Parameter(torch.empty(out, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out, device=device, dtype=dtype)) if bias else None
        self.active_rank = rank
        self.sampled_rank: int | None = None
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """The rank r of the stored factors."""
        return self.factor_in.shape[0]

    @property
    def weight(self) -> Tensor:
        """The dense weight at the current rank, for code that reads one; made anew every time."""
        b = self._rank(None)
        product = self.factor_out[:, :b] @ self.factor_in[:b].flatten(1)
        return product.view(-1, *self.factor_in.shape[1:])

    def reset_parameters(self) -> None:
        """Start from the singular vectors of a dense layer, initialised as torch does."""
        out, shape = self.factor_out.shape[0], self.factor_in.shape[1:]
        dense = self.factor_in.new_empty(out, *shape)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        self._factorise(dense)
        if self.bias is not None:
            bound = 1 / math.sqrt(shape.numel())
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def _factorise(self, dense: Tensor) -> None:
        """Set both factors from the largest singular values of a dense weight."""
        left, values, right = torch.linalg.svd(_wide(dense).flatten(1), full_matrices=False)
        root = values[: self.rank].sqrt()
        self.factor_out.copy_(left[:, : self.rank] * root)
        self.factor_in.copy_((root[:, None] * right[: self.rank]).view_as(self.factor_in))

    def _take_over(self, dense: nn.Linear | nn.Conv2d) -> None:
        """Become the layer ``dense``: weight, bias, what is frozen, training mode."""
        self.to_empty(device=dense.weight.device)
        self._factorise(dense.weight)
        self.factor_in.requires_grad_(dense.weight.requires_grad)
        self.factor_out.requires_grad_(dense.weight.requires_grad)
        if self.bias is not None and dense.bias is not None:
            with torch.no_grad():
                self.bias.copy_(dense.bias)
            self.bias.requires_grad_(dense.bias.requires_grad)
        self.train(dense.training)

    def _hand_over(self, dense: nn.Linear | nn.Conv2d) -> None:
        """Give the layer ``dense`` this layer's weight, bias, what is frozen, training mode."""
        dense.to_empty(device=self.factor_in.device)
        trained = self.factor_in.requires_grad or self.factor_out.requires_grad
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None and dense.bias is not None:
                dense.bias.copy_(self.bias)
        dense.weight.requires_grad_(trained)
        if self.bias is not None and dense.bias is not None:
            dense.bias.requires_grad_(self.bias.requires_grad)
        dense.train(self.training)

    def _rank(self, rank: int | None) -> int:
        if rank is None:
            rank = self.active_rank if self.sampled_rank is None else self.sampled_rank
        check_at_least("rank", rank, 0)
        if rank > self.active_rank:
            raise ValueError(f"rank must be at most {self.active_rank}, got {rank}")
        return rank

    @torch.no_grad()
    def importance(self, *, hierarchical: bool = True) -> Tensor:
        r"""Return how much hangs on each component, ``[r]``, float32 at least.

        :math:`\|V_{b:}\|_F \|U_{b:}\|_F` of the suffix from b on, which does not increase in b;
        with ``hierarchical=False`` :math:`\|V_b\| \|U_b\|` of the component alone.
        """
        norm_in, norm_out = self._norms(hierarchical)
        return norm_in * norm_out

    def group_lasso(self, *, hierarchical: bool = True) -> Tensor:
        r"""Return the group lasso of each component, ``[r]``, float32 at least.

        :math:`\|V_{b:}\|_F + \|U_{b:}\|_F`, or with ``hierarchical=False``
        :math:`\|V_b\| + \|U_b\|`. All stored components count, active or not. The gradient at 0 is
        0.
        """
        norm_in, norm_out = self._norms(hierarchical)
        return norm_in + norm_out

    def _norms(self, hierarchical: bool) -> tuple[Tensor, Tensor]:
        squares = (
            _wide(self.factor_in).square().flatten(1).sum(1),
            _wide(self.factor_out).square().sum(0),
        )
        if not hierarchical:
            return _root(squares[0]), _root(squares[1])
        # Summed over a component first, so that the suffixes cost r additions, not r times out.
        first, second = (square.flip(0).cumsum(0).flip(0) for square in squares)
        return _root(first), _root(second)

    @torch.no_grad()
    def shrink_(self, threshold: float, *, prune: bool = False) -> int:
        """Drop the tail of components whose importance is below a threshold; return what is left.

        Args:
            threshold: least hierarchical importance of a component that stays, at least 0.
            prune: cut the parameters as well. They are new tensors then: make a new optimizer.
                Otherwise only ``active_rank`` falls, and an optimizer keeps its state.

        Raises:
            ValueError: ``threshold`` is below 0, a factor is not finite, or a sampled rank is set.
        """
        check_not_negative("threshold", threshold)
        self.check_no_sampler("shrink_")
        importance = self.importance()
        if not importance.isfinite().all():
            raise ValueError("the factors must be finite, got infinity or NaN")
        # A prefix, since importance does not increase.
        self.active_rank = min(self.active_rank, int((importance >= threshold).sum()))
        if prune:
            b = self.active_rank
            for name, kept in (
                ("factor_in", self.factor_in[:b]),
                ("factor_out", self.factor_out[:, :b]),
            ):
                trained = getattr(self, name).requires_grad
                setattr(self, name, nn.Parameter(kept.clone(), requires_grad=trained))
        return self.active_rank

    def check_no_sampler(self, action: str) -> None:
        """Raise if a sampled rank is set."""
        if self.sampled_rank is not None:
            raise ValueError(f"{action} must not be called inside sampled_ranks")

    def is_beneficial(self) -> bool:
        """Tell whether factors of the active rank have no more numbers than the dense weight."""
        out, fan_in = self.factor_out.shape[0], self.factor_in.shape[1:].numel()
        return (fan_in + out) * self.active_rank <= fan_in * out

    def get_extra_state(self) -> Tensor:
        """Return ``active_rank`` for the state dict."""
        return torch.tensor(self.active_rank)

    def set_extra_state(self, state: Tensor) -> None:
        """Take ``active_rank`` from a state dict."""
        self.active_rank = int(state)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulate_dtype(tensor.dtype))


def _root(square: Tensor) -> Tensor:
    """Return the square root with gradient 0 at 0, where autograd's would be infinite."""
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())


class OrderedLowRankLinear(OrderedLowRankLayer):
    r"""A linear layer of two factors whose components are ordered: rank b uses the first b.

    .. math:: y = U_{:, :b} (V_{:, :b}^\top x) + \text{bias}

    Rank b costs two thin layers: factors are sliced, not masked. Components from b on get zero
    gradients from such a pass, and their zeros are written: a backward pass touches both
    factors in full, as every optimizer does. Nothing is rescaled.

    Args:
        in_features: size of the last dimension of the input.
        out_features: likewise of the output.
        bias: whether there is a bias.
        rank: r of the stored factors, at most min(in_features, out_features), the default.
        device: where the parameters go.
        dtype: their dtype.

    Parameters are ``factor_in`` :math:`= V^\top` ``[r, in]``, ``factor_out`` :math:`= U`
    ``[out, r]`` and ``bias``. A new layer holds the singular vectors of a dense one with torch's
    initialisation.

    Shape:
        ``[*, in_features]`` to ``[*, out_features]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> layer = OrderedLowRankLinear.from_linear(nn.Linear(8, 6))
        >>> layer.rank, layer(torch.randn(2, 8), rank=3).shape
        (6, torch.Size([2, 6]))
        >>> layer.shrink_(threshold=0.5 * layer.importance()[0].item()) < 6
        True

    Source:
        S. Horvath, S. Laskaridis, S. Rajput, H. Wang, "Maestro: Uncovering Low-Rank Structures via
        Trainable Decomposition", ICML 2024, arXiv 2308.14929; from the authors' code. There a rank
        j travels as the fraction j / r and comes back as ceil(r (j / r)), which is j + 1 for some
        pairs (the first: j = 7, r = 25); here ranks are integers. There a new layer has two
        independent random factors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_at_least("in_features", in_features, 1)
        check_at_least("out_features", out_features, 1)
        super().__init__(in_features, (in_features,), out_features, bias, rank, device, dtype)
        self.in_features = in_features
        self.out_features = out_features

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rank: int | None = None) -> OrderedLowRankLinear:
        """Factorise a dense layer by its singular values; full rank computes what it computed."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            rank=rank,
            device="meta",
            dtype=linear.weight.dtype,
        )
        layer._take_over(linear)
        return layer

    def to_linear(self) -> nn.Linear:
        """Multiply the factors of the active rank out; return a dense layer."""
        self.check_no_sampler("to_linear")
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device="meta",
            dtype=self.factor_in.dtype,
        )
        self._hand_over(linear)
        return linear

    def forward(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return the output at ``rank``; None: the sampled rank if one is set, or the active."""
        check_floating("x", x)
        b = self._rank(rank)
        return F.linear(F.linear(x, self.factor_in[:b]), self.factor_out[:, :b], self.bias)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}, active_rank={self.active_rank}"
        )


class OrderedLowRankConv2d(OrderedLowRankLayer):
    r"""A convolution to r ordered channels and a 1 x 1 convolution: rank b uses the first b.

    .. math:: y = U_{:, :b} * (V_{:b} \star x) + \text{bias}

    with the dense kernel, seen as a matrix ``[out, in kh kw]``, equal to :math:`U V` at full rank.
    Rank b costs two thin convolutions; rank 0 gives the bias at every place.

    Args:
        in_channels: as for ``torch.nn.Conv2d``.
        out_channels: likewise.
        kernel_size: likewise.
        stride: likewise.
        padding: likewise; padded with zeros.
        dilation: likewise.
        groups: 1; a grouped convolution has no one kernel matrix.
        bias: likewise.
        rank: r of the stored factors, at most min(out, in kh kw), the default.
        device: where the parameters go.
        dtype: their dtype.

    Parameters are ``factor_in`` ``[r, in, kh, kw]``, ``factor_out`` ``[out, r]`` and ``bias``.

    Shape:
        ``[B, in, H, W]`` to ``[B, out, H', W']``, or both without B.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or ``groups`` is not 1.

    Example:
        >>> layer = OrderedLowRankConv2d.from_conv2d(nn.Conv2d(3, 16, 3, padding=1))
        >>> layer.rank, layer(torch.randn(2, 3, 8, 8), rank=5).shape
        (16, torch.Size([2, 16, 8, 8]))

    Source:
        As :class:`OrderedLowRankLinear`. In the authors' code rank 0 puts the bias on the last
        axis; here it is broadcast over the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups != 1:
            raise ValueError(f"groups must be 1, got {groups}")
        # Checks and normalises the arguments as the layer whose place this takes.
        like = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, device="meta"
        )
        kernel = (in_channels, *like.kernel_size)
        super().__init__(math.prod(kernel), kernel, out_channels, bias, rank, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = cast(tuple[int, int], like.kernel_size)
        self.stride = cast(tuple[int, int], like.stride)
        self.padding = cast("tuple[int, int] | str", like.padding)
        self.dilation = cast(tuple[int, int], like.dilation)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, rank: int | None = None) -> OrderedLowRankConv2d:
        """Factorise a dense layer by its singular values; full rank computes what it computed."""
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be a torch.nn.Conv2d, got {type(conv).__name__}")
        if conv.padding_mode != "zeros":
            raise ValueError(f"conv must have padding_mode='zeros', got {conv.padding_mode!r}")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            cast(tuple[int, int], conv.kernel_size),
            cast(tuple[int, int], conv.stride),
            cast("tuple[int, int] | str", conv.padding),
            cast(tuple[int, int], conv.dilation),
            conv.groups,
            conv.bias is not None,
            rank=rank,
            device="meta",
            dtype=conv.weight.dtype,
        )
        layer._take_over(conv)
        return layer

    def to_conv2d(self) -> nn.Conv2d:
        """Multiply the factors of the active rank out; return a dense layer."""
        self.check_no_sampler("to_conv2d")
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device="meta",
            dtype=self.factor_in.dtype,
        )
        self._hand_over(conv)
        return conv

    def forward(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return the output at ``rank``; None: the sampled rank if one is set, or the active."""
        check_floating("x", x)
        b = self._rank(rank)
        if b == 0:
            return self._bias_everywhere(x)
        inner = F.conv2d(x, self.factor_in[:b], None, self.stride, self.padding, self.dilation)
        return F.conv2d(inner, self.factor_out[:, :b, None, None], self.bias)

    def _bias_everywhere(self, x: Tensor) -> Tensor:
        height, width = (self._output_size(x.shape[i], i) for i in (-2, -1))
        value = x.new_zeros(self.out_channels) if self.bias is None else self.bias
        return value[:, None, None].expand(*x.shape[:-3], -1, height, width)

    def _output_size(self, size: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
        if self.padding == "same":
            return size
        padding = 0 if isinstance(self.padding, str) else self.padding[axis]
        return (size + 2 * padding - reach - 1) // self.stride[axis] + 1

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"bias={self.bias is not None}, rank={self.rank}, active_rank={self.active_rank}"
        )
