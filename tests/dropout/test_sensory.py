"""Sensory dropout: the method contract and the facts of the sheet of paper 1."""

import pytest
import torch

from regularizers.dropout import SensoryDropout
from tests.harness import MethodContract


class TestSensoryDropout(MethodContract):
    rates = {"observation.state": 0.5, "camera": 0.4}

    def build(self, dtype):
        torch.manual_seed(0)
        dims = {"observation.state": 7, "camera": 5}
        return SensoryDropout(self.rates, mode="token", dims=dims).to(dtype)

    def inputs(self, dtype=torch.float32):
        return {
            "observation.state": torch.ones(8, 7, dtype=dtype),
            "camera": torch.ones(8, 3, 5, dtype=dtype),
            "text": torch.arange(8),
        }

    def call(self, module, dtype):
        outputs, _ = module(self.inputs(dtype), seed=2)
        return outputs["observation.state"].sum() + outputs["camera"].sum()

    def inert(self, module):
        inputs = self.inputs()
        return module(inputs)[0]["camera"], inputs["camera"]

    def bad_inputs(self):
        build = SensoryDropout
        rates, x = {"a": 0.5, "b": 0.5}, torch.ones(4, 3)
        drop, tokens = build(rates), build(rates, mode="token", dims={"a": 3, "b": 3})
        return [
            (ValueError, r"rates\['a'\] must", lambda: build({"a": 1.5})),
            (ValueError, r"rates\['a'\] must", lambda: build({"a": -0.1})),
            (TypeError, "rates must", lambda: build([("a", 0.1)])),
            (ValueError, "mode must", lambda: build(rates, mode="noise")),
            (ValueError, "keep_at_least_one must", lambda: build(rates, keep_at_least_one=["c"])),
            (ValueError, "keep_at_least_one", lambda: build(rates, keep_at_least_one=["a", "a"])),
            (TypeError, "keep_at_least_one must", lambda: build(rates, keep_at_least_one="ab")),
            (ValueError, "dims must", lambda: build(rates, mode="token")),
            (ValueError, "dims must", lambda: build(rates, dims={"a": 3, "b": 3})),
            (ValueError, "dims must", lambda: build(rates, mode="token", dims={"a": 3})),
            (ValueError, "dims", lambda: build({"a": 0.1}, mode="token", dims={"a": 0})),
            (ValueError, "inputs must have the stream 'b'", lambda: drop({"a": x})),
            (TypeError, "inputs must", lambda: drop(x)),
            (TypeError, r"inputs\['b'\] must", lambda: drop({"a": x, "b": 3})),
            (ValueError, r"inputs\['b'\] must", lambda: drop({"a": x, "b": x[:2]})),
            (ValueError, r"inputs\['b'\] must", lambda: tokens({"a": x, "b": x[:, :2]})),
            (ValueError, r"inputs\['a'\] must", lambda: tokens({"a": x.int(), "b": x})),
            (ValueError, "inputs must", lambda: build({})({})),
            (ValueError, "stream must", lambda: drop.set_rate("c", 0.1)),
            (ValueError, r"rates\['a'\] must", lambda: drop.set_rate("a", 2.0)),
        ]


def test_drop_frequencies_are_the_rates():
    # 4 standard deviations over 20,000 samples.
    rates, rows = {"a": 0.1, "b": 0.5, "c": 0.9}, 20_000
    _, present = SensoryDropout(rates)(dict.fromkeys(rates, torch.zeros(rows, 1)), seed=1)
    for name, rate in rates.items():
        dropped = (~present[name]).double().mean().item()
        assert abs(dropped - rate) < 4 * (rate * (1 - rate) / rows) ** 0.5, name


def test_streams_and_samples_are_independent():
    # Correlation of n independent pairs: standard deviation 1 / sqrt(n).
    rows = 20_000
    inputs = dict.fromkeys("ab", torch.zeros(rows, 1))
    _, present = SensoryDropout({"a": 0.5, "b": 0.5})(inputs, seed=1)
    a, b = (present[name].double() * 2 - 1 for name in "ab")
    assert abs((a * b).mean()) < 4 / rows**0.5
    assert abs((a[1:] * a[:-1]).mean()) < 4 / rows**0.5


def test_evaluation_returns_the_inputs_themselves():
    inputs = {"a": torch.randn(4, 3)}
    outputs, present = SensoryDropout({"a": 0.9}).eval()(inputs)
    assert outputs is inputs
    assert present["a"].all()


def test_rates_of_zero_return_the_inputs_themselves():
    drop = SensoryDropout({"a": 0.0, "b": 0.0})
    inputs = {"a": torch.randn(4, 3), "b": torch.randn(4, 3)}
    assert drop(inputs)[0] is inputs
    drop.set_rate("b", 1.0)
    outputs, present = drop(inputs)
    assert outputs["a"] is inputs["a"]
    assert not present["b"].any()
    assert (outputs["b"] == 0).all()


