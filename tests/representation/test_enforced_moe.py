"""Enforced experts: the contract, conversion of a pretrained model, and paper 153's two domains."""

import copy

import pytest
import torch
from torch import nn

from regularizers.representation import (
    EnforcedMoE,
    convert_to_enforced_moe,
    expert_assignment,
    mnr_loss,
    seed_domain_tokens,
)
from tests.harness import MethodContract


def _block(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12, dtype=dtype), nn.GELU(), nn.Linear(12, 6, dtype=dtype))


def _different(num_experts, dtype=torch.float32):
    """A mixture whose experts are no longer copies."""
    moe = EnforcedMoE(_block(dtype), num_experts)
    with torch.no_grad():
        for k, expert in enumerate(moe.experts):
            expert[0].weight.mul_(1 + k)
    return moe


def _hidden(n=5, dtype=torch.float32):
    return torch.linspace(-1, 1, n * 4 * 6, dtype=dtype).reshape(n, 4, 6)


class TestEnforcedMoE(MethodContract):
    def build(self, dtype):
        return _different(3, dtype)

    def call(self, module, dtype):
        return module(_hidden(dtype=dtype), torch.tensor([2, 0, 1, 0, 2]))

    def test_compiles_to_one_graph(self, fresh_dynamo):
        # With an int; how many sequences an expert has in a tensor is known on the host alone.
        module = self.build(torch.float32)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(_hidden(), 1), module(_hidden(), 1))

    def bad_inputs(self):
        moe, hidden = EnforcedMoE(_block(), 2), _hidden()
        assign = lambda *ids: torch.tensor(ids)
        return [
            (TypeError, "expert must", lambda: EnforcedMoE(lambda x: x, 2)),
            (ValueError, "num_experts must", lambda: EnforcedMoE(_block(), 0)),
            (ValueError, "assignment must lie", lambda: moe(hidden, assign(0, 1, 2, 0, 0))),
            (ValueError, "assignment must lie", lambda: moe(hidden, assign(0, 1, -1, 0, 0))),
            (ValueError, "assignment must lie", lambda: moe(hidden, 2)),
            (ValueError, "assignment must have shape", lambda: moe(hidden, assign(0, 1))),
            (TypeError, "assignment must", lambda: moe(hidden, assign(0, 1, 0, 0, 1).int())),
            (TypeError, "assignment must", lambda: moe(hidden, 1.0)),
            (ValueError, "assignment must be given", lambda: moe(hidden)),
        ]


def test_compiled_code_may_assign_by_tensors(fresh_dynamo):
    moe = _different(2)
    compiled = torch.compile(moe, backend="aot_eager")
    for ids in ([0, 1, 1, 0, 1], [1, 1, 1, 1, 0]):
        torch.testing.assert_close(
            compiled(_hidden(), torch.tensor(ids)), moe(_hidden(), torch.tensor(ids))
        )


def test_each_sequence_gets_what_its_expert_makes_of_it_alone():
    moe, hidden, ids = _different(3, torch.float64), _hidden(dtype=torch.float64), [2, 0, 1, 0, 2]
    expected = torch.cat([moe.experts[k](hidden[i : i + 1]) for i, k in enumerate(ids)])
    torch.testing.assert_close(moe(hidden, torch.tensor(ids)), expected)


def test_every_expert_runs_once_on_its_own_sequences():
    seen = []
    moe = EnforcedMoE(_block(), 4)
    for expert in moe.experts:
        expert.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    moe(_hidden(), torch.tensor([3, 0, 3, 3, 0]))
    assert seen == [2, 3]


def test_experts_share_no_parameters():
    moe = EnforcedMoE(_block(), 3)
    parameters = [parameter for expert in moe.experts for parameter in expert.parameters()]
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters) == 12


def test_the_given_module_is_copied_or_becomes_the_first_expert():
    block = _block()
    assert EnforcedMoE(block, 2).experts[0] is not block
    moe = EnforcedMoE(block, 2, copy=False)
    assert moe.experts[0] is block
    assert moe.experts[1] is not block


def test_experts_without_sequences_get_no_gradient():
    moe = EnforcedMoE(_block(), 3)
    moe(_hidden(), torch.zeros(5, dtype=torch.int64)).sum().backward()
    assert all(parameter.grad is not None for parameter in moe.experts[0].parameters())
    for expert in moe.experts[1:]:
        assert all(parameter.grad is None for parameter in expert.parameters())


