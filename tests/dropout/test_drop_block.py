"""DropBlock layers: the method contract and the facts of the sheet of paper 57."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.dropout import (
    DropBlock2d,
    apply_progressive_drop_block,
    drop_block2d,
    progressive_rates,
)
from regularizers.ops import drop_block
from tests.harness import MethodContract


class TestDropBlock2d(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 1, dtype=dtype), DropBlock2d(0.3, 3))

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 128, dtype=dtype).reshape(2, 2, 4, 8))

    def inert(self, module):
        x = torch.randn(2, 2, 4, 8)
        return module(x), module[0](x)

    def bad_inputs(self):
        x = torch.ones(1, 1, 4, 4)
        conv = nn.Sequential(nn.Conv2d(1, 1, 1))
        apply = apply_progressive_drop_block
        return [
            (ValueError, "p must", lambda: DropBlock2d(1.0)),
            (ValueError, "p must", lambda: DropBlock2d(-0.1)),
            (ValueError, "block_size must", lambda: DropBlock2d(0.1, 4)),
            (ValueError, "gamma must", lambda: DropBlock2d(0.1, gamma="other")),
            (ValueError, "normalize must", lambda: DropBlock2d(0.1, normalize="other")),
            (ValueError, "x must", lambda: DropBlock2d(0.1)(x[0])),
            (ValueError, "block_size must", lambda: drop_block2d(x, 0.1, 5, gamma="exact")),
            (TypeError, "x must", lambda: drop_block2d(3.0, 0.0)),
            (ValueError, "start must", lambda: progressive_rates(-0.1)),
            (ValueError, "end must", lambda: progressive_rates(0.1, 1.0)),
            (ValueError, "num_stages must", lambda: progressive_rates(num_stages=0)),
            (ValueError, "modules must", lambda: apply(conv, ["1"], [0.1])),
            (ValueError, "modules must", lambda: apply(conv, [], [])),
            (ValueError, "modules must", lambda: apply(conv, ["0", "0"], [0.1, 0.2])),
            (ValueError, "rates must", lambda: apply(conv, ["0"], [0.1, 0.2])),
            (ValueError, "rates must", lambda: apply(conv, ["0"], [1.0])),
            (ValueError, "block_size must", lambda: apply(conv, ["0"], [0.1], block_size=2)),
        ]


def test_a_refused_option_changes_nothing():
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="gamma must"):
        apply_progressive_drop_block(model, ["0"], [0.1], gamma="other")
    assert not list(model[0].children())


def test_nothing_to_do_returns_the_same_tensor():
    x = torch.randn(1, 2, 8, 8)
    assert drop_block2d(x, 0.0) is x
    assert drop_block2d(x, 0.5, training=False) is x
    assert DropBlock2d(0.0)(x) is x
    assert DropBlock2d(0.5).eval()(x) is x


def test_masks_are_those_of_the_operator():
    x = torch.randn(2, 3, 16, 16)
    options = {"gamma": "exact", "shared_channels": False, "seed": 3}
    assert torch.equal(drop_block2d(x, 0.3, 5, **options), drop_block(x, 0.3, 5, **options))


def test_rates_of_four_stages():
    assert progressive_rates() == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert progressive_rates(num_stages=1) == [0.2]


def test_stages_get_their_rates_and_keys_stay():
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()),
            "b": nn.Conv2d(2, 2, 1),
            "c": nn.Conv2d(2, 2, 1),
            "d": DropBlock2d(0.0, 3),
        }
    )
    keys = set(model.state_dict())
    apply_progressive_drop_block(model, ["a", ["b", "c"], "d"], block_size=5)
    layers = [m for m in model.modules() if isinstance(m, DropBlock2d)]
    rates = [m.p.item() for m in layers]
    assert rates == pytest.approx([0.05, 0.125, 0.125, 0.2])
    assert [m.block_size for m in layers] == [5, 5, 5, 3]
    assert set(model.state_dict()) == keys
    x = torch.ones(1, 1, 40, 40)
    assert (model["b"](model["a"](x)) == 0).any()


def test_a_schedule_of_the_layer_compiles_once(fresh_dynamo):
    layer = DropBlock2d(0.0, 3)
    graphs = []
    compiled = torch.compile(
        layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for step in range(20):
        layer.p = step / 40
        compiled(torch.ones(1, 1, 8, 8))
    assert len(graphs) == 1


@pytest.mark.slow
def test_blocks_lower_the_test_loss_of_a_small_network():
    # Sheet of paper 57, fact 7: 4 classes of 6 x 6 patterns in 16 x 16 noise, 300 images.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    patterns = torch.randn(4, 6, 6)

    def images(count):
        target = torch.randint(4, (count,))
        x = torch.randn(count, 1, 16, 16)
        places = torch.randint(0, 11, (count, 2))
        for i, (row, column) in enumerate(places.tolist()):
            x[i, 0, row : row + 6, column : column + 6] += patterns[target[i]]
        return x, target

    train, held_out = images(300), images(600)

    def test_loss(rates):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), DropBlock2d(rates[0], 5)),
            nn.MaxPool2d(2),
            nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), DropBlock2d(rates[1], 3)),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, 4),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(30):
            for rows in torch.randperm(300).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
                optimizer.step()
        with torch.no_grad():
            return F.cross_entropy(model.eval()(held_out[0]), held_out[1]).item()

    without, with_blocks = test_loss((0.0, 0.0)), test_loss((0.2, 0.4))
    assert with_blocks <= without - 0.1, (without, with_blocks)
