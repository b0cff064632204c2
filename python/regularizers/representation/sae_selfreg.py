"""Keep a classifier off directions that a person marked as unintended; fit the dictionary first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
    check_same_device,
    check_tensor,
    check_values,
)
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers._shared.scheduled import ScheduledModule
from regularizers.ops._operator import accumulate_dtype, full_precision
from regularizers.representation.sae import TopKSAE

Form = Literal["sq", "abs", "signed"]
FORMS = ("sq", "abs", "signed")


def feature_similarity_penalty(
    weight: Tensor,
    directions: Tensor,
    *,
    form: Form = "sq",
    pairwise: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Penalise the similarity of a linear classifier's rows with unintended directions.

    .. math::
        R = \operatorname{mean}_{c,f}\, g(\cos(w_c, v_f)), \qquad
        g(u) = u^2 \ \text{(sq)}, \quad |u| \ \text{(abs)}, \quad u \ \text{(signed)}

    The cosine leaves the norm of the weights free: shrinking them does not help. Directions are
    constants. A row of zeros has similarity 0 and no gradient. The classifier's bias is never
    penalised.

    Args:
        weight: rows w, ``[C, D]``, as in ``torch.nn.Linear``.
        directions: v, ``[F, D]``, at least one, of any norm but 0 (on a CPU this is checked); of
            any floating-point dtype. :func:`unintended_directions` takes them from an autoencoder.
        form: g.
        pairwise: penalise the differences of rows, :math:`w_d - w_c` for all c < d, in place of the
            rows: what softmax classifies by. With two classes that is the one row of the logit.
        reduction: over rows and directions: ``"mean"``, ``"sum"``, or ``"none"``.

    Returns:
        The penalty with no dimensions, float64 for float64 and else float32; ``[C, F]`` for
        ``reduction="none"``, with C (C - 1) / 2 rows if ``pairwise``.

    Raises:
        TypeError: a tensor is not floating-point.
        ValueError: the shapes do not fit, ``directions`` is empty or has a row of norm 0,
            ``pairwise`` with a single row, or ``form`` or ``reduction`` is unknown.

    Example:
        >>> weight, direction = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 0.0]])
        >>> print(f"{feature_similarity_penalty(weight, direction).item():.4f}")
        0.5000

    Source:
        "Self-Regularization with Sparse Autoencoders for Controllable LLM-based Classification",
        KDD 2025, arXiv 2502.14133. Reconstructed from the abstract; the square is chosen because it
        is smooth and least exactly where the weights are orthogonal to the directions.
    """
    check_one_of("form", form, FORMS)
    check_one_of("reduction", reduction, REDUCTIONS)
    _check_weight(weight, pairwise)
    directions = _checked_directions(directions, weight)
    wide = accumulate_dtype(weight.dtype)
    return _penalty(weight, _unit(directions.to(wide)), form, pairwise, reduction)


def _check_weight(weight: Tensor, pairwise: bool) -> None:
    check_floating("weight", weight)
    least = 2 if pairwise else 1
    if weight.dim() != 2 or weight.shape[0] < least:
        raise ValueError(
            f"weight must have shape [classes >= {least}, features], got {list(weight.shape)}"
        )


def _checked_directions(directions: Tensor, weight: Tensor | None = None) -> Tensor:
    check_floating("directions", directions)
    if directions.dim() != 2 or directions.shape[0] < 1:
        raise ValueError(
            f"directions must have shape [directions >= 1, features], got {list(directions.shape)}"
        )
    if weight is not None:
        if directions.shape[1] != weight.shape[1]:
            raise ValueError(
                f"directions must have the {weight.shape[1]} features of weight, "
                f"got {directions.shape[1]}"
            )
        check_same_device("directions", directions, "weight", weight)
    directions = directions.detach()
    check_values((directions != 0).any(1).all(), lambda: "directions must not have norm 0")
    return directions


