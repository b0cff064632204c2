"""Sensory dropout: drop whole sensor streams of a sample, such as one camera's view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_one_of,
    check_probability,
    check_same_device,
    check_tensor,
)
from regularizers._shared.randomness import draw_seed
from regularizers._shared.scheduled import ScheduledModule
from regularizers.dropout._random_subsets import random_words, uniform_integer

Mode = Literal["zero", "token", "mask"]
_MODES: tuple[str, ...] = get_args(Mode)


class SensoryDropout(ScheduledModule):
    r"""Drop whole streams of a sample's sensors, each independently of the others.

    .. math::
        P(\mathrm{stream}\ s\ \mathrm{of\ sample}\ i\ \mathrm{is\ absent}) = p_s, \qquad
        \tilde x^s_i = \begin{cases} x^s_i & \text{present} \\
        0 \text{ or a learned } v^s & \text{absent} \end{cases}

    What stays is not rescaled by 1 / (1 - p): a stream is a token, not a unit. Which streams a
    sample keeps is a function of the seed: for S streams, element (S + 1) i + s of the random bits.
    In ``eval()`` nothing is dropped.

    The paper's study finds no consistent gain from sensory dropout at scale. Measure it.

    Args:
        rates: probability of each stream to be dropped, in [0, 1], by the stream's name; the paper
            has 0.1 for proprioception and for each camera. Streams without a rate are kept.
        mode: what stands in an absent stream's place: ``"zero"`` zeros, ``"token"`` a learned
            vector, ``"mask"`` the stream itself, for models that mask by ``present``.
        keep_at_least_one: streams of which one, chosen uniformly, is restored where all would be
            absent.
        dims: last dimension of each stream with a rate; for ``mode="token"``, needed there and only
            there.

    Shape:
        ``{name: [B, *]}`` to ``({name: [B, *]}, {name: bool [B]})``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a rate is outside [0, 1]; a stream is unknown, missing from the inputs or of
            another batch size; ``dims`` does not fit.

    Example:
        >>> drop = SensoryDropout(
        ...     {"camera": 0.5, "state": 0.5}, keep_at_least_one=["camera", "state"]
        ... )
        >>> inputs = {"camera": torch.ones(4, 3, 8, 8), "state": torch.ones(4, 7)}
        >>> outputs, present = drop(inputs, seed=0)
        >>> present["camera"].tolist(), present["state"].tolist()
        ([False, True, True, True], [True, True, False, False])
        >>> outputs["state"][:, 0]
        tensor([1., 1., 0., 0.])
        >>> drop.set_rate("camera", 0.1)  # a schedule
        >>> drop.eval()(inputs)[0] is inputs
        True

    Source:
        "Rethinking Visual-Language-Action Model Scaling: Alignment, Mixture, and Regularization",
        2026, arXiv 2602.09722; reconstructed from the abstract and standard practice, with
        ``keep_at_least_one`` and the learned token as options.
    """

    def __init__(
        self,
        rates: Mapping[str, float],
        *,
        mode: Mode = "zero",
        keep_at_least_one: Sequence[str] = (),
        dims: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(rates, Mapping):
            raise TypeError(f"rates must be a mapping of names, got {type(rates).__name__}")
        if isinstance(keep_at_least_one, str):
            raise TypeError("keep_at_least_one must be a sequence of names, got one str")
        check_one_of("mode", mode, _MODES)
        for name, rate in rates.items():
            check_probability(f"rates[{name!r}]", rate)
        for name in keep_at_least_one:
            if name not in rates:
                raise ValueError(
                    f"keep_at_least_one must name streams of rates ({', '.join(rates)}), "
                    f"got {name!r}"
                )
        if len(set(keep_at_least_one)) < len(keep_at_least_one):
            raise ValueError(
                f"keep_at_least_one must not repeat a stream, got {list(keep_at_least_one)}"
            )
        if (mode == "token") != (dims is not None):
            raise ValueError("dims must be given for mode='token' and for no other mode")
        if dims is not None and set(dims) != set(rates):
            raise ValueError(
                f"dims must name the streams of rates ({', '.join(rates)}), got {', '.join(dims)}"
            )
        self.mode = mode
        self.streams = tuple(rates)
        self.keep_at_least_one = tuple(keep_at_least_one)
        # Streams at rate 0 are passed on as they are; a Python fact, for a tensor would have to be
        # read back from the device.
        self._at_zero = [rate == 0 for rate in rates.values()]
        for index, rate in enumerate(rates.values()):
            self.schedule(f"_rate{index}", rate, check_probability)
        self.tokens = nn.ParameterDict()
        for name, dim in ({} if dims is None else dims).items():
            check_at_least(f"dims[{name!r}]", dim, 1)
            self.tokens[_key(name)] = nn.Parameter(torch.randn(dim) * 0.02)

    def set_rate(self, stream: str, rate: float) -> None:
        """Change the rate of one stream, in place: no recompilation but to and from zero."""
        if stream not in self.streams:
            raise ValueError(f"stream must be one of {', '.join(self.streams)}, got {stream!r}")
        index = self.streams.index(stream)
        check_probability(f"rates[{stream!r}]", rate)
        setattr(self, f"_rate{index}", rate)
        self._at_zero[index] = rate == 0

    def rate(self, stream: str) -> Tensor:
        """Return the rate of one stream, float64 with no dimensions."""
        if stream not in self.streams:
            raise ValueError(f"stream must be one of {', '.join(self.streams)}, got {stream!r}")
        rate: Tensor = getattr(self, f"_rate{self.streams.index(stream)}")
        return rate

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        """Return the streams, and which samples have each.

        Args:
            inputs: all streams by name, ``[B, *]`` of any type. Those with a rate must be there.
            seed: int or int64 tensor with no dimensions; drawn from the default generator when
                omitted.
            generator: to draw the seed from; not inside ``torch.compile`` or checkpointing.

        Returns:
            ``(streams, present)``: ``inputs`` itself where nothing can be dropped, else a new
            mapping; bool ``[B]`` for every stream of ``inputs``.
        """
        first = self._check_inputs(inputs)
        batch = first.shape[0]
        everyone = torch.ones(batch, dtype=torch.bool, device=first.device)
        present = dict.fromkeys(inputs, everyone)
        if not self.training or all(self._at_zero):
            return inputs, present
        # One column more than there are streams, for the one that may be restored.
        bits = draw_seed(seed, generator, first)
        words = random_words(bits, batch, len(self.streams) + 1)
        rates = torch.stack([self.rate(name) for name in self.streams])
        kept = words[:, :-1] >= (rates * 2.0**32 + 0.5).to(torch.int64)
        present.update(zip(self.streams, kept.unbind(1), strict=True))
        if self.keep_at_least_one:
            self._restore_one(present, words[:, -1])
        if self.mode == "mask":
            return inputs, present
        outputs = dict(inputs)
        for index, name in enumerate(self.streams):
            if not self._at_zero[index]:
                outputs[name] = self._replace(name, inputs[name], present[name])
        return outputs, present

    def _restore_one(self, present: dict[str, Tensor], words: Tensor) -> None:
        """Put one stream back where all that are listed fell."""
        listed = self.keep_at_least_one
        fallen = ~torch.stack([present[name] for name in listed]).any(0)
        chosen = uniform_integer(words, 0, len(listed) - 1)
        for number, name in enumerate(listed):
            present[name] = present[name] | (fallen & (chosen == number))

    def _replace(self, name: str, x: Tensor, present: Tensor) -> Tensor:
        present = present.view(-1, *[1] * (x.dim() - 1))
        if self.mode == "zero":
            return torch.where(present, x, 0)  # selected: a dropped NaN stays out
        token = self.tokens[_key(name)]
        return torch.where(present, x, token.to(x.dtype))

    def _check_inputs(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if not isinstance(inputs, Mapping):
            raise TypeError(f"inputs must be a mapping of names, got {type(inputs).__name__}")
        for name in self.streams:
            if name not in inputs:
                raise ValueError(f"inputs must have the stream {name!r}, got {', '.join(inputs)}")
        first: Tensor | None = None
        for name, x in inputs.items():
            check_tensor(f"inputs[{name!r}]", x)
            first = x if first is None else first
            if x.dim() < 1 or x.shape[0] != first.shape[0]:
                raise ValueError(
                    f"inputs[{name!r}] must have shape [{first.shape[0]}, ...], got {list(x.shape)}"
                )
            check_same_device(f"inputs[{name!r}]", x, "the other streams", first)
            if self.mode == "token" and name in self.streams:
                dim = len(self.tokens[_key(name)])
                if x.dim() < 2 or x.shape[-1] != dim or not x.is_floating_point():
                    raise ValueError(
                        f"inputs[{name!r}] must be floating-point of shape [batch, ..., {dim}], "
                        f"got {x.dtype} of shape {list(x.shape)}"
                    )
        if first is None:
            raise ValueError("inputs must have at least one stream, got none")
        return first

    def extra_repr(self) -> str:
        """Describe the configuration."""
        rates = ", ".join(f"{name}={self.rate(name).item():g}" for name in self.streams)
        return f"{rates}, mode={self.mode!r}, keep_at_least_one={list(self.keep_at_least_one)}"


def _key(name: str) -> str:
    """Return a name that a parameter may have: "observation.state" may not."""
    return name.replace(".", "/")
