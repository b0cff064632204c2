"""Search in a codebook: the nearest code of a token, and random other codes, near ones first."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_positive,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from regularizers._shared.randomness import draw_seed
from regularizers._shared.scheduled import scheduled
from regularizers.ops._operator import (
    Operator,
    accumulate_dtype,
    autocast_dtype,
    transformed,
)
from regularizers.ops.philox import philox_words

# Numbers that the reference holds at a time.
_CHUNK = 1 << 22


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    r"""Find the nearest code of every token, without the matrix of distances.

    .. math:: i(z) = \operatorname{argmin}_j \|z - e_j\|^2

    The kernels maximise :math:`z \cdot e_j - \|e_j\|^2 / 2`, tile by tile with the best code so
    far, for tokens and codes relative to the mean code: :math:`\|z\|^2` is the same for all codes
    and never computed. Of codes whose distances differ by less than the rounding of that product
    (for float32 some :math:`10^{-7} \sqrt{C}\, (\|z\|^2 + \|e_j\|^2)`) any may be chosen; of equal
    codes the first. Half types are multiplied and added up in float32.

    An index has no derivative: the result does not require grad, like that of ``Tensor.argmin``.

    Args:
        z: tokens ``[*, C]``; float32, float64, bfloat16 or float16.
        codebook: codes ``[K, C]``, at least one, finite; dtype of ``z`` (outside of autocast).

    Returns:
        int64 ``[*]`` in [0, K). A token that is not finite gets 0.

    Raises:
        TypeError: an argument is no floating-point tensor, or the dtypes differ.
        ValueError: the codebook is empty or has other features than ``z``, or is on another device;
            on a CPU also if it is not finite.

    Example:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> nearest_code(torch.tensor([[0.9, 0.3], [-1.0, 1.2]]), codebook)
        tensor([1, 2])

    Source:
        The quantizer of VQ-VAE (A. van den Oord et al., 2017, arXiv 1711.00937); exact.
    """
    check_floating("z", z)
    check_tensor("codebook", codebook)
    if autocast_dtype(z.device) is not None:
        z, codebook = _common_dtype(z, codebook)
    if z.dim() == 0:
        raise ValueError("z must have shape [*, features], got []")
    _check_codebook(codebook, 1)
    check_shape("codebook", codebook, (None, z.shape[-1]), "[codes, features of z]")
    check_same_dtype("codebook", codebook, "z", z)
    check_same_device("codebook", codebook, "z", z)
    tokens = z.detach().flatten(end_dim=-2) if z.dim() > 1 else z.detach()[None]
    codes = codebook.detach()
    found: Tensor = _nearest(tokens, codes) if transformed() else NEAREST_CODE(tokens, codes)
    return found.reshape(z.shape[:-1])


def sample_code(
    index: Tensor,
    codebook: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    selected: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw for every token another code than its own, near codes more often than far ones.

    .. math::
        P(i \to j) = \frac{\exp(-\|e_j - e_i\|^2 / \tau)}{\sum_{l \ne i} \exp(-\|e_l - e_i\|^2 /
        \tau)}, \quad j \ne i

    The draw is the largest :math:`-\|e_j - e_i\|^2 / \tau + G_j` with independent Gumbel variables
    :math:`G_j = -\log(-\log u_j)`, found in one pass over the codes: no table of distances, no
    probabilities, O(K C) products a token. :math:`u_j` comes from the Philox word of stream "place
    of the token in ``index``, row-major" and element j, so a token's draw does not depend on which
    others are selected. Distances are rounded as in :func:`nearest_code`.

    Args:
        index: codes that the tokens have, int64 ``[*]`` in [0, K).
        codebook: codes ``[K, C]``, at least two, finite; float32, float64, bfloat16 or float16.
        temperature: :math:`\tau`, in units of squared distance, above 0: towards 0 the nearest
            other code, towards infinity any other code alike. A number or a tensor with no
            dimensions.
        selected: bool ``[*]``; other tokens keep their code and cost nothing. None: all.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        int64 ``[*]``; requires no grad.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range, of the wrong shape or on another device. Values of
            ``index`` and ``codebook`` are checked on a CPU alone; elsewhere the code of an index
            out of range counts as 0.

    Example:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> drawn = sample_code(torch.zeros(10000, dtype=torch.int64), codebook, seed=1)
        >>> drawn.bincount()  # probabilities 0, 0.9526, 0.0474
        tensor([   0, 9527,  473])

    Source:
        The perturbation of VQ-Seg (2026, arXiv 2601.10124, authors' code), which loops over codes;
        the Gumbel-max form gives the same distribution.
    """
    check_tensor("index", index)
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    _check_codebook(codebook, 2)
    check_same_device("codebook", codebook, "index", index)
    if selected is not None:
        check_tensor("selected", selected)
        if selected.dtype != torch.bool:
            raise TypeError(f"selected must be bool, got {selected.dtype}")
        check_shape("selected", selected, tuple(index.shape), "that of index")
        check_same_device("selected", selected, "index", index)
        selected = selected.flatten()
    tau = scheduled("temperature", temperature, codebook, check_positive)
    bits = draw_seed(seed, generator, codebook)
    arguments = (index.flatten(), codebook.detach(), selected, tau, bits)
    found: Tensor = _sample(*arguments) if transformed() else SAMPLE_CODE(*arguments)
    return found.reshape(index.shape)


