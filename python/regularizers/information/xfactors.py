"""A latent of a residual and one block a factor: supervised contrast for each, KL for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_labels,
    check_not_negative,
    check_one_of,
    check_positive,
    check_same_dtype,
    check_tensor,
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import add_up, gather_batch, gather_rows
from regularizers._shared.entries import reduce_entries
from regularizers._shared.gaussian import kl_standard_normal
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers.ops._operator import accumulate_dtype, full_precision
from regularizers.ops.pairwise import SameLabel, pairwise_logsumexp

Similarity = Literal["cosine", "dot"]
MISSING = -1

# Added to the scores of columns that do not count: their exponential is exactly 0, and a row with
# nothing else keeps finite values, so that its gradient can be multiplied by 0.
_AWAY = -1e30


def supervised_info_nce(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.07,
    similarity: Similarity = "cosine",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Contrast samples by label, with all positives of an anchor inside one logarithm.

    .. math::
        \ell_i = \log \sum_{j \ne i} e^{s_{ij}} - \log \sum_{j \ne i,\, y_j = y_i} e^{s_{ij}},
        \qquad s_{ij} = \frac{\langle \hat z_i, \hat z_j \rangle}{T}

    An anchor is content with *one* near positive, unlike in supervised contrastive learning
    (Khosla et al.'s L_out), which takes the mean over positives outside of the logarithm.

    Args:
        z: ``[N, D]``, floating point.
        labels: ``[N]``, integers.
        temperature: T, above 0.
        similarity: ``"cosine"``, or ``"dot"`` without normalisation.
        ignore_index: label of the samples that do not count, neither as anchors nor in the sums
            of others; None where all count.
        reduction: ``"mean"`` or ``"sum"`` over the anchors with a positive, or ``"none"``.
        process_group: processes whose batches are one; the loss is that of the whole. Local
            batches must have one size.

    Returns:
        The loss, at least 0, with no dimensions, or ``[N]`` with 0 for anchors without a positive;
        0 with a graph where there is none at all. float32 for half types.

    Raises:
        TypeError: ``z`` is not floating point, or ``labels`` are not integers.
        ValueError: a shape or an option is out of range.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> supervised_info_nce(z, torch.tensor([0, 0, 1, 1]), temperature=1.0)
        tensor(0.5514)

    Source:
        "XFactors: Disentangled Information Bottleneck via Contrastive Supervision", 2026, arXiv
        2601.21688, authors' code read, which clips similarities to 100 and the loss to 1e5 and
        skips batches with NaN. None of that is here: the logarithms are stable, and NaN comes out.
    """
    check_floating("z", z)
    check_positive("temperature", temperature)
    check_one_of("similarity", similarity, ("cosine", "dot"))
    check_one_of("reduction", reduction, REDUCTIONS)
    if z.dim() != 2:
        raise ValueError(f"z must have shape [N, D], got {list(z.shape)}")
    check_labels("labels", labels, z.shape[0])
    rows = gather_batch(z.to(accumulate_dtype(z.dtype)), process_group)
    labels = gather_rows(labels, process_group)
    if similarity == "cosine":
        rows = unit(rows)
    scale = 1 / temperature
    if ignore_index is None:
        bias, counted = None, torch.ones_like(labels, dtype=torch.bool)
    else:
        counted = labels != ignore_index
        bias = torch.where(counted, 0.0, _AWAY).to(rows.dtype)
    every = pairwise_logsumexp(rows, scale=scale, column_bias=bias).logsumexp
    near = pairwise_logsumexp(rows, scale=scale, pairs=SameLabel(labels))
    anchors = counted & (near.pair_count > 0)
    losses = torch.where(anchors, every, 0) - torch.where(anchors, near.logsumexp, 0)
    # What has no anchor at all still hangs on the graph of z.
    return reduce_entries(losses, reduction, valid=anchors) + 0 * rows.sum()


class XFactorsOutput(NamedTuple):
    """What :class:`XFactorsLoss` gives, each with no dimensions but ``nce``.

    Attributes:
        total: the loss.
        kl_s: divergence of the residual from the standard normal, without its weight.
        kl_t: the same for all blocks together.
        nce: contrast of every block, ``[K]``, without weights.
        cov: norm of the correlations between residual and blocks, without its weight.

    Example:
        >>> mu = torch.zeros(4, 2)
        >>> labels = torch.tensor([[0], [0], [1], [1]])
        >>> XFactorsLoss([2])(mu, mu, mu, mu, torch.ones(4, 2), labels).nce
        tensor([1.0986])
    """

    total: Tensor
    kl_s: Tensor
    kl_t: Tensor
    nce: Tensor
    cov: Tensor


