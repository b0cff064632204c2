"""gathered_attention: the operator contract, and what keys outside of a list may not do."""

import pytest
import torch
from torch.nn import functional as F

import regularizers
from regularizers.ops import gathered_attention, philox_words
from regularizers.ops.subsampled_attention import ATTENTION, ATTENTION_BACKWARD, SAMPLE_WORDS
from tests.harness import TOLERANCES, OperatorContract, Sample, forward_and_gradients


def _randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _problem(dtype, *, batch=1, heads=1, queries=5, tokens=5, features=2, values=1):
    return (
        _randn(batch, heads, queries, features, dtype=dtype),
        _randn(batch, heads, tokens, features, dtype=dtype, seed=1),
        _randn(batch, heads, tokens, values, dtype=dtype, seed=2),
    )


def _index(batch, tokens, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=generator)[:n] for _ in range(batch)])


def _outside(index, tokens):
    own = torch.ones(index.shape[0], tokens, dtype=torch.bool)
    for row, listed in zip(own, index, strict=True):
        row[listed[listed >= 0]] = False
    return own


WINDOWS = torch.tensor([[[4, 1], [0, 3], [2, -1]]])


class TestContract(OperatorContract):
    bitwise_across_threads = True  # products are cut by sizes alone
    autocast_dtype = torch.bfloat16
    scheduled = {}

    def samples(self, dtype):
        index, several = _index(1, 5, 3), _index(2, 5, 3)
        several[1, 2] = -1

        def sample(name, index=index, bias=None, sizes=None, transposed=False, **options):
            tensors = _problem(dtype, **(sizes or {}))
            if transposed:
                tensors = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors)
            if bias is None:
                call = lambda q, k, v, **o: gathered_attention(q, k, v, index, **o)
            else:
                tensors = (*tensors, bias.to(dtype))
                call = lambda q, k, v, b, **o: gathered_attention(q, k, v, index, attn_bias=b, **o)
            return Sample(name, tensors, call, options)

        own = _outside(index, 5)
        own[0, own[0].nonzero()[0]] = False  # neither listed nor its own
        two, heads = {"batch": 2}, {"heads": 2}
        return [
            sample("one list a sample", several, sizes=two),
            sample("cross", sizes={"queries": 4}, scale=0.3),
            sample("causal with the own key", is_causal=True, own=own, transposed=True),
            sample("bias of all heads", bias=_randn(1, 1, 5, 5, seed=4), own=own, sizes=heads),
            sample("bias of a sample", several, _randn(2, 1, 5, 5, seed=4), sizes=two),
            sample("windows", index=WINDOWS, query_index=WINDOWS, is_causal=True),
            sample("windows, bias", WINDOWS, _randn(1, 2, 5, 5), heads, query_index=WINDOWS),
            sample("one of all", index[:, :1], sizes={"features": 1}),
        ]

    def empty(self, dtype):
        index = torch.zeros(1, 0, dtype=torch.int64)
        call = lambda q, k, v: gathered_attention(q, k, v, index)
        return [
            Sample("no samples", _problem(dtype, batch=0), call),
            Sample("no queries", _problem(dtype, queries=0), call),
            Sample("no keys listed", _problem(dtype), call),
            Sample("no keys", _problem(dtype, tokens=0), call),
        ]

    def operator_calls(self):
        tensors = [t.requires_grad_() for t in _problem(torch.float64, heads=2)]
        bias = _randn(1, 2, 5, 5).requires_grad_()
        index = _index(1, 5, 3).unsqueeze(1)
        lists = (bias, index, None, _outside(index[:, 0], 5))
        with torch.no_grad():
            results = ATTENTION.kernel(None)(*tensors, *lists, True, None)
        grad = _randn(1, 2, 5, 1).requires_grad_()
        return [
            (ATTENTION, (*tensors, None, WINDOWS, WINDOWS, None, True, 0.3)),
            (ATTENTION_BACKWARD, (grad, *tensors, *lists, *results, True, None, True)),
            (SAMPLE_WORDS, (torch.tensor(3), 2, 5, 1)),
        ]

    def bad_inputs(self):
        q, k, v = _problem(torch.float32, batch=2, heads=2)
        index = _index(2, 5, 3)
        own = _outside(index, 5)
        bias = torch.zeros(1, 1, 5, 5)

        def call(q=q, k=k, v=v, index=index, **options):
            return lambda: gathered_attention(q, k, v, index, **options)

        twice = torch.tensor([[1, 1]])
        return [
            (TypeError, "q must", call(q=q.long())),
            (ValueError, "q must", call(q=q[0])),
            (TypeError, "k must", call(k=k.double())),
            (ValueError, "k must", call(k=k[..., :1])),
            (ValueError, "k must", call(k=k[:1])),
            (ValueError, "v must", call(v=v[:, :, :4])),
            (ValueError, "v must", call(v=v.to("meta"))),
            (TypeError, "key_index must", call(index=index.int())),
            (TypeError, "key_index must", call(index=[[1]])),
            (ValueError, "key_index must", call(index=index[0])),
            (ValueError, "key_index must", call(index=_index(3, 5, 3))),
            (ValueError, "key_index must lie", call(index=index + 5)),
            (ValueError, "key_index must lie", call(index=index - 9)),
            (ValueError, "key_index must name", call(index=twice)),
            (ValueError, "query_index must be given", call(index=WINDOWS)),
            (ValueError, "query_index must have", call(query_index=WINDOWS)),
            (ValueError, "query_index must name every", call(index=WINDOWS[:, :2],
                                                            query_index=WINDOWS[:, :2])),
            (TypeError, "own must", call(own=own.int())),
            (ValueError, "own must have", call(own=own[:, :3])),
            (ValueError, "own must be False", call(own=~own)),
            (ValueError, "own must be None", call(q=q[:, :, :4], own=own)),
            (ValueError, "own must be None", call(index=WINDOWS, query_index=WINDOWS, own=own)),
            (TypeError, "attn_bias must", call(attn_bias=bias.double())),
            (ValueError, "attn_bias must", call(attn_bias=bias[0])),
            (ValueError, "attn_bias must", call(attn_bias=torch.zeros(1, 3, 5, 5))),
        ]  # fmt: skip


