"""torch.compile around a whole training step, with a dropout rate that falls from step to step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regularizers.dropout import MultiSampleDropoutCrossEntropy
from regularizers.optim import AdamHD


class Model(nn.Module):
    """Two layers, and the fused loss as the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU())
        self.head = MultiSampleDropoutCrossEntropy(128, 10)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a batch."""
        loss: Tensor = self.head(self.body(x), target)
        return loss


def main() -> list[float]:
    """Take 60 steps; return the losses."""
    torch.manual_seed(0)
    model = Model()
    optimizer = AdamHD(model.parameters(), lr=3e-3)

    @torch.compile
    def step(x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    teacher = torch.randn(64, 10)
    losses = []
    for index in range(60):
        x = torch.randn(256, 64)
        model.head.p = 0.5 * (1 - index / 60)  # written into a tensor: nothing is compiled again
        losses.append(step(x, (x @ teacher).argmax(1)).item())
        if index == 2:  # the first steps make the optimizer's state
            torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, compiled before step 3 and never again")
    return losses


if __name__ == "__main__":
    found = main()
    assert found[-1] < 0.5 * found[0]
