"""Operators and methods inside of data-loader workers, forked and spawned."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from regularizers.mixing import mixup
from regularizers.ops import dropout_samples, nearest_code, row_gate, sinkhorn

TIMEOUT = 120  # seconds, after which the loader raises: a hang does not last


class Augmented(Dataset):
    """Images under a mask of their own, with the code that is nearest to their mean."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(12, 3, 16, 16, generator=generator)
        self.codebook = torch.randn(4, 3, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        image = dropout_samples(self.images[place], 0.3, 2, seed=place)
        return image, nearest_code(image.mean((0, 2, 3)), self.codebook)


def collate(pairs):
    """Mix the batch, drop rows of it and measure it, by a seed that the batch itself gives."""
    images, codes = (torch.stack(part) for part in zip(*pairs, strict=True))
    seed = int(images.abs().sum().item() * 1000)
    batch = mixup(images, codes, alpha=0.4, generator=torch.Generator().manual_seed(seed))
    kept = row_gate(batch.x, 0.25, seed=seed)
    distance = sinkhorn(torch.cdist(kept.flatten(1), images.flatten(1)), epsilon=1.0, max_iter=20)
    return kept, batch.lam, distance.value


def _loaded(**options):
    torch.manual_seed(5)
    return list(DataLoader(Augmented(), batch_size=4, collate_fn=collate, **options))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_load_what_the_parent_loads(method):
    expected = _loaded()
    torch.set_num_threads(2)
    dropout_samples(torch.ones(2_000_000), 0.5, 2)  # the parent has threads that a fork lacks
    found = _loaded(num_workers=2, multiprocessing_context=method, timeout=TIMEOUT)
    assert len(found) == len(expected) == 3
    for have, want in zip(found, expected, strict=True):
        for part, other in zip(have, want, strict=True):
            # Workers have one thread; sums over columns have an order of their own.
            torch.testing.assert_close(part, other)


def test_persistent_workers_load_every_epoch_alike():
    torch.manual_seed(5)
    loader = DataLoader(
        Augmented(),
        batch_size=4,
        collate_fn=collate,
        num_workers=2,
        multiprocessing_context="fork",
        persistent_workers=True,
        timeout=TIMEOUT,
    )
    first, second = list(loader), list(loader)
    for have, want in zip(first, second, strict=True):
        assert torch.equal(have[0], want[0])
