"""A mixture of experts without a router: who works on a sequence is said from outside."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regularizers._shared.checks import check_at_least, check_module, check_same_device
from regularizers._shared.modules import Model, replace_modules


class EnforcedMoE(nn.Module):
    r"""Run each sequence of a batch through the expert that it is assigned to.

    .. math:: y_b = E_{k_b}(h_b)

    No router and no loss that balances one: :math:`k_b` is the sequence's domain. Each expert runs
    once, on its sequences alone, so the work is that of one expert on the batch. Experts start as
    copies of one module, with equal results, and part ways in training.

    Args:
        expert: the module to copy, from ``[b, *]`` to ``[b, *]``; usually a pretrained
            feed-forward block.
        num_experts: number of experts, at least 1.
        copy: copy the module for the first expert, too; otherwise the module itself becomes it,
            and the parameters that an optimizer already holds stay in use.

    Shape:
        ``hidden`` ``[B, *]``, such as ``[B, S, D]``, and ``assignment`` int64 ``[B]``, or an int
        for the whole batch, to ``[B, *]``. Inside :func:`expert_assignment` the assignment may be
        left out.

    Raises:
        TypeError: ``expert`` is not a module, or the assignment is not an int or int64 tensor.
        ValueError: an expert that is not there is asked for, shapes do not fit, or there is no
            assignment.

    Note:
        Sorting by a tensor reads how many sequences each expert has: one synchronisation a call
        on a GPU, and a graph break under ``torch.compile``; an int costs neither. An expert
        without a sequence gets no gradient (None), for which ``DistributedDataParallel`` needs
        ``find_unused_parameters=True``. Results equal those of the expert on the whole batch up to
        the rounding of matrix products of other sizes.

    Example:
        >>> block = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> moe = EnforcedMoE(block, num_experts=3)
        >>> hidden, domain = torch.randn(4, 10, 8), torch.tensor([2, 0, 0, 1])
        >>> moe(hidden, domain).shape
        torch.Size([4, 10, 8])

    Source:
        L. Hallee, R. Kapur, A. Patel, J. P. Gleghorn, B. Khomtchouk, 2024, arXiv 2401.15713;
        authors' code read (``SentenceEnforcedSwitchMoeBlock``). Batches sorted by domain make the
        experts' parts of a batch large.
    """

    def __init__(self, expert: nn.Module, num_experts: int, *, copy: bool = True) -> None:
        super().__init__()
        check_module("expert", expert)
        check_at_least("num_experts", num_experts, 1)
        copies = [copying.deepcopy(expert) for _ in range(num_experts - 1)]
        self.experts = nn.ModuleList([copying.deepcopy(expert) if copy else expert, *copies])
        self._assignment: Tensor | int | None = None

    def forward(self, hidden: Tensor, assignment: Tensor | int | None = None) -> Tensor:
        """Return what each sequence's expert makes of it."""
        assignment = self._assignment if assignment is None else assignment
        if assignment is None:
            raise ValueError("assignment must be given, or the call be inside expert_assignment")
        _check_assignment(assignment)
        if not isinstance(assignment, Tensor):
            if not 0 <= assignment < len(self.experts):
                raise ValueError(self._out_of_range(assignment))
            return self._run(assignment, hidden)
        if assignment.shape != hidden.shape[:1]:
            raise ValueError(
                f"assignment must have shape [batch] = {list(hidden.shape[:1])}, "
                f"got {list(assignment.shape)}"
            )
        check_same_device("assignment", assignment, "hidden", hidden)
        which = torch.arange(len(self.experts), device=assignment.device)
        counts = (assignment[:, None] == which).sum(0).tolist()
        if sum(counts) != len(hidden):
            raise ValueError(self._out_of_range(assignment.tolist()))
        if max(counts) == len(hidden):
            return self._run(counts.index(len(hidden)), hidden)
        order = assignment.argsort(stable=True)
        parts = hidden[order].split(counts)
        outputs = [self._run(k, part) for k, part in enumerate(parts) if counts[k] > 0]
        return torch.cat(outputs)[order.argsort()]

    def _run(self, k: int, hidden: Tensor) -> Tensor:
        output: Tensor = self.experts[k](hidden)
        return output

    def _out_of_range(self, assignment: object) -> str:
        return f"assignment must lie in [0, {len(self.experts) - 1}], got {assignment}"


