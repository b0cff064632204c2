"""Training on repeated data: what it costs, and a sparse proxy to tune the dense model on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_positive,
)


def multi_epoch_degradation(loss_repeated: float | Tensor, loss_fresh: float | Tensor) -> Tensor:
    r"""Return what repetition costs: the loss of many epochs over that of one pass.

    .. math:: \Delta = L(\text{repeated}) - L(\text{single pass})

    Both are validation losses after equally many tokens; above 0, repetition hurts.

    Args:
        loss_repeated: loss of the model that saw its data repeatedly; a number or ``[*]``.
        loss_fresh: loss of the model that saw every token once; likewise, of a shape that
            broadcasts.

    Returns:
        The difference, broadcast.

    Raises:
        RuntimeError: the shapes do not broadcast.

    Example:
        >>> multi_epoch_degradation(torch.tensor([3.0, 3.5]), 3.0)
        tensor([0.0000, 0.5000])

    Source:
        "To Repeat or Not To Repeat", 2023, arXiv 2305.13230; the measure is reconstructed.
    """
    return torch.as_tensor(loss_repeated) - torch.as_tensor(loss_fresh)


def match_sparse_experts(
    dense_params: int,
    d_model: int,
    d_ff: int,
    num_layers: int,
    moe_every: int = 2,
    *,
    shared_params: int | None = None,
) -> int:
    r"""Return how many experts give a sparse model as many parameters as a dense one has.

    .. math:: shared + \lfloor L / m \rfloor\, E\, (2 d f + d) \approx dense\_params

    for the nearest integer E, at least 1. All experts count, not only the active ones: the sparse
    model over-fits as the dense one of equal size does, for the price of the small one.

    Args:
        dense_params: trainable parameters of the dense model.
        d_model: d of the sparse model.
        d_ff: f, width of its feed-forward layers, without biases.
        num_layers: L of its layers.
        moe_every: every m-th layer has a mixture; the others a plain feed-forward layer.
        shared_params: everything but the mixtures. When omitted: 4 d^2 of attention in every layer
            and 2 d f in those without a mixture; embeddings, norms and biases are left out, so
            leave them out of ``dense_params`` as well.

    Returns:
        E.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is below 1, there is no mixture, or ``dense_params`` is below the
            shared part.

    Example:
        >>> match_sparse_experts(50_000_000, d_model=512, d_ff=2048, num_layers=8)
        4

    Source:
        arXiv 2305.13230: that a sparse model with as many trainable parameters predicts the dense
        one stands in the abstract; the count is reconstructed.
    """
    check_at_least("dense_params", dense_params, 1)
    check_at_least("d_model", d_model, 1)
    check_at_least("d_ff", d_ff, 1)
    check_at_least("num_layers", num_layers, 1)
    check_at_least("moe_every", moe_every, 1)
    mixtures = num_layers // moe_every
    if mixtures == 0:
        raise ValueError(f"moe_every must be at most num_layers = {num_layers}, got {moe_every}")
    if shared_params is None:
        plain = num_layers - mixtures
        shared_params = num_layers * 4 * d_model**2 + plain * 2 * d_model * d_ff
    check_at_least("shared_params", shared_params, 0)
    if dense_params < shared_params:
        raise ValueError(
            f"dense_params must be at least the shared part {shared_params}, got {dense_params}"
        )
    one_expert = mixtures * (2 * d_model * d_ff + d_model)
    return max(1, math.floor((dense_params - shared_params) / one_expert + 0.5))


def switch_balance_loss(probabilities: Tensor, expert: Tensor) -> Tensor:
    r"""Return the load-balancing loss of a top-1 router.

    .. math:: L = E \sum_e f_e P_e, \qquad f_e = \tfrac{1}{N} |\{i : e_i = e\}|, \quad
        P_e = \tfrac{1}{N} \sum_i \pi_{ie}

    It is 1 for uniform routing and E where every token goes to one expert for sure. Only P carries
    a gradient.

    Args:
        probabilities: the router's softmax ``[N, E]``.
        expert: the chosen expert of each token, int64 ``[N]``.

    Returns:
        A tensor with no dimensions.

    Raises:
        TypeError: ``probabilities`` is not a floating-point tensor.
        ValueError: the shapes do not fit.

    Example:
        >>> switch_balance_loss(torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1]))
        tensor(1.)

    Source:
        W. Fedus, B. Zoph, N. Shazeer, 2021, arXiv 2101.03961, as used by arXiv 2305.13230.
    """
    check_floating("probabilities", probabilities)
    if probabilities.dim() != 2 or expert.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities must have shape [tokens, experts] and expert [tokens], "
            f"got {list(probabilities.shape)} and {list(expert.shape)}"
        )
    experts = probabilities.shape[1]
    share = nn.functional.one_hot(expert, experts).to(probabilities.dtype).mean(0)
    balance: Tensor = experts * (share * probabilities.mean(0)).sum()
    return balance


class SwitchFeedForward(nn.Module):
    r"""A feed-forward layer of E experts, one of them for each token.

    .. math:: y_i = \pi_{i e_i} W^{out}_{e_i} \mathrm{ReLU}(W^{in}_{e_i} x_i), \qquad
        \pi_i = \mathrm{softmax}(R x_i), \quad e_i = \operatorname{argmax}_e \pi_{ie}

    An expert takes at most capacity_factor N / E of N tokens, rounded up, first come, first served;
    tokens beyond get 0, so keep a residual connection around the layer. It has E (2 d f + d)
    parameters. After a call ``layer.balance_loss`` holds ``balance_weight`` times
    :func:`switch_balance_loss`: add it to the loss.

    Args:
        d_model: d, features of a token.
        d_ff: f, width of an expert.
        num_experts: E.
        capacity_factor: room of an expert over an even share, above 0.
        balance_weight: factor of the balancing loss, at least 0.

    Shape:
        ``[*, d_model]`` to the same.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or ``x`` has another number of features.

    Example:
        >>> layer = SwitchFeedForward(16, 64, num_experts=4)
        >>> tokens = torch.randn(2, 10, 16)
        >>> loss = (tokens + layer(tokens)).square().mean() + layer.balance_loss
        >>> sum(parameter.numel() for parameter in layer.parameters())
        8256

    Source:
        W. Fedus, B. Zoph, N. Shazeer, 2021, arXiv 2101.03961; the sparse proxy of arXiv 2305.13230.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        capacity_factor: float = 1.25,
        balance_weight: float = 0.01,
    ) -> None:
        super().__init__()
        check_at_least("d_model", d_model, 1)
        check_at_least("d_ff", d_ff, 1)
        check_at_least("num_experts", num_experts, 1)
        check_positive("capacity_factor", capacity_factor)
        check_not_negative("balance_weight", balance_weight)
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.balance_weight = balance_weight
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.weight_in = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.weight_out = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.balance_loss = torch.zeros(())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every layer as ``torch.nn.Linear`` does."""
        self.router.reset_parameters()
        for weight in (self.weight_in, self.weight_out):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return the experts' results, weighted by the router."""
        check_floating("x", x)
        experts, d_model = self.num_experts, self.weight_in.shape[2]
        if x.dim() < 1 or x.shape[-1] != d_model:
            raise ValueError(f"x must have shape [*, {d_model}], got {list(x.shape)}")
        tokens = x.reshape(-1, d_model)
        count = tokens.shape[0]
        capacity = math.ceil(self.capacity_factor * count / experts)
        probabilities = self.router(tokens).softmax(-1)
        gate, expert = probabilities.max(-1)
        self.balance_loss = self.balance_weight * switch_balance_loss(probabilities, expert)
        # A token's slot: how many before it chose the same expert. Tokens without a place go to one
        # more slot behind all others, which nobody reads.
        chosen = nn.functional.one_hot(expert, experts)
        slot = (chosen.cumsum(0) * chosen).sum(-1) - 1
        place = torch.where(slot < capacity, expert * capacity + slot, experts * capacity)
        slots = tokens.new_zeros(experts * capacity + 1, d_model)
        queue = slots.index_add(0, place, tokens)[:-1].reshape(experts, capacity, d_model)
        hidden = torch.bmm(queue, self.weight_in.transpose(1, 2)).relu()
        results = torch.bmm(hidden, self.weight_out.transpose(1, 2)).reshape(-1, d_model)
        nothing = results.new_zeros(1, d_model)
        found = torch.cat([results, nothing]).index_select(0, place)
        result: Tensor = (gate[:, None].to(found.dtype) * found).reshape(x.shape)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Leave the graph of the last loss out of copies and pickles."""
        return {**self.__dict__, "balance_loss": self.balance_loss.detach()}

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"num_experts={self.num_experts}, capacity_factor={self.capacity_factor:g}, "
            f"balance_weight={self.balance_weight:g}"
        )