def _common_dtype(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the wider type: under autocast one may come from a product in half."""
    dtype = torch.promote_types(z.dtype, codebook.dtype)
    return z.to(dtype), codebook.to(dtype)


def _check_codebook(codebook: Tensor, least: int) -> None:
    check_floating("codebook", codebook)
    check_shape("codebook", codebook, (None, None), "[codes, features]")
    if codebook.shape[0] < least:
        raise ValueError(f"codebook must have at least {least} codes, got {codebook.shape[0]}")


def _squared_distances(z: Tensor, codebook: Tensor) -> Tensor:
    """Return squared distances [n, K] from differences."""
    wide = accumulate_dtype(codebook.dtype)
    return (z[:, None].to(wide) - codebook.to(wide)).square().sum(-1)


def _chunks(tokens: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    chunks: tuple[Tensor, ...] = tokens.split(max(1, _CHUNK // max(1, codebook.numel())))
    return chunks


def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Find nearest codes in plain PyTorch; the specification."""
    found = [_squared_distances(rows, codebook).argmin(-1) for rows in _chunks(z, codebook)]
    return torch.where(z.isfinite().all(-1), torch.cat(found), 0)


def _sample(
    index: Tensor, codebook: Tensor, selected: Tensor | None, temperature: Tensor, seed: Tensor
) -> Tensor:
    """Draw other codes in plain PyTorch; the specification."""
    codes = codebook.shape[0]
    inside = (index >= 0) & (index < codes)
    every = torch.arange(codes, device=index.device)
    place = torch.arange(index.shape[0], device=index.device)
    found = []
    for rows in _chunks(place, codebook):
        own = torch.where(inside[rows], index[rows], 0)
        distance = _squared_distances(codebook[own], codebook)
        u = ((philox_words(seed, codes, stream=rows) >> 9) + 0.5).to(distance.dtype) * 2.0**-23
        gumbel = -torch.log(-torch.log(u))
        # Both factors are at most 1, so that neither end of the range of tau overflows.
        near = 1 / temperature.clamp(min=1).to(distance.dtype)
        weight = temperature.clamp(max=1).to(distance.dtype)
        score = near * distance - weight * gumbel
        found.append(score.masked_fill(own[:, None] == every, float("inf")).argmin(-1))
    drawn = torch.cat(found)
    return drawn if selected is None else torch.where(selected, drawn, index)


def _check_finite(codebook: Tensor) -> None:
    if codebook.device.type == "cpu" and not bool(codebook.isfinite().all()):
        raise ValueError("codebook must be finite")


def _nearest_reference(z: Tensor, codebook: Tensor) -> Tensor:
    _check_finite(codebook)
    return _nearest(z, codebook)


def _sample_reference(
    index: Tensor, codebook: Tensor, selected: Tensor | None, temperature: Tensor, seed: Tensor
) -> Tensor:
    if index.device.type == "cpu":
        check_positive("temperature", temperature.item())
        _check_finite(codebook)
        outside = (index < 0) | (index >= codebook.shape[0])
        if bool(outside.any()):
            place = int(outside.nonzero()[0])
            raise ValueError(
                f"index must lie in [0, {codebook.shape[0]}), "
                f"got {int(index[place])} at place {place}"
            )
    return _sample(index, codebook, selected, temperature, seed)


# Neither has an autograd rule: the public functions detach what they are given, and an integer
# result takes no gradient.
NEAREST_CODE = Operator(
    "nearest_code",
    "(Tensor z, Tensor codebook) -> Tensor",
    fake=lambda z, codebook: z.new_empty(z.shape[:1], dtype=torch.int64),
    reference=_nearest_reference,
    triton="code_search:nearest_code",
)
SAMPLE_CODE = Operator(
    "sample_code",
    "(Tensor index, Tensor codebook, Tensor? selected, Tensor temperature, Tensor seed) -> Tensor",
    fake=lambda index, *_: index.new_empty(index.shape),
    reference=_sample_reference,
    triton="code_search:sample_code",
)
