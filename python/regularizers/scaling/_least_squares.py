"""Levenberg-Marquardt for many small curves at once: fits of saturating power laws."""

from __future__ import annotations

import torch
from torch import Tensor


def fit_curves(
    x: Tensor,
    loss: Tensor,
    weights: Tensor,
    start: Tensor,
    bounds: Tensor,
    *,
    fixed_exponent: bool,
    huber_delta: float | None,
    max_iterations: int = 300,
) -> tuple[Tensor, Tensor]:
    r"""Fit :math:`\log L_i = \log(E + e^a x_i^{-\alpha})` from many starts, all at once.

    .. math:: \min_{a,\, \log \alpha,\, E \in bounds} \sum_i w_i\, \rho(r_i), \qquad
        r_i = \log(E + e^a x_i^{-\alpha}) - \log L_i

    Damped Gauss-Newton steps, three unknowns each; \rho is a square or Huber's, by reweighting.
    A step that leaves the bounds of E ends on them.

    Args:
        x: float64 ``[n]``, above 0.
        loss: ``[b, n]``, above 0.
        weights: ``[n]``.
        start: :math:`(a, \log \alpha, E)` ``[b, 3]``.
        bounds: lowest and highest E ``[2]``.
        fixed_exponent: leave alpha as it starts.
        huber_delta: where Huber's square ends; None: squares everywhere.
        max_iterations: damped steps at most.

    Returns:
        The parameters ``[b, 3]`` and their objective ``[b]``.
    """
    log_x, log_loss = x.log(), loss.log()
    theta = start.clone()
    damping = torch.full(start.shape[:1], 1e-3, dtype=start.dtype)
    free = torch.ones(3, dtype=start.dtype)
    if fixed_exponent:
        free[1] = 0

    def residuals(theta: Tensor) -> tuple[Tensor, Tensor]:
        power = (theta[:, :1] - theta[:, 1:2].exp() * log_x).exp()
        return (theta[:, 2:] + power).log() - log_loss, power

    def objective(r: Tensor) -> Tensor:
        if huber_delta is None:
            return (weights * r.square()).sum(-1)
        return 2 * (
            weights
            * torch.nn.functional.huber_loss(
                r, torch.zeros_like(r), reduction="none", delta=huber_delta
            )
        ).sum(-1)

    r, power = residuals(theta)
    value = objective(r)
    quiet = 0
    for _ in range(max_iterations):
        share = power / (theta[:, 2:] + power)
        alpha_log_x = theta[:, 1:2].exp() * log_x
        jacobian = torch.stack([share, -share * alpha_log_x, 1 / (theta[:, 2:] + power)], -1)
        # A coordinate that is held, by the caller or by a bound that the gradient pushes
        # against, takes no part in the step.
        robust = weights if huber_delta is None else weights * (huber_delta / r.abs()).clamp(max=1)
        weighted = robust[..., None] * jacobian
        gradient = (weighted * r[..., None]).sum(1)
        at_low = (theta[:, 2] <= bounds[0]) & (gradient[:, 2] > 0)
        at_high = (theta[:, 2] >= bounds[1]) & (gradient[:, 2] < 0)
        moving = free.expand_as(theta).clone()
        moving[:, 2] *= ~(at_low | at_high)
        normal = jacobian.mT @ weighted * moving[:, :, None] * moving[:, None, :]
        gradient = gradient * moving
        diagonal = normal.diagonal(dim1=1, dim2=2)
        scale = diagonal * (1 + damping[:, None]) + 1e-30 + (1 - moving)
        damped = normal - torch.diag_embed(diagonal) + torch.diag_embed(scale)
        # Scaled to a unit diagonal: E and the exponent live on other scales.
        root = scale.rsqrt()
        solution, _ = torch.linalg.solve_ex(
            damped * root[:, :, None] * root[:, None, :], (root * gradient)[..., None]
        )
        trial = theta - root * solution[..., 0]
        trial[:, 2] = trial[:, 2].clamp(bounds[0], bounds[1])
        trial_r, trial_power = residuals(trial)
        trial_value = objective(trial_r)
        better = trial_value < value
        gain = torch.where(better, (value - trial_value) / value.clamp(min=1e-300), 0.0)
        theta = torch.where(better[:, None], trial, theta)
        r, power = (
            torch.where(better[:, None], new, old)
            for new, old in ((trial_r, r), (trial_power, power))
        )
        value = torch.where(better, trial_value, value)
        damping = torch.where(better, damping / 5, damping * 4).clamp(1e-14, 1e14)
        # Several steps without gain, not one: the damping may still be falling.
        quiet = quiet + 1 if bool((gain < 1e-14).all()) else 0
        if quiet >= 12:
            break
    return theta, value
