"""The fused optimizer step: kernel against reference, known values, layouts, registration."""

import itertools
import math

import pytest
import torch

import regularizers
from regularizers.ops import decay_amount, decoupled_adam_, stochastic_round
from regularizers.ops.decay import DECOUPLED_ADAM, PENALTIES
from regularizers.ops.tensor_table import is_dense
from tests.harness import DTYPES, TOLERANCES, in_forked_child

# Odd sizes, none, one, several chunks of 16384, and a number of lanes that is no whole vector.
SIZES = ((5,), (3, 7), (1,), (), (0,), (30, 77), (20000,))
STATE = ("exp_avgs", "exp_avg_sqs", "sums", "params")


def problem(dtype=torch.float32, sizes=SIZES, *extras):
    """Arguments of a step in the middle of a run, every parameter at another step."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(to):
        return [
            torch.randn(size, generator=generator, dtype=torch.float64).to(to) for size in sizes
        ]

    found = {
        "params": normal(dtype),
        "grads": normal(dtype),
        "exp_avgs": normal(wide),
        "exp_avg_sqs": [x.square() for x in normal(wide)],
        "steps": torch.arange(1.0, len(sizes) + 1),
        "deltas": torch.linspace(0.1, 2, len(sizes), dtype=torch.float64),
        "sums": torch.zeros(len(sizes), dtype=torch.float64),
    }
    if "max_exp_avg_sqs" in extras:
        found["max_exp_avg_sqs"] = [x.square() for x in normal(wide)]
    if "masters" in extras:
        found["masters"] = [p.to(wide) for p in found["params"]]
    if "references" in extras:
        found["references"] = normal(dtype)
    if "masks" in extras:
        found["masks"] = [x > 0 for x in normal(wide)]
    return found


EXTRAS = ("max_exp_avg_sqs", "masters", "references", "masks")
OPTIONS = {"lr": 0.1, "weight_decay": 0.3}


def step(backend, arguments, **options):
    with regularizers.use_backend(backend):
        decoupled_adam_(**arguments, **{**OPTIONS, **options})
    return arguments


def both(dtype, sizes=SIZES, extras=(), **options):
    """The arguments after a step of the kernel and of the reference."""
    return [
        step(backend, problem(dtype, sizes, *extras), **options) for backend in ("cpp", "reference")
    ]


@pytest.mark.parametrize("extras", [(), EXTRAS, ("references",), ("masks",)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_agrees_with_reference(dtype, extras):
    for penalty, prox, first in itertools.product(PENALTIES, (True, False), (True, False)):
        have, want = both(
            dtype, extras=extras, penalty=penalty, prox=prox, decay_first=first, eps=1e-3
        )
        torch.testing.assert_close(have, want, **TOLERANCES[dtype])


@pytest.mark.parametrize(
    "option",
    [
        {"maximize": True},
        {"bias_correction": False},
        {"betas": (0.5, 0.6)},
        {"eps": 0.0},
        {"weight_decay": 0.0},
        {"lr": 0.0},
        {"grad_scale": torch.tensor(8.0)},
        {"found_inf": torch.tensor(0.0)},
    ],
    ids=str,
)
def test_every_option_agrees_with_reference(option):
    have, want = both(torch.float64, penalty="huber", prox=True, decay_first=False, **option)
    torch.testing.assert_close(have, want, **TOLERANCES[torch.float64])


def test_nothing_is_written_where_gradients_overflowed():
    for backend in ("cpp", "reference"):
        before = problem(torch.float32, SIZES, *EXTRAS)
        after = step(backend, problem(torch.float32, SIZES, *EXTRAS), found_inf=torch.tensor(2.0))
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_an_infinite_threshold_is_l2_decay():
    arguments = problem(torch.float64)
    arguments["deltas"].fill_(math.inf)
    huber = step("cpp", arguments, penalty="huber", prox=True)
    l2 = step("cpp", problem(torch.float64), penalty="l2", prox=True)
    torch.testing.assert_close(huber["params"], l2["params"], rtol=0, atol=0)


def test_nan_in_a_parameter_stays_there():
    for prox in (True, False):
        arguments = problem(torch.float32, ((40,),))
        arguments["params"][0][17] = math.nan
        (p,) = step("cpp", arguments, penalty="huber", prox=prox)["params"]
        assert torch.equal(p.isnan().nonzero().flatten(), torch.tensor([17]))


def test_sums_do_not_depend_on_the_number_of_threads():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(step("cpp", problem(torch.float32)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_works_in_a_forked_process():
    work = lambda: step("cpp", problem(torch.float64))["params"][1]  # few: a pipe carries them
    torch.testing.assert_close(in_forked_child(work).to(torch.float64), work())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_passes(dtype):
    scalar = lambda value: torch.tensor(value, dtype=torch.float64)
    found = problem(dtype, ((5,), (3, 7)), *EXTRAS)
    seed = torch.tensor(3) if dtype == torch.bfloat16 else None
    arguments = (
        *(found[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", *EXTRAS)),
        *(found[name] for name in ("steps", "deltas", "sums")),
        *map(scalar, (0.1, 0.3, 0.9, 0.95)),
        *(None, None, seed, 1e-8, "huber", True, False, False, True),
    )
    for backend in (None, "reference"):
        results = torch.library.opcheck(DECOUPLED_ADAM.kernel(backend), arguments)
        assert set(results.values()) == {"SUCCESS"}


def test_a_schedule_compiles_one_graph_with_equal_results(fresh_dynamo):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")

    def train(lr, *arguments):
        decoupled_adam_(*arguments, lr=lr, weight_decay=0.1)
        return arguments[0][0] * 2

    compiled = torch.compile(train, fullgraph=True, backend=backend)
    for rate in (0.1, 0.2, 0.3):
        lr = torch.tensor(rate, dtype=torch.float64)
        have, want = problem(), problem()
        doubled = compiled(lr, *(have[name] for name in names))
        train(lr, *(want[name] for name in names))
        torch.testing.assert_close(have, want, rtol=0, atol=0)
        assert torch.equal(doubled, 2 * have["params"][0])
    assert len(graphs) == 1


def test_inductor_sees_that_parameters_change(fresh_dynamo):
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")

    def train(*arguments):
        before = arguments[0][0] * 2
        decoupled_adam_(*arguments, lr=0.1)
        return before, arguments[0][0] * 2

    have, want = problem(), problem()
    results = torch.compile(train, fullgraph=True)(*(have[name] for name in names))
    expected = train(*(want[name] for name in names))
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(have, want)


def test_grad_mode_is_refused_and_saved_tensors_notice_the_change():
    x = torch.ones(3, requires_grad=True)
    others = [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(3)], torch.ones(1)
    with pytest.raises(RuntimeError, match="no derivative"):
        decoupled_adam_([x], *others, lr=0.1)
    loss = (x * x).sum()
    with torch.no_grad():
        decoupled_adam_([x], *others, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _in_layout(arguments, layout):
    """Tensors of other strides: in a wider storage, transposed, channels last."""
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        arguments[name] = [layout(name, tensor) for tensor in arguments[name]]
    return arguments


LAYOUTS = {
    "all transposed": lambda name, x: x.mT.contiguous().mT,
    "gradient transposed": lambda name, x: x.mT.contiguous().mT if name == "grads" else x,
    "moment transposed": lambda name, x: x.mT.contiguous().mT if name == "exp_avgs" else x,
    "parameter in a wider storage": lambda name, x: (
        torch.cat([x, x], -1)[:, : x.shape[-1]] if name == "params" else x
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_memory_do_not_matter(layout):
    sizes = ((3, 7), (130, 5))
    want = step("cpp", problem(torch.float32, sizes))
    have = step("cpp", _in_layout(problem(torch.float32, sizes), LAYOUTS[layout]))
    for name in STATE:
        # Sums alone are added up in the order of memory, in float32 within a chunk.
        tolerance = 1e-6 if name == "sums" else 0
        torch.testing.assert_close(have[name], want[name], rtol=tolerance, atol=0)


def test_dense_tensors_are_known():
    x = torch.zeros(4, 3, 2, 2)
    dense = x, x.mT, x.to(memory_format=torch.channels_last), x[:, :0], x[:2]
    assert all(map(is_dense, dense))
    assert not any(map(is_dense, (x[:, :2], x[..., ::2], torch.zeros(1, 3).expand(3, 3))))


def test_stochastic_rounding_has_the_bits_of_the_reference():
    have, want = both(torch.bfloat16, seed=torch.tensor(5), decay_first=True)
    # The float32 values before rounding differ in the last place, which moves one in 2^15 or so.
    for a, b in zip(have["params"], want["params"], strict=True):
        assert (a != b).float().sum() <= 1 + 2e-3 * a.numel()


def test_stochastic_rounding_keeps_the_mean_and_leaves_infinities_alone():
    x = torch.full((200_000,), 1.002)
    rounded = stochastic_round(x, torch.tensor(0)).float()
    # Steps of 2^-7, share 0.256: standard deviation of the mean 7.6e-6; five of them.
    assert abs(rounded.mean().item() - 1.002) < 3.8e-5
    odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -2.0])
    torch.testing.assert_close(stochastic_round(odd, torch.tensor(1)).float(), odd, equal_nan=True)


def test_masters_are_rounded_to_their_parameters():
    arguments = step("cpp", problem(torch.bfloat16, SIZES, "masters"))
    for p, master in zip(arguments["params"], arguments["masters"], strict=True):
        assert torch.equal(p, master.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("penalty", "prox", "expected"),
    [
        ("huber", True, [0.49, 0.0454545, 0.10, -0.49, 0.0]),
        ("huber", False, [0.49, 0.045, 0.10, -0.49, 0.0]),
        ("l2", False, [0.45, 0.045, 0.099, -0.45, 0.0]),
        ("l1", True, [0.4, 0.0, 0.01, -0.4, 0.0]),
        ("l1", False, [0.4, -0.05, 0.01, -0.4, 0.0]),
        ("none", True, [0.5, 0.05, 0.11, -0.5, 0.0]),
    ],
)
def test_decay_at_known_values(penalty, prox, expected):
    x = torch.tensor([0.5, 0.05, 0.11, -0.5, 0.0], dtype=torch.float64)
    tenth = torch.tensor(0.1, dtype=torch.float64)
    found = x - decay_amount(x, tenth, penalty, prox=prox, delta=tenth)
    want = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-7)
    # The kernel, from moments at zero: no update but the decay.
    p, zeros = x.clone(), lambda: [torch.zeros_like(x)]
    decoupled_adam_(
        [p], zeros(), zeros(), zeros(), torch.ones(1), lr=1.0, weight_decay=0.1,
        penalty=penalty, prox=prox, deltas=torch.full((1,), 0.1, dtype=torch.float64),
    )  # fmt: skip
    torch.testing.assert_close(p, want, rtol=0, atol=1e-7)


def _call(**changes):
    arguments = {**problem(torch.float32, ((3,), (4,))), **OPTIONS, **changes}
    return lambda: decoupled_adam_(**arguments)


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (ValueError, "penalty must be one of", _call(penalty="l3")),
        (ValueError, "grads must hold 2", _call(grads=[torch.zeros(3)])),
        (ValueError, "grads must have the shapes", _call(grads=[torch.zeros(3)] * 2)),
        (TypeError, "grads must be", _call(grads=[torch.zeros(3).half(), torch.zeros(4)])),
        (TypeError, "exp_avgs must be", _call(exp_avgs=[torch.zeros(3).double()] * 2)),
        (TypeError, "masks must be", _call(masks=[torch.zeros(3), torch.zeros(4)])),
        (TypeError, "params must be", _call(params=[torch.zeros(3, dtype=torch.int32)] * 2)),
        (ValueError, "deltas must be given", _call(penalty="huber", deltas=None)),
        (TypeError, "deltas must be", _call(penalty="huber", deltas=torch.ones(2))),
        (ValueError, "steps must have shape", _call(steps=torch.ones(3))),
        (TypeError, "sums must be", _call(sums=torch.zeros(2))),
        (ValueError, "seed must come with bfloat16", _call(seed=torch.tensor(1))),
        (TypeError, "lr must be a number", _call(lr="fast")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_names_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call()


def test_no_parameters_are_no_work():
    decoupled_adam_([], [], [], [], torch.ones(0), lr=0.1)


@pytest.mark.parametrize("name", ["params", "grads", "exp_avgs"])
def test_a_list_of_numbers_is_refused_by_name(name):
    arguments = problem(torch.float32, ((3,),))
    arguments[name] = [1.0]
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        step(None, arguments)
