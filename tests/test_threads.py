"""Operators called from many Python threads at once give the bits that they give alone."""

import threading

import pytest
import torch

from tests.fuzzing import TABLE, seeded_draws
from tests.harness import forward_and_gradients

THREADS = 8
ROUNDS = 5


def _calls(name):
    """Fixed calls of an operator, large enough for its kernel to share the work out."""
    for seed in range(3):
        draws = seeded_draws(
            seed, sizes=(5, 8, 9), rows=(33, 130), values=("normal",), faulty=False
        )
        yield TABLE[name].build(draws)


def _results(name, samples):
    torch.set_num_threads(2)  # of this Python thread
    found = []
    for sample in samples:
        if TABLE[name].gradients:
            result, gradients = forward_and_gradients(sample, sample.leaves())
            found += [result, *(gradient for gradient in gradients if gradient is not None)]
        else:
            found.append(sample(*sample.differentiable))
    return found


@pytest.mark.parametrize("name", TABLE)
def test_eight_threads_at_once_give_the_bits_of_one(name):
    samples = list(_calls(name))
    found = [[] for _ in range(THREADS)]
    start = threading.Barrier(THREADS)

    def alone():
        found[0].append(_results(name, samples))

    def beside_others(results):
        start.wait()
        results += [_results(name, samples) for _ in range(ROUNDS)]

    first = threading.Thread(target=alone)
    first.start()
    first.join()
    (expected,) = found[0]
    found[0] = []
    threads = [threading.Thread(target=beside_others, args=(results,)) for results in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(results) for results in found] == [ROUNDS] * THREADS  # none of them raised
    for result in (result for results in found for result in results):
        for have, want in zip(result, expected, strict=True):
            assert torch.equal(have, want)
