"""The difference of two state dicts: what has a delta, what is kept, and the way back."""

import pytest
import torch
from torch import nn

from regularizers.optim import StateDelta


def states(**shapes):
    torch.manual_seed(0)
    before = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {name: x + 0.1 * torch.randn_like(x) for name, x in before.items()}, before


def test_delta_is_the_difference_and_restoring_gives_the_finetuned_back():
    after, before = states(a=(3, 2), b=(4,))
    delta = StateDelta(after, before)
    assert list(delta.deltas) == ["a", "b"]
    torch.testing.assert_close(delta.deltas["a"], after["a"] - before["a"])
    restored = delta.restore()
    assert list(restored) == list(after)
    torch.testing.assert_close(restored, after)


def test_changed_deltas_are_added_to_the_pretrained():
    after, before = states(a=(3, 2))
    delta = StateDelta(after, before)
    torch.testing.assert_close(delta.restore({"a": torch.zeros(3, 2)}), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_deltas_are_float32_and_restore_the_same_bits(dtype):
    after, before = states(a=(30, 20))
    after, before = ({k: v.to(dtype) for k, v in s.items()} for s in (after, before))
    delta = StateDelta(after, before)
    assert delta.deltas["a"].dtype == torch.float32
    assert torch.equal(delta.restore()["a"], after["a"])


def test_integers_and_kept_modules_are_the_finetuned_ones():
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(2), "head": nn.Linear(2, 1)})
    after = {name: x + 1 for name, x in model.state_dict().items()}
    before = model.state_dict()
    delta = StateDelta(after, before, keep="head")
    assert not any("head" in key or "num_batches" in key for key in delta.deltas)
    zeros = {key: torch.zeros_like(x) for key, x in delta.deltas.items()}
    restored = delta.restore(zeros)
    assert restored["norm.num_batches_tracked"] is after["norm.num_batches_tracked"]
    assert restored["head.weight"] is after["head.weight"]
    torch.testing.assert_close(restored["norm.weight"], before["norm.weight"])


def test_names_to_keep_are_whole_parts_of_keys_and_may_be_new():
    after, before = states(**{"x.head.w": (2,), "header.w": (2,)})
    del before["x.head.w"]
    assert list(StateDelta(after, before, keep=["head"]).deltas) == ["header.w"]


@pytest.mark.parametrize(("rows", "old"), [(7, 5), (5, 7)])
def test_resized_embeddings_have_a_delta_of_the_common_rows(rows, old):
    before = {"embeddings.weight": torch.randn(old, 3)}
    after = {"embeddings.weight": torch.randn(rows, 3)}
    delta = StateDelta(after, before)
    assert delta.deltas["embeddings.weight"].shape == (5, 3)
    restored = delta.restore({"embeddings.weight": torch.zeros(5, 3)})["embeddings.weight"]
    assert torch.equal(restored[:5], before["embeddings.weight"][:5])
    assert torch.equal(restored[5:], after["embeddings.weight"][5:])


def test_differing_keys_and_shapes_are_named():
    after, before = states(a=(3, 2), b=(4,))
    with pytest.raises(ValueError, match=r"same keys.*: c"):
        StateDelta({**after, "c": torch.ones(1)}, before)
    with pytest.raises(ValueError, match=r"same keys.*: b"):
        StateDelta({"a": after["a"]}, before)
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[4, 2\] for a"):
        StateDelta(after, {**before, "a": torch.ones(4, 2)})
    with pytest.raises(ValueError, match="for embed"):
        StateDelta({"embed": torch.ones(2, 3)}, {"embed": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="deltas"):
        StateDelta(after, before).restore({})