class XFactorsLoss(nn.Module):
    r"""Shape a latent of a residual S and one block T_k for every labelled factor.

    .. math::
        L = L_{\mathrm{recon}} + w (\beta_S \mathrm{KL}_S + \beta_T \mathrm{KL}_T)
        + \sum_k a_k \mathrm{NCE}(T_k, y_k)
        + v\, \|\operatorname{corr}(\mu_S, \mu_T)\|_F

    KL is the divergence of the Gaussian posteriors from N(0, I), a sum over dimensions and a mean
    over the batch, with log-variances kept in [-20, 20]. NCE is :func:`supervised_info_nce` of the
    *sampled* block. Correlations divide by :math:`\sigma_i \sigma_j + 10^{-8}`.

    Args:
        block_dims: dimensions of the blocks, one for each of the K factors.
        beta_s: :math:`\beta_S`, at least 0.
        beta_t: :math:`\beta_T`, at least 0; 1 or 100 in the paper.
        kl_weight: w, at least 0.
        nce_weights: :math:`a_k`, at least 0, one for all or one a factor.
        temperature: of NCE, above 0.
        cov_weight: v, at least 0; 0 in the published configuration.
        cov_clip: upper bound of the norm of the correlations, above which it has no gradient; 1 in
            the released code, None for no bound.
        process_group: processes whose batches are one; the loss is that of the whole. Local
            batches must have one size.

    Shape:
        ``mu_s`` and ``logvar_s`` ``[N, D_s]``, ``mu_t``, ``logvar_t`` and the sample ``z_t``
        ``[N, sum(block_dims)]``, ``labels`` ``[N, K]`` integers, -1 where a label is missing (the
        sample is left out of that factor's contrast), ``recon`` the loss of the reconstruction
        with no dimensions, or None; to a :class:`XFactorsOutput`, float32 for half types.

    Raises:
        TypeError: latents are not floating point or differ in type, or labels are not integers.
        ValueError: a shape or an argument is out of range.

    Example:
        >>> from regularizers._shared.gaussian import reparameterize
        >>> mu_s, mu_t = torch.randn(32, 4), torch.randn(32, 4, requires_grad=True)
        >>> z_t = reparameterize(mu_t, 0.1)
        >>> loss = XFactorsLoss(block_dims=[2, 2])
        >>> labels = torch.randint(4, (32, 2))
        >>> output = loss(mu_s, torch.zeros(32, 4), mu_t, torch.zeros(32, 4), z_t, labels)
        >>> output.total.backward()

    Source:
        "XFactors", 2026, arXiv 2601.21688, authors' code read; see :func:`supervised_info_nce` for
        what is left out of it.
    """

    def __init__(
        self,
        block_dims: Sequence[int],
        *,
        beta_s: float = 1.0,
        beta_t: float = 1.0,
        kl_weight: float = 1e-4,
        nce_weights: float | Sequence[float] = 1e-2,
        temperature: float = 0.07,
        cov_weight: float = 0.0,
        cov_clip: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.block_dims = _check_blocks(block_dims)
        count = len(self.block_dims)
        weights = (
            (nce_weights,) * count if isinstance(nce_weights, (int, float)) else tuple(nce_weights)
        )
        if len(weights) != count:
            raise ValueError(f"nce_weights must have {count} entries, got {len(weights)}")
        for name, value in (
            ("beta_s", beta_s),
            ("beta_t", beta_t),
            ("kl_weight", kl_weight),
            ("cov_weight", cov_weight),
            *(("nce_weights", weight) for weight in weights),
        ):
            check_not_negative(name, value)
        check_positive("temperature", temperature)
        if cov_clip is not None:
            check_positive("cov_clip", cov_clip)
        self.beta_s = beta_s
        self.beta_t = beta_t
        self.kl_weight = kl_weight
        self.nce_weights = weights
        self.temperature = temperature
        self.cov_weight = cov_weight
        self.cov_clip = cov_clip
        self.process_group = process_group

    def forward(
        self,
        mu_s: Tensor,
        logvar_s: Tensor,
        mu_t: Tensor,
        logvar_t: Tensor,
        z_t: Tensor,
        labels: Tensor,
        *,
        recon: Tensor | None = None,
    ) -> XFactorsOutput:
        """Return the loss and its terms."""
        self._check(mu_s, logvar_s, mu_t, logvar_t, z_t, labels)
        group = self.process_group
        dtype = accumulate_dtype(mu_s.dtype)
        mu_s, logvar_s, mu_t, logvar_t, z_t = (
            gather_batch(x.to(dtype), group) for x in (mu_s, logvar_s, mu_t, logvar_t, z_t)
        )
        labels = gather_rows(labels, group)
        kl_s, kl_t = _divergence(mu_s, logvar_s), _divergence(mu_t, logvar_t)
        nce = torch.stack(
            [
                supervised_info_nce(
                    block, labels[:, k], temperature=self.temperature, ignore_index=MISSING
                )
                for k, block in enumerate(z_t.split(self.block_dims, dim=1))
            ]
        )
        cov = _correlation(mu_s, mu_t)
        if self.cov_clip is not None:
            cov = cov.clamp_max(self.cov_clip)
        total = self.kl_weight * (self.beta_s * kl_s + self.beta_t * kl_t)
        for weight, term in zip(self.nce_weights, nce, strict=True):
            total = total + weight * term
        total = total + self.cov_weight * cov
        if recon is not None:
            if group is not None:
                recon = add_up(recon, group) / dist.get_world_size(group)
            total = total + recon
        return XFactorsOutput(total, kl_s, kl_t, nce, cov)

    def _check(
        self,
        mu_s: Tensor,
        logvar_s: Tensor,
        mu_t: Tensor,
        logvar_t: Tensor,
        z_t: Tensor,
        labels: Tensor,
    ) -> None:
        check_floating("mu_s", mu_s)
        if mu_s.dim() != 2 or mu_s.shape[0] < 1:
            raise ValueError(f"mu_s must have shape [N >= 1, D_s], got {list(mu_s.shape)}")
        batch, width = mu_s.shape[0], sum(self.block_dims)
        for name, x, shape in (
            ("logvar_s", logvar_s, mu_s.shape),
            ("mu_t", mu_t, (batch, width)),
            ("logvar_t", logvar_t, (batch, width)),
            ("z_t", z_t, (batch, width)),
        ):
            check_floating(name, x)
            check_same_dtype(name, x, "mu_s", mu_s)
            if x.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
        check_tensor("labels", labels)
        if labels.dim() != 2 or labels.shape[1] != len(self.block_dims):
            raise ValueError(
                f"labels must have shape [{batch}, {len(self.block_dims)}], "
                f"got {list(labels.shape)}"
            )
        check_labels("labels", labels[:, 0], batch)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"block_dims={self.block_dims}, beta_s={self.beta_s:g}, beta_t={self.beta_t:g}, "
            f"kl_weight={self.kl_weight:g}, nce_weights={self.nce_weights}, "
            f"temperature={self.temperature:g}, cov_weight={self.cov_weight:g}, "
            f"cov_clip={self.cov_clip}"
        )


