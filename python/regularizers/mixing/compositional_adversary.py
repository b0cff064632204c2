"""Compositional adversarial training: an adversary that picks a sequence of transforms an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
    check_shape,
    check_values,
)
from regularizers._shared.scheduled import ScheduledModule
from regularizers.mixing.transforms import TransformFamily

Backward = Literal["soft", "hard"]
_BACKWARDS = ("soft", "hard")


class GradientReversal(nn.Module):
    r"""Give the input forward and its gradient, times ``-scale``, backward.

    .. math:: y = x, \qquad \partial L / \partial x = -s\, \partial L / \partial y

    Args:
        scale: s.

    Shape:
        Any, to the same.

    Raises:
        TypeError: the input is no floating-point tensor.
        ValueError: ``scale`` is negative or not finite.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> GradientReversal()(3 * x).sum().backward()
        >>> x.grad
        tensor([-3., -3.])

    Source:
        Y. Ganin, V. Lempitsky, 2015, arXiv 1409.7495; in plain operations, so that it compiles and
        has derivatives of every order.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        check_not_negative("scale", scale)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        check_floating("x", x)
        return x.detach() - self.scale * (x - x.detach())

    def extra_repr(self) -> str:
        """Name the scale."""
        return f"scale={self.scale:g}"


def straight_through_gumbel(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw one of K for each row, with the gradient of a softmax.

    .. math:: s = \mathrm{softmax}((a + G) / \tau), \qquad
        w = \mathrm{onehot}(\operatorname{argmax} s) + s - \mathrm{sg}(s)

    The index has probabilities softmax(a), whatever :math:`\tau` is; w is one-hot exactly.

    Args:
        logits: a ``[*, K]``, finite.
        temperature: :math:`\tau`, above 0: towards 0 the gradient gets one-hot and its variance
            grows.
        generator: of the Gumbel variables; None: PyTorch's default generator.

    Returns:
        ``weights [*, K]`` and ``index [*]``.

    Raises:
        TypeError: ``logits`` is no floating-point tensor.
        ValueError: it is not finite, or ``temperature`` is not above 0.

    Example:
        >>> weights, index = straight_through_gumbel(torch.tensor([[0.0, 50.0]]))
        >>> weights, index
        (tensor([[0., 1.]]), tensor([1]))

    Source:
        E. Jang, S. Gu, B. Poole, 2017, arXiv 1611.01144; ``F.gumbel_softmax(hard=True)`` with a
        generator and the index.
    """
    check_floating("logits", logits)
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
    check_values(
        logits.detach().isfinite().all(), lambda: f"logits must be finite, got {logits.tolist()}"
    )
    s = ((logits + _gumbel(logits, generator)) / temperature).softmax(-1)
    index = s.argmax(-1)
    return F.one_hot(index, s.shape[-1]).to(s.dtype) + (s - s.detach()), index


def _gumbel(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    u = torch.rand(logits.shape, generator=generator, device=logits.device)
    return -torch.log(-torch.log(u.clamp(min=1e-30))).to(logits.dtype)


class Attack(NamedTuple):
    """What :class:`CompositionalAdversary` gives.

    Args:
        x: the attacked inputs ``[B, *]``.
        logits: of the selector, without noise ``[B, S, K]``.
        choice: the families ``[B, S]``.

    Example:
        >>> from regularizers.mixing import TransformFamily
        >>> family = TransformFamily("half", lambda x, s: x / 2, (0.0, 0.0))
        >>> adversary = CompositionalAdversary([family], encoder=torch.nn.Identity(), hidden=3)
        >>> adversary(torch.ones(1, 3)).x.detach()  # two steps
        tensor([[0.2500, 0.2500, 0.2500]])
    """

    x: Tensor
    logits: Tensor
    choice: Tensor


class CompositionalAdversary(ScheduledModule):
    r"""Pick a transform family for each sample, step after step, and apply it.

    .. math::
        a_t = \mathrm{net}(\mathrm{sg}(x_t), t), \quad
        s = \mathrm{softmax}((a_t + G) / \tau), \quad
        w = \mathrm{onehot}(\operatorname{argmax} s) + s - \mathrm{sg}(s), \quad
        x_{t+1} = \sum_k w_k T_k(x_t; \sigma_k)

    Forward, a step is exactly the chosen transform. Backward, the selector learns from
    :math:`\langle \partial L / \partial x_{t+1}, T_k(x_t) \rangle` of *every* family, and the image
    gets the Jacobians of all families weighted by s (``backward="soft"``) or the chosen one's alone
    (``"hard"``). The selector sees a detached image, so that a model is not rewarded for steering
    it. Its last layer begins at zero: all families alike.

    All K transforms run on the whole batch, S times. ``evaluated`` with ``"hard"`` runs the chosen
    transform of each sample and that many families, drawn at every step, without their Jacobians:
    their share of the selector's gradient, times K over their number, has the full gradient for
    its mean. It reads the choices on the host and does not compile to one graph.

    Args:
        families: at least one :class:`TransformFamily`.
        num_steps: S, at least 1.
        encoder: module ``[B, *] -> [B, hidden]``; None: two strided convolutions and a mean, for
            images.
        hidden: features of the encoder.
        channels: of the images, for the default encoder.
        temperature: :math:`\tau`, above 0; can be assigned a new number.
        learn_strength: the adversary chooses the strengths too, else they are drawn.
        backward: ``"soft"`` or ``"hard"``.
        evaluated: families that the gradient of the selector evaluates at a step; None: all.

    Shape:
        ``[B, *]`` to :class:`Attack`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; a family changes the shape; logits are not finite
            (on CUDA and in compiled code by an assertion on the device).

    Example:
        >>> from regularizers.mixing import default_families
        >>> adversary = CompositionalAdversary(default_families(), num_steps=2)
        >>> attack = adversary(torch.rand(4, 3, 32, 32))
        >>> attack.x.shape, attack.logits.shape, attack.choice.shape
        (torch.Size([4, 3, 32, 32]), torch.Size([4, 2, 12]), torch.Size([4, 2]))

    Source:
        "Compositional Adversarial Training for Robust Visual Watermarking", 2026, arXiv
        2605.16720. From the abstract: the min-max over sequences, one family a step by
        straight-through Gumbel-softmax, the entropy, gradients that aggregate over families.
        Reconstructed: the network, strengths, temperature and weights.
    """

    temperature: Tensor

    def __init__(
        self,
        families: Iterable[TransformFamily],
        *,
        num_steps: int = 2,
        encoder: nn.Module | None = None,
        hidden: int = 64,
        channels: int = 3,
        temperature: float = 1.0,
        learn_strength: bool = False,
        backward: Backward = "soft",
        evaluated: int | None = None,
    ) -> None:
        super().__init__()
        self.families = nn.ModuleList(families)
        count = len(self.families)
        if count == 0:
            raise ValueError("families must have at least one family, got none")
        check_at_least("num_steps", num_steps, 1)
        check_at_least("hidden", hidden, 1)
        check_one_of("backward", backward, _BACKWARDS)
        if evaluated is not None:
            check_at_least("evaluated", evaluated, 1)
            if backward != "hard" or evaluated > count:
                raise ValueError(
                    f"evaluated must be at most the number of families, {count}, "
                    f"with backward 'hard', got {evaluated} with {backward!r}"
                )
        self.schedule("temperature", temperature, check_positive)
        self.num_steps = num_steps
        self.learn_strength = learn_strength
        self.backward = backward
        self.evaluated = evaluated
        self.encoder = _image_encoder(channels, hidden) if encoder is None else encoder
        self.step_embedding = nn.Embedding(num_steps, hidden)
        nn.init.normal_(self.step_embedding.weight, std=hidden**-0.5)
        self.head = nn.Linear(hidden, count * (2 if learn_strength else 1))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        x: Tensor,
        *,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        reverse: bool = False,
    ) -> Attack:
        """Attack ``x``.

        Args:
            x: ``[B, *]``.
            deterministic: take the likeliest family, and the middle of a range that is not learned.
            generator: of choices, strengths and random transforms; None: PyTorch's default one.
            reverse: turn the gradients of the adversary's parameters round, see :func:`cat_step`.
        """
        check_floating("x", x)
        logits, choices = [], []
        for step in range(self.num_steps):
            features = self.encoder(x.detach()) + self.step_embedding.weight[step]
            out = self.head(features)
            logits.append(out[:, : len(self.families)])
            if reverse:
                out = GradientReversal()(out)
            x, choice = self._step(x, out, deterministic, generator)
            choices.append(choice)
        return Attack(x, torch.stack(logits, 1), torch.stack(choices, 1))

    def _step(
        self,
        x: Tensor,
        out: Tensor,
        deterministic: bool,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        count = len(self.families)
        scores = out[:, :count]
        check_values(
            scores.detach().isfinite().all(),
            lambda: f"logits must be finite, got {scores.tolist()}",
        )
        if not deterministic:
            scores = scores + _gumbel(scores, generator)
        s = (scores / self.temperature.to(scores.dtype)).softmax(-1)
        choice = s.argmax(-1)
        shares = out[:, count:].sigmoid() if self.learn_strength else None
        strengths = [self._strength(k, x, shares, deterministic, generator) for k in range(count)]
        if self.evaluated is not None:
            return self._chosen(x, s, choice, strengths, generator), choice
        results = torch.stack(
            [self._family(k)(x, strengths[k], generator=generator) for k in range(count)]
        )
        return _blend(results, s, choice, self.backward), choice

    def _family(self, k: int) -> TransformFamily:
        return cast(TransformFamily, self.families[k])

    def _strength(
        self,
        k: int,
        x: Tensor,
        shares: Tensor | None,
        deterministic: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        family = self._family(k)
        if shares is not None:
            return family.strength(shares[:, k].to(x.dtype))
        if deterministic:
            return family.strength(x.new_full(x.shape[:1], 0.5))
        return family.draw_strength(x, generator)

    def _chosen(
        self,
        x: Tensor,
        s: Tensor,
        choice: Tensor,
        strengths: list[Tensor],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Run the chosen families on their rows, and some on all rows for the selector."""
        assert self.evaluated is not None
        result, count = torch.zeros_like(x), len(self.families)
        for k in range(count):
            rows = (choice == k).nonzero().flatten()
            if rows.numel() > 0:
                found = self._family(k)(x[rows], strengths[k][rows], generator=generator)
                result = result.index_add(0, rows, found)
        if not s.requires_grad:
            return result
        device = None if generator is None else generator.device
        order = torch.randperm(count, generator=generator, device=device)
        change = (s - s.detach()).to(x.dtype) * (count / self.evaluated)
        for k in order[: self.evaluated].tolist():
            with torch.no_grad():
                found = self._family(k)(x, strengths[k], generator=generator)
            result = result + change[:, k].reshape(-1, *(1,) * (x.dim() - 1)) * found
        return result

    def entropy(self, logits: Tensor) -> Tensor:
        """Return the mean entropy of the policy, in nats, from ``logits [B, S, K]``."""
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean()

    def extra_repr(self) -> str:
        """Name the steps and the temperature."""
        return f"num_steps={self.num_steps}, temperature={self.temperature:g}"


def _image_encoder(channels: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _blend(results: Tensor, s: Tensor, choice: Tensor, backward: Backward) -> Tensor:
    """Return the chosen of the results [K, B, *], with the gradients of all."""
    chosen = results[choice, torch.arange(choice.shape[0], device=choice.device)]
    s = s.to(results.dtype)
    if backward == "soft":
        soft = torch.einsum("bk,kb...->b...", s, results)
        return chosen.detach() + (soft - soft.detach())
    return chosen + torch.einsum("bk,kb...->b...", s - s.detach(), results.detach())


class CATStep(NamedTuple):
    """The losses of one min-max step.

    Args:
        loss: call ``backward()`` on it once: it gives the defender the gradient of its loss, and
            the adversary that of its own.
        defender_loss: L, detached.
        adversary_loss: -(L + entropy weight x H), detached.
        entropy: H, detached.
        attack: the attacked inputs, logits and choices.

    Example:
        >>> CATStep._fields
        ('loss', 'defender_loss', 'adversary_loss', 'entropy', 'attack')
    """

    loss: Tensor
    defender_loss: Tensor
    adversary_loss: Tensor
    entropy: Tensor
    attack: Attack


def cat_step(
    adversary: CompositionalAdversary,
    x: Tensor,
    recover_loss_fn: Callable[[Tensor], Tensor],
    *,
    entropy_weight: float = 0.02,
    generator: torch.Generator | None = None,
) -> CATStep:
    r"""Compute both sides of the game, for one backward pass.

    .. math::
        \min_\theta L(x_{S+1}), \qquad
        \max_\varphi L(x_{S+1}) + \lambda_H \frac1S \sum_t H(\mathrm{softmax}(a_t))

    The parameters of the adversary get the gradient of :math:`-(L + \lambda_H H)`, because its
    outputs pass a :class:`GradientReversal` on their way to L; all others that of L. The entropy is
    that of the policy without noise. Add to ``loss`` what the defender alone minimises. One
    optimizer over both sets of parameters, or one for each, descends.

    Args:
        adversary: the adversary.
        x: inputs ``[B, *]`` with their graph to the defender, such as watermarked images.
        recover_loss_fn: loss of the attacked inputs, no dimensions.
        entropy_weight: :math:`\lambda_H`, at least 0.
        generator: as for the adversary.

    Returns:
        :class:`CATStep`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``entropy_weight`` is negative, or ``recover_loss_fn`` gives no scalar.

    Example:
        >>> from regularizers.mixing import default_families
        >>> adversary = CompositionalAdversary(default_families(), num_steps=1)
        >>> x = torch.rand(2, 3, 16, 16, requires_grad=True)
        >>> step = cat_step(adversary, x, lambda attacked: attacked.square().mean())
        >>> step.loss.backward()
        >>> round(step.entropy.item(), 4)  # log(12)
        2.4849

    Source:
        As :class:`CompositionalAdversary`; the default weight comes from a toy problem.
    """
    check_not_negative("entropy_weight", entropy_weight)
    attack = adversary(x, generator=generator, reverse=True)
    defender_loss = recover_loss_fn(attack.x)
    check_shape("the result of recover_loss_fn", defender_loss, (), "[]")
    entropy = adversary.entropy(attack.logits)
    adversary_loss = -(defender_loss.detach() + entropy_weight * entropy.detach())
    loss = defender_loss - entropy_weight * entropy
    return CATStep(loss, defender_loss.detach(), adversary_loss, entropy.detach(), attack)
