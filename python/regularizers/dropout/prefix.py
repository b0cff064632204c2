"""Prefixes: laws of the kept length k, and the mask that keeps the first k entries of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_positive,
    check_shape,
    check_tensor,
)
from regularizers._shared.prefix import check_prefix_length, check_prefix_lengths
from regularizers._shared.randomness import draw_seed
from regularizers.ops.philox import philox_words


class PrefixDistribution(nn.Module):
    r"""A law over kept lengths: P(k = i) for i = 1, ..., K.

    .. math:: k = \min \{ i : F_i > u \}, \qquad F_i = \sum_{j \le i} P(k = j), \quad u \in [0, 1)

    A module, so that a module which holds one takes it along from device to device; nothing enters
    the state dict, and the probabilities stay float64 under ``.half()``. Drawing does not wait for
    the device.

    Args:
        probs: ``[K]``, not negative, summing to 1 (within 1e-4; normalised in float64).

    Raises:
        TypeError: ``probs`` is not a tensor.
        ValueError: ``probs`` is not of shape ``[K >= 1]``, has a negative or infinite entry or NaN,
            or does not sum to 1.

    Example:
        >>> law = PrefixDistribution.gaussian(4, mean=0.0, std=2.0)
        >>> [round(p, 6) for p in law.probs.tolist()]
        [0.613038, 0.289579, 0.082966, 0.014417]
        >>> [round(p, 6) for p in law.keep_probability().tolist()]
        [1.0, 0.386962, 0.097383, 0.014417]
        >>> law.sample((6,), seed=1)
        tensor([2, 1, 3, 1, 2, 3])

    Source:
        O. Rippel, M. Gelbart, R. Adams, "Learning Ordered Representations with Nested Dropout",
        2014, arXiv 1402.0915, for the idea; each constructor names the work that uses its law.
    """

    probs: Tensor
    _cumulative: Tensor

    def __init__(self, probs: Tensor) -> None:
        super().__init__()
        check_tensor("probs", probs)
        if probs.dim() != 1 or probs.numel() == 0:
            raise ValueError(f"probs must have shape [K >= 1], got {list(probs.shape)}")
        wide = probs.detach().to("cpu", torch.float64)
        if not bool((wide >= 0).all() and wide.isfinite().all()):
            raise ValueError("probs must be finite and not negative")
        total = wide.sum().item()
        if abs(total - 1) > 1e-4:
            raise ValueError(f"probs must sum to 1, got a sum of {total}")
        wide = wide / total
        cumulative = wide.cumsum(0)
        self.register_buffer("probs", wide, persistent=False)
        # The last entry is 1 to the bit, so that every u in [0, 1) finds an index of positive
        # probability.
        self.register_buffer("_cumulative", cumulative / cumulative[-1], persistent=False)

    @classmethod
    def _from_logits(cls, logits: Tensor) -> PrefixDistribution:
        return cls(logits.softmax(0))

    @classmethod
    def uniform(cls, k_min: int, k_max: int) -> PrefixDistribution:
        """Make the law with equal probability for ``k_min``, ..., ``k_max``; K = ``k_max``.

        Example:
            >>> PrefixDistribution.uniform(2, 3).probs
            tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)
        """
        check_at_least("k_min", k_min, 1)
        check_at_least("k_max", k_max, k_min)
        probs = torch.zeros(k_max, dtype=torch.float64, device="cpu")
        probs[k_min - 1 :] = 1 / (k_max - k_min + 1)
        return cls(probs)

    @classmethod
    def gaussian(
        cls, num_features: int, mean: float = 0.0, std: float = 10.0
    ) -> PrefixDistribution:
        r"""Make the law :math:`P(k = i) \propto \exp(-((i - \mathrm{mean}) / \mathrm{std})^2)`.

        There is **no factor 1/2** in the exponent, so the usual standard deviation is
        :math:`\mathrm{std} / \sqrt 2`. The law is one on integers, not a rounded normal number.

        Source:
            Nested dropout for noisy labels, arXiv 2206.13140, after the authors' code.

        Example:
            >>> round(PrefixDistribution.gaussian(512, std=10.0).mean().item(), 4)
            5.9693
        """
        check_at_least("num_features", num_features, 1)
        check_positive("std", std)
        lengths = _lengths(num_features)
        return cls._from_logits(-(((lengths - mean) / std) ** 2))

    @classmethod
    def geometric(cls, num_features: int, q: float) -> PrefixDistribution:
        r"""Make the law :math:`P(k = i) \propto q^{i-1}`, cut at ``num_features``; 0 < q <= 1.

        Source:
            O. Rippel, M. Gelbart, R. Adams, 2014, arXiv 1402.0915.

        Example:
            >>> PrefixDistribution.geometric(3, 0.5).probs * 7
            tensor([4., 2., 1.], dtype=torch.float64)
        """
        check_at_least("num_features", num_features, 1)
        check_positive("q", q)
        if q > 1:
            raise ValueError(f"q must lie in (0, 1], got {q}")
        log_q = torch.tensor(q, dtype=torch.float64, device="cpu").log()
        return cls._from_logits((_lengths(num_features) - 1) * log_q)

    @classmethod
    def padded_uniform(cls, num_tokens: int, num_pad: int, k_min: int = 1) -> PrefixDistribution:
        r"""Make the law of min(k, N) with k uniform on ``k_min``, ..., N + M; K = N.

        .. math:: P(N) = \frac{M + 1}{N + M - k_{\min} + 1}

        for N = ``num_tokens`` and M = ``num_pad``: with padding behind the tokens, all N of them
        are kept more often.

        Source:
            Redundant token padding, arXiv 2601.01535; the law is reconstructed.

        Example:
            >>> [round(p, 4) for p in PrefixDistribution.padded_uniform(4, 3).probs.tolist()]
            [0.1429, 0.1429, 0.1429, 0.5714]
        """
        check_at_least("num_tokens", num_tokens, 1)
        check_at_least("num_pad", num_pad, 0)
        check_at_least("k_min", k_min, 1)
        if k_min > num_tokens:
            raise ValueError(f"k_min must be at most num_tokens = {num_tokens}, got {k_min}")
        count = num_tokens + num_pad - k_min + 1
        probs = torch.zeros(num_tokens, dtype=torch.float64, device="cpu")
        probs[k_min - 1 :] = 1 / count
        probs[-1] = (num_pad + 1) / count
        return cls(probs)

    @classmethod
    def fixed(cls, k: int, num_features: int | None = None) -> PrefixDistribution:
        """Make the law that is always ``k``; K = ``num_features``, or ``k`` when omitted.

        Example:
            >>> PrefixDistribution.fixed(2, 3).probs
            tensor([0., 1., 0.], dtype=torch.float64)
        """
        check_at_least("k", k, 1)
        if num_features is None:
            num_features = k
        check_at_least("num_features", num_features, k)
        probs = torch.zeros(num_features, dtype=torch.float64, device="cpu")
        probs[k - 1] = 1.0
        return cls(probs)

    @property
    def num_features(self) -> int:
        """The largest length K."""
        return self.probs.shape[0]

    def sample(
        self,
        shape: Sequence[int] = (),
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw independent lengths; draw i (in row-major order) is Philox stream i, element 0.

        Args:
            shape: shape of the result; none gives one length without dimensions.
            seed: int or int64 tensor with no dimensions; drawn from the default generator when
                omitted.
            generator: generator to draw the seed from, on the device of the probabilities; not
                inside ``torch.compile`` or activation checkpointing.

        Returns:
            int64 tensor of shape ``shape``, values in [1, K], beside the probabilities.

        Raises:
            TypeError: ``seed`` or ``generator`` is of the wrong type.
            ValueError: both are given, or one is out of range or on another device.
        """
        bits = draw_seed(seed, generator, self.probs)
        count = 1
        for size in shape:
            count *= size
        streams = torch.arange(count, device=bits.device)
        words = philox_words(bits, 1, stream=streams)[:, 0]
        u = (words >> 8).to(self._cumulative.dtype) * 2.0**-24
        return torch.searchsorted(self._cumulative, u, right=True).reshape(tuple(shape)) + 1

    def mean(self) -> Tensor:
        """Return E[k], a tensor with no dimensions."""
        lengths = torch.arange(1, self.num_features + 1, device=self.probs.device)
        return (lengths * self.probs).sum()

    def keep_probability(self) -> Tensor:
        """Return P(k >= i) for i = 1, ..., K as ``[K]``; the first entry is exactly 1."""
        kept = self.probs.flip(0).cumsum(0).flip(0)
        return torch.cat([torch.ones_like(kept[:1]), kept[1:]])

    def extra_repr(self) -> str:
        """Describe the law."""
        return f"num_features={self.num_features}, mean={self.mean().item():g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixDistribution:
        kept = {name: getattr(self, name) for name in ("probs", "_cumulative")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            moved: Tensor = getattr(self, name)
            if moved.device.type not in ("meta", "mps"):  # MPS has no float64
                self._buffers[name] = value.to(moved.device)
        return self


def prefix_mask(x: Tensor, k: int | Tensor, dim: int = -1, *, truncate: bool = False) -> Tensor:
    r"""Keep the first ``k`` entries of a dimension; the others become zero, or are cut off.

    .. math:: y_{\dots d \dots} = x_{\dots d \dots}\, 1[d < k]

    What is kept is **not** rescaled. Dropped entries are selected out: a NaN among them reaches
    neither the result nor a gradient.

    Args:
        x: a tensor of any shape.
        k: how many to keep, in [1, size of ``dim``]: an int, or an int64 tensor on the device of
            ``x`` whose dimensions are the leading ones of ``x`` (or broadcast to them), all before
            ``dim``. Values of a tensor on CUDA are not checked.
        dim: the dimension whose prefix is kept.
        truncate: cut the rest off, as a view, rather than zero it. Wants one k; a tensor is read,
            which waits for the device.

    Returns:
        The shape of ``x``, or with ``truncate`` k in place of its size along ``dim``. ``x`` itself
        where k is an int and keeps everything.

    Raises:
        TypeError: ``x`` is not a tensor, or ``k`` neither an int nor an int64 tensor.
        ValueError: ``k`` is out of range, has the wrong shape or is on another device.

    Example:
        >>> x = torch.arange(1.0, 7.0).reshape(2, 3)
        >>> prefix_mask(x, 2)
        tensor([[1., 2., 0.],
                [4., 5., 0.]])
        >>> prefix_mask(x, torch.tensor([1, 3]))
        tensor([[1., 0., 0.],
                [4., 5., 6.]])
        >>> prefix_mask(x, 1, truncate=True)
        tensor([[1.],
                [4.]])

    Source:
        Nested dropout, O. Rippel, M. Gelbart, R. Adams, 2014, arXiv 1402.0915.
    """
    check_tensor("x", x)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be a dimension of x of shape {list(x.shape)}, got {dim}")
    dim %= x.dim()
    size = x.shape[dim]
    if isinstance(k, Tensor):
        check_prefix_lengths(k, size, x, dim)
        if not truncate:
            lengths = k.reshape(k.shape + (1,) * (x.dim() - k.dim()))
            return torch.where(_positions(x, dim) < lengths, x, 0)
        check_shape("k", k, (), "[] with truncate")
        k = int(k)
    check_prefix_length(k, size)
    if truncate:
        return x.narrow(dim, 0, k)
    return x if k == size else torch.where(_positions(x, dim) < k, x, 0)


def _positions(x: Tensor, dim: int) -> Tensor:
    """Count along ``dim``, in a shape that broadcasts against ``x``."""
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    return torch.arange(x.shape[dim], device=x.device).reshape(shape)


def _lengths(num_features: int) -> Tensor:
    return torch.arange(1, num_features + 1, dtype=torch.float64, device="cpu")
