"""Drawn calls of every operator, written once: fuzzing, threads and workers use the same table.

A builder makes a ``Sample`` of what it picks from ``Draws``; where the picks come from (hypothesis,
or a seeded generator) is not its affair.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from regularizers import ops
from regularizers.ops._operator import accumulate_dtype
from tests.harness import DTYPES, Sample

# Those behind the first come less often, but shrinking ends at the first.
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "channels_last")
TAME = ("normal", "normal", "normal", "ties", "tiny", "denormal", "zero")
WILD = ("huge", "nan", "inf", "mixed")
INFINITE = ("inf", "mixed")
BAD_NUMBERS = (-1.0, float("nan"), float("inf"), "half", None, -7)
BAD_TENSORS = ("integers", "another dimension", "one row less", "no tensor", "another dtype")


class Draws:
    """What one case consists of.

    Args:
        pick: ``pick(options)`` chooses one of a sequence.
        seed: ``seed()`` gives a fresh integer in [0, 2^31).
        sizes: of dimensions; ``rows`` those of the batch.
        values: kinds of numbers to choose from.
        faulty: whether one argument may be wrong.
    """

    def __init__(
        self,
        pick: Callable[[Sequence[Any]], Any],
        seed: Callable[[], int],
        *,
        sizes: Sequence[int] = (2, 1, 3, 5, 8, 17, 0),
        rows: Sequence[int] = (2, 1, 3, 7, 33, 0),
        values: Sequence[str] = (*TAME, *WILD),
        faulty: bool = True,
    ) -> None:
        self.pick = pick
        self.seed = seed
        self.dtype = pick(DTYPES)
        self.faulty = faulty
        self.kinds: set[str] = set()
        self.rough = False  # a builder says so: rounding alone may move results far
        self._sizes, self._rows, self._values = sizes, rows, values

    def size(self, least: int = 0) -> int:
        return max(least, self.pick(self._sizes))

    def rows(self, least: int = 0) -> int:
        return max(least, self.pick(self._rows))

    def flag(self) -> bool:
        return self.pick((False, True))

    def number(self, *good: float) -> Any:
        """One of ``good``, or rarely something that no argument of a kernel is."""
        if self.faulty and self.pick(range(24)) == 23:
            return self.pick(BAD_NUMBERS)
        return self.pick(good)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed())

    def tensor(
        self, *shape: int, dtype: torch.dtype | None = None, without: Sequence[str] = ()
    ) -> Tensor:
        """A tensor of any kind of numbers, but for some, in any layout."""
        kind = self.pick([kind for kind in self._values if kind not in without])
        layout = self.pick(LAYOUTS)
        self.kinds.add(kind)
        return laid_out(numbers(kind, shape, dtype or self.dtype, self.generator()), layout)

    def ordinary(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers in any layout: for what an operator asks to be finite."""
        values = numbers("normal", shape, dtype or self.dtype, self.generator())
        return laid_out(values, self.pick(LAYOUTS))

    def masses(self, *shape: int) -> Tensor:
        """Numbers above 0 that sum to 1 over the last dimension; half types' in float32."""
        values = torch.rand(shape, generator=self.generator(), dtype=torch.float64) + 0.1
        values = values / values.sum(-1, keepdim=True)
        return laid_out(values.to(accumulate_dtype(self.dtype)), self.pick(LAYOUTS[:3]))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        values = torch.randint(low, max(high, low + 1), shape, generator=self.generator())
        return laid_out(values, self.pick(LAYOUTS))

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator())

    @property
    def tame(self) -> bool:
        """Whether all numbers were of moderate size, so that results have values to compare."""
        return not (self.rough or self.kinds.intersection(WILD))

    def spoil(self, sample: Sample) -> Sample:
        """Return the sample, rarely with a wrong tensor among its arguments."""
        if not self.faulty or self.pick(range(16)) != 15 or not sample.differentiable:
            return sample
        tensors: list[Any] = list(sample.differentiable)
        place = self.pick(range(len(tensors)))
        tensors[place] = _wrong(tensors[place], self.pick(BAD_TENSORS))
        return Sample(sample.name, tuple(tensors), sample.call, sample.options)