def swap_factor(
    z_t_source: Tensor, z_t_target: Tensor, factor: int, block_dims: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Exchange the block of one factor between two latents.

    ``source[:, T_k], target[:, T_k] = target[:, T_k], source[:, T_k]``, out of place. Decoded, the
    results show what the block holds.

    Args:
        z_t_source: ``[..., sum(block_dims)]``.
        z_t_target: of the same shape and type.
        factor: k, from 0.
        block_dims: dimensions of the blocks.

    Returns:
        The source with the target's block, and the target with the source's.

    Raises:
        TypeError: tensors differ in type.
        ValueError: a shape does not fit, or there is no such factor.

    Example:
        >>> swap_factor(torch.zeros(1, 4), torch.ones(1, 4), 1, [2, 2])[0]
        tensor([[0., 0., 1., 1.]])

    Source:
        "XFactors", 2026, arXiv 2601.21688, authors' code read.
    """
    blocks = _check_blocks(block_dims)
    check_tensor("z_t_source", z_t_source)
    check_tensor("z_t_target", z_t_target)
    check_same_dtype("z_t_target", z_t_target, "z_t_source", z_t_source)
    if z_t_source.dim() < 1 or z_t_source.shape[-1] != sum(blocks):
        raise ValueError(
            f"z_t_source must have shape [..., {sum(blocks)}], got {list(z_t_source.shape)}"
        )
    if z_t_target.shape != z_t_source.shape:
        raise ValueError(
            f"z_t_target must have the shape of z_t_source, {list(z_t_source.shape)}, "
            f"got {list(z_t_target.shape)}"
        )
    check_at_least("factor", factor, 0)
    if factor >= len(blocks):
        raise ValueError(f"factor must be below {len(blocks)}, got {factor}")
    first, second = (list(x.split(blocks, dim=-1)) for x in (z_t_source, z_t_target))
    first[factor], second[factor] = second[factor], first[factor]
    return torch.cat(first, -1), torch.cat(second, -1)


@torch.no_grad()
def factorvae_score(
    latents: Tensor,
    factors: Tensor,
    *,
    num_votes: int = 800,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> float:
    r"""Score how well single latent dimensions stand for single factors.

    A vote fixes a factor k at the value of a random sample, takes ``batch_size`` samples of that
    value, and names the dimension d that varies least among them, in units of its variance over
    all samples. The score is the share of votes whose factor the majority of its dimension's
    votes tells:

    .. math:: \frac{1}{n} \sum_{(d, k)} [k = \arg\max_{k'} V_{d k'}]

    with the table V of ``num_votes`` votes, and n = ``num_votes`` fresh ones.

    Args:
        latents: ``[N, D]``, floating point; means of the posteriors.
        factors: ``[N, K]``, integers.
        num_votes: to learn from, and again to score.
        batch_size: samples of a vote, at least 2.
        generator: of the CPU, to draw with.

    Returns:
        In [0, 1]; about 1/K for latents that tell nothing. Dimensions that do not vary get no
        vote.

    Raises:
        TypeError: ``latents`` are not floating point, or ``factors`` are not integers.
        ValueError: a shape or an option is out of range, or no dimension varies.

    Example:
        >>> factors = torch.randint(4, (400, 2), generator=torch.Generator().manual_seed(0))
        >>> factorvae_score(factors.float(), factors, num_votes=100)
        1.0

    Source:
        H. Kim, A. Mnih, "Disentangling by Factorising", ICML 2018, arXiv 1802.05983, as XFactors
        (2026, arXiv 2601.21688) evaluates. Scored on fresh votes here.
    """
    check_floating("latents", latents)
    check_tensor("factors", factors)
    check_at_least("num_votes", num_votes, 1)
    check_at_least("batch_size", batch_size, 2)
    if latents.dim() != 2:
        raise ValueError(f"latents must have shape [N, D], got {list(latents.shape)}")
    if factors.dim() != 2 or factors.shape[1] < 1:
        raise ValueError(f"factors must have shape [N, K >= 1], got {list(factors.shape)}")
    check_labels("factors", factors[:, 0], latents.shape[0])
    latents, factors = latents.detach().double().cpu(), factors.cpu()
    scale = latents.var(0)
    varies = scale > 1e-12 * scale.max()
    if not bool(varies.any()):
        raise ValueError("latents must vary in a dimension, got constants")
    latents = latents[:, varies] / scale[varies].sqrt()
    count, kinds = factors.shape
    chosen = torch.randint(kinds, (2 * num_votes,), generator=generator).tolist()
    samples = torch.randint(count, (2 * num_votes,), generator=generator).tolist()
    dims = []
    for kind, sample in zip(chosen, samples, strict=True):
        rows = (factors[:, kind] == factors[sample, kind]).nonzero()[:, 0]
        drawn = rows[torch.randint(len(rows), (batch_size,), generator=generator)]
        dims.append(int(latents[drawn].var(0).argmin()))
    votes = torch.zeros(latents.shape[1], kinds)
    learn, score = slice(num_votes), slice(num_votes, None)
    one = torch.ones(num_votes)
    votes.index_put_((torch.tensor(dims[learn]), torch.tensor(chosen[learn])), one, accumulate=True)
    told = votes.argmax(1)[dims[score]] == torch.tensor(chosen[score])
    return float(told.double().mean())


def _check_blocks(block_dims: Sequence[int]) -> list[int]:
    blocks = list(block_dims)
    if not blocks:
        raise ValueError("block_dims must hold a block, got none")
    for size in blocks:
        check_at_least("block_dims", size, 1)
    return blocks


def _divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    terms = kl_standard_normal(mean, log_variance=log_variance.clamp(-20, 20))
    return terms.sum(1).mean()


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return the Frobenius norm of the correlations of all columns; 0 for a single row."""
    x, y = x - x.mean(0), y - y.mean(0)
    freedom = max(len(x) - 1, 1)
    deviation_x, deviation_y = (torch.linalg.vector_norm(z, dim=0) / freedom**0.5 for z in (x, y))
    with full_precision(x.device):
        covariance = x.T @ y / freedom
    norm: Tensor = torch.linalg.vector_norm(
        covariance / (deviation_x[:, None] * deviation_y + 1e-8)
    )
    return norm
