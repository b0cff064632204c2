"""MixUp: the module's contract and what the blend must hold."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from regularizers.mixing.cutmix import cutmix
from regularizers.mixing.mixup import MixUp, mixup
from regularizers.ops import mix
from tests.harness import GraphRecorder, MethodContract


class Classifier(nn.Module):
    """A mixer before a linear model, with its loss; a plain model in evaluation."""

    def __init__(self, mixer, dtype, features):
        super().__init__()
        self.mixer = mixer
        self.linear = nn.Linear(features, 3, dtype=dtype)

    def forward(self, x, target):
        batch = self.mixer(x, target)
        return batch.loss(self.linear(batch.x.flatten(1)))


class TestMixUp(MethodContract):
    target = torch.tensor([0, 2, 1, 2, 0])

    def build(self, dtype):
        torch.manual_seed(0)
        return Classifier(MixUp(alpha=0.4, prob=0.9, per_sample=True), dtype, 6)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 30, dtype=dtype).reshape(5, 6), self.target)

    def inert(self, module):
        x = torch.randn(5, 6)
        expected = torch.nn.functional.cross_entropy(module.linear(x), self.target)
        return module(x, self.target), expected

    def bad_inputs(self):
        x, y = torch.randn(4, 3), torch.arange(4)
        return [
            (ValueError, "alpha must", lambda: MixUp(alpha=-1.0)),
            (ValueError, "prob must", lambda: MixUp(prob=1.5)),
            (ValueError, "alpha must", lambda: mixup(x, y, alpha=-0.1)),
            (ValueError, "prob must", lambda: mixup(x, y, prob=-0.1)),
            (TypeError, "x must", lambda: mixup(x.long(), y)),
            (TypeError, "target must", lambda: mixup(x, [0, 1, 2, 3])),
            (ValueError, "target must", lambda: mixup(x, y[:3])),
            (ValueError, "perm must", lambda: mixup(x, y, perm=y[:3])),
            (TypeError, "perm must", lambda: mixup(x, y, perm=y.float())),
            (ValueError, "perm must not name", lambda: mixup(x, y, perm=torch.zeros_like(y))),
        ]


@pytest.mark.parametrize("per_sample", [False, True])
def test_inputs_are_blended_with_the_partners_of_their_labels(per_sample):
    x, y = torch.randn(16, 3), torch.arange(16)
    batch = mixup(x, y, per_sample=per_sample)
    assert batch.lam.shape == ((16,) if per_sample else ())
    assert torch.equal(batch.target_b, y[batch.perm])
    assert torch.equal(batch.x, mix(x, batch.target_b, batch.lam))
    assert torch.equal(batch.perm.sort().values, y)


def test_rows_have_weights_of_their_own():
    assert mixup(torch.randn(16, 3), torch.arange(16), per_sample=True).lam.unique().numel() == 16


def test_no_alpha_changes_nothing():
    x, y = torch.randn(6, 3), torch.arange(6)
    batch = mixup(x, y, alpha=0.0)
    assert torch.equal(batch.x, x)
    assert batch.lam == 1


def test_a_batch_is_mixed_with_probability_prob():
    x, y = torch.randn(6, 1), torch.arange(6)
    generator = torch.Generator().manual_seed(0)
    plain = sum(mixup(x, y, prob=0.3, generator=generator).lam.item() == 1.0 for _ in range(1000))
    assert abs(plain - 700) < 4 * (1000 * 0.3 * 0.7) ** 0.5  # four standard deviations


def test_an_unmixed_batch_has_itself_for_partner():
    x, y = torch.randn(6, 1), torch.arange(6)
    batch = mixup(x, y, prob=0.0)
    assert torch.equal(batch.x, x)
    assert torch.equal(batch.perm, y)


def test_a_generator_reproduces_and_leaves_the_default_one_alone():
    x, y, state = torch.randn(6, 3), torch.arange(6), torch.get_rng_state()
    first, second = (mixup(x, y, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_generator_is_refused_where_a_second_pass_would_draw_again(fresh_dynamo):
    x, y, generator = torch.randn(6, 3, requires_grad=True), torch.arange(6), torch.Generator()
    call = lambda x: mixup(x, y, generator=generator).x
    with pytest.raises(RuntimeError, match="generator"):
        checkpoint(call, x, use_reentrant=False)
    with pytest.raises(Exception, match="generator"):
        torch.compile(call, fullgraph=True, backend="eager")(x)
    with pytest.raises(TypeError, match="generator"):
        mixup(x, y, generator=3)


def test_checkpointing_mixes_the_same_way_twice():
    x, y = torch.randn(6, 3, requires_grad=True), torch.arange(6)
    call = lambda x: mixup(x, y, per_sample=True).x.square()
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(call(x).sum(), x)
    torch.manual_seed(0)
    (found,) = torch.autograd.grad(checkpoint(call, x, use_reentrant=False).sum(), x)
    assert torch.equal(found, expected)


def test_batch_sizes_share_one_dynamic_graph(fresh_dynamo):
    for sampler in (mixup, cutmix):
        graphs = GraphRecorder()
        compiled = torch.compile(sampler, fullgraph=True, dynamic=True, backend=graphs)
        for size in (8, 5, 7):
            assert compiled(torch.randn(size, 3, 9, 10), torch.arange(size)).x.shape[0] == size
        assert len(graphs) == 1
        torch._dynamo.reset()


def test_evaluation_returns_the_input_itself():
    x, y = torch.randn(6, 3), torch.arange(6)
    batch = MixUp().eval()(x, y)
    assert batch.x is x
    assert batch.lam == 1
