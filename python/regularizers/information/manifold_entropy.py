"""Nearest-neighbour entropy of embeddings: against mode collapse of adversarial training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
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
)
from regularizers._shared.distributed import gather_batch
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.code_search import nearest_code

Form = Literal["log_mean", "mean_log"]
FORMS = ("log_mean", "mean_log")
Distance = Literal["mse", "sq"]
DISTANCES = ("mse", "sq")
Mixing = Literal["uniform", "normal"]
MIXINGS = ("uniform", "normal")
Embed = Callable[[Tensor], Tensor]
# Distances that knn_entropy holds at a time.
_CHUNK = 1 << 22


def nn_entropy_loss(
    z: Tensor,
    bank: Tensor,
    *,
    form: Form = "log_mean",
    distance: Distance = "mse",
    eps: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Minus the entropy of embeddings, from the distance to the nearest entry of a bank.

    .. math::
        d_i = \min_j \tfrac1D \|z_i - b_j\|^2, \qquad
        L = -\log\big( \tfrac1B \textstyle\sum_i d_i + \epsilon \big)\ (\text{log mean}), \qquad
        L = -\tfrac1B \textstyle\sum_i \log (d_i + \epsilon)\ (\text{mean log})

    Descent pushes each embedding straight away from its nearest entry. The bank gets no gradient.
    The B x M distances are never stored.

    Args:
        z: embeddings ``[B, D]``, B at least 1, bounded: entropy of unbounded ones diverges.
        bank: ``[M, D]``, M at least 1, finite; not the batch itself, in which each embedding would
            find itself.
        form: ``"log_mean"`` as in the authors' code, or ``"mean_log"``, the entropy estimator
            proper (up to factor and constants), which is no smaller.
        distance: ``"mse"``, the mean over D as above, or ``"sq"``, the sum.
        eps: added inside the logarithm, above 0; the gradient of an embedding that stands in the
            bank is 0.
        process_group: processes whose embeddings count as one batch; their banks must be equal.

    Returns:
        No dimensions; float32 for half types.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit, the bank is empty or (on a CPU) not finite, or ``eps`` is
            not above 0.

    Example:
        >>> z, bank = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [3.0, 3.0]])
        >>> nn_entropy_loss(z, bank)  # -log of 1/2, the mean of (0 + 1) / 2 and (0 + 1) / 2
        tensor(0.6931)

    Source:
        H. Liu et al., "Combating Mode Collapse in GANs via Manifold Entropy Estimation", AAAI 2023,
        arXiv 2208.12055, authors' code.
    """
    check_floating("z", z)
    check_floating("bank", bank)
    check_one_of("form", form, FORMS)
    check_one_of("distance", distance, DISTANCES)
    check_positive("eps", eps)
    check_same_device("bank", bank, "z", z)
    if z.dim() != 2 or bank.dim() != 2 or z.shape[1] != bank.shape[1] or not len(z) * len(bank):
        raise ValueError(
            "z and bank must have shapes [B, D] and [M, D], B and M >= 1, "
            f"got {list(z.shape)} and {list(bank.shape)}"
        )
    wide = torch.promote_types(accumulate_dtype(z.dtype), accumulate_dtype(bank.dtype))
    embeddings = gather_batch(z.to(wide), process_group)
    entries = bank.detach().to(wide)
    squares = (embeddings - entries[nearest_code(embeddings, entries)]).square()
    nearest = squares.mean(1) if distance == "mse" else squares.sum(1)
    if form == "log_mean":
        return -(nearest.mean() + eps).log()
    return -(nearest + eps).log().mean()


