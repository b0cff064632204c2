"""SoMA: what goes into the factors and what stays, frozen blocks, the annealed decay, drift."""

import pytest
import torch
from torch import nn

from regularizers.optim import SoMALinear, WeightDecayAnnealing, inject_soma
from tests.harness import MethodContract


def linear(m=12, n=8, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(n, m, bias=bias, dtype=dtype)


def product(layer):
    return layer.lora_B.detach() @ layer.lora_A.detach()


class TestSoMALinear(MethodContract):
    def build(self, dtype):
        return SoMALinear(linear(dtype=dtype), rank=3, alpha=2.0)

    def call(self, module, dtype):
        torch.manual_seed(2)
        return module(torch.randn(5, 8).to(dtype))

    def bad_inputs(self):
        def made(**options):
            return lambda: SoMALinear(linear(), **{"rank": 2, **options})

        quantized = linear()
        quantized.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.uint8), requires_grad=False)
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
        return [
            (ValueError, r"rank must be at most min\(m, n\) = 8", made(rank=9)),
            (ValueError, "rank", made(rank=0)),
            (ValueError, "components", made(components="major")),
            (ValueError, "svd must be one of", made(svd="fast")),
            (ValueError, "svd must be 'full'", made(svd="lowrank")),
            (TypeError, "weight of base", lambda: SoMALinear(quantized, rank=2)),
            (ValueError, "eta_min|final", lambda: WeightDecayAnnealing(optimizer, 4, -1.0)),
            (ValueError, "total_steps", lambda: WeightDecayAnnealing(optimizer, 0)),
            (ValueError, "start_block", lambda: inject_soma(blocks(1), start_block=-1)),
        ]


@pytest.mark.parametrize("components", ["minor", "principal", "random"])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_output_is_unchanged_at_the_start(components, alpha):
    base, x = linear(), torch.randn(5, 8)
    layer = SoMALinear(base, rank=3, components=components, alpha=alpha)
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=1e-6)


def test_smallest_component_of_a_diagonal_goes_into_the_factors():
    base = linear(3, 3, bias=False)
    base.weight.data = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    layer = SoMALinear(base, rank=1)
    torch.testing.assert_close(layer.lora_A.abs(), torch.tensor([[0.0, 0.0, 1.0]]))
    torch.testing.assert_close(product(layer), torch.diag(torch.tensor([0.0, 0.0, 1.0])))
    torch.testing.assert_close(layer.weight.data, torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    torch.testing.assert_close(base.weight.diag(), torch.tensor([3.0, 2.0, 1.0]))


@pytest.mark.parametrize("svd", ["full", "lowrank"])
def test_largest_component_of_a_diagonal_is_the_principal_one(svd):
    base = linear(3, 3, bias=False)
    base.weight.data = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    layer = SoMALinear(base, rank=1, components="principal", svd=svd)
    torch.testing.assert_close(product(layer), torch.diag(torch.tensor([3.0, 0.0, 0.0])))


def test_factors_are_orthogonal_to_the_range_of_the_residual():
    layer = SoMALinear(linear(dtype=torch.float64), rank=3)
    zero = {"rtol": 0, "atol": 1e-14}
    torch.testing.assert_close(layer.weight.T @ layer.lora_B, torch.zeros(8, 3).double(), **zero)
    torch.testing.assert_close(layer.lora_A @ layer.weight.T, torch.zeros(3, 12).double(), **zero)


def test_norm_of_the_factors_product_is_that_of_the_smallest_singular_values():
    base = linear(dtype=torch.float64)
    sigma = torch.linalg.svdvals(base.weight.detach())
    layer = SoMALinear(base, rank=3, alpha=6.0)
    torch.testing.assert_close(layer.delta_weight().norm(), sigma[-3:].norm())
    # Eckart-Young: what is left after taking out r components is at least this far from zero.
    other = SoMALinear(base, rank=3, components="principal")
    assert other.delta_weight().norm() > layer.delta_weight().norm()


def test_factors_share_the_singular_values_evenly():
    layer = SoMALinear(linear(), rank=3)
    torch.testing.assert_close(layer.lora_B.norm(dim=0), layer.lora_A.norm(dim=1))


def test_full_rank_leaves_no_residual():
    layer = SoMALinear(linear(dtype=torch.float64), rank=8)
    assert layer.weight.abs().max() < 1e-14


def test_merged_weight_is_the_pretrained_one_at_the_start():
    base = linear(dtype=torch.float64)
    layer = SoMALinear(base, rank=3, alpha=1.5)
    torch.testing.assert_close(layer.merged_weight(), base.weight.detach(), rtol=0, atol=1e-15)


def test_bfloat16_weight_is_decomposed_in_float32():
    base = linear(dtype=torch.bfloat16)
    layer = SoMALinear(base, rank=3)
    assert layer.weight.dtype == layer.lora_A.dtype == torch.bfloat16
    # One rounding of the residual and one of the sum.
    bound = 2 * 2**-8 * base.weight.abs().max().item()
    assert (layer.merged_weight() - base.weight).abs().max() <= bound


def test_only_factors_and_bias_have_gradients():
    base = linear()
    layer = SoMALinear(base, rank=3)
    layer(torch.randn(2, 8)).sum().backward()
    have = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert have == {"lora_A", "lora_B", "bias"}
    assert base.weight.requires_grad
    assert base.weight.grad is None


def test_zero_singular_values_are_skipped_unless_asked_for():
    base = linear(6, 6, bias=False)
    base.weight.data = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0]))
    assert SoMALinear(base, rank=2).delta_weight().norm() == pytest.approx(5**0.5)
    assert SoMALinear(base, rank=2, skip_null=False).delta_weight().norm() < 1e-6
    with pytest.warns(UserWarning, match="only 4 of rank = 5"):
        layer = SoMALinear(base, rank=5)
    torch.testing.assert_close(layer.merged_weight(), base.weight.data)


