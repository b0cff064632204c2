"""torch.export of a trained model: in eval() the regularizers leave nothing in the graph."""

from __future__ import annotations

import torch
from torch import nn

from regularizers.dropout import MultiSampleDropout, ScheduledDropPath


class Residual(nn.Module):
    """A layer beside the identity, dropped now and then while training."""

    def __init__(self, features: int, index: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, features), nn.GELU())
        self.drop_path = ScheduledDropPath(0.1, index, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x plus the layer of x."""
        dropped: torch.Tensor = self.drop_path(self.body(x))
        return x + dropped


def main() -> list[str]:
    """Return the names of the operators in the exported graph."""
    torch.manual_seed(0)
    model = nn.Sequential(
        Residual(32, 0), Residual(32, 1), MultiSampleDropout(nn.Linear(32, 10), 0.5)
    )
    model.eval()
    x = torch.randn(4, 32)
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    print(f"{len(calls)} operators, of regularizers: {sum('regularizers' in c for c in calls)}")
    return calls


if __name__ == "__main__":
    assert not [call for call in main() if "regularizers" in call]