class RingBuffer(nn.Module):
    """The last ``size`` rows that were pushed; at first, uniform noise in (-1, 1).

    Args:
        size: number of rows, at least 1.
        dim: D, at least 1.
        generator: of the first rows.
        device: where the rows are.
        dtype: their dtype.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> ring = RingBuffer(3, 1)
        >>> for value in range(5):
        ...     ring.push(torch.tensor([[float(value)]]))
        >>> ring.oldest_first().flatten()
        tensor([2., 3., 4.])

    Source:
        The memory of arXiv 2208.12055 as intended. The authors' code drops as many *rows* at each
        step as the batch has embeddings and appends one: after five steps of 256 one row is left,
        and each sample meets a single unrelated one.
    """

    rows: Tensor
    position: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("size", size, 1)
        check_at_least("dim", dim, 1)
        rows = torch.empty(size, dim, device=device, dtype=dtype).uniform_(
            -1, 1, generator=generator
        )
        self.register_buffer("rows", rows)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Put rows ``[B, D]``, B at most ``size``, in the place of the B oldest."""
        size, dim = self.rows.shape
        check_floating("rows", rows)
        check_shape("rows", rows, (None, dim), "[B, dim]")
        if len(rows) > size:
            raise ValueError(f"rows must be at most the size {size}, got {len(rows)}")
        place = (self.position + torch.arange(len(rows), device=rows.device)) % size
        self.rows.index_copy_(0, place, rows.detach().to(self.rows.dtype))
        self.position.copy_((self.position + len(rows)) % size)

    def oldest_first(self) -> Tensor:
        """Return the rows ``[size, D]`` in the order of their coming."""
        place = torch.arange(len(self.rows), device=self.rows.device)
        return self.rows[(self.position + place) % len(self.rows)]


def dlle_loss(
    embed: Embed,
    x: Tensor,
    *,
    augment: Callable[[Tensor], Tensor] | None = None,
    noise: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Local consistency: equal embeddings of a sample and of its augmentation.

    .. math:: \mathrm{MSE}\big( E(x),\ \mathrm{sg}\, E(T(x)) \big)

    Args:
        embed: E, ``[B, *] -> [B, D]``.
        x: samples ``[B, *]``.
        augment: T; None for Gaussian noise, after a flip along a random one of the last two
            dimensions for images ``[B, C, H, W]``.
        noise: standard deviation of that noise, at least 0; not used with ``augment``.
        generator: generator to draw from, of the device of ``x``.

    Returns:
        No dimensions; float32 for half types.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``noise`` is negative.

    Example:
        >>> embed, x = nn.Linear(2, 8), torch.randn(16, 2)
        >>> dlle_loss(embed, x, augment=lambda x: x)
        tensor(0., grad_fn=<MseLossBackward0>)

    Source:
        H. Liu et al., 2023, arXiv 2208.12055, authors' code, which flips the whole batch one way.
    """
    check_floating("x", x)
    check_not_negative("noise", noise)
    return _consistency(embed, x, embed(x), augment, noise, generator)


def _consistency(
    embed: Embed,
    x: Tensor,
    embedding: Tensor,
    augment: Callable[[Tensor], Tensor] | None,
    noise: float,
    generator: torch.Generator | None,
) -> Tensor:
    with torch.no_grad():
        target = embed(_flip_and_noise(x, noise, generator) if augment is None else augment(x))
    wide = accumulate_dtype(embedding.dtype)
    return F.mse_loss(embedding.to(wide), target.to(wide))


def _flip_and_noise(x: Tensor, noise: float, generator: torch.Generator | None) -> Tensor:
    if x.dim() == 4:
        upright = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator) < 0.5
        x = torch.where(upright, x.flip(3), x.flip(2))
    return x + noise * torch.empty_like(x).normal_(generator=generator)


