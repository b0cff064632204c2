"""Ten thousand training steps: memory stays where it was after the first of them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from regularizers.dropout import MultiSampleDropoutCrossEntropy
from regularizers.ops import mix, row_gate, sliced_epps_pulley
from regularizers.optim import AdamHD

STEPS, WARM_UP = 10_000, 2_000
# A tensor of a few elements that is kept takes some 600 bytes, with its autograd node over a
# kilobyte: 5 to 10 MiB over the steps that count. What the allocator itself moves by is below 1.
TOLERANCE = 3 * 2**20
PAGES = Path("/proc/self/statm")


def _resident_bytes():
    return int(PAGES.read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not PAGES.exists(), reason="needs Linux's /proc")
def test_memory_is_flat_over_ten_thousand_training_steps():
    torch.set_num_threads(1)
    x, target = torch.randn(16, 8), torch.randint(0, 3, (16,))
    first, second = nn.Linear(8, 12), nn.Linear(12, 12)
    head = MultiSampleDropoutCrossEntropy(12, 3, num_samples=2)
    model = nn.ModuleList([first, second, head])
    optimizer = AdamHD(model.parameters(), lr=1e-3)
    slices = nn.functional.normalize(torch.randn(12, 4), dim=0)
    after_warm_up = 0
    for step in range(STEPS):
        if step == WARM_UP:
            after_warm_up = _resident_bytes()
        mixed = mix(x, torch.randperm(16), 0.9)
        hidden = first(mixed).relu()
        hidden = row_gate(second(hidden), 0.1, residual=hidden)
        loss = head(hidden, target) + 0.01 * sliced_epps_pulley(hidden[None], slices, num_knots=5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert _resident_bytes() - after_warm_up < TOLERANCE
