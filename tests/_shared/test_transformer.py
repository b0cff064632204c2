"""The transformer that several methods use: its mask, its positions, its checks."""

import pytest
import torch

from regularizers._shared.transformer import Transformer, sinusoidal_positions


def test_positions_are_sines_and_cosines_of_falling_frequency():
    waves = sinusoidal_positions(5, 4, base=100.0)
    for position in range(5):
        angles = torch.tensor([position, position / 10.0])
        expected = torch.stack([angles.sin(), angles.cos()], -1).flatten()
        torch.testing.assert_close(waves[position], expected)


def test_an_odd_number_of_features_ends_with_a_sine():
    torch.testing.assert_close(sinusoidal_positions(4, 3)[:, 0], torch.arange(4.0).sin())
    assert sinusoidal_positions(4, 3).shape == (4, 3)


def test_masked_tokens_are_as_good_as_absent():
    model = Transformer(8, 2, 2).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    present = torch.tensor([True, False, True, True, False]).expand(3, 5)
    torch.testing.assert_close(model(x, present)[:, [0, 2, 3]], model(x[:, [0, 2, 3]]))


def test_tokens_are_a_set():
    model, x = Transformer(8, 2, 2).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x.flip(1)), model(x).flip(1))


def test_bad_arguments_are_named():
    for name, call in [
        ("num_heads must", lambda: Transformer(8, 1, 3)),
        ("depth must", lambda: Transformer(8, -1, 2)),
        ("base must", lambda: sinusoidal_positions(3, 4, base=0.0)),
        ("count must", lambda: sinusoidal_positions(0, 4)),
    ]:
        with pytest.raises(ValueError, match=name):
            call()
