"""Quantized perturbation: tokens snapped to a codebook, some of them swapped for other codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_fraction,
    check_not_negative,
    check_one_of,
    check_positive,
    check_probability,
    check_same_device,
    check_shape,
    check_tensor,
    known_range,
)
from regularizers._shared.randomness import draw_seed
from regularizers._shared.scheduled import ScheduledModule, scheduled
from regularizers.ops._operator import accumulate_dtype, full_precision, loss_dtype
from regularizers.ops.code_search import nearest_code, sample_code
from regularizers.ops.philox import philox_words

Mode = Literal["distance", "uniform", "shuffle"]
_MODES = ("distance", "uniform", "shuffle")
# Steps of the words that are not those of `sample_code`, which is step 0.
_SELECTION, _PLACEMENT = 1, 2


def perturb_indices(
    indices: Tensor,
    codebook: Tensor,
    *,
    rate: float | Tensor = 0.1,
    mode: Mode = "distance",
    temperature: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Replace the codes of randomly selected tokens by other codes.

    .. math:: P(i \to j) = \frac{\exp(-\|e_j - e_i\|^2 / \tau)}{\sum_{l \ne i} \exp(-\|e_l - e_i\|^2
        / \tau)}, \quad j \ne i \qquad (\text{mode "distance"})

    Every token is selected independently with probability ``rate``. ``"uniform"`` draws any code,
    the token's own too; ``"shuffle"`` permutes the selected codes within each sample.

    The bits come from Philox: token number t (row-major) is selected by the word of stream 0,
    element t, step 1; ``"uniform"`` and ``"shuffle"`` place by that of step 2; ``"distance"`` is
    :func:`regularizers.ops.sample_code`.

    Args:
        indices: codes of the tokens, int64 ``[*, N]`` in [0, K); a sample is a row of N.
        codebook: ``[K, C]``; float32, float64, bfloat16 or float16.
        rate: probability that a token is selected, in [0, 1]; a number or a tensor with no
            dimensions.
        mode: ``"distance"`` (the authors' code), ``"uniform"`` or ``"shuffle"`` (their abstract).
        temperature: :math:`\tau` of ``"distance"``, in units of squared distance, above 0; a number
            or a tensor with no dimensions.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        int64 ``[*, N]``; ``indices`` itself for the number ``rate=0``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range, of the wrong shape or on another device; the
            codebook has one code and the mode is ``"distance"``. Values inside tensors are checked
            on a CPU.

    Example:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> perturb_indices(torch.tensor([[0, 1, 2, 0, 1, 2]]), codebook, rate=0.5, seed=2)
        tensor([[2, 1, 2, 1, 0, 2]])

    Source:
        "VQ-Seg: Vector-Quantized Token Perturbation for Semi-Supervised Medical Image
        Segmentation", NeurIPS 2025, arXiv 2601.10124. ``"distance"`` follows the authors' code
        (which loops over codes), ``"shuffle"`` their abstract.
    """
    check_tensor("indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.dim() == 0:
        raise ValueError("indices must have shape [*, tokens], got []")
    check_floating("codebook", codebook)
    check_shape("codebook", codebook, (None, None), "[codes, features]")
    check_same_device("codebook", codebook, "indices", indices)
    check_one_of("mode", mode, _MODES)
    _check_range(indices, codebook)
    share = scheduled("rate", rate, codebook, check_probability)
    if (bounds := known_range(share)) is not None:
        check_probability("rate", bounds[0])
    scheduled("temperature", temperature, codebook, check_positive)
    if mode == "distance" and codebook.shape[0] < 2:
        raise ValueError("codebook must have at least two codes for mode 'distance', got 1")
    bits = draw_seed(seed, generator, codebook)
    if not isinstance(rate, Tensor) and rate == 0:
        return indices
    threshold = (share * 2.0**32 + 0.5).to(torch.int64)
    selected = _words(indices, bits, _SELECTION) < threshold
    if mode == "distance":
        return sample_code(indices, codebook, temperature=temperature, selected=selected, seed=bits)
    words = _words(indices, bits, _PLACEMENT)
    if mode == "uniform":
        return torch.where(selected, words * codebook.shape[0] >> 32, indices)
    # Selected places in their order, and in a random one; the others stand behind in both.
    places = (~selected).byte().argsort(dim=-1, stable=True)
    shuffled = torch.where(selected, words, 2**32).argsort(dim=-1, stable=True)
    return indices.scatter(-1, places, indices.gather(-1, shuffled))


def _words(indices: Tensor, seed: Tensor, step: int) -> Tensor:
    return philox_words(seed, indices.numel(), step=step).reshape(indices.shape)


def _check_range(indices: Tensor, codebook: Tensor) -> None:
    bounds = known_range(indices)
    if bounds is not None and not (bounds[0] >= 0 and bounds[1] < codebook.shape[0]):
        raise ValueError(
            f"indices must lie in [0, {codebook.shape[0]}), got {bounds[0]} to {bounds[1]}"
        )


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    r"""Return the values of ``z_q`` with the gradient of ``z``.

    .. math:: y = z + \mathrm{sg}(z_q - z)

    Computed as :math:`\mathrm{sg}(z_q) + (z - \mathrm{sg}(z))`, whose rounding is none: the values
    are those of ``z_q`` bit by bit. No gradient reaches ``z_q``.

    Args:
        z: ``[*]``.
        z_q: the same shape.

    Returns:
        ``[*]``.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes differ.

    Example:
        >>> z = torch.tensor([0.2], requires_grad=True)
        >>> y = straight_through(z, torch.tensor([1.0]))
        >>> y.item(), *torch.autograd.grad(y, z)
        (1.0, tensor([1.]))

    Source:
        Y. Bengio, N. Leonard, A. Courville, 2013, arXiv 1308.3432; as in VQ-VAE.
    """
    check_floating("z", z)
    check_floating("z_q", z_q)
    if z.shape != z_q.shape:
        raise ValueError(f"z_q must have the shape of z {list(z.shape)}, got {list(z_q.shape)}")
    return z_q.detach() + (z - z.detach())


def vq_alignment_loss(z_q: Tensor, z: Tensor, *, beta: float = 0.25) -> Tensor:
    r"""Pull the chosen codes to the tokens, and the tokens, less, to their codes.

    .. math:: L = \mathrm{mean}\,(z_q - \mathrm{sg}(z))^2 + \beta\, \mathrm{mean}\,
        (z - \mathrm{sg}(z_q))^2

    Give it the unperturbed ``z_q``: this is where the projection of the codebook learns.

    Args:
        z_q: quantized tokens ``[*]``, with their gradient to the codebook.
        z: tokens ``[*]``.
        beta: weight of the commitment of the tokens, at least 0.

    Returns:
        A tensor with no dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the shapes differ or ``beta`` is negative.

    Example:
        >>> vq_alignment_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
        tensor(0.6250)

    Source:
        A. van den Oord et al., 2017, arXiv 1711.00937; with the mean of both terms as in the code
        of VQ-Seg (2026, arXiv 2601.10124).
    """
    check_floating("z_q", z_q)
    check_floating("z", z)
    check_not_negative("beta", beta)
    if z.shape != z_q.shape:
        raise ValueError(f"z_q must have the shape of z {list(z.shape)}, got {list(z_q.shape)}")
    wide = accumulate_dtype(z.dtype)
    codes, tokens = z_q.to(wide), z.to(wide)
    loss = F.mse_loss(codes, tokens.detach()) + beta * F.mse_loss(tokens, codes.detach())
    return loss.to(loss_dtype(z))


def codebook_entropy_loss(
    z: Tensor, codebook: Tensor, *, inv_temperature: float = 1.0, chunk_size: int = 1024
) -> Tensor:
    r"""Make every token sure of its code, and all codes equally used.

    .. math::
        q_n = \mathrm{softmax}_j(-\kappa \|z_n - e_j\|^2), \qquad
        L = \frac1n \sum_n H(q_n) - H\Big(\frac1n \sum_n q_n\Big) \in [-\log K, 0]

    Tokens are worked off ``chunk_size`` at a time and computed again in the backward pass, so that
    memory holds ``chunk_size`` x K probabilities and not n x K.

    Args:
        z: tokens ``[n, C]``, at least one.
        codebook: ``[K, C]``, dtype of ``z`` (outside of autocast).
        inv_temperature: :math:`\kappa`, above 0.
        chunk_size: tokens at a time, at least 1.

    Returns:
        A tensor with no dimensions; dtype of ``z``, float32 under autocast.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> codes = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> codebook_entropy_loss(codes, codes)  # 0.582203 - 0.693147
        tensor(-0.1109)

    Source:
        VQ-Seg (2026, arXiv 2601.10124), authors' code, with its 1e-7 inside the second logarithm;
        the form is that of MAGVIT-v2 (L. Yu et al., 2023, arXiv 2310.05737).
    """
    check_floating("z", z)
    check_shape("z", z, (None, None), "[tokens, features]")
    check_floating("codebook", codebook)
    check_shape("codebook", codebook, (None, z.shape[1]), "[codes, features of z]")
    if z.shape[0] == 0:
        raise ValueError("z must have at least one token, got none")
    check_positive("inv_temperature", inv_temperature)
    check_at_least("chunk_size", chunk_size, 1)
    wide = accumulate_dtype(z.dtype)
    with full_precision(z.device):
        codes = codebook.to(wide)
        arguments = (codes, codes.square().sum(1), inv_temperature)
        chunks = z.to(wide).split(chunk_size)
        if len(chunks) == 1:
            entropy, usage = _chunk_usage(chunks[0], *arguments)
        else:
            found = [
                checkpoint(
                    _chunk_usage, rows, *arguments, use_reentrant=False, preserve_rng_state=False
                )
                for rows in chunks
            ]
            entropy = torch.stack([part[0] for part in found]).sum()
            usage = torch.stack([part[1] for part in found]).sum(0)
        mean = usage / z.shape[0]
        loss = entropy / z.shape[0] + (mean * (mean + 1e-7).log()).sum()
    return loss.to(loss_dtype(z))


def _chunk_usage(
    z: Tensor, codebook: Tensor, norms: Tensor, inv_temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the sums of the entropies and of the probabilities [K]."""
    # |z|^2 is the same for all codes.
    logits = inv_temperature * torch.addmm(norms, z, codebook.T, beta=-1, alpha=2)
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    return -(q * log_q).sum(), q.sum(0)


class ProjectedVectorQuantizer(nn.Module):
    r"""Nearest codes from a frozen random codebook seen through a learned linear map.

    .. math:: e_j = W b_j + w, \quad b_j \sim \mathcal N(0, 1/C), \qquad
        i = \operatorname{argmin}_j \|z - e_j\|^2, \quad z_q = e_i

    All codes move with the map, so none dies. The frozen codes are a buffer of the state dict.

    Args:
        dim: features C.
        num_codes: K.
        learn_projection: False leaves the random codes as they are.
        generator: of the random codes; None: PyTorch's default generator.

    Shape:
        ``z [*, C]`` to ``z_q [*, C]``, differentiable in the projection alone, and ``indices [*]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or ``z`` has other features.

    Example:
        >>> quantizer = ProjectedVectorQuantizer(8, num_codes=64)
        >>> z_q, indices = quantizer(torch.randn(2, 10, 8))
        >>> z_q.shape, indices.shape, bool(indices.max() < 64)
        (torch.Size([2, 10, 8]), torch.Size([2, 10]), True)

    Source:
        VQ-Seg (2026, arXiv 2601.10124), authors' code; the frozen codebook with a projection is
        that of SimVQ (Y. Zhu et al., 2024, arXiv 2411.02038).
    """

    base: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_codes: int = 16384,
        learn_projection: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("num_codes", num_codes, 1)
        self.dim, self.num_codes = dim, num_codes
        base = torch.randn(num_codes, dim, generator=generator) * dim**-0.5
        self.register_buffer("base", base)
        self.projection = nn.Linear(dim, dim) if learn_projection else None

    def codebook(self) -> Tensor:
        """Return the effective codes ``[K, C]``, differentiable in the projection."""
        codes: Tensor = self.base if self.projection is None else self.projection(self.base)
        return codes

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``z_q`` and ``indices``."""
        codebook = self.codebook()
        indices = nearest_code(z, codebook)
        return F.embedding(indices, codebook), indices

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"dim={self.dim}, num_codes={self.num_codes}"


class PerturbedTokens(NamedTuple):
    """What :class:`QuantizedPerturbation` gives.

    Args:
        features: ``[*, N, C]``, code vectors with the gradient of the tokens.
        indices: ``[*, N]``, the code of each feature vector.
        quantized: ``[*, N, C]``, unperturbed code vectors with their gradient to the projection;
            for :func:`vq_alignment_loss`.
        codebook: ``[K, C]``, likewise; for :func:`codebook_entropy_loss`.

    Example:
        >>> tokens = QuantizedPerturbation(8, num_codes=64)(torch.randn(2, 10, 8))
        >>> [field.shape for field in (tokens.features, tokens.indices)]
        [torch.Size([2, 10, 8]), torch.Size([2, 10])]
    """

    features: Tensor
    indices: Tensor
    quantized: Tensor
    codebook: Tensor


class QuantizedPerturbation(ScheduledModule):
    r"""Quantize tokens, and in training swap some for other codes: a dropout that stays on codes.

    .. math:: y = z + \mathrm{sg}(e_j - z), \qquad i = \operatorname{argmin}_j \|z - e_j\|^2, \quad
        j = i \text{ or, with probability } \varepsilon, \text{ another code}

    In evaluation y is the nearest code. The gradient of y goes to z alone; the projection of the
    codebook learns from :func:`vq_alignment_loss` and :func:`codebook_entropy_loss` of what is
    returned. Maps ``[B, C, H, W]`` become tokens by ``x.flatten(2).transpose(1, 2)``.

    Args:
        dim: features C.
        num_codes: K.
        rate: :math:`\varepsilon`, probability that a token is selected, in [0, 1]; can be assigned
            a new number.
        mode: ``"distance"``, ``"uniform"`` or ``"shuffle"``, as in :func:`perturb_indices`.
        temperature: :math:`\tau` of ``"distance"``, above 0; can be assigned a new number.
        learn_projection: as in :class:`ProjectedVectorQuantizer`.
        quantizer: one to share with other modules, in place of a new one.

    Shape:
        ``z [*, N, C]`` to :class:`PerturbedTokens`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or ``quantizer`` has other sizes.

    Example:
        >>> module = QuantizedPerturbation(8, num_codes=64, rate=0.1)
        >>> z = torch.randn(2, 10, 8, requires_grad=True)
        >>> tokens = module(z)
        >>> loss = tokens.features.square().sum() + vq_alignment_loss(tokens.quantized, z)
        >>> loss.backward()

    Source:
        VQ-Seg (2026, arXiv 2601.10124), authors' code.
    """

    rate: Tensor
    temperature: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_codes: int = 16384,
        rate: float = 0.1,
        mode: Mode = "distance",
        temperature: float = 1.0,
        learn_projection: bool = True,
        quantizer: ProjectedVectorQuantizer | None = None,
    ) -> None:
        super().__init__()
        check_one_of("mode", mode, _MODES)
        if quantizer is None:
            quantizer = ProjectedVectorQuantizer(
                dim, num_codes=num_codes, learn_projection=learn_projection
            )
        elif quantizer.dim != dim:
            raise ValueError(f"quantizer must have dim {dim}, got {quantizer.dim}")
        if mode == "distance" and quantizer.num_codes < 2:
            raise ValueError(f"num_codes must be at least 2 for mode 'distance', got {num_codes}")
        self.mode = mode
        self.schedule("rate", rate, check_probability)
        self.schedule("temperature", temperature, check_positive)
        self.quantizer = quantizer

    def forward(
        self,
        z: Tensor,
        *,
        perturb: bool | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PerturbedTokens:
        """Quantize and perturb.

        Args:
            z: tokens ``[*, N, C]``.
            perturb: None: in training only. False for labelled images, as in the paper.
            seed: as in :func:`perturb_indices`.
            generator: likewise.
        """
        codebook = self.quantizer.codebook()
        indices = nearest_code(z, codebook)
        quantized = F.embedding(indices, codebook)
        if not (self.training if perturb is None else perturb):
            return PerturbedTokens(straight_through(z, quantized), indices, quantized, codebook)
        swapped = perturb_indices(
            indices,
            codebook.detach(),
            rate=self.rate,
            mode=self.mode,
            temperature=self.temperature,
            seed=seed,
            generator=generator,
        )
        features = straight_through(z, F.embedding(swapped, codebook.detach()))
        return PerturbedTokens(features, swapped, quantized, codebook)

    def extra_repr(self) -> str:
        """Name the rate, the mode and the temperature."""
        return f"rate={self.rate:g}, mode={self.mode!r}, temperature={self.temperature:g}"


def semi_supervised_seg_loss(
    logits_l: Tensor,
    y: Tensor,
    logits_u1: Tensor,
    logits_u2: Tensor,
    teacher_logits: Tensor,
    *,
    threshold: float = 0.95,
    supervised_weight: float = 5.0,
    auxiliary: Tensor | float = 0.0,
    auxiliary_weight: float = 0.1,
    valid: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Supervised segmentation, and consistency of two perturbed views with a teacher.

    .. math::
        L = \tfrac12 \big(5 L_{\sup} + L_u\big) + 0.1\, L_{\mathrm{aux}}, \qquad
        L_u = \frac{1}{2} \sum_{v=1}^{2} \frac{\sum_p [\max_c t_p^c \ge 0.95]\,
        \mathrm{CE}(u^v_p, \operatorname{argmax} t_p)}{\#\text{valid pixels}}

    Args:
        logits_l: of the labelled images ``[B, K, *]``.
        y: their labels, int64 ``[B, *]``.
        logits_u1: of unlabelled images under a strong augmentation, with perturbed tokens
            ``[U, K, *]``.
        logits_u2: of a second such view.
        teacher_logits: of the averaged teacher on the weak view, moved as the strong ones are;
            detached here.
        threshold: confidence from which a pixel counts, in [0, 1].
        supervised_weight: factor of the supervised loss, at least 0.
        auxiliary: alignment and entropy losses of labelled and unlabelled images, added up.
        auxiliary_weight: its factor, at least 0.
        valid: bool ``[U, *]``; which pixels of the unlabelled images are no padding. None: all.
        ignore_index: label of pixels that do not count.

    Returns:
        A tensor with no dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> y = torch.tensor([[0, 1]])
        >>> sure = torch.tensor([[[9.0, 0.0], [0.0, 9.0]]])
        >>> unsure = torch.zeros(1, 2, 2)
        >>> semi_supervised_seg_loss(sure, y, unsure, unsure, sure)  # about log(2) / 2
        tensor(0.3469)

    Source:
        VQ-Seg (2026, arXiv 2601.10124), authors' code; the two strong views and the threshold are
        those of UniMatch (L. Yang et al., 2023, arXiv 2208.09910). The teacher is an average of the
        student by :func:`ramped_ema`.
    """
    for name, logits in (("logits_l", logits_l), ("logits_u1", logits_u1)):
        check_floating(name, logits)
        if logits.dim() < 2:
            raise ValueError(f"{name} must have shape [batch, classes, *], got {logits.dim()} dims")
    for name, logits in (("logits_u2", logits_u2), ("teacher_logits", teacher_logits)):
        check_floating(name, logits)
        check_shape(name, logits, tuple(logits_u1.shape), "that of logits_u1")
    check_probability("threshold", threshold)
    check_not_negative("supervised_weight", supervised_weight)
    check_not_negative("auxiliary_weight", auxiliary_weight)
    confidence, label = teacher_logits.detach().softmax(1).max(1)
    if valid is None:
        valid = torch.ones_like(confidence, dtype=torch.bool)
    check_shape("valid", valid, tuple(confidence.shape), "that of the teacher's labels")
    counted, pixels = (confidence >= threshold) & valid, valid.sum().clamp(min=1)
    consistency = sum(
        torch.where(counted, F.cross_entropy(logits, label, reduction="none"), 0).sum() / pixels
        for logits in (logits_u1, logits_u2)
    )
    supervised = F.cross_entropy(logits_l, y, ignore_index=ignore_index)
    loss = (supervised_weight * supervised + consistency / 2) / 2
    return loss + auxiliary_weight * auxiliary


def ramped_ema(max_decay: float = 0.996) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    r"""Return the averaging rule of the teacher, for ``torch.optim.swa_utils.AveragedModel``.

    .. math:: \theta' \leftarrow d \theta' + (1 - d) \theta, \qquad
        d = \min(1 - 1 / \mathrm{iteration}, 0.996)

    A plain mean of the first iterations, an exponential one later: the teacher does not remember
    where the student began.

    Args:
        max_decay: the largest d, in [0, 1).

    Returns:
        ``avg_fn(averaged, current, num_averaged)``.

    Raises:
        ValueError: ``max_decay`` is out of range.

    Example:
        >>> student = torch.nn.Linear(2, 2)
        >>> teacher = torch.optim.swa_utils.AveragedModel(student, avg_fn=ramped_ema())
        >>> teacher.update_parameters(student)

    Source:
        VQ-Seg (2026, arXiv 2601.10124), authors' code; as in Mean Teacher.
    """
    check_fraction("max_decay", max_decay)

    def average(averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        decay = min(1 - 1 / (float(num_averaged) + 1), max_decay)
        return averaged * decay + current * (1 - decay)

    return average