def _wrong(tensor: Tensor, how: str) -> Any:
    if how == "integers":
        return torch.zeros_like(tensor, dtype=torch.int64)
    if how == "another dimension":
        return tensor[None]
    if how == "one row less":
        return tensor[1:] if tensor.dim() and len(tensor) else tensor.reshape(-1, 1)
    if how == "another dtype":
        return tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.bfloat16)
    return tensor.tolist()


def hypothesis_draws(draw: Callable[..., Any], **options: Any) -> Draws:
    return Draws(
        lambda among: draw(st.sampled_from(among)),
        lambda: draw(st.integers(0, 2**31 - 1)),
        **options,
    )


def seeded_draws(seed: int, **options: Any) -> Draws:
    source = random.Random(seed)
    return Draws(source.choice, lambda: source.randrange(2**31), **options)


def numbers(
    kind: str, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Return numbers of a kind; sizes are relative to what the dtype reaches."""
    info = torch.finfo(dtype)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "ties":
        values = values.round()
    elif kind == "huge":
        values = values * info.max**0.25  # products of three stay finite
    elif kind == "tiny":
        values = values * info.tiny**0.5
    elif kind == "denormal":
        values = values * info.tiny / 8
    elif kind == "zero":
        values = torch.copysign(torch.zeros_like(values), values)
    elif kind in ("nan", "inf", "mixed"):
        special = torch.rand(shape, generator=generator) < 0.2
        infinite = torch.copysign(torch.full_like(values, torch.inf), values)
        nan = torch.full_like(values, torch.nan)
        either = torch.where(values > 0.5, nan, infinite)
        values = torch.where(special, {"nan": nan, "inf": infinite, "mixed": either}[kind], values)
    return values.to(dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Return the values in memory as a layout says; "expanded" repeats the first of them."""
    if layout == "transposed":
        backwards = tuple(reversed(range(values.dim())))
        return values.permute(backwards).contiguous().permute(backwards)
    if layout == "sliced" and values.dim():
        room = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), 7)
        room[..., 1::2] = values
        return room[..., 1::2]
    if layout == "expanded" and values.dim() and values.shape[0]:
        return values[:1].expand(values.shape)
    if layout == "channels_last" and values.dim() in (4, 5):
        last = {4: torch.channels_last, 5: torch.channels_last_3d}[values.dim()]
        return values.contiguous(memory_format=last)
    return values


def _dropout_samples(d: Draws) -> Sample:
    shape = [d.size() for _ in range(d.pick((2, 0, 1, 3, 4)))]
    options = {
        "p": d.number(0.5, 0.0, 1.0, 0.1),
        "num_samples": d.number(2, 1, 8),
        "seed": d.seed(),
    }
    return Sample("", (d.tensor(*shape),), ops.dropout_samples, options)


def _drop_block(d: Draws) -> Sample:
    x = d.tensor(d.rows(), d.size(), d.size(), d.size())
    options = {
        "p": d.number(0.3, 0.0, 0.9),
        "block_size": d.number(3, 1, 7),
        "gamma": d.pick(("simple", "exact")),
        "normalize": d.pick(("batch", "sample")),
        "shared_channels": d.flag(),
        "seed": d.seed(),
    }
    return Sample("", (x,), ops.drop_block, options)


def _row_gate(d: Draws) -> Sample:
    shape = [d.rows(), *(d.size() for _ in range(d.pick((1, 0, 3, 4))))]
    options = {"p": d.number(0.4, 0.0, 1.0), "scale_by_keep": d.flag(), "seed": d.seed()}
    if d.flag():
        return Sample("", (d.tensor(*shape),), ops.row_gate, options)
    call = lambda x, r, **o: ops.row_gate(x, residual=r, **o)
    return Sample("", (d.tensor(*shape), d.tensor(*shape)), call, options)