def disomap_loss(
    embed: Embed,
    x_a: Tensor,
    x_b: Tensor,
    *,
    alpha: Mixing = "uniform",
    target_noise: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Straight lines: the embedding of a mixture is the mixture of the embeddings.

    .. math::
        \mathrm{MSE}\big( E(\alpha x_a + (1 - \alpha) x_b),\
        \mathrm{sg}(\alpha E(x_a) + (1 - \alpha) E(x_b) + s \varepsilon) \big)

    Args:
        embed: E, ``[B, *] -> [B, D]``.
        x_a: samples ``[B, *]``.
        x_b: samples of the same shape.
        alpha: a share for every sample: ``"uniform"`` in (0, 1), the interpolation of the text, or
            ``"normal"``, which also extrapolates, as the authors' code does.
        target_noise: s, at least 0.
        generator: generator to draw from, of the device of ``x_a``.

    Returns:
        No dimensions; float32 for half types. 0 for a linear ``embed`` without noise.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes differ or an argument is out of range.

    Example:
        >>> embed = nn.Linear(2, 8)
        >>> x_a, x_b = torch.randn(16, 2), torch.randn(16, 2)
        >>> bool(disomap_loss(embed, x_a, x_b, target_noise=0.0) < 1e-12)
        True

    Source:
        H. Liu et al., 2023, arXiv 2208.12055, authors' code.
    """
    check_floating("x_a", x_a)
    check_floating("x_b", x_b)
    if x_a.shape != x_b.shape or x_a.dim() == 0:
        raise ValueError(f"x_b must have shape {list(x_a.shape)}, got {list(x_b.shape)}")
    check_one_of("alpha", alpha, MIXINGS)
    check_not_negative("target_noise", target_noise)
    with torch.no_grad():
        ends = embed(x_a), embed(x_b)
    return _linearity(embed, (x_a, x_b), ends, alpha, target_noise, generator)


def _linearity(
    embed: Embed,
    samples: tuple[Tensor, Tensor],
    embeddings: tuple[Tensor, Tensor],
    alpha: Mixing,
    target_noise: float,
    generator: torch.Generator | None,
) -> Tensor:
    x_a, x_b = samples
    shape = (len(x_a), *[1] * (x_a.dim() - 1))
    draw = torch.rand if alpha == "uniform" else torch.randn
    share = draw(shape, device=x_a.device, dtype=x_a.dtype, generator=generator)
    found = embed(share * x_a + (1 - share) * x_b)
    wide = accumulate_dtype(found.dtype)
    e_a, e_b = (embedding.detach().to(wide) for embedding in embeddings)
    share = share.reshape(len(x_a), *[1] * (e_a.dim() - 1)).to(wide)
    target = share * e_a + (1 - share) * e_b
    target = target + target_noise * torch.empty_like(target).normal_(generator=generator)
    return F.mse_loss(found.to(wide), target)


class CriticTerms(NamedTuple):
    """The critic's loss, and its terms; all without dimensions.

    Attributes:
        loss: to minimise: critic + weight * entropy + dlle + disomap.
        critic: -mean E(real) + mean E(fake).
        entropy: :func:`nn_entropy_loss` of the real embeddings, without weight.
        dlle: :func:`dlle_loss` of real plus of fake samples.
        disomap: :func:`disomap_loss` between them.

    Example:
        >>> critic, terms = nn.Sequential(nn.Linear(2, 8), nn.Tanh()), ManifoldEntropy(8)
        >>> found = terms.discriminator_terms(critic, torch.ones(4, 2), torch.zeros(4, 2), epoch=0)
        >>> torch.equal(found.loss, found.critic + found.dlle + found.disomap)  # no weight yet
        True
    """

    loss: Tensor
    critic: Tensor
    entropy: Tensor
    dlle: Tensor
    disomap: Tensor


class GeneratorTerms(NamedTuple):
    """The generator's loss, and its terms; all without dimensions.

    Attributes:
        loss: to minimise: critic + weight * entropy.
        critic: -mean E(fake).
        entropy: :func:`nn_entropy_loss` of the fake embeddings, without weight.

    Example:
        >>> critic, terms = nn.Sequential(nn.Linear(2, 8), nn.Tanh()), ManifoldEntropy(8)
        >>> found = terms.generator_terms(critic, torch.zeros(4, 2), epoch=0)
        >>> torch.equal(found.loss, found.critic)  # no weight yet
        True
    """

    loss: Tensor
    critic: Tensor
    entropy: Tensor


class ManifoldEntropy(nn.Module):
    r"""Losses of adversarial training with a vector critic whose embeddings keep their entropy.

    .. math::
        L_D = -\overline{E(x)} + \overline{E(G)} + w H_x + \mathrm{DLLE} + \mathrm{DIsoMap}, \qquad
        L_G = -\overline{E(G)} + w H_G

    Means are over batch and components, H is :func:`nn_entropy_loss` against a ring of past
    embeddings, one ring for real and one for generated samples, and
    :math:`w = \text{weight} \cdot \min(1, \text{epoch} / \text{warmup})`. The critic's output must
    be bounded, as by a tanh.

    Args:
        dim: D, number of critic outputs.
        bank_size: length of both rings; at least the size of a batch.
        weight: of the entropy, at least 0.
        warmup_epochs: of its ramp, at least 0; 0 for none.
        form: of :func:`nn_entropy_loss`.
        augment: of :func:`dlle_loss`.
        alpha: of :func:`disomap_loss`.
        process_group: processes whose embeddings count as one batch in the entropy, and enter all
            rings; draw equal first rows everywhere.
        generator: of the first rows.
        device: where the rings are.
        dtype: of the rings.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, an embedding has another D than the rings or a
            batch more samples.

    Example:
        >>> critic, generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh()), nn.Linear(4, 2)
        >>> terms = ManifoldEntropy(8, bank_size=64)
        >>> real, fake = torch.randn(32, 2), generator(torch.randn(32, 4))
        >>> terms.discriminator_terms(critic, real, fake, epoch=3).loss.backward()
        >>> terms.generator_terms(critic, fake, epoch=3).loss.backward()

    Source:
        H. Liu et al., 2023, arXiv 2208.12055, authors' code: 8 outputs, bank 1024, batch 256, one
        step of the generator per 5 of the critic, Adam 2e-4 with betas 0.5 and 0.9. The memory is
        a ring (see :class:`RingBuffer`), alpha uniform, and the logarithm has an eps.
    """

    def __init__(
        self,
        dim: int = 8,
        *,
        bank_size: int = 1024,
        weight: float = 1.0,
        warmup_epochs: float = 100,
        form: Form = "log_mean",
        augment: Callable[[Tensor], Tensor] | None = None,
        alpha: Mixing = "uniform",
        process_group: dist.ProcessGroup | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("bank_size", bank_size, 1)
        check_not_negative("weight", weight)
        check_not_negative("warmup_epochs", warmup_epochs)
        check_one_of("form", form, FORMS)
        check_one_of("alpha", alpha, MIXINGS)
        self.weight = weight
        self.warmup_epochs = warmup_epochs
        self.form: Form = form
        self.augment = augment
        self.alpha: Mixing = alpha
        self.process_group = process_group
        self.real_bank, self.fake_bank = (
            RingBuffer(bank_size, dim, generator=generator, device=device, dtype=dtype)
            for _ in range(2)
        )

    def entropy_weight(self, epoch: float) -> float:
        """Return the weight of the entropy in an epoch, counted from 0."""
        check_not_negative("epoch", epoch)
        if epoch >= self.warmup_epochs:
            return self.weight
        return self.weight * epoch / self.warmup_epochs

    def discriminator_terms(
        self,
        embed: Embed,
        real: Tensor,
        fake: Tensor,
        epoch: float,
        *,
        generator: torch.Generator | None = None,
    ) -> CriticTerms:
        """Return the critic's loss and terms, and remember the real embeddings.

        Args:
            embed: the critic, ``[B, *] -> [B, dim]``.
            real: samples ``[B, *]``.
            fake: generated samples of the same shape; they get no gradient here.
            epoch: of the training, for the ramp; a fraction where it is to rise within an epoch.
            generator: of the augmentation and the mixing, of the device of ``real``.
        """
        check_floating("real", real)
        check_floating("fake", fake)
        if real.shape != fake.shape:
            raise ValueError(f"fake must have shape {list(real.shape)}, got {list(fake.shape)}")
        fake = fake.detach()
        e_real, e_fake = embed(real), embed(fake)
        dlle = torch.stack(
            [
                _consistency(embed, x, e, self.augment, 1e-3, generator)
                for x, e in ((real, e_real), (fake, e_fake))
            ]
        ).sum()
        disomap = _linearity(embed, (real, fake), (e_real, e_fake), self.alpha, 0.05, generator)
        wide = accumulate_dtype(e_real.dtype)
        critic = e_fake.to(wide).mean() - e_real.to(wide).mean()
        entropy = self._entropy(e_real, self.real_bank)
        loss = critic + self.entropy_weight(epoch) * entropy + dlle + disomap
        return CriticTerms(loss, critic, entropy, dlle, disomap)

    def generator_terms(self, embed: Embed, fake: Tensor, epoch: float) -> GeneratorTerms:
        """Return the generator's loss and terms, and remember the generated embeddings.

        Args:
            embed: the critic, ``[B, *] -> [B, dim]``.
            fake: generated samples ``[B, *]``.
            epoch: of the training, for the ramp.
        """
        check_floating("fake", fake)
        e_fake = embed(fake)
        critic = -e_fake.to(accumulate_dtype(e_fake.dtype)).mean()
        entropy = self._entropy(e_fake, self.fake_bank)
        return GeneratorTerms(critic + self.entropy_weight(epoch) * entropy, critic, entropy)

    def _entropy(self, embedding: Tensor, bank: RingBuffer) -> Tensor:
        whole = gather_batch(embedding, self.process_group)
        if len(whole) > len(bank.rows):
            raise ValueError(
                f"bank_size must be at least the batch, {len(whole)}, got {len(bank.rows)}"
            )
        loss = nn_entropy_loss(whole, bank.rows, form=self.form)
        bank.push(whole)
        return loss


@torch.no_grad()
def knn_entropy(x: Tensor, *, k: int = 1) -> Tensor:
    r"""Estimate the differential entropy of a sample from distances to k-th nearest neighbours.

    .. math::
        H = \psi(N) - \psi(k) + \log V_D + \frac{D}{N} \sum_i \log \rho_k(i)

    :math:`V_D` is the volume of the unit ball, :math:`\rho_k(i)` the distance of sample i to its
    k-th nearest other sample. Repeated samples give -inf.

    Args:
        x: samples ``[N, D]``.
        k: in [1, N - 1].

    Returns:
        Nats, no dimensions, without gradient; float32 for half types.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` is not of two dimensions, or ``k`` out of range.

    Example:
        >>> x = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> f"{knn_entropy(x, k=3):.1f} nats, where the uniform distribution has 0"
        '0.0 nats, where the uniform distribution has 0'

    Source:
        L. Kozachenko, N. Leonenko, 1987; A. Kraskov, H. Stögbauer, P. Grassberger, 2004, arXiv
        cond-mat/0305641.
    """
    check_floating("x", x)
    check_at_least("k", k, 1)
    if x.dim() != 2 or x.shape[1] == 0 or len(x) <= k:
        raise ValueError(f"x must have shape [N > k, D >= 1], got {list(x.shape)} for k = {k}")
    points = x.to(accumulate_dtype(x.dtype))
    count, dim = points.shape
    # Its k + 1 nearest samples begin with the sample itself.
    rho = torch.cat(
        [
            torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
            .topk(k + 1, largest=False)
            .values[:, k]
            for rows in points.split(max(1, _CHUNK // count))
        ]
    )
    digamma = torch.digamma(torch.tensor([count, k], dtype=torch.float64)).tolist()
    log_volume = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    entropy: Tensor = dim * rho.log().mean() + (digamma[0] - digamma[1] + log_volume)
    return entropy
