"""CutMix: a box of another image pasted into each, and labels mixed by the area that was pasted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_probability,
    check_shape,
    check_tensor,
    known_range,
)
from regularizers.mixing.functional import (
    BatchMixer,
    MixBatch,
    check_labelled_batch,
    draw_partners,
    drawing,
    label_weight_dtype,
    moved,
    sample_lambda,
)
from regularizers.ops.mix import MOST_BOX_SIDES, paste_boxes


def random_box(
    size: Sequence[int],
    lam: float | Tensor,
    *,
    centre: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw boxes that fill a part :math:`1 - \lambda` of an image, cut off at its edges.

    .. math::
        c = \lfloor S\, (1 - \lambda)^{1/d} \rfloor, \qquad
        [\,m - \lfloor c / 2 \rfloor,\ m + \lfloor c / 2 \rfloor\,) \cap [0, S), \qquad
        m \sim \mathrm{U}\{0, \dots, S - 1\}

    on each of d sides S. Odd lengths c lose one place, as in the authors' code.

    Args:
        size: the sides S_1, ..., S_d, 1 to 3 of them: ``(height, width)`` of images.
        lam: part that stays outside, in [0, 1]: a number or a tensor ``[*]``.
        centre: the places m ``[*, d]``, int64; drawn if None.
        generator: a generator on any device, as for :func:`sample_lambda`; None: PyTorch's default
            generator of the CPU.

    Returns:
        ``[*, d, 2]``, int64: on each side the first place inside and the first one behind.

    Raises:
        TypeError: ``size`` does not hold ints, or ``lam`` is neither a number nor a tensor.
        ValueError: ``size`` has no or too many sides, ``lam`` is outside [0, 1], or ``centre`` is
            of another shape.

    Example:
        >>> random_box((32, 32), 0.75, centre=torch.tensor([16, 16])).tolist()
        [[8, 24], [8, 24]]

    Source:
        S. Yun et al., 2019, arXiv 1905.04899; ``rand_bbox`` of the authors' code, with
        :math:`(1 - \lambda)^{1/d}` for d sides where the code has two.
    """
    if not 1 <= len(size) <= MOST_BOX_SIDES:
        raise ValueError(f"size must have 1 to {MOST_BOX_SIDES} sides, got {len(size)}")
    for side in size:
        check_at_least("size", side, 1)
    if not isinstance(lam, Tensor):
        check_probability("lam", lam)
        lam = torch.tensor(lam, dtype=torch.float64)
    check_floating("lam", lam)
    for value in known_range(lam) or ():
        check_probability("lam", value)
    if centre is None:
        centre = moved(_random_centre(size, tuple(lam.shape), generator), lam.device)
    else:
        check_tensor("centre", centre)
        check_shape("centre", centre, (*lam.shape, len(size)), "[*, sides], * of lam")
    sides = torch.tensor(list(size), device=lam.device)
    ratio = (1 - lam.double()) ** (1 / len(size))
    half = (sides * ratio.unsqueeze(-1)).long() // 2
    begin, end = (centre - half).clamp(min=0), torch.minimum(centre + half, sides)
    return torch.stack([begin, end], -1)