def _unit(rows: Tensor) -> Tensor:
    """Return rows of norm 1; a row of zeros stays, with a gradient that is finite."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit: Tensor = rows / norm.where(norm != 0, 1.0)
    return unit


def _penalty(
    weight: Tensor, unit: Tensor, form: Form, pairwise: bool, reduction: Reduction
) -> Tensor:
    rows = weight.to(unit.dtype)
    if pairwise:
        first, second = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
        rows = rows[second] - rows[first]
    with full_precision(weight.device):
        cosine = _unit(rows) @ unit.T
    similarity = cosine.square() if form == "sq" else cosine.abs() if form == "abs" else cosine
    return reduce_rows(similarity, reduction)


class UnintendedFeatureRegularizer(ScheduledModule):
    r"""Add :func:`feature_similarity_penalty` of a linear layer to a loss.

    .. math:: \lambda \operatorname{mean}_{c,f}\, g(\cos(w_c, v_f))

    Which directions are unintended is for a person (or a language model that reads the texts on
    which they fire) to say. ``module.weight = 0.5`` changes :math:`\lambda`.

    Args:
        directions: v, ``[F, D]``; kept with norm 1 in a buffer, no parameter.
        weight: :math:`\lambda`, at least 0; the paper tunes it for every task.
        form: g: ``"sq"``, ``"abs"`` or ``"signed"``.
        pairwise: penalise differences of rows in place of rows.

    Shape:
        A ``torch.nn.Linear`` of D inputs, or its weight ``[C, D]``, to a loss with no dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: as :func:`feature_similarity_penalty`, or ``weight`` is below 0.

    Example:
        >>> head = nn.Linear(16, 2)
        >>> regularizer = UnintendedFeatureRegularizer(torch.randn(3, 16), weight=10.0)
        >>> features, target = torch.randn(8, 16), torch.randint(2, (8,))
        >>> loss = nn.functional.cross_entropy(head(features), target) + regularizer(head)
        >>> loss.backward()

    Source:
        "Self-Regularization with Sparse Autoencoders for Controllable LLM-based Classification",
        KDD 2025, arXiv 2502.14133; reconstructed from the abstract.
    """

    weight: Tensor
    directions: Tensor

    def __init__(
        self,
        directions: Tensor,
        *,
        weight: float = 1.0,
        form: Form = "sq",
        pairwise: bool = False,
    ) -> None:
        super().__init__()
        check_one_of("form", form, FORMS)
        directions = _checked_directions(directions)
        unit = _unit(directions.to(accumulate_dtype(directions.dtype)))
        self.register_buffer("directions", unit.to(directions.dtype))
        self.form: Form = form
        self.pairwise = pairwise
        self.schedule("weight", weight, check_not_negative)

    def forward(self, linear: nn.Linear | Tensor) -> Tensor:
        """Return the weighted penalty."""
        rows = linear if isinstance(linear, Tensor) else getattr(linear, "weight", None)
        if not isinstance(rows, Tensor):
            raise TypeError(f"linear must be a linear layer, got {type(linear).__name__}")
        penalty = feature_similarity_penalty(
            rows, self.directions, form=self.form, pairwise=self.pairwise
        )
        return (self.weight * penalty).to(penalty.dtype)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"directions={list(self.directions.shape)}, weight={self.weight.item():g}, "
            f"form={self.form!r}, pairwise={self.pairwise}"
        )


def project_out(weight: Tensor, directions: Tensor, *, rcond: float = 1e-6) -> Tensor:
    r"""Remove the span of unintended directions from weights: the penalty's hard limit.

    .. math:: W \leftarrow W - W Q Q^\top, \qquad Q \text{ an orthonormal basis of the span}

    The model's embedding is not touched, so nothing that correlates with the directions is lost to
    other uses of it.

    Args:
        weight: ``[C, D]``.
        directions: ``[F, D]``, at least one, none of norm 0; may be linearly dependent.
        rcond: directions that a combination of the others leaves within ``rcond`` of 0, relative to
            the largest singular value of the directions at norm 1, count as dependent; above 0.

    Returns:
        ``[C, D]``, in the dtype of ``weight``, differentiable in it. A row inside the span becomes
        exactly 0, not the rounding errors of itself.

    Raises:
        TypeError: a tensor is not floating-point.
        ValueError: the shapes do not fit, ``directions`` is empty or has a row of norm 0, or
            ``rcond`` is not above 0.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0, 3.0]])
        >>> project_out(weight, torch.tensor([[0.0, 5.0, 0.0]]))
        tensor([[1., 0., 3.]])

    Source:
        The inference-time form of KDD 2025, arXiv 2502.14133; reconstructed.
    """
    _check_weight(weight, pairwise=False)
    check_positive("rcond", rcond)
    directions = _checked_directions(directions, weight)
    # In float64 throughout, so that what is left along the directions is the rounding of the result
    # alone; it costs one small SVD.
    _, size, basis = torch.linalg.svd(_unit(directions.double()), full_matrices=False)
    basis = basis * (size > rcond * size[0]).unsqueeze(1)
    rows = weight.double()
    left = rows - (rows @ basis.T) @ basis
    noise = torch.finfo(weight.dtype).eps * weight.shape[1] ** 0.5
    before, after = (
        torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) for x in (rows, left)
    )
    result: Tensor = left.where(~(after <= noise * before), 0.0).to(weight.dtype)
    return result


def unintended_directions(sae: TopKSAE, indices: Tensor) -> Tensor:
    r"""Return the directions of some latents: their rows of the decoder, not of the encoder.

    .. math:: v_f = d_{i_f}

    Args:
        sae: the dictionary.
        indices: i, int64 ``[F]``, in [0, M).

    Returns:
        ``[F, D]``, a copy, without gradient.

    Raises:
        TypeError: ``sae`` is no :class:`TopKSAE`, or ``indices`` is no int64 tensor.
        ValueError: ``indices`` is empty, has several dimensions or is out of range.

    Example:
        >>> sae = TopKSAE(dim=8, dict_size=32, k=4)
        >>> unintended_directions(sae, torch.tensor([3, 17])).shape
        torch.Size([2, 8])

    Source:
        KDD 2025, arXiv 2502.14133; reconstructed.
    """
    _check_sae(sae)
    check_tensor("indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.dim() != 1 or indices.numel() == 0:
        raise ValueError(f"indices must have shape [directions >= 1], got {list(indices.shape)}")
    least, most = (int(value) for value in indices.aminmax())
    if least < 0 or most >= sae.dict_size:
        raise ValueError(
            f"indices must lie in [0, {sae.dict_size}), got values from {least} to {most}"
        )
    return sae.decoder.detach()[indices.to(sae.decoder.device)]


def _check_sae(sae: object) -> None:
    if not isinstance(sae, TopKSAE):
        raise TypeError(f"sae must be a TopKSAE, got {type(sae).__name__}")


def finetune_sae(
    sae: TopKSAE,
    activations: Iterable[Tensor],
    *,
    steps: int,
    lr: float,
    aux_weight: float = 1 / 32,
) -> TopKSAE:
    r"""Fit a pretrained dictionary to the activations of a task, and revive what is dead on them.

    .. math::
        \overline{\|x - \hat x\|^2} + \alpha\, \overline{\|\mathrm{sg}(e) - \hat e_{\mathrm{dead}}
        \|^2} \,/\, \overline{\|e - \bar e\|^2}

    The loss of :meth:`TopKSAE.loss`, where a latent is dead if it was silent for one whole pass
    over ``activations``; a first pass counts. A latent that is 0 on every token before the
    selection, too, has no gradient and stays dead. Trained by Adam, in place; training mode,
    ``dead_after`` and ``aux_weight`` are afterwards what they were.

    Args:
        sae: the dictionary; ``subtract_decoder_bias=True`` is the paper's form.
        activations: batches ``[*, D]`` of the task, on the device of ``sae``; gone through several
            times, so a list or a data loader, no generator.
        steps: number of optimizer steps, at least 1; batches are taken in order, again and again.
        lr: learning rate, above 0.
        aux_weight: :math:`\alpha`, at least 0.

    Returns:
        ``sae``.

    Raises:
        TypeError: ``sae`` is no :class:`TopKSAE`, or ``activations`` is an iterator.
        ValueError: a number is out of range, or there are no activations.

    Example:
        >>> sae = TopKSAE(dim=8, dict_size=32, k=4, subtract_decoder_bias=True)
        >>> batches = [torch.randn(64, 8) for _ in range(4)]
        >>> before = sae.loss(batches[0]).recon.item()
        >>> finetune_sae(sae, batches, steps=100, lr=1e-2).loss(batches[0]).recon.item() < before
        True

    Source:
        KDD 2025, arXiv 2502.14133; reconstructed.
    """
    _check_sae(sae)
    check_at_least("steps", steps, 1)
    check_positive("lr", lr)
    check_not_negative("aux_weight", aux_weight)
    if isinstance(activations, Iterator):
        raise TypeError("activations must be iterable several times, got an iterator")
    training, dead_after, kept_weight = sae.training, sae.dead_after, sae.aux_weight.item()
    try:
        sae.train()
        sae.dead_after = _count_over(sae, activations)
        sae.aux_weight.fill_(aux_weight)
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
        sae.attach(optimizer)
        batches = _over_and_over(activations)
        for _ in range(steps):
            optimizer.zero_grad()
            sae.loss(next(batches)).total.backward()
            optimizer.step()
        optimizer.zero_grad()
    finally:
        sae.dead_after = dead_after
        sae.aux_weight.fill_(kept_weight)
        sae.train(training)
    return sae


@torch.no_grad()
def _count_over(sae: TopKSAE, activations: Iterable[Tensor]) -> int:
    """Let the autoencoder count silent latents over one pass; return the number of tokens."""
    sae.silent_tokens.zero_()
    tokens = 0
    for batch in activations:
        sae.loss(batch)
        tokens += batch.numel() // sae.dim
    if tokens == 0:
        raise ValueError("activations must hold a token, got none")
    return tokens


def _over_and_over(activations: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from activations
