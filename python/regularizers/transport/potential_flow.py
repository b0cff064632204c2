"""Walks through a latent space along gradients of learned potentials that obey a wave equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_one_of,
    check_shape,
    known_range,
)
from regularizers._shared.randomness import draw_seed
from regularizers.ops.philox import philox_words, rademacher

Equation = Literal["wave", "heat", "transport"]
Laplacian = Literal["exact", "hutchinson", "hessian_sum"]
Potential = Callable[[Tensor, Tensor], Tensor]

_EQUATIONS = ("wave", "heat", "transport")
_LAPLACIANS = ("exact", "hutchinson", "hessian_sum")


def wave_residual(
    u: Potential,
    z: Tensor,
    t: float | Tensor,
    c: float | Tensor,
    *,
    pde: Equation = "wave",
    laplacian: Laplacian = "exact",
    num_probes: int = 1,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return how far a potential u(z, t) is from solving its differential equation.

    .. math::
        \text{wave: } r = \partial_t^2 u - c^2 \Delta_z u, \qquad
        \text{heat: } r = \partial_t u - c^2 \Delta_z u, \qquad
        \text{transport: } r = \partial_t u + c \sum_k \partial_{z_k} u

    The loss is the mean of :math:`r^2`. Every sample has its own time.

    Args:
        u: potential ``(z [B, d], t [B]) -> [B]`` or ``[B, 1]``; twice differentiable, each sample
            apart from the others.
        z: points ``[B, d]``.
        t: times >= 0, ``[B]`` or one for all.
        c: speed; a number or a tensor with no dimensions. Differentiated through.
        pde: which equation.
        laplacian: ``"exact"``, the trace of the Hessian in d products with it (all at once);
            ``"hutchinson"``, the mean of :math:`v^\top H v` over ``num_probes`` random sign
            vectors, unbiased for :math:`\Delta u`, at the cost of one product each (a squared
            residual is biased upwards by the variance); ``"hessian_sum"``, what the authors' code
            computes instead of the equation. The transport equation has none.
        num_probes: number of sign vectors, at least 1.
        seed: of the sign vectors; int or int64 tensor with no dimensions.
        generator: to draw the seed from, where none is given.

    Returns:
        ``[B]``. ``"hessian_sum"`` gives ``[B, d]``: row sums of the Hessian, set against the second
        time derivative summed over the batch.

    Raises:
        TypeError: ``z`` is not a floating-point tensor, or an argument is of the wrong type.
        ValueError: a shape is wrong, a time is negative, or a name is unknown.

    Example:
        >>> w, c, z = torch.tensor([1.0, -2.0, 0.5]), 0.7, torch.randn(4, 3)
        >>> u = lambda z, t: (z @ w).sin() * (c * w.norm() * t).cos()  # a standing wave
        >>> bool((wave_residual(u, z, 0.3, c).abs() < 1e-5).all())
        True

    Source:
        Y. Song, T. A. Keller, N. Sebe, M. Welling, "Latent Traversals in Generative Models as
        Potential Flows", ICML 2023, arXiv 2304.12944. The wave equation follows the paper's text;
        the authors' code departs from it (row sums in place of the trace, one time for the batch),
        and ``laplacian="hessian_sum"`` reproduces that. Heat and transport are reconstructed.
    """
    _check_points("z", z)
    _check_equation(pde, laplacian, num_probes)
    if isinstance(c, Tensor) and c.dim() != 0:
        raise ValueError(f"c must have no dimensions, got shape {list(c.shape)}")
    signs = _draw_signs(z, num_probes, seed, generator) if laplacian == "hutchinson" else None
    return _residual(u, z, _times(t, z), c, pde, laplacian, signs)


