"""FSDP2 on two gloo processes: AdamHD on shards, one threshold for all shards of a tensor."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from regularizers.optim import AdamHD

WORLD, STEPS = 2, 20


def train(shard: bool) -> dict[str, Tensor]:
    """Train on the same batches everywhere; return whole parameters and their thresholds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 5))
    if shard:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = AdamHD(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 16, generator=generator)
        loss = (model(x) - x[:, :5]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = {}
    for name, p in model.named_parameters():
        found[name] = (p.full_tensor() if shard else p).detach()
        found[f"threshold of {name}"] = optimizer.state[p]["delta"]
    return found


def process(rank: int, folder: str) -> None:
    """Run one of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store)
    found = train(shard=True)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> float:
    """Return the largest difference from training unsharded in one process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (folder,), nprocs=WORLD)
        found = torch.load(Path(folder) / "found.pt")
    alone = train(shard=False)
    difference = max((found[name] - alone[name]).abs().max().item() for name in alone)
    print(f"parameters and thresholds of shards differ from whole ones by at most {difference:.1e}")
    return difference


if __name__ == "__main__":
    assert main() < 1e-5
