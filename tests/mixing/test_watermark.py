"""The game of watermarking (paper 26): its objective and its metrics."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.mixing import (
    CompositionalAdversary,
    TransformFamily,
    bit_accuracy,
    detection_rate,
    watermark_capacity,
    watermark_step,
)


def _adversary():
    flip = TransformFamily("flip", lambda x, s: x.flip(-1), (0.0, 0.0))
    return CompositionalAdversary([flip], num_steps=1, encoder=nn.Linear(6, 4), hidden=4)


def test_watermark_step_adds_imperceptibility_to_the_defender():
    adversary, x = _adversary(), torch.randn(8, 6)
    message = torch.randint(2, (8, 3))
    extractor = nn.Linear(6, 3)
    embed = lambda x, m: x + 0.1 * m.sum(1, keepdim=True)
    step = watermark_step(
        embed, extractor, adversary, x, message, imperceptibility_weight=2.0, entropy_weight=0.0
    )
    expected = F.binary_cross_entropy_with_logits(extractor(step.attack.x), message.float())
    torch.testing.assert_close(step.defender_loss, expected.detach())
    extra = 2 * (embed(x, message) - x).square().mean()
    torch.testing.assert_close(step.loss, expected + extra)


def test_capacity_of_known_accuracies():
    # 1 - H2(0.11) = 0.500084, Shannon's example of a channel that carries half.
    found = watermark_capacity(torch.tensor([0.89, 0.11, 0.5, 1.0]), 100)
    expected = torch.tensor([50.0084, 50.0084, 0.0, 100.0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_detection_keeps_its_rate_of_false_alarms_also_with_ties():
    generator = torch.Generator().manual_seed(0)
    unmarked = (torch.randn(5000, generator=generator) * 4).round()
    rate = detection_rate(unmarked, unmarked)
    assert rate <= 0.01
    normal = torch.randn(100_000, generator=generator)
    # The normal quantile of 99 % is 2.326: a shift by it finds one half.
    assert detection_rate(normal + 2.326, normal).item() == pytest.approx(0.5, abs=0.01)


def test_bit_accuracy_counts_signs_for_each_message():
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0], [-1.0, -1.0, -1.0, 1.0]])
    message = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 0]])
    assert bit_accuracy(logits, message).tolist() == [0.75, 0.0]


def test_bad_input_names_the_argument():
    x, logits, bits = torch.ones(2, 6), torch.zeros(2, 3), torch.ones(2, 3)
    mark = lambda embed, extract, **o: watermark_step(embed, extract, _adversary(), x, bits, **o)
    for name, call in (
        ("embedder", lambda: mark(lambda x, m: x[:, :1], nn.Linear(6, 3))),
        ("extractor", lambda: mark(lambda x, m: x, nn.Linear(6, 2))),
        (
            "imperceptibility_weight",
            lambda: mark(lambda x, m: x, nn.Linear(6, 3), imperceptibility_weight=-1.0),
        ),
        ("message", lambda: bit_accuracy(logits, bits[:1])),
        ("accuracy", lambda: watermark_capacity(1.1, 3)),
        ("num_bits", lambda: watermark_capacity(0.9, 0)),
        ("marked", lambda: detection_rate(logits[:0], logits)),
        ("unmarked", lambda: detection_rate(logits, logits[:0])),
        (
            "false_positive_rate",
            lambda: detection_rate(logits, logits, false_positive_rate=2.0),
        ),
    ):
        with pytest.raises(ValueError, match=name):
            call()
