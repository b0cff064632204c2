"""DistributedDataParallel over two gloo processes, with a loss of batch statistics.

VICReg's variance and covariance concern the batch of all processes: ``process_group=`` gathers it,
and the parameters end where one process with the whole batch ends.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regularizers.optim import AdamHD
from regularizers.transport import vicreg_loss

WORLD, BATCH, STEPS = 2, 64, 20


def views(step: int) -> tuple[Tensor, Tensor]:
    """Return two noisy views of one batch, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    clean = torch.randn(BATCH, 16, generator=generator)
    one, two = (clean + 0.1 * torch.randn(BATCH, 16, generator=generator) for _ in range(2))
    return one, two


def train(rank: int, world: int) -> list[Tensor]:
    """Train on every ``world``-th row from ``rank``; return the parameters."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).double()
    group = dist.group.WORLD if world > 1 else None
    if world > 1:
        model = DistributedDataParallel(model)
    optimizer = AdamHD(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        one, two = (view[rank::world].double() for view in views(step))
        z, other = model(one), model(two)
        spread = vicreg_loss(z, process_group=group) + vicreg_loss(other, process_group=group)
        loss = 25 * (z - other).square().mean() + spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def process(rank: int, folder: str) -> None:
    """Run one of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store)
    found = train(rank, WORLD)
    if rank == 0:
        torch.save(found, Path(folder) / "parameters.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> float:
    """Return the largest difference from training in one process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (folder,), nprocs=WORLD)
        found = torch.load(Path(folder) / "parameters.pt")
    pairs = zip(found, train(0, 1), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"after {STEPS} steps, two processes and one differ by at most {difference:.1e}")
    return difference


if __name__ == "__main__":
    assert main() < 1e-9