def test_whole_streams_of_a_sample_are_zeroed_and_nothing_is_rescaled():
    x = torch.randn(200, 3, 4, 5)
    outputs, present = SensoryDropout({"camera": 0.4})({"camera": x}, seed=3)
    assert 0 < present["camera"].sum() < 200
    assert torch.equal(outputs["camera"][present["camera"]], x[present["camera"]])
    assert (outputs["camera"][~present["camera"]] == 0).all()


def test_learned_tokens_stand_in_and_get_the_gradient():
    drop = TestSensoryDropout().build(torch.float32)
    outputs, present = drop(TestSensoryDropout().inputs(), seed=3)
    absent = ~present["camera"]
    token = drop.tokens["camera"]
    assert torch.equal(outputs["camera"][absent], token.expand(int(absent.sum()), 3, 5))
    outputs["camera"].sum().backward()
    assert torch.equal(token.grad, torch.full((5,), 3.0 * absent.sum()))


def test_mask_mode_leaves_the_streams():
    inputs = {"a": torch.randn(40, 3)}
    outputs, present = SensoryDropout({"a": 0.5}, mode="mask")(inputs)
    assert outputs is inputs
    assert 0 < present["a"].sum() < 40


def test_images_of_integers_keep_their_type():
    image = torch.full((10, 3, 4, 4), 200, dtype=torch.uint8)
    outputs, present = SensoryDropout({"camera": 0.5})({"camera": image}, seed=0)
    assert outputs["camera"].dtype == torch.uint8
    assert torch.equal(outputs["camera"][:, 0, 0, 0] == 200, present["camera"])


def test_a_dropped_nan_stays_out_of_result_and_gradient():
    x = torch.full((4, 2), torch.nan, requires_grad=True)
    outputs, _ = SensoryDropout({"a": 1.0})({"a": x})
    outputs["a"].sum().backward()
    assert (outputs["a"] == 0).all()
    assert (x.grad == 0).all()


def test_streams_without_a_rate_are_present_and_untouched():
    inputs = {"a": torch.randn(4, 3), "text": torch.arange(4)}
    outputs, present = SensoryDropout({"a": 1.0})(inputs)
    assert outputs["text"] is inputs["text"]
    assert present["text"].all()


@pytest.mark.parametrize("rate", [0.9, 1.0])
def test_one_of_the_listed_streams_always_stays(rate):
    names = ("a", "b", "c")
    drop = SensoryDropout(dict.fromkeys((*names, "d"), rate), keep_at_least_one=names)
    _, present = drop(dict.fromkeys((*names, "d"), torch.zeros(3000, 1)), seed=2)
    alive = torch.stack([present[name] for name in names])
    assert alive.any(0).all()
    if rate == 1.0:  # which one is restored is uniform: 4 standard deviations
        assert (alive.sum(0) == 1).all()
        assert ((alive.sum(1) - 1000).abs() < 4 * (3000 * 2 / 9) ** 0.5).all()
        assert not present["d"].any()


def test_masks_are_a_function_of_the_seed():
    drop, inputs = SensoryDropout({"a": 0.5}), {"a": torch.zeros(64, 1)}
    same = [drop(inputs, seed=seed)[1]["a"] for seed in (7, 7, 8)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    torch.manual_seed(4)
    first = drop(inputs)[1]["a"]
    torch.manual_seed(4)
    assert torch.equal(drop(inputs)[1]["a"], first)


def test_a_longer_batch_begins_with_the_same_masks():
    drop = SensoryDropout({"a": 0.5, "b": 0.5})
    short, long = (drop(dict.fromkeys("ab", torch.zeros(n, 1)), seed=7)[1] for n in (10, 50))
    assert all(torch.equal(short[name], long[name][:10]) for name in "ab")


def test_a_schedule_of_rates_compiles_one_graph(fresh_dynamo):
    drop, graphs = SensoryDropout({"a": 0.5, "b": 0.1}, keep_at_least_one=["a", "b"]), []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    inputs = {"a": torch.randn(16, 3), "b": torch.randn(16, 3)}
    compiled, seed = torch.compile(drop, fullgraph=True, backend=record), torch.tensor(5)
    for step in range(20):
        drop.set_rate("a", (step + 1) / 21)
        have, want = compiled(inputs, seed=seed), drop(inputs, seed=seed)
        assert torch.equal(have[1]["a"], want[1]["a"])
    assert len(graphs) == 1


def test_rates_can_be_asked_for():
    drop = SensoryDropout({"a": 0.25})
    assert drop.rate("a").item() == 0.25
    with pytest.raises(ValueError, match="stream must"):
        drop.rate("b")
    assert "a=0.25" in repr(drop)