@contextmanager
def expert_assignment(model: nn.Module, assignment: Tensor | int) -> Iterator[None]:
    """Tell all :class:`EnforcedMoE` of a model which experts to use inside a ``with`` block.

    The modules between the model's input and its experts need not know of assignments. With
    activation checkpointing, keep ``backward()`` inside the block, too.

    Args:
        model: a model with experts, as :func:`convert_to_enforced_moe` makes one.
        assignment: int64 ``[B]``, the expert of every sequence, or an int for all.

    Raises:
        TypeError: ``assignment`` is not an int or an int64 tensor.
        ValueError: the model has no experts.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), EnforcedMoE(nn.Linear(8, 8), 2))
        >>> with expert_assignment(model, torch.tensor([0, 1, 1])):
        ...     output = model(torch.randn(3, 5, 4))

    Source:
        As :class:`EnforcedMoE`; the authors hand the labels through every layer instead.
    """
    _check_assignment(assignment)
    layers = [module for module in model.modules() if isinstance(module, EnforcedMoE)]
    if not layers:
        raise ValueError("model must have an EnforcedMoE, found none")
    before = [layer._assignment for layer in layers]
    try:
        for layer in layers:
            layer._assignment = assignment
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer._assignment = earlier


def convert_to_enforced_moe(
    model: Model, match: Callable[[str, nn.Module], bool], num_experts: int
) -> nn.Module:
    """Give a pretrained model experts, in place: copies of the modules that ``match`` picks.

    The first expert of each is the module itself. Until training moves them apart, the model gives
    what it gave before, whatever the assignment; attention and all else stay shared.

    Args:
        model: any model whose matched modules take one tensor, batch first.
        match: ``match(qualified name, module)``, asked from the model down; below a module that
            matches nothing is asked.
        num_experts: number of experts, at least 1.

    Returns:
        The model, or its :class:`EnforcedMoE` where the model itself matched. Call it inside
        :func:`expert_assignment`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``num_experts`` is below 1, or nothing matched.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> model = nn.Sequential(nn.Linear(4, 8), mlp)
        >>> x = torch.randn(3, 5, 4)
        >>> before = model(x)
        >>> model = convert_to_enforced_moe(model, lambda name, module: name == "1", 2)
        >>> with expert_assignment(model, torch.tensor([0, 1, 0])):
        ...     torch.allclose(model(x), before)
        True

    Source:
        L. Hallee et al., 2024, arXiv 2401.15713; authors' code read (``convert_to_moe_bert``).
    """
    check_module("model", model)
    check_at_least("num_experts", num_experts, 1)
    found = 0

    def replacement(name: str, module: nn.Module) -> nn.Module | None:
        nonlocal found
        if not match(name, module):
            return None
        found += 1
        return EnforcedMoE(module, num_experts, copy=False)

    converted = replace_modules(model, replacement)
    if found == 0:
        raise ValueError("match must pick a module of the model, it picked none")
    return converted


def seed_domain_tokens(embedding: nn.Embedding, source_id: int, count: int) -> nn.Embedding:
    r"""Make room for new tokens, one a domain, that start as copies of a known one.

    .. math:: W' = [W;\ W_s;\ \dots;\ W_s]

    A domain's token in the place of [CLS] tells the shared layers which domain they work on; at
    first it means what [CLS] means.

    Args:
        embedding: table of the pretrained model, ``[V, D]``; it stays as it is.
        source_id: s, the token to copy, usually that of [CLS].
        count: number of new tokens, at least 1; their ids are V, ..., V + count - 1.

    Returns:
        A new table ``[V + count, D]`` with the options, dtype and device of the old one. Put it
        into the model, and its weight where an output layer is tied to the old one.

    Raises:
        TypeError: ``embedding`` is not a ``torch.nn.Embedding``, or a number is not an int.
        ValueError: ``source_id`` is no row of it, or ``count`` is below 1.

    Example:
        >>> table = seed_domain_tokens(nn.Embedding(100, 16), source_id=2, count=3)
        >>> torch.equal(table(torch.tensor([100, 101, 102])), table(torch.tensor([2, 2, 2])))
        True

    Source:
        L. Hallee et al., 2024, arXiv 2401.15713; authors' code read (``add_new_tokens``).
    """
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"embedding must be a torch.nn.Embedding, got {type(embedding).__name__}")
    check_at_least("source_id", source_id, 0)
    check_at_least("count", count, 1)
    if source_id >= embedding.num_embeddings:
        raise ValueError(
            f"source_id must be below the {embedding.num_embeddings} tokens, got {source_id}"
        )
    old = embedding.weight.detach()
    weight = torch.cat([old, old[source_id].expand(count, -1)])
    new: nn.Embedding = nn.Embedding.from_pretrained(
        weight,
        freeze=not embedding.weight.requires_grad,
        padding_idx=embedding.padding_idx,
        max_norm=embedding.max_norm,
        norm_type=embedding.norm_type,
        scale_grad_by_freq=embedding.scale_grad_by_freq,
        sparse=embedding.sparse,
    )
    new.train(embedding.training)
    return new


def _check_assignment(assignment: object) -> None:
    if isinstance(assignment, Tensor):
        if assignment.dtype != torch.int64:
            raise TypeError(f"assignment must be an int or an int64 tensor, got {assignment.dtype}")
    elif isinstance(assignment, bool) or not isinstance(assignment, (int, torch.SymInt)):
        raise TypeError(
            f"assignment must be an int or an int64 tensor, got {type(assignment).__name__}"
        )