class PotentialFlowOutput(NamedTuple):
    """What :meth:`PotentialFlow.loss` gives; see there.

    Attributes:
        total: the loss, ``ic + pde - jvp_weight * jvp``.
        ic: mean squared gradient of the potential at time 0.
        pde: mean squared residual along the flow.
        jvp: mean squared change of the decoder's output along the flow, which is maximised.
        z1: ``[B, d]``, the point after the selected step.
        z2: ``[B, d]``, the point after the next one.
        energy: ``[B]``, the potential before the selected step.
        velocity: mean over samples and steps of the squared length of a step. A potential that
            collapses to a constant, which solves the equation, shows here.

    Example:
        >>> flow = PotentialFlow(4, num_potentials=2, num_steps=6)
        >>> output = flow.loss(torch.randn(8, 4), index=0)
        >>> output.z1.shape, output.energy.shape
        (torch.Size([8, 4]), torch.Size([8]))
    """

    total: Tensor
    ic: Tensor
    pde: Tensor
    jvp: Tensor
    z1: Tensor
    z2: Tensor
    energy: Tensor
    velocity: Tensor


class PotentialNet(nn.Module):
    r"""A potential on a latent space that depends on time.

    .. math::
        u(z, t) = \tanh\big(w^\top \tanh(W_2 [\tanh(W_1 z) + \mathrm{MLP}(\gamma(t))])\big), \qquad
        \gamma(t) = (\sin \omega_k t, \cos \omega_k t)_k

    with biases, frequencies :math:`\omega_k` from 1 down to 1e-4, and a GELU inside the MLP.

    Args:
        dim: d, at least 1. An odd d has d - 1 time features (the authors' code fails there), d < 4
            has the single frequency 1.
        device: where the parameters go.
        dtype: their dtype.

    Shape:
        ``z`` ``[B, d]``, ``t`` ``[B]`` to ``[B, 1]``.

    Raises:
        TypeError: ``dim`` is not an int.
        ValueError: ``dim`` is below 1, or a shape is wrong.

    Example:
        >>> PotentialNet(8)(torch.randn(5, 8), torch.arange(5.0)).shape
        torch.Size([5, 1])

    Source:
        Song et al., 2023, arXiv 2304.12944; from the authors' code.
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        self.dim = dim
        half = max(dim // 2, 1)
        exponents = torch.arange(half, device=device, dtype=dtype) / max(half - 1, 1)
        self.register_buffer("frequencies", 10000.0**-exponents, persistent=False)
        self.space = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.time = nn.Sequential(
            nn.Linear(2 * half, dim, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(dim, dim, device=device, dtype=dtype),
        )
        self.fusion = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.head = nn.Linear(dim, 1, device=device, dtype=dtype)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the potential, ``[B, 1]``, in (-1, 1)."""
        check_shape("z", z, (None, self.dim), f"[B, {self.dim}]")
        check_shape("t", t, (z.shape[0],), "[B]")
        phase = t.to(z.dtype)[:, None] * self.frequencies
        features = self.time(torch.cat((phase.sin(), phase.cos()), -1))
        hidden = torch.tanh(self.fusion(torch.tanh(self.space(z)) + features))
        return torch.tanh(self.head(hidden))