def blocks(count):
    torch.manual_seed(0)

    def block():
        return nn.ModuleDict(
            {"norm1": nn.LayerNorm(4), "fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}
        )

    return nn.ModuleDict(
        {
            "patch": nn.ModuleDict({"proj": nn.Linear(4, 4)}),
            "blocks": nn.ModuleList(block() for _ in range(count)),
            "head": nn.Linear(4, 2),
        }
    )


def test_early_blocks_and_what_is_outside_blocks_are_frozen():
    model = inject_soma(blocks(11), rank=2, start_block=9, trainable="head")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    want = {
        f"blocks.{block}.{layer}.{name}"
        for block in (9, 10)
        for layer in ("fc1", "fc2")
        for name in ("lora_A", "lora_B", "bias")
    }
    assert trained == want | {"head.weight", "head.bias"}


def test_no_late_block_is_an_error():
    model = blocks(8)
    with pytest.raises(ValueError, match="target"):
        inject_soma(model, rank=2)
    assert all(p.requires_grad for p in model.parameters())


def test_decay_falls_from_its_start_to_the_end_by_a_cosine_and_norms_keep_none():
    weights, norms = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [weights], "weight_decay": 0.05}, {"params": [norms], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = WeightDecayAnnealing(optimizer, 10)
    values = [optimizer.param_groups[0]["weight_decay"]]
    for _ in range(12):
        optimizer.step()
        scheduler.step()
        values.append(optimizer.param_groups[0]["weight_decay"])
        assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert values[0] == 0.05
    assert values[5] == pytest.approx((0.05 + 1e-5) / 2)
    assert values[10:] == [pytest.approx(1e-5, abs=1e-18)] * 3


def adapt(components):
    """Drift inside the top-4 singular block, and the training error, after adapting a matrix."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(32, 32))
    v, _ = torch.linalg.qr(torch.randn(32, 32))
    base = nn.Linear(32, 32, bias=False)
    base.weight.data = u @ torch.diag(torch.logspace(0.5, -1.5, 32)) @ v.T
    x = torch.randn(64, 32)
    target = x @ (base.weight.detach() + 0.05 * torch.randn(32, 32)).T
    layer = SoMALinear(base, rank=4, components=components)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    change = layer.merged_weight() - base.weight.detach()
    return (u[:, :4].T @ change @ v[:, :4]).norm().item(), loss.item()


def test_principal_directions_drift_less_than_when_they_are_adapted_and_the_fit_is_no_worse():
    (minor, minor_loss), (principal, principal_loss) = adapt("minor"), adapt("principal")
    assert minor < 0.7 * principal
    assert minor_loss < principal_loss
