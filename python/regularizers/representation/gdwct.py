"""Group-wise whitening and coloring: give content features the statistics of a style."""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_probability,
    check_same_device,
    check_same_dtype,
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import add_up
from regularizers._shared.moments import center
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers.ops._operator import accumulate_dtype, full_precision

ColoringForm = Literal["gram", "direct"]


class WCTOutput(NamedTuple):
    """What :class:`GroupWhiteningColoring` returns.

    Attributes:
        out: the colored features, of the shape and dtype of the content.
        covariance: of the content by groups, ``[G, c, c]``, for :func:`whitening_loss`.
        basis: the normalised bases U of all samples and groups, ``[B * G, c, c]``, for
            :func:`coloring_loss`.

    Example:
        >>> layer = GroupWhiteningColoring(4, groups=2, style_dim=2, mlp_dim=8)
        >>> out, covariance, basis = layer(torch.randn(2, 4, 3, 3), torch.randn(2, 2))
    """

    out: Tensor
    covariance: Tensor
    basis: Tensor


class GroupWhiteningColoring(nn.Module):
    r"""Color content features with matrices that a style predicts, group of channels by group.

    .. math::
        \mathrm{out} = \alpha \left( \mathrm{blockdiag}(X_1, \dots, X_G)\, (x - \mu_x)
        + \mu(s) \right) + (1 - \alpha)\, x, \qquad X_g = U_g D_g U_g^\top

    Content is centred here and never whitened: :func:`whitening_loss` of the returned covariance
    makes the encoder emit white features instead, and :func:`coloring_loss` of the returned basis
    keeps X close to a true square root of a covariance. Add both to the loss of the generator;
    where there are several layers, average over them. Statistics are those of the batch, also in
    evaluation.

    One MLP of five linear layers makes the :math:`c \times c` numbers of each group from that
    group's share of the style, the same MLP for all groups; another of three makes the mean.

    Args:
        channels: C of the content.
        groups: G, a divisor of ``channels`` and of ``style_dim``; C for a scale a channel, 1 for
            one full matrix; 8 for 256 channels in the paper.
        style_dim: S of the style.
        mlp_dim: hidden width of the MLP of the matrices.
        alpha_init: first value of the learned blend :math:`\alpha`, in [0, 1]. It is put back into
            [0, 1] before each use in training.
        eps: added to the diagonal of the covariance, at least 0.
        process_group: processes whose batches are one, for means and covariance; local batches may
            differ in size.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        Content ``[B, C, *]`` with ``B x positions`` at least 2 and style ``[B, S]`` (further axes
        of size 1 are dropped) to :class:`WCTOutput`. Covariance and product are computed in float32
        (float64 for float64).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> layer = GroupWhiteningColoring(16, groups=4, style_dim=8, mlp_dim=32)
        >>> found = layer(torch.randn(2, 16, 8, 8), torch.randn(2, 8))
        >>> found.out.shape, found.covariance.shape, found.basis.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([4, 4, 4]), torch.Size([8, 4, 4]))
        >>> penalty = 0.001 * whitening_loss(found.covariance) + coloring_loss(found.basis)

    Source:
        W. Cho, S. Choi, D. K. Park, I. Shin, J. Choo, "Image-to-Image Translation via Group-wise
        Deep Whitening-and-Coloring Transformation", CVPR 2019, arXiv 1812.09912; authors' code
        read. There a dense C x C matrix is masked, which costs G times as much, and the style has C
        numbers.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        style_dim: int,
        mlp_dim: int,
        alpha_init: float = 0.6,
        eps: float = 1e-5,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("channels", channels, 1)
        check_at_least("groups", groups, 1)
        check_at_least("style_dim", style_dim, 1)
        check_at_least("mlp_dim", mlp_dim, 1)
        check_probability("alpha_init", alpha_init)
        check_not_negative("eps", eps)
        for name, size in (("channels", channels), ("style_dim", style_dim)):
            if size % groups:
                raise ValueError(f"{name} must be a multiple of groups ({groups}), got {size}")
        self.channels = channels
        self.groups = groups
        self.style_dim = style_dim
        self.eps = eps
        self.process_group = process_group
        factory = {"device": device, "dtype": dtype}
        members = channels // groups
        self.matrix_mlp = _mlp([style_dim // groups, *[mlp_dim] * 4, members**2], factory)
        self.mean_mlp = _mlp([style_dim, *[channels] * 3], factory)
        self.alpha = nn.Parameter(torch.tensor(float(alpha_init), **factory))  # type: ignore[arg-type]

    def forward(self, content: Tensor, style: Tensor) -> WCTOutput:
        """Return the colored content, and what the two regularizers take."""
        check_floating("content", content)
        check_floating("style", style)
        check_same_device("style", style, "content", content)
        batch = len(content) if content.dim() else 0
        style = style.flatten(1) if style.dim() > 2 else style
        if style.shape != (batch, self.style_dim):
            raise ValueError(
                f"style must have shape [{batch}, {self.style_dim}], got {list(style.shape)}"
            )
        x, mean, count = _centered_groups(content, self.groups, self.process_group, self.channels)
        members = x.shape[2]
        numbers = self.matrix_mlp(style.reshape(batch * self.groups, -1)).to(x.dtype)
        matrix, basis = coloring_matrix(numbers.view(batch, self.groups, members, members))
        shift = self.mean_mlp(style).to(x.dtype).view(batch, self.groups, members, 1)
        alpha = self._blend().to(x.dtype)
        # alpha (X (x - mean) + shift) + (1 - alpha) x as one product and one sum: exactly x where
        # alpha is 0, and no less accurate than x itself where its mean is large.
        identity = torch.eye(members, dtype=x.dtype, device=x.device)
        groups = content.reshape(x.shape).to(x.dtype)
        with full_precision(x.device):
            blend = torch.lerp(identity.expand_as(matrix), matrix, alpha)
            bias = alpha * (shift - matrix @ mean)
            out = torch.baddbmm(bias.flatten(0, 1), blend.flatten(0, 1), groups.flatten(0, 1))
        return WCTOutput(
            out.view(content.shape).to(content.dtype),
            _group_covariance(x, count, self.eps, self.process_group),
            basis.flatten(0, 1),
        )

    def _blend(self) -> Tensor:
        if not self.training:
            return self.alpha.clamp(0, 1)
        with torch.no_grad():
            self.alpha.clamp_(0, 1)
        # A copy, so that no earlier graph holds the parameter that the next call writes to.
        return self.alpha.clone()

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"{self.channels}, groups={self.groups}, style_dim={self.style_dim}, eps={self.eps}"


def group_covariance(
    x: Tensor,
    *,
    groups: int,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Return the covariance of each group of channels, over the batch and all positions.

    .. math:: \Sigma_g = \frac{1}{n - 1} \sum (x_g - \bar x_g)(x_g - \bar x_g)^\top + \epsilon I

    Args:
        x: ``[B, C, *]``, n = B x positions at least 2.
        groups: G, a divisor of C.
        eps: :math:`\epsilon`, at least 0.
        process_group: processes whose batches are one; local batches may differ in size.

    Returns:
        ``[G, C / G, C / G]``, float64 for float64, else float32.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: an argument is out of range or of the wrong shape. NaN gives NaN.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).view(2, 2, 1, 1)
        >>> group_covariance(x, groups=1, eps=0.0)
        tensor([[[2., 4.],
                 [4., 8.]]])

    Source:
        W. Cho et al., CVPR 2019, arXiv 1812.09912; authors' code read.
    """
    check_at_least("groups", groups, 1)
    check_not_negative("eps", eps)
    centered, _, count = _centered_groups(x, groups, process_group)
    return _group_covariance(centered, count, eps, process_group)


