"""Gradient dropout: entries of a task gradient that disagree with a regularizer's are dropped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_not_negative,
    check_positive,
    check_probability,
    check_tensor,
)
from regularizers._shared.randomness import draw_seed
from regularizers._shared.scheduled import known_zero
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.gradient_gate import agreement, check_gradients, gradient_gate


def keep_probability(g_task: Tensor, g_reg: Tensor, *, eps: float = 1e-8) -> Tensor:
    r"""Return how likely gradient dropout keeps each entry of the task gradient.

    .. math:: P = \tfrac12 \Bigl(1 + \mathrm{sign}(g_a)
        \frac{g_a + g_b}{|g_a| + |g_b| + \epsilon}\Bigr)

    1 where the gradients agree in sign or the second is 0; where they disagree, the task
    gradient's share of the two magnitudes. Changing the signs of both changes nothing.

    Args:
        g_task: :math:`g_a` ``[*]``.
        g_reg: :math:`g_b`, same shape, dtype and device.
        eps: added to the denominator, at least 0. Gradients of its size are dropped half the
            time, whatever the regularizer says; with 0 they are not.

    Returns:
        ``[*]`` in [0, 1]; float32 for half-precision gradients. 1/2 where only the task gradient is
        0. 1 where a gradient is infinite or NaN: an overflow is not to be hidden from a
        ``GradScaler``.

    Raises:
        TypeError: a gradient is no floating-point tensor, or their dtypes differ.
        ValueError: the shapes or devices differ, or ``eps`` is negative.

    Example:
        >>> keep_probability(torch.ones(4), torch.tensor([1.0, 0.0, -1.0, -3.0]))
        tensor([1.0000, 1.0000, 0.5000, 0.2500])

    Source:
        As :func:`gradient_dropout`.
    """
    check_gradients(g_task, g_reg)
    check_not_negative("eps", eps)
    return agreement(g_task.detach(), g_reg.detach(), eps)


def gradient_dropout(
    g_task: Tensor,
    g_reg: Tensor,
    *,
    drop_strength: float | Tensor = 1.0,
    eps: float = 1e-8,
    stream: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Drop entries of a gradient at random, the likelier the more another gradient opposes them.

    .. math:: g = \bigl((1 - \lambda) + \lambda\, 1[P > U]\bigr)\, g_a, \qquad U \sim U(0, 1)

    with P of :func:`keep_probability`. The second gradient only gates: it is never added. Nothing
    is rescaled, so :math:`E[g] = ((1 - \lambda) + \lambda P)\, g_a`.

    U is made of the upper 24 bits of Philox word e of the stream for entry e. A task gradient
    that is differentiated through passes its gradient where it is kept; the gate is a constant.

    Args:
        g_task: gradient of the task, :math:`g_a` ``[*]``.
        g_reg: gradient of the regularizer, :math:`g_b`, same shape, dtype and device.
        drop_strength: :math:`\lambda` in [0, 1], a number or a 0-d tensor: 1 drops entirely, 0
            keeps everything and returns ``g_task`` itself. (The released code calls it leak.)
        eps: added to the denominator of P.
        stream: number of the random stream; give every tensor under one seed its own.
        seed: int in [-2^63, 2^63) or 0-d int64 tensor; drawn when omitted. The same seed drops the
            same entries on every device.
        generator: generator to draw the seed from.

    Returns:
        ``[*]``, dtype of ``g_task``.

    Raises:
        TypeError: a gradient is no floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, or a number is out of range.

    Example:
        >>> g_task = torch.ones(4)
        >>> gradient_dropout(g_task, torch.tensor([1.0, 1.0, -1e6, -1e6]), seed=0)
        tensor([1., 1., 0., 0.])

    Source:
        "Regularized Mask Tuning", 2023, arXiv 2307.15049; formula of the authors' code
        (wuw2019/R-AMT), whose random numbers are torch's.
    """
    if known_zero(drop_strength):
        check_gradients(g_task, g_reg)
        check_not_negative("eps", eps)
        return g_task
    return gradient_gate(
        g_task, g_reg, drop_strength, eps=eps, stream=stream, seed=seed, generator=generator
    )