class PotentialFlow(nn.Module):
    r"""Learn K potentials that obey a wave equation, and walk along their gradients.

    .. math::
        z_{i+1} &= z_i + \nabla_z u_k(z_i, i) \\
        L &= \tfrac{1}{d} \mathbb{E} \|\nabla_z u_k(z, 0)\|^2
        + \frac{2}{T} \sum_{i < T/2} \mathbb{E}\, r_k(z_i, i)^2
        - \lambda\, \mathbb{E}\, \overline{(J_G(z') v)^2}, \qquad v = \nabla_z u_k(z', i^* + 1)

    with the residual r of :func:`wave_residual`, the point z' = z after step i*, and the bar for
    the mean over output elements. The first term starts every walk at rest, the second spreads it
    as a wave, the third makes the decoder G see it. With :func:`traversal_classification_loss`,
    which asks that one can tell from the pictures which potential moved them, the K walks change
    different things.

    Generators stay outside: any callable from latent codes to pictures serves as decoder, trained
    or frozen. The module itself is a penalty; ``optimizer = Adam(flow.parameters(), lr=1e-4)`` is
    the paper's.

    Args:
        dim: number of latent features d.
        num_potentials: K.
        num_steps: T, at least 2; potentials are trained on the first T / 2 steps (rounded down).
        net: makes one potential from d, an ``nn.Module`` ``(z [B, d], t [B]) -> [B]`` or
            ``[B, 1]``, twice differentiable, no batch statistics. :class:`PotentialNet` if omitted.
        wave_speed_init: first value of the learnt speeds c_k.
        pde: ``"wave"``, ``"heat"`` or ``"transport"``.
        laplacian: as for :func:`wave_residual`. ``"exact"`` holds d times the activations of the
            potential; take ``"hutchinson"`` for hundreds of features.
        num_probes: sign vectors of ``"hutchinson"``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> flow = PotentialFlow(dim=4, num_potentials=3, num_steps=8)
        >>> generator = nn.Linear(4, 10)
        >>> output = flow(torch.randn(16, 4), index=1, decoder=generator)
        >>> output.total.backward()
        >>> flow.traverse(torch.randn(2, 4), index=1).shape
        torch.Size([5, 2, 4])

    Source:
        Song et al., 2023, arXiv 2304.12944, and the authors' code. Departures: the Laplacian is the
        trace (``laplacian="hessian_sum"`` is theirs), times are those of each sample, and step i*
        may differ between the samples of a batch. The loss with ``"hessian_sum"`` and one i* is the
        released one.
    """

    def __init__(
        self,
        dim: int,
        num_potentials: int,
        num_steps: int,
        *,
        net: Callable[[int], nn.Module] | None = None,
        wave_speed_init: float = 1.0,
        pde: Equation = "wave",
        laplacian: Laplacian = "exact",
        num_probes: int = 1,
    ) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("num_potentials", num_potentials, 1)
        check_at_least("num_steps", num_steps, 2)
        _check_equation(pde, laplacian, num_probes)
        make = PotentialNet if net is None else net
        if not callable(make):
            raise TypeError(f"net must be callable, got {type(net).__name__}")
        self.dim = dim
        self.num_potentials = num_potentials
        self.num_steps = num_steps
        self.pde: Equation = pde
        self.laplacian: Laplacian = laplacian
        self.num_probes = num_probes
        self.nets = nn.ModuleList(make(dim) for _ in range(num_potentials))
        like = next(self.nets.parameters(), torch.empty(()))
        speeds = like.new_full((num_potentials,), float(wave_speed_init))
        self.wave_speed = nn.Parameter(speeds.detach())

    def velocity(self, z: Tensor, t: float | Tensor, index: int) -> Tensor:
        """Return the gradient of potential ``index`` in z, ``[B, d]``, at times ``t``."""
        self._check_call(z, index)
        return _gradient(self.nets[index], _times(t, z))(z)

    def traverse(self, z: Tensor, index: int, steps: int | None = None) -> Tensor:
        """Walk along potential ``index``, from time 0.

        Args:
            z: where to start, ``[B, d]``.
            index: which potential.
            steps: number of steps; T / 2 if omitted, which is what training covers.

        Returns:
            ``[steps + 1, B, d]``, the start first.
        """
        self._check_call(z, index)
        count = self.num_steps // 2 if steps is None else steps
        check_at_least("steps", count, 0)
        return torch.stack(self._walk(z, index, count)[0])

    def forward(
        self,
        z: Tensor,
        index: int,
        t_sel: int | Tensor | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        *,
        jvp_weight: float | Tensor = 1.0,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PotentialFlowOutput:
        """Return :meth:`loss`, under the name that ``torch.compile`` and DDP wrap."""
        return self.loss(
            z, index, t_sel, decoder, jvp_weight=jvp_weight, seed=seed, generator=generator
        )

    def loss(
        self,
        z: Tensor,
        index: int,
        t_sel: int | Tensor | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        *,
        jvp_weight: float | Tensor = 1.0,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PotentialFlowOutput:
        """Return the loss of one potential on a batch of latent codes, and its parts.

        Gradients reach the potential, its speed, the codes and the decoder's parameters, where
        these require them.

        Args:
            z: latent codes ``[B, d]``.
            index: which potential k.
            t_sel: the selected step i* in {0, ..., T/2 - 2}: an int, an int64 tensor ``[B]`` with
                one a sample, or drawn uniformly for each sample if omitted.
            decoder: differentiable in forward mode, ``[B, d] -> [B, ...]``; the identity if
                omitted.
            jvp_weight: weight of the term that is maximised. Without it a constant potential is
                optimal.
            seed: of the drawn step and of Hutchinson's signs; int or int64 tensor with no
                dimensions.
            generator: to draw the seed from, where none is given; not inside ``torch.compile``.

        Returns:
            The loss ``total`` with its parts and the points of the pair to classify.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: ``z`` has not d features, ``index`` or ``t_sel`` is out of range.
        """
        self._check_call(z, index)
        half = self.num_steps // 2
        random = t_sel is None or self.laplacian == "hutchinson"
        bits = draw_seed(seed, generator, z) if random else None
        step = self._selected_step(z, t_sel, bits)

        # The pair needs two steps, the equation T / 2; a walk holds all gradients that L asks for.
        points, steps = map(torch.stack, self._walk(z, index, max(half, 2)))
        times = torch.arange(half, device=z.device, dtype=z.dtype)[:, None].expand(half, len(z))
        signs = None
        if self.laplacian == "hutchinson":
            signs = _draw_signs(points[:half], self.num_probes, bits, None)
        residual = _residual(
            self.nets[index],
            points[:half],
            times,
            self.wave_speed[index],
            self.pde,
            self.laplacian,
            signs,
        )

        z1, direction = _at(points, step + 1), _at(steps, step + 1)
        change = direction if decoder is None else _jvp(decoder, z1, direction)[1]
        ic, pde, jvp = steps[0].square().mean(), residual.square().mean(), change.square().mean()
        start, when = _at(points, step), torch.as_tensor(step, device=z.device).expand(len(z))
        return PotentialFlowOutput(
            total=ic + pde - jvp_weight * jvp,
            ic=ic,
            pde=pde,
            jvp=jvp,
            z1=z1,
            z2=_at(points, step + 2),
            energy=_values(self.nets[index], start, when.to(z.dtype)),
            velocity=steps.square().sum(-1).mean(),
        )

    def _walk(self, z: Tensor, index: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the points of a walk, ``count + 1`` of them, and its steps; all keep the graph."""
        points, steps = [z], []
        for i in range(count):
            steps.append(_gradient(self.nets[index], _times(float(i), z))(points[-1]))
            points.append(points[-1] + steps[-1])
        return points, steps

    def _selected_step(
        self, z: Tensor, t_sel: int | Tensor | None, seed: Tensor | None
    ) -> int | Tensor:
        choices = max(self.num_steps // 2 - 1, 1)
        if t_sel is None:
            assert seed is not None
            # Step 1 of the streams, whose step 0 are the signs.
            return (philox_words(seed, len(z), step=1) * choices) >> 32
        if isinstance(t_sel, Tensor):
            if t_sel.dtype != torch.int64:
                raise TypeError(f"t_sel must be an int or an int64 tensor, got {t_sel.dtype}")
            check_shape("t_sel", t_sel, (len(z),), "[B]")
            worst = known_range(t_sel)
        else:
            check_at_least("t_sel", t_sel, 0)
            worst = (t_sel, t_sel)
        if worst is not None and not 0 <= worst[0] <= worst[1] < choices:
            raise ValueError(f"t_sel must lie in [0, {choices - 1}], got {t_sel}")
        return t_sel

    def _check_call(self, z: Tensor, index: int) -> None:
        _check_points("z", z)
        check_shape("z", z, (None, self.dim), f"[B, {self.dim}]")
        check_at_least("index", index, 0)
        if index >= self.num_potentials:
            raise ValueError(f"index must be below {self.num_potentials}, got {index}")

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"dim={self.dim}, num_potentials={self.num_potentials}, num_steps={self.num_steps}, "
            f"pde={self.pde!r}, laplacian={self.laplacian!r}"
        )


def _residual(
    u: Potential,
    z: Tensor,  # [*, B, d]
    t: Tensor,  # [*, B]
    c: float | Tensor,
    pde: Equation,
    laplacian: Laplacian,
    signs: Tensor | None,  # [probes, *, B, d]
) -> Tensor:
    """Return the residual of each sample; the batch over which "hessian_sum" adds up is B."""
    batch = t.shape
    z, t = z.flatten(0, -2).contiguous(), t.flatten().contiguous()  # jvp takes no expanded ones
    rate = torch.func.grad(lambda times: _values(u, z, times).sum())
    change, acceleration = _jvp(rate, t, torch.ones_like(t))
    gradient = _gradient(u, t)
    if pde == "transport":
        return (change + c * gradient(z).sum(-1)).reshape(batch)
    in_time = (acceleration if pde == "wave" else change).reshape(batch)

    if laplacian == "hessian_sum":
        rows = _jvp(gradient, z, torch.ones_like(z))[1].reshape(*batch, -1)
        return in_time.sum(-1, keepdim=True).unsqueeze(-1) - c**2 * rows
    probes = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)[:, None]
    if signs is not None:
        probes = signs.flatten(1, -2)
    # All products with the Hessian at once: 3 to 20 times as fast as one after the other.
    terms: Tensor = torch.func.vmap(lambda v: (v * _jvp(gradient, z, v.expand_as(z))[1]).sum(-1))(
        probes
    )
    trace = terms.sum(0) if signs is None else terms.mean(0)
    return in_time - c**2 * trace.reshape(batch)


def _gradient(u: Potential, t: Tensor) -> Callable[[Tensor], Tensor]:
    """Return z -> grad_z u(z, t), sample by sample."""
    gradient: Callable[[Tensor], Tensor] = torch.func.grad(lambda z: _values(u, z, t).sum())
    return gradient


def _jvp(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return f(x) and J(x) v."""
    value, product, *_ = torch.func.jvp(f, (x,), (v,))
    return value, product


def _values(u: Potential, z: Tensor, t: Tensor) -> Tensor:
    values = u(z, t)
    if values.shape not in ((len(z),), (len(z), 1)):
        raise ValueError(
            f"u must return shape [{len(z)}] or [{len(z)}, 1], got {list(values.shape)}"
        )
    return values.flatten()


def _draw_signs(
    z: Tensor, num_probes: int, seed: int | Tensor | None, generator: torch.Generator | None
) -> Tensor:
    return rademacher(tuple(z.shape), draw_seed(seed, generator, z), num_probes, z.dtype)


def _at(path: Tensor, step: int | Tensor) -> Tensor:
    """Return the entry of ``[steps, B, ...]`` at one step, or at one for each sample."""
    if isinstance(step, Tensor):
        return path[step, torch.arange(path.shape[1], device=path.device)]
    return path[step]


def _times(t: float | Tensor, z: Tensor) -> Tensor:
    """Return the time of each sample, ``[B]``, in the type of z."""
    if not isinstance(t, Tensor):
        if isinstance(t, bool) or not isinstance(t, (int, float)):
            raise TypeError(f"t must be a number or a tensor, got {type(t).__name__}")
        if t < 0:
            raise ValueError(f"t must not be negative, got {t}")
        return torch.full((len(z),), t, dtype=z.dtype, device=z.device)
    if t.dim() != 0:
        check_shape("t", t, (len(z),), "[B]")
    worst = known_range(t)
    if worst is not None and worst[0] < 0:
        raise ValueError(f"t must not be negative, got {worst[0]}")
    return t.to(z).expand(len(z))


def _check_points(name: str, z: Tensor) -> None:
    check_floating(name, z)
    check_shape(name, z, (None, None), "[B, d]")


def _check_equation(pde: str, laplacian: str, num_probes: int) -> None:
    check_one_of("pde", pde, _EQUATIONS)
    check_one_of("laplacian", laplacian, _LAPLACIANS)
    check_at_least("num_probes", num_probes, 1)