def whitening_loss(covariance: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Return how far covariances are from the identity, entry by entry.

    .. math:: R_w = \operatorname{mean} |\Sigma - I|

    Args:
        covariance: ``[*, c, c]``, as :class:`GroupWhiteningColoring` returns it.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for all entries.

    Returns:
        The loss; float64 for float64, else float32.

    Raises:
        TypeError: ``covariance`` is not floating-point.
        ValueError: it is not square, or ``reduction`` is unknown.

    Example:
        >>> whitening_loss(torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
        tensor(0.5000)

    Source:
        W. Cho et al., CVPR 2019, arXiv 1812.09912; authors' code read. Its weight is 0.001.
    """
    return _distance_to_identity("covariance", covariance, reduction)


def coloring_loss(
    basis: Tensor, *, form: ColoringForm = "gram", reduction: Reduction = "mean"
) -> Tensor:
    r"""Return how far the bases of coloring matrices are from orthogonal.

    .. math::
        R_c = \operatorname{mean} |U^\top U - I| \ \text{(gram)}, \qquad
        R_c = \operatorname{mean} |U - I| \ \text{(direct)}

    Args:
        basis: U, ``[*, c, c]``, as :class:`GroupWhiteningColoring` returns it.
        form: ``"gram"``, the paper's: any orthogonal basis costs nothing. ``"direct"``, the
            released code's, which calls the same helper on U itself: the identity alone costs
            nothing.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for all entries.

    Returns:
        The loss; float64 for float64, else float32.

    Raises:
        TypeError: ``basis`` is not floating-point.
        ValueError: it is not square, or a word is unknown.

    Example:
        >>> U = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
        >>> bool(coloring_loss(U) < 1e-6)
        True
        >>> print(f"{coloring_loss(U, form='direct').item():.4f}")
        0.8536

    Source:
        W. Cho et al., CVPR 2019, arXiv 1812.09912. The weight 10 of the paper goes with
        ``"direct"``; start at 1 with ``"gram"``.
    """
    check_one_of("form", form, ("gram", "direct"))
    _check_square("basis", basis)
    if form == "direct":
        return _distance_to_identity("basis", basis, reduction)
    basis = basis.to(accumulate_dtype(basis.dtype))
    with full_precision(basis.device):
        return _distance_to_identity("basis", basis.mT @ basis, reduction)


def coloring_matrix(s: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return a symmetric coloring matrix and its basis from any square matrix.

    .. math:: D = \mathrm{diag}(\|s_{\cdot 1}\|, \|s_{\cdot 2}\|, \dots), \qquad U = s D^{-1},
        \qquad X = U D U^\top = s U^\top

    X is positive definite, with the eigenvectors U and the eigenvalues D, where U is orthogonal.

    Args:
        s: ``[*, c, c]``. A column of zeros stays one in U, without gradient.

    Returns:
        X and U, ``[*, c, c]`` both; float64 for float64, else float32.

    Raises:
        TypeError: ``s`` is not floating-point.
        ValueError: ``s`` is not square.

    Example:
        >>> X, U = coloring_matrix(torch.diag(torch.tensor([3.0, 2.0])))
        >>> X
        tensor([[3., 0.],
                [0., 2.]])

    Source:
        W. Cho et al., CVPR 2019, arXiv 1812.09912; authors' code read, which divides by 0 there.
    """
    _check_square("s", s)
    s = s.to(accumulate_dtype(s.dtype))
    basis = unit(s.mT).mT
    with full_precision(s.device):
        return s @ basis.mT, basis


@torch.no_grad()
def exact_whiten_color(content: Tensor, style: Tensor, *, groups: int, eps: float = 1e-5) -> Tensor:
    r"""Give content features exactly the means and covariances of style features.

    .. math:: y_g = \Sigma_{s,g}^{1/2} \Sigma_{c,g}^{-1/2} (x_g - \bar x_g) + \bar s_g

    The transformation that :class:`GroupWhiteningColoring` learns to approximate, from
    eigendecompositions; without gradient.

    Args:
        content: x, ``[B, C, *]``.
        style: s, features ``[B', C, *]`` of the same dtype; batch and positions may differ.
        groups: G, a divisor of C.
        eps: the least eigenvalue that is divided by, at least 0 (0 for a covariance of full rank).

    Returns:
        The shape and dtype of ``content``.

    Raises:
        TypeError: a tensor is not floating-point, or dtypes differ.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> content, style = torch.randn(2, 4, 8, 8), 3 * torch.randn(2, 4, 8, 8) + 1
        >>> y = exact_whiten_color(content, style, groups=2)
        >>> torch.allclose(group_covariance(y, groups=2), group_covariance(style, groups=2))
        True

    Source:
        Y. Li et al., "Universal Style Transfer via Feature Transforms", 2017, arXiv 1705.08086, by
        groups as in W. Cho et al., arXiv 1812.09912.
    """
    check_at_least("groups", groups, 1)
    check_not_negative("eps", eps)
    check_floating("content", content)
    check_floating("style", style)
    check_same_dtype("style", style, "content", content)
    check_same_device("style", style, "content", content)
    x, _, count = _centered_groups(content, groups, None)
    s, mean, style_count = _centered_groups(style, groups, None, content.shape[1])
    with full_precision(x.device):
        values, vectors = torch.linalg.eigh(_group_covariance(x, count, 0.0, None))
        whitening = (vectors * values.clamp_min(eps).rsqrt()[:, None]) @ vectors.mT
        values, vectors = torch.linalg.eigh(_group_covariance(s, style_count, 0.0, None))
        coloring = (vectors * values.clamp_min(0).sqrt()[:, None]) @ vectors.mT
        y: Tensor = (coloring @ whitening) @ x + mean
    return y.view(content.shape).to(content.dtype)


def _centered_groups(
    x: Tensor,
    groups: int,
    process_group: dist.ProcessGroup | None,
    channels: int | None = None,
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return the centred groups ``[B, G, c, positions]``, means ``[1, G, c, 1]`` and the count."""
    check_floating("x", x)
    if x.dim() < 3 or (channels is not None and x.shape[1] != channels):
        raise ValueError(f"x must have shape [B, {channels or 'C'}, ...], got {list(x.shape)}")
    if x.shape[1] % groups:
        raise ValueError(f"x must have a multiple of {groups} channels, got {x.shape[1]}")
    if x.shape[1] == 0 or (process_group is None and x.numel() < 2 * x.shape[1]):
        raise ValueError(f"x must have 2 positions or more in its batch, got {list(x.shape)}")
    parts = x.reshape(len(x), groups, x.shape[1] // groups, -1)
    return center(parts, (0, 3), process_group)


def _group_covariance(
    x: Tensor, count: float | Tensor, eps: float, process_group: dist.ProcessGroup | None
) -> Tensor:
    """Return ``[G, c, c]`` from centred groups, as a sum over samples: no copy of the features."""
    with full_precision(x.device):
        products = (x @ x.mT).sum(0)
    if process_group is not None:
        products = add_up(products, process_group)
    identity = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    return products / (count - 1) + eps * identity


def _distance_to_identity(name: str, matrix: Tensor, reduction: Reduction) -> Tensor:
    check_one_of("reduction", reduction, REDUCTIONS)
    _check_square(name, matrix)
    matrix = matrix.to(accumulate_dtype(matrix.dtype))
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    entries = (matrix - identity).abs()
    return reduce_rows(entries, reduction)


def _check_square(name: str, matrix: Tensor) -> None:
    check_floating(name, matrix)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., c, c], got {list(matrix.shape)}")


def _mlp(
    sizes: list[int], factory: dict[str, torch.device | str | torch.dtype | None]
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, **factory), nn.LeakyReLU(0.01)]  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])