# Sizes around the blocks of the kernel: 64 queries, 128 keys, panels of up to 32 features, parts of
# four blocks.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "n"), [(65, 64), (300, 129), (600, 257)])
@pytest.mark.parametrize("features", [31, 64, 80])
def test_large_problems_agree_with_the_reference(dtype, tokens, n, features):
    tensors = _problem(
        dtype, batch=1, heads=2, queries=tokens, tokens=tokens, features=features, values=33
    )
    index = _index(1, tokens, n)
    options = {"is_causal": True, "own": _outside(index, tokens)}
    results = []
    for backend in ("cpp", "reference"):
        with regularizers.use_backend(backend):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            call = lambda *t: gathered_attention(*t, index, **options)
            results.append(forward_and_gradients(call, leaves))
    torch.testing.assert_close(*results, **TOLERANCES[dtype])


def test_it_is_dense_attention_to_the_listed_keys():
    q, k, v = _problem(torch.float64, queries=40, tokens=50)
    index = _index(1, 50, 12)
    expected = F.scaled_dot_product_attention(q, k[:, :, index[0]], v[:, :, index[0]])
    torch.testing.assert_close(gathered_attention(q, k, v, index), expected)


def test_it_is_dense_attention_with_the_other_keys_hidden():
    q, k, v = _problem(torch.float64, batch=2, heads=2, queries=40, tokens=40)
    index = _index(2, 40, 12)
    own = _outside(index, 40)
    hidden = torch.ones(2, 40, 40, dtype=torch.bool)
    for sample, listed in zip(hidden, index, strict=True):
        sample[:, listed] = False
    visible = (~hidden).tril() | torch.eye(40, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
    found = gathered_attention(q, k, v, index, own=own, is_causal=True)
    torch.testing.assert_close(found, expected)


def test_nothing_of_an_unlisted_key_is_read():
    q, k, v = _problem(torch.float32)
    index = torch.tensor([[0, 2, 4]])
    k[:, :, 1], v[:, :, 3] = torch.nan, torch.inf
    assert gathered_attention(q, k, v, index).isfinite().all()


def test_gradients_of_unlisted_keys_are_exactly_zero():
    leaves = [tensor.requires_grad_() for tensor in _problem(torch.float32, heads=2)]
    index = torch.tensor([[0, 2, 4]])
    gathered_attention(*leaves, index).sum().backward()
    for leaf in leaves[1:]:
        listed = (leaf.grad != 0).any(-1)
        assert listed[:, :, index[0]].all()
        assert listed.sum() == 2 * 3


def test_a_query_that_sees_no_key_gets_zero_and_gives_no_gradient():
    leaves = [tensor.requires_grad_() for tensor in _problem(torch.float64)]
    found = gathered_attention(*leaves, torch.tensor([[4, 3]]), is_causal=True)
    found.sum().backward()
    assert (found[:, :, :3] == 0).all()
    assert (leaves[0].grad[:, :, :3] == 0).all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_a_bias_of_minus_infinity_hides_a_key():
    q, k, v = _problem(torch.float64)
    bias = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    bias[..., 2] = -torch.inf
    found = gathered_attention(q, k, v, torch.tensor([[0, 2, 4]]), attn_bias=bias)
    torch.testing.assert_close(found, gathered_attention(q, k, v, torch.tensor([[0, 4]])))
    bias.fill_(-torch.inf)
    assert (gathered_attention(q, k, v, torch.tensor([[0, 4]]), attn_bias=bias) == 0).all()


def test_large_logits_neither_overflow_nor_vanish():
    q, k, v = _problem(torch.float32, queries=300, tokens=300)
    index = torch.arange(300)[None]
    found = gathered_attention(300 * q, 300 * k, v, index)
    expected = F.scaled_dot_product_attention(300 * q, 300 * k, v)
    # Logits near 1e5 have an ulp of 0.01, and neighbours of the largest get weights like it.
    assert found.isfinite().all()
    assert ((found - expected).abs() < 0.05).double().mean() > 0.99


def test_results_lie_in_memory_token_by_token():
    leaves = [tensor.requires_grad_() for tensor in _problem(torch.float32)]
    found = gathered_attention(*leaves, torch.tensor([[0, 2]]))
    assert found.transpose(1, 2).is_contiguous()


def test_words_of_samples_are_streams():
    seed = torch.tensor(-5)
    words = SAMPLE_WORDS.kernel(None)(seed, 3, 1030, 2)
    assert words.shape == (3, 1030)
    for stream in range(3):
        assert torch.equal(words[stream], philox_words(seed, 1030, stream=stream, step=2))


@pytest.mark.parametrize("logit", [float("nan"), float("inf"), -float("inf")])
def test_an_own_key_of_no_finite_logit_counts_as_any_other(logit):
    q, v = torch.ones(1, 1, 2, 1), torch.tensor([3.0, 5.0]).reshape(1, 1, 2, 1)
    bias, own = (
        torch.tensor([logit, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2),
        torch.tensor([[True, False]]),
    )
    none = torch.zeros(1, 0, dtype=torch.int64)
    found = gathered_attention(q, q, v, none, own=own, attn_bias=bias)
    expected = 0.0 if logit == -float("inf") else float("nan")
    torch.testing.assert_close(
        found.flatten(), torch.tensor([expected, 0.0]), equal_nan=True, rtol=0, atol=0
    )
