"""Mixed precision two ways: autocast on float32 parameters, and bfloat16 parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regularizers.dropout import MultiSampleDropoutCrossEntropy
from regularizers.optim import AdamHD


def make(dtype: torch.dtype) -> tuple[nn.Sequential, MultiSampleDropoutCrossEntropy]:
    """Return a body and a head."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 128), nn.GELU())
    head = MultiSampleDropoutCrossEntropy(128, 10, p=0.2)
    return body.to(dtype), head.to(dtype)


def train(*, autocast: bool, **options: str) -> float:
    """Take 150 steps; return the accuracy without dropout."""
    body, head = make(torch.float32 if autocast else torch.bfloat16)
    optimizer = AdamHD([*body.parameters(), *head.parameters()], lr=3e-3, **options)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 10, generator=generator)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(256, 64, generator=generator)
        return (x if autocast else x.bfloat16()), (x @ teacher).argmax(1)

    for _ in range(150):
        x, target = batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = head(body(x), target)  # the product in bfloat16, the loss in float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    x, target = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return (head.logits(body(x)).argmax(1) == target).float().mean().item()


def main() -> dict[str, float]:
    """Return the accuracy of each way."""
    found = {
        "autocast": train(autocast=True),
        "bfloat16, float32 master": train(autocast=False, rounding="master"),
        "bfloat16, stochastic rounding": train(autocast=False, rounding="stochastic"),
    }
    print("accuracy: " + "; ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    assert min(main().values()) > 0.75
