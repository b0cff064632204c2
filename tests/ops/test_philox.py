"""Philox words: known answers, and equality of every instruction set with the reference."""

import pytest
import torch

import regularizers
from regularizers import _extension
from regularizers.ops.philox import PHILOX_WORDS, dropout_mask, philox_4x32, philox_words
from tests.harness import run_python

KNOWN_ANSWERS = [  # counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
    ((0, 0, 0, 0), (42, 0), (0x9CEAF053, 0x77F5493B, 0x12BF50AD, 0x5742B3D7)),
]


def _signed(value, bits):
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def _kernel_words(seed, first_call, calls, stream=0, step=0):
    words = PHILOX_WORDS(torch.tensor(seed), first_call, calls, stream, step)
    return words.long() & 0xFFFFFFFF


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_reference_gives_the_known_answers(counter, key, words):
    found = philox_4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, found)) == words


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_operator_gives_the_known_answers(backend, counter, key, words):
    seed = _signed(key[0] | key[1] << 32, 64)
    call = _signed(counter[0] | counter[1] << 32, 64)
    with regularizers.use_backend(backend):
        found = _kernel_words(seed, call, 1, counter[2], counter[3])
    assert tuple(found.tolist()) == words


@pytest.mark.parametrize("first_call", [0, 5, 2**32 - 20, 2**32 + 3, 2**40])
def test_kernel_words_equal_the_reference_across_the_counter_word(first_call):
    # Element 2^34 is call 2^32, where the high counter word starts.
    found = _kernel_words(-3, first_call, 101, stream=7, step=2)
    expected = philox_words(torch.tensor(-3), 404, stream=7, step=2, first_call=first_call)
    assert torch.equal(found, expected)


def test_several_streams_stack_the_single_ones():
    seed = torch.tensor(9)
    together = philox_words(seed, 13, stream=torch.arange(3))
    assert torch.equal(together, torch.stack([philox_words(seed, 13, stream=s) for s in range(3)]))


def test_element_rule_takes_word_e_mod_4_of_call_e_div_4():
    words = philox_words(torch.tensor(1), 12)
    later = philox_words(torch.tensor(1), 4, first_call=2)
    assert torch.equal(words[8:], later)


def test_threshold_is_exact_at_its_edge():
    word = int(philox_words(torch.tensor(42), 1))
    for offset, kept in ((0, True), (1, False)):
        p = torch.tensor((word + offset) / 2**32, dtype=torch.float64)
        assert bool(dropout_mask((1,), p, torch.tensor(42), 1)) is kept


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_bits_of_the_reference(isa):
    if isa not in _extension.build_facts().get("instruction_sets", ""):
        pytest.skip(f"{isa} was not built for this machine's processor family")
    script = """
import torch, regularizers
from regularizers import _extension
from regularizers.ops import dropout_mask, dropout_samples, multi_sample_dropout_cross_entropy
print(_extension.build_facts()["instruction_set"])
p = torch.tensor(0.3, dtype=torch.float64)
expected = dropout_mask((7, 333), p, torch.tensor(6), 3)
for threads in (1, 2):
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.ones(7, 333, dtype=dtype)
        assert torch.equal(dropout_samples(x, p, 3, seed=6) != 0, expected), dtype
        assert torch.equal(dropout_samples(x.T.contiguous().T, p, 3, seed=6) != 0, expected), dtype
torch.manual_seed(0)
x, w, b = torch.randn(7, 333, requires_grad=True), torch.randn(41, 333) / 9, torch.randn(41)
results = []
for backend in ("cpp", "reference"):
    with regularizers.use_backend(backend):
        loss = multi_sample_dropout_cross_entropy(x, w, b, torch.arange(7), p=p, num_samples=3,
        seed=6)
    results.append((loss.detach(), *torch.autograd.grad(loss, x)))
torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
"""
    run = run_python(script, REGULARIZERS_ISA=isa)
    assert run.returncode == 0, run.stderr
    order = ["baseline", "avx2", "avx512"]
    assert order.index(run.stdout.strip()) <= order.index(isa)


def test_unknown_instruction_set_is_refused():
    run = run_python("import regularizers; regularizers.info()", REGULARIZERS_ISA="mmx")
    assert run.returncode != 0
    assert "REGULARIZERS_ISA must be baseline, avx2 or avx512" in run.stderr