class GradientDropout:
    r"""Take the place of ``loss.backward()``: two losses in, gated task gradients out.

    :func:`gradient_dropout` for every parameter, from the gradients of a task loss and of a
    regularizer, usually :func:`soft_kl` to the model before tuning. The regularizer never enters
    the gradient itself. A parameter without a gradient of the regularizer gets its task gradient
    unchanged; one without a task gradient gets nothing.

    Both losses should come from one forward pass, or from two in the same mode: batch
    normalisation that trains in one and evaluates in the other would compare unlike gradients.

    Args:
        drop_strength: :math:`\lambda` in [0, 1]; the attribute may be changed at any time.
        eps: added to the denominator of the keep probability.

    Raises:
        TypeError, ValueError: as :func:`gradient_dropout`.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> task_loss = w.sum()
        >>> reg_loss = w[0] - 1e9 * w[1]
        >>> GradientDropout().backward(task_loss, reg_loss, [w], seed=0)
        >>> w.grad
        tensor([1., 0.])

    Source:
        "Regularized Mask Tuning", 2023, arXiv 2307.15049; authors' code. The released loop never
        steps when gradient dropout is off; here :math:`\lambda = 0` is a plain backward pass.
    """

    def __init__(self, *, drop_strength: float = 1.0, eps: float = 1e-8) -> None:
        check_probability("drop_strength", drop_strength)
        check_not_negative("eps", eps)
        self.drop_strength = drop_strength
        self.eps = eps

    def backward(
        self,
        task_loss: Tensor,
        reg_loss: Tensor,
        params: Iterable[Tensor],
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add the gated gradients to ``.grad`` of the parameters, as ``backward()`` would.

        Both graphs are freed. Parameter i draws from stream i of the seed. Under
        ``DistributedDataParallel`` the hooks that average gradients do not run: average ``.grad``
        yourself, and give all ranks their own seeds.

        Args:
            task_loss: a tensor with one element that depends on the parameters.
            reg_loss: likewise; it may depend on some or none of them.
            params: leaf tensors that require grad.
            seed: as in :func:`gradient_dropout`.
            generator: likewise.

        Raises:
            TypeError: a loss or a parameter is no tensor.
            ValueError: a loss has more than one element, the task loss does not depend on
                anything that requires grad, or ``params`` is empty or holds something else than
                leaves that require grad.
        """
        for name, loss in (("task_loss", task_loss), ("reg_loss", reg_loss)):
            check_floating(name, loss)
            if loss.numel() != 1:
                raise ValueError(f"{name} must have one element, got shape {list(loss.shape)}")
        leaves = list(params)
        if not leaves:
            raise ValueError("params must hold at least one parameter, got none")
        for leaf in leaves:
            check_tensor("params", leaf)
            if not (leaf.is_leaf and leaf.requires_grad):
                raise ValueError("params must be leaves that require grad, got another tensor")
        if not task_loss.requires_grad:
            raise ValueError("task_loss must depend on the parameters, got a constant")
        check_probability("drop_strength", self.drop_strength)
        root = draw_seed(seed, generator, leaves[0])
        reg_grads: list[Tensor | None] = [None] * len(leaves)
        if reg_loss.requires_grad and self.drop_strength > 0:
            reg_grads = list(
                torch.autograd.grad(reg_loss.sum(), leaves, retain_graph=True, allow_unused=True)
            )
        task_grads = torch.autograd.grad(task_loss.sum(), leaves, allow_unused=True)
        with torch.no_grad():
            for stream, leaf in enumerate(leaves):
                grad, other = task_grads[stream], reg_grads[stream]
                if grad is None:
                    continue
                if other is not None:
                    grad = gradient_dropout(
                        grad,
                        other,
                        drop_strength=self.drop_strength,
                        eps=self.eps,
                        stream=stream,
                        seed=root.to(leaf.device),
                    )
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad

    def __repr__(self) -> str:
        return f"GradientDropout(drop_strength={self.drop_strength:g}, eps={self.eps:g})"


def soft_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, T: float = 1.0, mix: float = 1.0
) -> Tensor:
    r"""Return the distillation loss whose gradient gates: soft cross-entropy to the teacher.

    .. math:: L = -T^2\, \mathrm{mean}_b \sum_c q_{bc} \log \mathrm{softmax}(z_s / T)_{bc}, \qquad
        q = \mathrm{softmax}\bigl((\mu z_t + (1 - \mu) z_s) / T\bigr)

    The KL divergence up to the entropy of q, which is a constant: q carries no gradient. The
    gradient is :math:`T (\mathrm{softmax}(z_s / T) - q)` over the batch size, exactly 0 where the
    logits agree. Computed in float32 for half-precision logits.

    Args:
        student_logits: :math:`z_s` ``[*, C]``.
        teacher_logits: :math:`z_t`, same shape; for mask tuning, of the model without masks.
        T: temperature, above 0.
        mix: :math:`\mu` in [0, 1]; below 1 the student's own logits soften the teacher.

    Returns:
        A tensor with no dimensions.

    Raises:
        TypeError: the logits are no floating-point tensors.
        ValueError: the shapes differ or have no class dimension, or a number is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> soft_kl(logits, logits.detach()).backward()
        >>> logits.grad
        tensor([[0., 0.]])

    Source:
        "Regularized Mask Tuning", 2023, arXiv 2307.15049; authors' code.
    """
    check_floating("student_logits", student_logits)
    check_floating("teacher_logits", teacher_logits)
    if student_logits.dim() < 1 or teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have one shape [*, C], "
            f"got {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    check_positive("T", T)
    check_probability("mix", mix)
    dtype = accumulate_dtype(student_logits.dtype)
    # In this form both parts of the gradient are made by the same operations, so they cancel bit
    # by bit where the logits agree: rounding noise of a plain log_softmax would gate entries.
    student = student_logits.to(dtype)
    with torch.no_grad():
        target = _centred(torch.lerp(student, teacher_logits.to(dtype), mix) / T)
        target = (target - target.logsumexp(-1, keepdim=True)).exp()
    student = _centred(student / T)
    return T * T * (student.logsumexp(-1) - (target * student).sum(-1)).mean()


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.detach().amax(-1, keepdim=True)
