"""What fine-tuning changed: the difference of two state dicts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regularizers._shared.checks import FLOATING
from regularizers.ops._operator import accumulate_dtype


class StateDelta:
    r"""The difference of a fine-tuned and a pretrained state dict, and the way back.

    .. math:: \delta = \theta_{\text{fine-tuned}} - \theta_{\text{pretrained}}

    Only floating-point tensors have a delta, in float32 for half types. Tensors that are kept,
    counters and other integer tensors are the fine-tuned ones in the end. So are the rows that a
    resized embedding has and its pretrained one has not; the delta is that of the common rows.

    Args:
        finetuned: a state dict; not copied.
        pretrained: a state dict with the same keys; not copied.
        keep: modules that stay as fine-tuned: names, each a run of parts of a key (``"head"`` is
            ``head.weight`` and ``model.head.bias``). Their keys may be in one of the dicts only.
        resized: substrings of the names of tensors whose numbers of rows may differ.

    Attributes:
        deltas: the differences by key.

    Raises:
        ValueError: keys or shapes differ.

    Example:
        >>> before = {"w": torch.zeros(2), "head.w": torch.zeros(1), "steps": torch.tensor(1)}
        >>> after = {"w": torch.ones(2), "head.w": torch.ones(1), "steps": torch.tensor(5)}
        >>> delta = StateDelta(after, before, keep=["head"])
        >>> delta.deltas
        {'w': tensor([1., 1.])}
        >>> delta.restore({"w": torch.tensor([0.0, 2.0])})
        {'w': tensor([0., 2.]), 'head.w': tensor([1.]), 'steps': tensor(5)}

    Source:
        Task vectors, G. Ilharco et al., 2022, arXiv 2212.04089, as DAREx uses them.
    """

    def __init__(
        self,
        finetuned: Mapping[str, Tensor],
        pretrained: Mapping[str, Tensor],
        *,
        keep: str | Sequence[str] = (),
        resized: Sequence[str] = ("embed", "wte"),
    ) -> None:
        keep = (keep,) if isinstance(keep, str) else keep
        kept = {key for key in {*finetuned, *pretrained} if any(_part(name, key) for name in keep)}
        differing = sorted((finetuned.keys() ^ pretrained.keys()) - kept)
        if differing:
            raise ValueError(
                "finetuned and pretrained must have the same keys, got in one of them only: "
                f"{', '.join(differing[:5])}"
            )
        self.finetuned = finetuned
        self.pretrained = pretrained
        self.deltas: dict[str, Tensor] = {}
        for key, after in finetuned.items():
            if key in kept or after.dtype not in FLOATING:
                continue
            before = pretrained[key]
            may_differ = any(name in key for name in resized)
            if after.shape != before.shape and not (
                may_differ and after.dim() > 1 and after.shape[1:] == before.shape[1:]
            ):
                raise ValueError(
                    f"finetuned and pretrained must have equal shapes, got {list(after.shape)} and "
                    f"{list(before.shape)} for {key}"
                )
            after, before = _common_rows(after, before)
            wide = accumulate_dtype(after.dtype)
            self.deltas[key] = after.detach().to(wide) - before.detach().to(after.device, wide)

    def restore(self, deltas: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the pretrained state dict plus deltas, in the order and types of the fine-tuned.

        Args:
            deltas: a delta for each key of ``self.deltas``, changed as one likes; differentiable.
                The deltas themselves when omitted, which gives the fine-tuned values back.
        """
        deltas = self.deltas if deltas is None else deltas
        if deltas.keys() != self.deltas.keys():
            raise ValueError("deltas must have the keys of self.deltas")
        return {
            key: self._restored(key, deltas[key]) if key in deltas else tensor
            for key, tensor in self.finetuned.items()
        }

    def _restored(self, key: str, delta: Tensor) -> Tensor:
        after = self.finetuned[key]
        _, before = _common_rows(after, self.pretrained[key])
        total = (before.detach().to(delta.device, delta.dtype) + delta).to(after.dtype)
        if total.shape == after.shape:
            return total
        return torch.cat((total, after[len(total) :].detach()))


def _common_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape == b.shape:
        return a, b
    rows = min(len(a), len(b))
    return a[:rows], b[:rows]


def _part(name: str, key: str) -> bool:
    """Whether a name is a run of parts of a dotted key."""
    return re.search(rf"(^|\.){re.escape(name)}(\.|$)", key) is not None