def _random_centre(
    size: Sequence[int], shape: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    return torch.stack([torch.randint(side, shape, **drawing(generator)) for side in size], -1)


def cutmix(
    x: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    prob: float = 1.0,
    per_sample: bool = False,
    perm: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MixBatch:
    r"""Paste a box of another image of the batch into each, and weigh the labels by the area.

    .. math::
        \tilde x_{i,s} = \begin{cases} x_{\pi(i),s} & s \in \mathrm{box} \\ x_{i,s} &
        \text{elsewhere} \end{cases}, \qquad
        \lambda' = 1 - \frac{|\mathrm{box}|}{S_1 \cdots S_d}, \qquad
        L = \lambda' \mathrm{CE}(y) + (1 - \lambda') \mathrm{CE}(y_\pi)

    The box is :func:`random_box` of :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)`, one for the
    batch, the same in all channels. The label weight is :math:`\lambda'`, the part of the image
    that really stays, and not the drawn :math:`\lambda`: the box is cut off at the edges and loses
    odd places, so the mean of :math:`\lambda'` is 0.70, not 0.5, for :math:`\alpha = 1` and
    32 x 32.

    Beside ``torchvision.transforms.v2.CutMix`` and ``timm.data.Mixup(cutmix_alpha=...)``: partners
    come from a permutation, where torchvision rolls and timm flips the batch; labels come as two
    indices and a weight (:meth:`MixBatch.soft_target` makes them soft); ``prob`` is timm's; timm's
    ``mode="elem"`` is ``per_sample``.

    Args:
        x: images ``[B, C, H, W]``, signals ``[B, C, L]`` or volumes ``[B, C, D, H, W]`` of any
            dtype; not modified.
        target: labels ``[B, *]``.
        alpha: of the Beta law, at least 0; 0 pastes nothing.
        prob: probability that the batch is mixed at all, in [0, 1]; one draw for the batch.
        per_sample: draw :math:`\lambda` and a box for each image.
        perm: the partners, a permutation ``[B]``; drawn if None.
        generator: a generator on any device; None: PyTorch's default generator of the CPU. One
            state gives the same boxes and partners on every device.

    Returns:
        A :class:`MixBatch`; ``lam`` has no dimensions, or ``[B]`` with ``per_sample``. It is
        float64 for float64 images, else float32.

    Raises:
        TypeError: ``x`` or ``target`` is not a tensor, or a parameter not a number.
        ValueError: ``x`` does not have 3 to 5 dimensions, ``target`` has another length, ``alpha``
            or ``prob`` is out of range, or ``perm`` is not a permutation.

    Example:
        >>> images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
        >>> batch = cutmix(images, labels, alpha=1.0)
        >>> batch.x.shape
        torch.Size([8, 3, 32, 32])
        >>> loss = batch.loss(torch.randn(8, 10))

    Source:
        S. Yun, D. Han, S. J. Oh, S. Chun, J. Choe, Y. Yoo, "CutMix: Regularization Strategy to
        Train Strong Classifiers with Localizable Features", 2019, arXiv 1905.04899; from the
        authors' code (train.py), which recomputes the label weight as here. ``prob`` is 0.5 there
        for CIFAR and 1 for ImageNet. One box an image and other dimensions are additions.
    """
    check_labelled_batch(x, target)
    check_not_negative("alpha", alpha)
    check_probability("prob", prob)
    if not 3 <= x.dim() <= 2 + MOST_BOX_SIDES:
        raise ValueError(
            f"x must have shape [batch, channels, ...] with 1 to {MOST_BOX_SIDES} sides, "
            f"got {list(x.shape)}"
        )
    count = x.shape[0] if per_sample else 1
    size = x.shape[2:]
    lam, partners = draw_partners(
        x,
        perm,
        lambda: sample_lambda(count, alpha, generator=generator, dtype=torch.float64),
        prob,
        generator,
    )
    box = random_box(size, lam, generator=generator)
    lam = 1 - (box[..., 1] - box[..., 0]).prod(-1).double() / size.numel()
    if not per_sample:
        box, lam = box[0], lam[0]
    return MixBatch(
        paste_boxes(x, partners, moved(box, x.device)),
        target,
        target[partners],
        moved(lam.to(label_weight_dtype(x)), x.device),
        partners,
    )


class CutMix(BatchMixer):
    r"""CutMix as a module: :func:`cutmix` in training, nothing in ``eval()``.

    .. math::
        \tilde x = \text{box of } x_\pi \text{ pasted into } x, \qquad
        \lambda' = 1 - |\mathrm{box}| / |\mathrm{image}|

    Args:
        alpha: of the Beta law, at least 0.
        prob: probability that a batch is mixed, in [0, 1].
        per_sample: draw a box for each image.

    Shape:
        ``x`` ``[B, C, ...]`` with 1 to 3 sides and ``target`` ``[B, *]`` to a :class:`MixBatch`. In
        ``eval()`` that holds ``x`` itself with weight 1.

    Raises:
        TypeError: a parameter is not a number.
        ValueError: a parameter is out of range, or as :func:`cutmix`.

    Example:
        >>> mixer = CutMix(alpha=1.0, prob=0.5)
        >>> batch = mixer(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))
        >>> batch.soft_target(10).sum(1)
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])

    Source:
        S. Yun et al., 2019, arXiv 1905.04899, from the authors' code.
    """

    _mixes = staticmethod(cutmix)