def _mix(d: Draws) -> Sample:
    n = d.rows()
    x = d.tensor(n, *(d.size() for _ in range(d.pick((1, 0, 3)))))
    perm = d.permutation(n)[: d.pick((n, n // 2))]
    if d.flag():
        lam = d.number(0.3, 0.0, 1.0)
        return Sample("", (x,), lambda x: ops.mix(x, perm, lam))
    lam = torch.rand(len(perm), generator=d.generator(), dtype=torch.float64).to(d.dtype)
    return Sample("", (x, lam), lambda x, lam: ops.mix(x, perm, lam))


def _paste_boxes(d: Draws) -> Sample:
    n, sides = d.rows(), d.pick((2, 1, 3))
    places = [d.size() for _ in range(sides)]
    x, perm = d.tensor(n, d.size(), *places), d.permutation(n)
    box = torch.stack([d.integers(0, side + 1, n, 2).sort(-1).values for side in places], 1)
    return Sample("", (x,), lambda x: ops.paste_boxes(x, perm, box))


def _classifier(d: Draws, *, least_features: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
    rows, features, classes = d.rows(), d.size(least_features), d.size(1)
    tensors = (d.tensor(rows, features), d.tensor(classes, features))
    if d.flag():
        tensors = (*tensors, d.tensor(classes))
    return tensors, d.integers(0, classes, rows)


def _multi_sample_dropout_cross_entropy(d: Draws) -> Sample:
    tensors, target = _classifier(d)
    options = {
        "p": d.number(0.5, 0.0, 0.1),
        "num_samples": d.number(2, 1, 5),
        "label_smoothing": d.number(0.0, 0.2),
        "reduction": d.pick(("mean", "sum", "none")),
        "seed": d.seed(),
        "ignore_index": d.pick((-100, 0)),
    }
    call = lambda x, w, b=None, **o: ops.multi_sample_dropout_cross_entropy(x, w, b, target, **o)
    return Sample("", tensors, call, options)


def _expected_prefix_cross_entropy(d: Draws) -> Sample:
    tensors, target = _classifier(d)
    probs = d.masses(tensors[0].shape[1])
    options = {"reduction": d.pick(("mean", "sum", "none")), "ignore_index": d.pick((-100, 0))}
    call = lambda x, w, b=None, **o: ops.expected_prefix_cross_entropy(x, w, b, target, probs, **o)
    return Sample("", tensors, call, options)


def _prefix_accuracy(d: Draws) -> Sample:
    tensors, target = _classifier(d)
    call = lambda x, w, b=None: ops.prefix_accuracy(x, w, b, target)
    tame = d.tame  # else the largest logits differ by rounding alone
    return Sample("", tensors, lambda *t: call(*t) if tame else call(*t) <= len(target))


def _prefix_logits(d: Draws) -> Sample:
    return Sample("", _classifier(d)[0], lambda x, w, b=None: ops.prefix_logits(x, w, b))


def _prefix_linear(d: Draws) -> Sample:
    tensors, _ = _classifier(d, least_features=1)
    rows, features = tensors[0].shape
    k = d.integers(1, features + 1, *d.pick(((rows,), ())))
    return Sample("", tensors, lambda x, w, b=None: ops.prefix_linear(x, w, b, k))


def _nearest_code(d: Draws) -> Sample:
    features = d.size()
    z, codebook = d.tensor(d.rows(), features), d.tensor(d.size(1), features)

    def excess(z: Tensor, codebook: Tensor) -> Tensor:
        """How far the code found is, beyond the nearest; codes at equal distances are equal."""
        index = ops.nearest_code(z, codebook)
        z, codebook = z.detach().double(), codebook.detach().double()
        squares = (z[:, None] - codebook).square().sum(-1)
        scale = z.square().sum(-1) + codebook.square().sum(-1).max() + torch.finfo(d.dtype).tiny
        found = squares.gather(1, index[:, None])[:, 0]
        return torch.where(z.isfinite().all(-1), (found - squares.amin(1)) / scale, index.double())

    return Sample("", (z, codebook), excess)


def _nearest_neighbour(d: Draws) -> Sample:
    n, features = d.rows(2), d.size()
    points = (d.tensor(n, features), d.tensor(d.size(1), features))[: d.pick((2, 1))]
    return Sample("", points, lambda *t: ops.nearest_neighbour(*t)[0])


def _gradient_gate(d: Draws) -> Sample:
    shape = [d.size() for _ in range(d.pick((2, 0, 1, 4)))]
    options = {"drop_strength": d.number(1.0, 0.0, 0.3), "seed": d.seed()}
    return Sample("", (d.tensor(*shape), d.tensor(*shape)), ops.gradient_gate, options)


def _mini_format(d: Draws) -> dict[str, Any]:
    exp_bits, man_bits = d.pick(((4, 3), (5, 2), (2, 1), (3, 0), (1, 1)))
    options = {"exp_bits": exp_bits, "man_bits": man_bits, "signed": d.flag()}
    return {**options, "has_inf_nan": d.faulty and d.flag(), "dense": d.flag()}


def _mini_float_bias(d: Draws) -> Sample:
    x = d.tensor(d.rows(), d.size())
    options = {"exp_bits": d.number(3, 2, 5), "has_inf_nan": d.flag()}
    return Sample("", (x,), ops.mini_float_bias, options)


def _mini_float_pack(d: Draws) -> Sample:
    bias = torch.tensor(d.pick((7, 0, 100, -100)), dtype=torch.int32)
    call = lambda x, **o: ops.mini_float_pack(x, bias, **o)
    return Sample("", (d.tensor(d.rows(), d.size()),), call, _mini_format(d))


def _mini_float_unpack(d: Draws) -> Sample:
    bias = torch.tensor(d.pick((7, 0, 100, -100)), dtype=torch.int32)
    format = _mini_format(d)
    x = d.ordinary(d.rows())
    packed = ops.mini_float_pack(x, bias, **{**format, "exp_bits": 4, "man_bits": 3})
    if d.faulty:  # bytes that may be no codes of the format, and too few of them or too many
        bits = format["exp_bits"] + format["man_bits"] + format["signed"]
        count = -(-len(x) * bits // 8) if format["dense"] else len(x)
        packed = d.integers(0, 256, count + d.pick((0, 0, 0, 1))).to(torch.uint8)
    else:
        format.update(exp_bits=4, man_bits=3)
    options = {**format, "shape": x.shape, "dtype": d.dtype}
    return Sample("", (), lambda **o: ops.mini_float_unpack(packed, bias, **o), options)


def _sample_code(d: Draws) -> Sample:
    codes = d.size(2)
    codebook, index = d.tensor(codes, d.size()), d.integers(0, codes, d.rows(), d.size())
    selected = d.integers(0, 2, *index.shape).bool() if d.flag() else None
    options = {"temperature": d.number(1.0, 0.1, 10.0), "seed": d.seed(), "selected": selected}
    tame = d.tame  # else distances differ by rounding alone, and any code may be drawn

    def drawn(codebook: Tensor, **options: Any) -> Tensor:
        found = ops.sample_code(index, codebook, **options)
        return found if tame else (found >= 0) & (found < codes) & (found != index)

    return Sample("", (codebook,), drawn, options)


def _pairwise_logsumexp(d: Draws) -> Sample:
    n, features = d.rows(), d.size()
    options: dict[str, Any] = {
        "kind": d.pick(("dot", "sqdist", "dist")),
        "scale": d.number(1.0, -0.5),
        "exclude_self": d.pick((None, True, False)),
    }
    d.rough = options["kind"] == "dist"  # the root of the rounding of a square
    if d.flag():
        return Sample("", (d.tensor(n, features), d.tensor(d.size(), features)), _sums, options)
    rule = d.pick((ops.SameLabel, ops.OtherLabel, None))
    options["pairs"] = rule and rule(d.integers(0, 3, n))
    return Sample("", (d.tensor(n, features),), _sums, options)


def _sums(*tensors: Tensor, **options: Any) -> Tensor:
    found = ops.pairwise_logsumexp(*tensors, **options)
    return torch.stack([found.logsumexp, found.total, found.pair_count.to(found.total)])


def _gathered_attention(d: Draws) -> Sample:
    batch, heads, tokens, features = d.size(), d.size(), d.size(), d.pick((2, 1, 5, 16))
    q, k = d.tensor(batch, heads, tokens, features), d.tensor(batch, heads, tokens, features)
    # Finite: a reference multiplies the value of a hidden key by 0, a kernel passes over it.
    v = d.tensor(batch, heads, tokens, d.pick((1, 3, 16)), without=("nan", "inf", "mixed"))
    index = d.permutation(tokens)[: d.pick((tokens, tokens // 2))][None]
    options: dict[str, Any] = {"is_causal": d.flag(), "scale": d.pick((None, 0.3))}
    if d.flag():
        options["own"] = torch.ones(1, tokens, dtype=torch.bool).scatter_(1, index, False)
    if d.flag():
        call = lambda q, k, v, b, **o: ops.gathered_attention(q, k, v, index, attn_bias=b, **o)
        return Sample("", (q, k, v, d.tensor(1, heads, tokens, tokens)), call, options)
    return Sample("", (q, k, v), lambda *t, **o: ops.gathered_attention(*t, index, **o), options)


def _sparse_projection(d: Draws) -> Sample:
    shape = [d.rows(), d.size(), d.size()][: d.pick((2, 1, 3))]
    options = {
        "z": d.number(1.0, 0.0, 5.0, None),
        "k": d.number(None, 1, 3),
        "dim": d.pick((-1, 0)),
    }
    # A vector of infinities has no projection: which of them gets the mass is left open.
    return Sample("", (d.tensor(*shape, without=INFINITE),), ops.sparse_projection, options)


def _dual_problem(d: Draws) -> tuple[Tensor, ...]:
    """alpha, cost, a, b, beta."""
    n, m = d.rows(), d.size(1)
    alpha, cost, beta = (d.tensor(*shape, without=INFINITE) for shape in ((m,), (n, m), (n,)))
    return alpha, cost, d.ordinary(m), d.ordinary(n).abs(), beta


def _transport_dual(d: Draws) -> Sample:
    problem = _dual_problem(d)[: d.pick((4, 5))]
    options = {"gamma": d.number(1.0, 0.1), "regularizer": d.pick(("quadratic", "entropic"))}
    if options["regularizer"] == "quadratic":
        options["k"] = d.number(None, 1, 3)
    return Sample("", problem, lambda *t, **o: ops.transport_dual(*t, **o).value, options)


def _regularized_plan(d: Draws) -> Sample:
    alpha, cost, _, b, beta = _dual_problem(d)
    options = {"gamma": d.number(1.0, 0.1), "regularizer": d.pick(("quadratic", "entropic"))}
    tensors = (alpha, cost, b, beta)[: d.pick((3, 4))]
    return Sample("", tensors, ops.regularized_plan, options)


def _sparse_regularized_plan(d: Draws) -> Sample:
    alpha, cost, _, b, beta = _dual_problem(d)
    options = {"gamma": d.number(1.0, 0.1), "k": d.number(1, 3)}
    call = lambda *t, **o: ops.sparse_regularized_plan(*t, **o)[0]
    return Sample("", (alpha, cost, b, beta)[: d.pick((3, 4))], call, options)


SOLVER = {"max_iter": 4, "tol": 0.0, "momentum": 1.0}


def _sinkhorn(d: Draws) -> Sample:
    n, m = d.rows(1), d.size(1)
    a, b = d.masses(n), d.masses(m)
    options = {"epsilon": d.number(1.0, 0.2), **SOLVER, "tau_a": d.number(1.0, 0.7)}
    call = lambda cost, a, b, **o: ops.sinkhorn(cost, a, b, **o).value
    # Huge costs round by more than epsilon, which empties rows on one side only.
    cost = d.tensor(*d.pick(((), (2,))), n, m, without=("huge",))
    return Sample("", (cost, a, b), call, options)


def _clouds(d: Draws) -> tuple[Tensor, ...]:
    # Squares of tiny numbers vanish and those of huge ones round by more than epsilon: directions
    # and plans then depend on rounding alone.
    n, m, features = d.rows(1), d.size(1), d.size(1)
    x, y = (d.tensor(size, features, without=("huge", "tiny", "denormal")) for size in (n, m))
    return x, y, d.masses(n), d.masses(m)


def _point_options(d: Draws) -> dict[str, Any]:
    cost = d.pick(("sqeuclidean", "euclidean", "cosine"))
    d.rough = cost == "euclidean"  # the root of the rounding of a square
    return {"epsilon": d.number(1.0, 0.5), "cost": cost, "scale": d.number(1.0, 0.5)}


def _sinkhorn_points(d: Draws) -> Sample:
    call = lambda *t, **o: ops.sinkhorn_points(*t, **o).value
    return Sample("", _clouds(d), call, {**_point_options(d), **SOLVER})


def _transport_apply(d: Draws) -> Sample:
    x, y, a, b = _clouds(d)
    f, g = d.ordinary(len(x), dtype=a.dtype), d.ordinary(len(y), dtype=a.dtype)
    v = d.tensor(len(y), d.size(1), dtype=a.dtype)
    call = lambda x, y, v, **o: ops.transport_apply(x, y, f, g, v, a, b, **o)
    return Sample("", (x, y, v), call, _point_options(d))


def _transport_plan(d: Draws) -> Sample:
    n, m = d.rows(1), d.size(1)
    wide = accumulate_dtype(d.dtype)
    f, g = d.ordinary(n, dtype=wide), d.ordinary(m, dtype=wide)
    return Sample("", (d.tensor(n, m), f, g), ops.transport_plan, {"epsilon": d.number(1.0, 0.5)})


def _sketch(d: Draws, without: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
    features = d.size()
    z = d.tensor(d.pick((2, 1)), d.rows(1), features, without=without)
    return z, d.ordinary(features, d.size(1))


def _sliced_epps_pulley(d: Draws) -> Sample:
    z, slices = _sketch(d)
    options = {"num_knots": d.number(17, 2, 5), "t_max": d.number(3.0, 1.0)}
    return Sample("", (z,), lambda z, **o: ops.sliced_epps_pulley(z, slices, **o), options)


def _sliced_characteristic(d: Draws) -> Sample:
    z, slices = _sketch(d)
    options = {"num_knots": d.number(17, 2, 5), "t_max": d.number(3.0, 1.0)}
    return Sample("", (z,), lambda z, **o: ops.sliced_characteristic(z, slices, **o), options)


def _sliced_quantile(d: Draws) -> Sample:
    z, slices = _sketch(d, without=("ties",))  # which rounding parts: gradients would differ
    quantiles = torch.linspace(-1, 1, z.shape[1], dtype=z.dtype)
    return Sample("", (z,), lambda z: ops.sliced_quantile(z, slices, quantiles))


def _decoupled_adam(d: Draws) -> Sample:
    shapes = [[d.size() for _ in range(d.pick((1, 2, 0)))] for _ in range(d.pick((1, 2)))]
    wide = accumulate_dtype(d.dtype)
    params, grads = ([d.tensor(*shape) for shape in shapes] for _ in range(2))
    first, second = ([d.ordinary(*shape, dtype=wide) for shape in shapes] for _ in range(2))
    options = {
        "lr": d.pick((0.1, 0.0)),  # the optimizers check their numbers
        "weight_decay": d.pick((0.3, 0.0)),
        "penalty": d.pick(("l2", "l1", "huber", "none")),
        "prox": d.flag(),
        "decay_first": d.flag(),
        "maximize": d.flag(),
    }

    def step(*tensors: Tensor, **options: Any) -> Tensor:
        with torch.no_grad():
            n = len(shapes)
            written = [[t.clone() if isinstance(t, Tensor) else t for t in tensors[:n]]]
            written.append([t.clone() for t in first])
            written.append([t.square() for t in second])
            ops.decoupled_adam_(
                written[0],
                tensors[n:],
                *written[1:],
                torch.arange(1.0, n + 1),
                deltas=torch.full((n,), 0.5, dtype=torch.float64),
                **options,
            )
        return torch.cat([t.to(wide).flatten() for group in written for t in group])

    return Sample("", (*params, *grads), step, options)


@dataclass(frozen=True)
class Fuzzed:
    """How an operator is fuzzed.

    Args:
        build: makes a call of what it draws.
        degree: a result grows as this power of the inputs: the scale of rounding errors.
        exact: NaN stands where it stands in the reference. Elsewhere (sums) infinities of both
            signs or an overflow may meet in another order, and NaN stand for infinity.
        smooth: a result changes little under the rounding of inputs of any size, so that values,
            not finiteness alone, are compared for huge inputs too.
        reads_less: the kernel passes over a NaN in weights that count for nothing, as documented.
        gradients: whether they are compared.
    """

    build: Callable[[Draws], Sample]
    degree: int = 1
    exact: bool = False
    smooth: bool = False
    reads_less: bool = False
    gradients: bool = True


TABLE = {
    "decoupled_adam_": Fuzzed(_decoupled_adam, gradients=False),
    "drop_block": Fuzzed(_drop_block, exact=True, smooth=True),
    "dropout_samples": Fuzzed(_dropout_samples, exact=True, smooth=True),
    "expected_prefix_cross_entropy": Fuzzed(_expected_prefix_cross_entropy, degree=2),
    "gradient_gate": Fuzzed(_gradient_gate, exact=True, smooth=True),
    "gathered_attention": Fuzzed(_gathered_attention, degree=2),
    "mini_float_bias": Fuzzed(_mini_float_bias, gradients=False),
    "mini_float_pack": Fuzzed(_mini_float_pack, gradients=False),
    "mini_float_unpack": Fuzzed(_mini_float_unpack, exact=True, smooth=True, gradients=False),
    "mix": Fuzzed(_mix, exact=True, smooth=True),
    "multi_sample_dropout_cross_entropy": Fuzzed(_multi_sample_dropout_cross_entropy, degree=2),
    "nearest_code": Fuzzed(_nearest_code, degree=0, smooth=True, gradients=False),
    "pairwise_logsumexp": Fuzzed(_pairwise_logsumexp, degree=2),
    "nearest_neighbour": Fuzzed(_nearest_neighbour, degree=2, gradients=False),
    "paste_boxes": Fuzzed(_paste_boxes, degree=0, exact=True, smooth=True),
    "prefix_accuracy": Fuzzed(_prefix_accuracy, gradients=False),
    "prefix_linear": Fuzzed(_prefix_linear, degree=2, smooth=True, reads_less=True),
    "prefix_logits": Fuzzed(_prefix_logits, degree=2, smooth=True),
    "regularized_plan": Fuzzed(_regularized_plan),
    "row_gate": Fuzzed(_row_gate, exact=True, smooth=True),
    "sample_code": Fuzzed(_sample_code, degree=0, gradients=False),
    "sinkhorn": Fuzzed(_sinkhorn),
    "sinkhorn_points": Fuzzed(_sinkhorn_points, degree=2),
    "sliced_characteristic": Fuzzed(_sliced_characteristic, degree=2),
    "sliced_epps_pulley": Fuzzed(_sliced_epps_pulley, degree=2),
    "sliced_quantile": Fuzzed(_sliced_quantile, degree=2, smooth=True),
    "sparse_projection": Fuzzed(_sparse_projection, smooth=True),
    "sparse_regularized_plan": Fuzzed(_sparse_regularized_plan),
    "transport_apply": Fuzzed(_transport_apply, degree=2),
    "transport_dual": Fuzzed(_transport_dual),
    "transport_plan": Fuzzed(_transport_plan),
}
NO_KERNEL = {
    "FalselyNear": "a rule",
    "LabelWindow": "a rule",
    "OtherLabel": "a rule",
    "PairwiseSums": "a result",
    "SameLabel": "a rule",
    "SinkhornOutput": "a result",
    "TransportDual": "a result",
    "decay_amount": "the formula that references share",
    "dropout_mask": "the formula that references share",
    "philox_4x32": "the formula that references share",
    "philox_words": "the formula that references share",
    "stochastic_round": "the formula that references share",
}