def test_an_empty_batch_gives_an_empty_result():
    assert _different(2)(_hidden()[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 4, 6)


class _Layer(nn.Module):
    """A transformer's layer whose feed-forward block is a module."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


def _model():
    torch.manual_seed(1)
    return nn.Sequential(_Layer(), _Layer())


def _convert(model, num_experts=3):
    return convert_to_enforced_moe(model, lambda name, _: name.endswith("mlp"), num_experts)


@pytest.mark.parametrize("ids", [[0] * 5, [2] * 5, [0, 1, 2, 1, 0]])
def test_a_converted_model_gives_what_it_gave_before(ids):
    model, x = _model(), _hidden()
    before = model(x)
    converted = _convert(model)
    assert converted is model
    assert sum(isinstance(module, EnforcedMoE) for module in model.modules()) == 2
    with expert_assignment(model, torch.tensor(ids)):
        after = model(x)
    if len(set(ids)) == 1:
        assert torch.equal(after, before)  # bit for bit: the same products
    else:
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_conversion_keeps_parameters_that_an_optimizer_holds():
    model = _model()
    before = {id(parameter) for parameter in model.parameters()}
    held = {id(parameter) for parameter in _convert(model).parameters()}
    assert before < held


def test_a_model_that_is_matched_itself_is_wrapped():
    block = _block()
    moe = convert_to_enforced_moe(block, lambda name, module: name == "", 2)
    assert isinstance(moe, EnforcedMoE)
    torch.testing.assert_close(moe(_hidden(), 1), block(_hidden()))


def test_assignments_hold_inside_the_block_alone_and_nest():
    moe = _different(2)
    one, two = moe(_hidden(), 0), moe(_hidden(), 1)
    with expert_assignment(moe, 0):
        with expert_assignment(moe, 1):
            assert torch.equal(moe(_hidden()), two)
        assert torch.equal(moe(_hidden()), one)
    with pytest.raises(ValueError, match="assignment must be given"):
        moe(_hidden())


def test_an_error_inside_the_block_ends_the_assignment():
    moe = _different(2)
    wrong = torch.tensor([0, 1])
    with (
        pytest.raises(ValueError, match="assignment must have shape"),
        expert_assignment(moe, wrong),
    ):
        moe(_hidden())
    with pytest.raises(ValueError, match="assignment must be given"):
        moe(_hidden())


def test_conversion_and_assignment_refuse_what_has_no_effect():
    with pytest.raises(ValueError, match="match must"):
        convert_to_enforced_moe(_model(), lambda name, module: False, 2)
    with pytest.raises(ValueError, match="model must"), expert_assignment(_model(), 0):
        pass
    with pytest.raises(TypeError, match="assignment must"), expert_assignment(_different(2), "0"):
        pass


def test_domain_tokens_start_as_copies_and_part_in_training():
    embedding = nn.Embedding(10, 4, padding_idx=0, max_norm=5.0, dtype=torch.float64)
    original = embedding.weight.detach().clone()
    table = seed_domain_tokens(embedding, source_id=3, count=2)
    assert (table.num_embeddings, table.padding_idx, table.max_norm) == (12, 0, 5.0)
    assert table.weight.requires_grad
    assert torch.equal(table.weight[:10], original)
    assert torch.equal(table.weight[10:], original[3].expand(2, -1))
    with torch.no_grad():
        table.weight[10] += 1
    assert torch.equal(table.weight[11], original[3])
    assert torch.equal(embedding.weight, original)


def test_a_frozen_table_stays_frozen():
    embedding = nn.Embedding(10, 4).requires_grad_(False)
    assert not seed_domain_tokens(embedding, 0, 1).weight.requires_grad


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (TypeError, "embedding must", lambda: seed_domain_tokens(nn.Linear(2, 2), 0, 1)),
        (ValueError, "source_id must", lambda: seed_domain_tokens(nn.Embedding(3, 2), 3, 1)),
        (ValueError, "source_id must", lambda: seed_domain_tokens(nn.Embedding(3, 2), -1, 1)),
        (ValueError, "count must", lambda: seed_domain_tokens(nn.Embedding(3, 2), 0, 0)),
    ],
)
def test_bad_tables_name_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call()


def test_two_experts_rank_two_domains_that_one_network_cannot():
    # Sheet of paper 153: partners of domain A agree in dims 0-2 alone, those of B in 13-15.
    torch.set_num_threads(1)
    shared = torch.tensor([[0, 1, 2], [13, 14, 15]])

    def pairs(domain, generator):
        a, b = torch.randn(2, len(domain), 16, generator=generator)
        which = shared[domain]
        return a, b.scatter(1, which, a.gather(1, which))

    def accuracy(num_experts):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        moe = EnforcedMoE(nn.Linear(16, 8), num_experts)
        optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
        # Both domains in each batch, and domains look alike to the network.
        domain = torch.arange(2).repeat_interleave(32)
        expert = domain if num_experts == 2 else torch.zeros_like(domain)
        for _ in range(300):
            a, b = pairs(domain, generator)
            loss = mnr_loss(moe(a, expert), moe(b, expert), scale=20, normalize=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = []
        for k in range(2):
            domain = torch.full((64,), k)
            a, b = pairs(domain, generator)
            with torch.no_grad():
                z, w = (nn.functional.normalize(moe(x, min(k, num_experts - 1))) for x in (a, b))
            found.append(((z @ w.T).argmax(1) == torch.arange(64)).float().mean())
        return torch.stack(found)

    one, two = accuracy(1), accuracy(2)
    assert (two - one >= 0.4).all(), (one, two)


def test_a_copied_mixture_forgets_no_expert():
    moe = _different(2)
    twin = copy.deepcopy(moe)
    assert torch.equal(twin(_hidden(), 1), moe(_hidden(), 1))
