"""OrthoGrad: any optimizer, with the part of each gradient along its weights taken out first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from regularizers._shared.checks import check_floating, check_not_negative, check_one_of
from regularizers.ops._operator import accumulate_dtype
from regularizers.optim._batch import local, over_shards
from regularizers.optim.base import placed_as

Per = Literal["tensor", "row", "global"]
PER = ("tensor", "row", "global")
STATE_DICT_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


@torch.no_grad()
def orthogonalize_grad_(
    params: Tensor | Iterable[Tensor],
    *,
    rescale: bool = True,
    per: Per = "tensor",
    eps: float = 1e-30,
) -> None:
    r"""Take out of gradients, in place, what only scales the weights.

    .. math::
        g_\perp = g - \frac{\langle w, g \rangle}{\lVert w \rVert^2 + \epsilon}\, w, \qquad
        g \leftarrow g_\perp \frac{\lVert g \rVert}{\lVert g_\perp \rVert + \epsilon}

    A gradient along the weights, up to rounding, becomes zero: rescaling would only make noise
    large. Hence a parameter of one element gets no gradient at all. Where the weights are zero the
    gradient stays as it is.

    Args:
        params: parameters, one or many; those without gradient are passed over. Shards of DTensors
            give the result of the whole, by two all-reduces.
        rescale: restore the norm of the gradient, as the authors' code does; the paper's formula is
            the projection alone.
        per: what a weight vector is: each ``"tensor"``, each ``"row"`` (slice of the first
            dimension; a vector is one row), or ``"global"``, all parameters together.
        eps: :math:`\epsilon`, at least 0.

    Raises:
        TypeError: a parameter is not floating point, a gradient is sparse.
        ValueError: ``per`` or ``eps`` is out of its range, or processes share rows with ``"row"``.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.grad = torch.tensor([1.0, 1.0])
        >>> orthogonalize_grad_(w, rescale=False)
        >>> w.grad
        tensor([ 0.1600, -0.1200])

    Source:
        L. Prieto and others, 2025, arXiv 2501.04697, and the authors' code. Setting gradients along
        the weights to zero is the library's.
    """
    check_one_of("per", per, PER)
    check_not_negative("eps", eps)
    stepped = _with_gradients(params, per)
    if not stepped:
        return
    weights = [_wide(local(p)) for p in stepped]
    grads = [_wide(local(p.grad)) for p in stepped]
    along = _inner(weights, grads, stepped, per)
    sizes = _inner(weights, weights, stepped, per)
    before = _inner(grads, grads, stepped, per)
    across = [
        g - _on_rows(wg / (ww + eps), g) * w
        for w, g, wg, ww in zip(weights, grads, along, sizes, strict=True)
    ]
    # Not from the three products above: near parallel vectors the difference would cancel.
    after = _inner(across, across, stepped, per)
    for p, g, gg, hh in zip(stepped, across, before, after, strict=True):
        norm, old = hh.sqrt(), gg.sqrt()
        factor = old / (norm + eps) if rescale else torch.ones_like(norm)
        factor = torch.where(norm > _noise(p.dtype) * old, factor, 0)
        local(p.grad).copy_(g * _on_rows(factor, g))


def _with_gradients(params: Tensor | Iterable[Tensor], per: Per) -> list[Any]:
    """Return the parameters that have a gradient, all checked before any is written."""
    stepped: list[Any] = [
        p for p in ([params] if isinstance(params, Tensor) else params) if p.grad is not None
    ]
    for p in stepped:
        check_floating("params", p)
        if p.grad.layout is not torch.strided:
            raise TypeError("params must have dense gradients, got a sparse one")
        split = [x for x in getattr(p, "placements", ()) if not (x.is_replicate() or x.is_shard(0))]
        if per == "row" and (split or (p.dim() == 1 and hasattr(p, "placements"))):
            raise ValueError("per must be 'tensor' or 'global' where processes share rows")
    for p in stepped:
        p.grad = placed_as(p.grad, p)
    return stepped


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(accumulate_dtype(tensor.dtype))


def _noise(dtype: torch.dtype) -> float:
    """Return what part of a gradient along the weights rounding leaves across them."""
    eps: float = torch.finfo(dtype).eps
    return 8 * eps if accumulate_dtype(dtype) == dtype else eps


def _on_rows(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.dim() - 1)) if like.dim() else value.view(())


def _inner(xs: list[Tensor], ys: list[Tensor], params: list[Any], per: Per) -> list[Tensor]:
    """Return inner products: ``[1]`` for each tensor, or ``[rows]``."""
    if per == "row":
        return [torch.linalg.vecdot(_as_rows(x), _as_rows(y)) for x, y in zip(xs, ys, strict=True)]
    sums = [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(xs, ys, strict=True)]
    sums = over_shards(sums, params)
    if per == "global":
        dtype = max((s.dtype for s in sums), key=lambda d: d.itemsize)
        total = torch.stack([s.to(sums[0].device, dtype) for s in sums]).sum()
        return [total.to(s.device, s.dtype).view(1) for s in sums]
    return [s.view(1) for s in sums]


def _as_rows(x: Tensor) -> Tensor:
    return x.flatten(1) if x.dim() > 1 else x.view(1, -1)


def nlm_alignment(
    params: Tensor | Iterable[Tensor], *, per: Literal["global", "tensor"] = "global"
) -> Tensor:
    r"""Return how much of a step only makes the weights larger: naive loss minimisation.

    .. math:: \cos(-g, w) = -\frac{\langle g, w \rangle}{\lVert g \rVert\, \lVert w \rVert}

    Near 1 a gradient step scales logits up and changes no decision: the state that precedes the
    collapse of the softmax, and that :class:`OrthoGrad` removes.

    Args:
        params: parameters, one or many; those without gradient are passed over.
        per: ``"global"`` for one number, of all parameters as one vector, or ``"tensor"``.

    Returns:
        A tensor with no dimensions, or ``[n]`` for n parameters with gradients; 0 where weights or
        gradients are zero.

    Raises:
        TypeError: a parameter is not floating point, a gradient is sparse.
        ValueError: ``per`` is unknown, or no parameter has a gradient.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.grad = torch.tensor([-6.0, -8.0])
        >>> nlm_alignment(w)
        tensor(1.)

    Source:
        arXiv 2501.04697.
    """
    check_one_of("per", per, ("global", "tensor"))
    stepped = _with_gradients(params, per)
    if not stepped:
        raise ValueError("params must have gradients, got none")
    weights = [_wide(local(p)) for p in stepped]
    grads = [_wide(local(p.grad)) for p in stepped]
    device = grads[0].device
    along, sizes, steps = (
        torch.cat([s.to(device) for s in _inner(xs, ys, stepped, per)])
        for xs, ys in ((weights, grads), (weights, weights), (grads, grads))
    )
    # Roots before the product, which may underflow.
    norms = sizes.sqrt() * steps.sqrt()
    cosine = torch.where(norms > 0, -along / torch.where(norms > 0, norms, 1), 0)
    return cosine[0] if per == "global" else cosine


class OrthoGrad(Optimizer):
    r"""Any optimizer on gradients without their part along the weights.

    .. math::
        g_\perp = g - \frac{\langle w, g \rangle}{\lVert w \rVert^2 + \epsilon}\, w, \qquad
        w \leftarrow \mathrm{base}\!\left(w,\
            g_\perp \frac{\lVert g \rVert}{\lVert g_\perp \rVert + \epsilon}\right)

    Once a classifier fits its training set, the gradient of the cross-entropy mostly scales the
    logits up, until the softmax rounds to one and learning stops before the model generalises.
    Without that direction weights grow only by the second order of a step.

    The projection is written into ``p.grad`` (:func:`orthogonalize_grad_`) before the step, so the
    base's moments see it. Groups, state and defaults *are* the base's, so that schedulers,
    ``GradScaler`` and checkpoints work as on the base alone; its checkpoints load here and the
    other way round. A group with ``orthogonalize=False`` is stepped as it is: give parameters of
    one element, which would never move, to such a group, perhaps biases and norms too.

    Args:
        params: parameters or groups.
        base: class of the optimizer to step with.
        rescale: restore the norm of each gradient (authors' code; the paper's formula does not).
        per: ``"tensor"``, ``"row"`` or ``"global"``, see :func:`orthogonalize_grad_`; ``"global"``
            is over all groups.
        eps: :math:`\epsilon` of the projection, at least 0. The base's own ``eps`` can be set in
            ``base_options`` or in a group.
        base_options: options of the base, over ``base_kwargs``: for names taken above.
        **base_kwargs: options of the base (``lr``, ``betas``, ...).

    Raises:
        TypeError: ``base`` is not a class of optimizers; sparse gradients, at the step.
        ValueError: ``per`` or ``eps`` is out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = OrthoGrad([w], torch.optim.SGD, lr=1.0)
        >>> w.grad = torch.tensor([1.0, 1.0])
        >>> optimizer.step()
        >>> w.data, w.norm() ** 2  # 25 + 1 * 2
        (tensor([1.8686, 4.8485]), tensor(27.0000, grad_fn=<PowBackward0>))

    Source:
        L. Prieto and others, "Grokking at the Edge of Numerical Stability", 2025, arXiv 2501.04697,
        and the authors' code, with the differences of :func:`orthogonalize_grad_`.
    """

    base_optimizer: Optimizer
    rescale: bool
    per: Per
    eps: float

    def __init__(
        self,
        params: Any,
        base: type[Optimizer] = SGD,
        *,
        rescale: bool = True,
        per: Per = "tensor",
        eps: float = 1e-30,
        base_options: dict[str, Any] | None = None,
        **base_kwargs: Any,
    ) -> None:
        if not (isinstance(base, type) and issubclass(base, Optimizer)):
            raise TypeError(f"base must be a class of torch.optim.Optimizer, got {base!r}")
        check_one_of("per", per, PER)
        check_not_negative("eps", eps)
        # Not Optimizer.__init__, which makes groups and state: these are the base's.
        self.__setstate__(
            {
                "base_optimizer": base(params, **{**base_kwargs, **(base_options or {})}),
                "rescale": rescale,
                "per": per,
                "eps": eps,
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what makes a copy."""
        return {name: getattr(self, name) for name in ("base_optimizer", "rescale", "per", "eps")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from :meth:`__getstate__`."""
        super().__setstate__(state)
        for name in STATE_DICT_HOOKS:
            setattr(self, name, getattr(self.base_optimizer, name))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the base."""
        return self.base_optimizer.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The state of the base."""
        return self.base_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the base."""
        return self.base_optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project the gradients, then step the base.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        if closure is None:
            self._project()
            return self.base_optimizer.step()

        def projected() -> Any:
            loss = closure()
            self._project()
            return loss

        return self.base_optimizer.step(projected)

    def _project(self) -> None:
        params = (p for g in self.param_groups if g.get("orthogonalize", True) for p in g["params"])
        orthogonalize_grad_(params, rescale=self.rescale, per=self.per, eps=self.eps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the checkpoint of the base."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of the base, made through this class or not."""
        self.base_optimizer.load_state_dict(state_dict)
