"""Losses around potential flows: telling walks apart, and training an autoencoder along."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_one_of,
    check_shape,
    check_tensor,
    known_range,
)
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers.transport.potential_flow import PotentialFlowOutput

_LIKELIHOODS = ("bernoulli", "gaussian")


def traversal_classification_loss(
    logits: Tensor, index: int | Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    r"""Return the cross-entropy of telling which potential moved a pair of pictures.

    .. math:: L = -\log \operatorname{softmax}(\mathrm{logits})_k

    The classifier sees both pictures of a step, concatenated along channels. The paper adds this
    loss with weight 1.

    Args:
        logits: ``[B, K]``.
        index: k, the potential that moved the batch, or int64 ``[B]``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A tensor with no dimensions, or ``[B]`` for ``reduction="none"``.

    Raises:
        TypeError: ``logits`` is not a floating-point tensor.
        ValueError: a shape is wrong, ``index`` is out of range, or ``reduction`` is unknown.

    Example:
        >>> from regularizers.transport import PotentialFlow
        >>> flow, generator = PotentialFlow(4, 3, num_steps=6), torch.nn.Linear(4, 10)
        >>> classifier = torch.nn.Linear(20, 3)
        >>> output = flow(torch.randn(16, 4), index=2, decoder=generator)
        >>> pair = torch.cat((generator(output.z1), generator(output.z2)), 1)
        >>> loss = output.total + traversal_classification_loss(classifier(pair), 2)

    Source:
        Song et al., 2023, arXiv 2304.12944; from the authors' code.
    """
    check_floating("logits", logits)
    check_shape("logits", logits, (None, None), "[B, K]")
    check_one_of("reduction", reduction, REDUCTIONS)
    if isinstance(index, Tensor):
        check_shape("index", index, (len(logits),), "[B]")
        worst = known_range(index)
    else:
        check_at_least("index", index, 0)
        worst = (index, index)
        index = torch.full((len(logits),), index, device=logits.device)
    if worst is not None and not 0 <= worst[0] <= worst[1] < logits.shape[1]:
        raise ValueError(f"index must lie in [0, {logits.shape[1] - 1}], got {worst}")
    return F.cross_entropy(logits, index, reduction=reduction)


def negative_elbo(
    reconstruction: Tensor,
    target: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *,
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
) -> Tensor:
    r"""Return the loss of a variational autoencoder, summed over elements, averaged over samples.

    .. math::
        -\log p(x \mid z) + \mathrm{KL}\big(N(\mu, \operatorname{diag} \sigma^2) \,\|\, N(0, I)\big)
        = -\log p(x \mid z) - \tfrac12 \sum_k (1 + \log \sigma_k^2 - \mu_k^2 - \sigma_k^2)

    Args:
        reconstruction: ``[B, ...]``, what the decoder gives: probabilities for ``"bernoulli"``,
            means for ``"gaussian"``.
        target: ``[B, ...]``, what it should give.
        mean: ``[B, d]``, mean of the code.
        log_var: ``[B, d]``, logarithm of its variances.
        likelihood: ``"bernoulli"`` (binary cross-entropy) or ``"gaussian"`` (half the squared
            error, unit variance, without its constant).

    Returns:
        A tensor with no dimensions.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, or ``likelihood`` is unknown.

    Example:
        >>> picture, code = torch.full((2, 3), 0.5), torch.zeros(2, 4)
        >>> negative_elbo(picture, picture, code, code)  # 3 log 2
        tensor(2.0794)

    Source:
        The part of the VAE loss of Song et al., 2023, arXiv 2304.12944, that is not theirs;
        Bernoulli as in the authors' code.
    """
    check_one_of("likelihood", likelihood, _LIKELIHOODS)
    check_floating("reconstruction", reconstruction)
    check_floating("mean", mean)
    if target.shape != reconstruction.shape:
        raise ValueError(
            f"target must have the shape {list(reconstruction.shape)} of reconstruction, "
            f"got {list(target.shape)}"
        )
    check_shape("log_var", log_var, tuple(mean.shape), f"{list(mean.shape)} of mean")
    if likelihood == "bernoulli":
        misfit = F.binary_cross_entropy(reconstruction, target, reduction="sum")
    else:
        misfit = (reconstruction - target).square().sum() / 2
    divergence = -(1 + log_var - mean.square() - log_var.exp()).sum() / 2
    return (misfit + divergence) / len(reconstruction)


def vae_flow_loss(
    elbo: Tensor,
    elbo_next: Tensor,
    flow: PotentialFlowOutput,
    z_t: Tensor,
    z_next: Tensor,
    *,
    lambda_pde: float | Tensor = 1.0,
) -> Tensor:
    r"""Return the loss that trains a variational autoencoder together with potentials.

    .. math::
        L = L_{\mathrm{VAE}}(x) + L_{\mathrm{VAE}}(x_{t+1} \mid z_2) + \lambda L_{\mathrm{flow}}
        + \overline{(z_{t+1} - z_t + z_1 - z_2)^2} + \overline{(z_t - z_1)^2}

    The training pictures come in sequences of a known transformation k: :math:`x`, and
    :math:`x_t`, :math:`x_{t+1}` after t and t + 1 steps of it. :math:`z_t` and :math:`z_{t+1}` are
    their codes, :math:`z_1` and :math:`z_2` where the flow of potential k takes the code of x.

    Args:
        elbo: negative ELBO of x, as :func:`negative_elbo` gives it.
        elbo_next: that of :math:`x_{t+1}`, with its own mean and variance, reconstructed from
            ``flow.z2``.
        flow: result of :meth:`PotentialFlow.loss` on the code of x, with the step t.
        z_t: ``[B, d]``.
        z_next: ``[B, d]``.
        lambda_pde: weight of the flow's own loss.

    Returns:
        A tensor with no dimensions.

    Raises:
        TypeError: ``flow`` is not a :class:`PotentialFlowOutput`, or a code is not a tensor.
        ValueError: a code has not the shape of ``flow.z1``.

    Example:
        >>> from regularizers.transport import PotentialFlow
        >>> flow, code = PotentialFlow(4, 2, num_steps=6), torch.randn(8, 4)
        >>> output = flow(code, index=0, t_sel=1)
        >>> z_t, z_next = torch.randn(8, 4), torch.randn(8, 4)
        >>> vae_flow_loss(torch.tensor(90.0), torch.tensor(91.0), output, z_t, z_next).shape
        torch.Size([])

    Source:
        Song et al., 2023, arXiv 2304.12944; from the authors' code.
    """
    if not isinstance(flow, PotentialFlowOutput):
        raise TypeError(f"flow must be a PotentialFlowOutput, got {type(flow).__name__}")
    for name, code in (("z_t", z_t), ("z_next", z_next)):
        check_tensor(name, code)
        check_shape(name, code, tuple(flow.z1.shape), f"{list(flow.z1.shape)} of flow.z1")
    step_match = (z_next - z_t + flow.z1 - flow.z2).square().mean()
    return elbo + elbo_next + lambda_pde * flow.total + step_match + (z_t - flow.z1).square().mean()
