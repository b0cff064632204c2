"""MixUp: convex combinations of inputs and of their labels."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import check_floating, check_not_negative, check_probability
from regularizers.mixing.functional import (
    BatchMixer,
    MixBatch,
    check_labelled_batch,
    draw_partners,
    label_weight_dtype,
    mix,
    moved,
    sample_lambda,
)


def mixup(
    x: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    prob: float = 1.0,
    per_sample: bool = False,
    perm: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MixBatch:
    r"""Blend every input of a batch with another one, and the labels alike.

    .. math::
        \tilde x_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}, \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha), \qquad
        L = \lambda \mathrm{CE}(y) + (1 - \lambda) \mathrm{CE}(y_\pi)

    Beside ``torchvision.transforms.v2.MixUp`` and ``timm.data.Mixup``: partners come from a
    permutation, where torchvision rolls and timm flips the batch; labels come as two indices and a
    weight (:meth:`MixBatch.soft_target` makes them soft); ``prob`` is timm's; timm's
    ``mode="elem"`` is ``per_sample``.

    Args:
        x: ``[B, *]``, floating point; not modified.
        target: labels ``[B, *]``.
        alpha: of the Beta law, at least 0; 0 mixes nothing.
        prob: probability that the batch is mixed at all, in [0, 1]; one draw for the batch.
        per_sample: draw :math:`\lambda` for each input.
        perm: the partners, a permutation ``[B]``; drawn if None.
        generator: a generator on any device; None: PyTorch's default generator of the CPU. One
            state gives the same weights and partners on every device.

    Returns:
        A :class:`MixBatch`; ``lam`` has no dimensions, or ``[B]`` with ``per_sample``. It is
        float64 for float64 inputs, else float32.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``target`` not a tensor, or a parameter not
            a number.
        ValueError: ``target`` has another length, ``alpha`` or ``prob`` is out of range, or
            ``perm`` is not a permutation.

    Example:
        >>> inputs, labels = torch.randn(8, 16), torch.randint(10, (8,))
        >>> batch = mixup(inputs, labels, alpha=0.2)
        >>> loss = batch.loss(torch.randn(8, 10))

    Source:
        H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, "mixup: Beyond Empirical Risk
        Minimization", 2018, arXiv 1710.09412; the baseline of paper 22 (H. Guo et al., 2018, arXiv
        1809.02499), whose alpha of 1 is the default.
    """
    check_floating("x", x)
    check_labelled_batch(x, target)
    check_not_negative("alpha", alpha)
    check_probability("prob", prob)
    count = x.shape[0] if per_sample else 1
    lam, partners = draw_partners(
        x,
        perm,
        lambda: sample_lambda(count, alpha, generator=generator, dtype=torch.float64),
        prob,
        generator,
    )
    weight = moved((lam if per_sample else lam[0]).to(label_weight_dtype(x)), x.device)
    return MixBatch(mix(x, partners, weight), target, target[partners], weight, partners)


class MixUp(BatchMixer):
    r"""MixUp as a module: :func:`mixup` in training, nothing in ``eval()``.

    .. math:: \tilde x = \lambda x + (1 - \lambda) x_\pi, \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    Args:
        alpha: of the Beta law, at least 0.
        prob: probability that a batch is mixed, in [0, 1].
        per_sample: draw a weight for each input.

    Shape:
        ``x`` ``[B, *]`` and ``target`` ``[B, *]`` to a :class:`MixBatch`. In ``eval()`` that holds
        ``x`` itself with weight 1.

    Raises:
        TypeError: a parameter is not a number.
        ValueError: a parameter is out of range, or as :func:`mixup`.

    Example:
        >>> mixer = MixUp(alpha=0.2)
        >>> batch = mixer(torch.randn(8, 16), torch.randint(10, (8,)))
        >>> batch.x.shape
        torch.Size([8, 16])

    Source:
        H. Zhang et al., 2018, arXiv 1710.09412; the baseline of paper 22.
    """

    _mixes = staticmethod(mixup)
