"""Quantized perturbation (paper 54): the method contract and the facts of its sheet."""

import math

import pytest
import torch
from torch.nn import functional as F

from regularizers.dropout import (
    ProjectedVectorQuantizer,
    QuantizedPerturbation,
    codebook_entropy_loss,
    perturb_indices,
    ramped_ema,
    semi_supervised_seg_loss,
    straight_through,
    vq_alignment_loss,
)
from tests.harness import MethodContract

TRIANGLE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])


class TestContract(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return QuantizedPerturbation(8, num_codes=16, rate=0.5).to(dtype)

    def call(self, module, dtype):
        z = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        tokens = module(z)
        return tokens.features.sum() + vq_alignment_loss(tokens.quantized, z)

    def inert(self, module):
        z = torch.randn(3, 5, 8)
        return module(z).features, module.quantizer(z)[0]

    def bad_inputs(self):
        indices = torch.zeros(2, 3, dtype=torch.int64)
        z, logits, y = torch.zeros(4, 2), torch.zeros(2, 3, 4), torch.zeros(2, 4).long()
        seg = lambda **o: semi_supervised_seg_loss(logits, y, logits, logits, logits, **o)
        return [
            (ValueError, "rate", lambda: perturb_indices(indices, TRIANGLE, rate=1.1)),
            (ValueError, "rate", lambda: perturb_indices(indices, TRIANGLE, rate=-0.1)),
            (
                ValueError,
                "rate",
                lambda: perturb_indices(indices, TRIANGLE, rate=torch.tensor(2.0)),
            ),
            (ValueError, "temperature", lambda: perturb_indices(indices, TRIANGLE, temperature=0)),
            (ValueError, "indices", lambda: perturb_indices(indices + 3, TRIANGLE)),
            (ValueError, "indices", lambda: perturb_indices(indices - 1, TRIANGLE, mode="shuffle")),
            (ValueError, "indices", lambda: perturb_indices(indices[0, 0], TRIANGLE)),
            (TypeError, "indices", lambda: perturb_indices(indices.int(), TRIANGLE)),
            (TypeError, "indices", lambda: perturb_indices([0], TRIANGLE)),
            (ValueError, "codebook", lambda: perturb_indices(indices, TRIANGLE[:1])),
            (ValueError, "codebook", lambda: perturb_indices(indices, TRIANGLE[0])),
            (ValueError, "mode", lambda: perturb_indices(indices, TRIANGLE, mode="near")),
            (ValueError, "z_q", lambda: straight_through(z, z[:1])),
            (ValueError, "z_q", lambda: vq_alignment_loss(z[:1], z)),
            (ValueError, "beta", lambda: vq_alignment_loss(z, z, beta=-1.0)),
            (ValueError, "codebook", lambda: codebook_entropy_loss(z, torch.ones(3, 5))),
            (ValueError, "z must", lambda: codebook_entropy_loss(z[:0], TRIANGLE)),
            (
                ValueError,
                "inv_temperature",
                lambda: codebook_entropy_loss(z, TRIANGLE, inv_temperature=0.0),
            ),
            (ValueError, "chunk_size", lambda: codebook_entropy_loss(z, TRIANGLE, chunk_size=0)),
            (ValueError, "num_codes", lambda: ProjectedVectorQuantizer(4, num_codes=0)),
            (ValueError, "codebook", lambda: ProjectedVectorQuantizer(4, num_codes=8)(z)),
            (ValueError, "num_codes", lambda: QuantizedPerturbation(4, num_codes=1)),
            (ValueError, "mode", lambda: QuantizedPerturbation(4, num_codes=8, mode="near")),
            (
                ValueError,
                "quantizer",
                lambda: QuantizedPerturbation(4, quantizer=ProjectedVectorQuantizer(3)),
            ),
            (ValueError, "threshold", lambda: seg(threshold=1.5)),
            (ValueError, "valid", lambda: seg(valid=torch.ones(2, 3, dtype=torch.bool))),
            (
                ValueError,
                "teacher_logits",
                lambda: semi_supervised_seg_loss(logits, y, logits, logits, logits[:1]),
            ),
            (ValueError, "max_decay", lambda: ramped_ema(1.0)),
        ]


def test_replacement_rows_of_three_codes():
    expected = torch.tensor([[0, 0.9526, 0.0474], [0.9820, 0, 0.0180], [0.7311, 0.2689, 0]])
    indices = torch.arange(3).repeat_interleave(50_000)
    drawn = perturb_indices(indices, TRIANGLE, rate=1.0, seed=1)
    frequency = torch.stack([row.bincount(minlength=3) / 50_000 for row in drawn.view(3, -1)])
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.01)  # 4.5 deviations


@pytest.mark.parametrize("mode", ["distance", "uniform", "shuffle"])
def test_rate_zero_is_the_identity(mode):
    indices = torch.randint(3, (2, 50))
    assert perturb_indices(indices, TRIANGLE, rate=0.0, mode=mode) is indices
    zero = torch.tensor(0.0)
    assert torch.equal(perturb_indices(indices, TRIANGLE, rate=zero, mode=mode), indices)


def test_rate_one_changes_every_index():
    indices = torch.randint(3, (40, 50))
    assert (perturb_indices(indices, TRIANGLE, rate=1.0) != indices).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_changed_fraction_lies_within_four_deviations_of_the_rate(rate):
    indices = torch.randint(3, (100, 1000))
    changed = (perturb_indices(indices, TRIANGLE, rate=rate, seed=3) != indices).sum().item()
    deviation = (100_000 * rate * (1 - rate)) ** 0.5
    assert abs(changed - 100_000 * rate) < 4 * deviation


def test_uniform_draws_every_code_alike_its_own_too():
    drawn = perturb_indices(torch.full((1, 70_000), 2), torch.randn(7, 2), rate=1.0, mode="uniform")
    # Mean 10000, standard deviation 93.
    assert (drawn[0].bincount(minlength=7) - 10_000).abs().max() < 5 * 93


def test_shuffle_preserves_the_histogram_of_each_sample():
    indices = torch.randint(20, (6, 200)) + 20 * torch.arange(6)[:, None]
    drawn = perturb_indices(indices, torch.randn(120, 2), rate=0.5, mode="shuffle", seed=1)
    assert torch.equal(drawn.sort(-1).values, indices.sort(-1).values)
    assert not torch.equal(drawn, indices)


def test_shuffle_moves_selected_tokens_alone_and_everywhere_alike():
    indices = torch.arange(5).repeat(20_000, 1)
    drawn = perturb_indices(indices, torch.randn(5, 2), rate=1.0, mode="shuffle", seed=1)
    counts = torch.stack([column.bincount(minlength=5) for column in drawn.T])
    # Mean 4000, standard deviation 57.
    assert (counts - 4000).abs().max() < 5 * 57
    some = perturb_indices(indices, torch.randn(5, 2), rate=0.4, mode="shuffle", seed=1)
    # A permutation of selected tokens never moves a lone one: 1 - 0.4 = 0.6 stay at least.
    assert (some == indices).double().mean() > 0.6


def test_cold_draws_the_nearest_other_code_and_hot_any_other():
    codebook = torch.randn(9, 3)
    indices = torch.arange(9).repeat(4000, 1)
    cold = perturb_indices(indices, codebook, rate=1.0, temperature=1e-9)
    nearest = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(cold, nearest.expand(4000, 9))
    hot = perturb_indices(indices, codebook, rate=1.0, temperature=1e9, seed=1)
    counts = hot[:, 0].bincount(minlength=9)
    assert (counts[1:] - 500).abs().max() < 5 * 21  # mean 500, standard deviation 21
    assert counts[0] == 0


def test_generator_and_seed_reproduce():
    indices = torch.randint(3, (4, 100))
    for mode in ("distance", "uniform", "shuffle"):
        pair = [perturb_indices(indices, TRIANGLE, rate=0.5, mode=mode, seed=5) for _ in range(2)]
        assert torch.equal(*pair)
        generators = [torch.Generator().manual_seed(2) for _ in range(2)]
        pair = [
            perturb_indices(indices, TRIANGLE, rate=0.5, mode=mode, generator=g) for g in generators
        ]
        assert torch.equal(*pair)


def test_entropy_loss_of_two_codes():
    codes = TRIANGLE[:2]
    assert codebook_entropy_loss(codes, codes).item() == pytest.approx(-0.110944, abs=1e-5)


def test_entropy_loss_lies_between_minus_log_k_and_zero():
    for scale in (0.01, 1.0, 100.0):
        codebook = scale * torch.randn(12, 4)
        loss = codebook_entropy_loss(scale * torch.randn(50, 4), codebook).item()
        assert -math.log(12) - 1e-5 <= loss <= 1e-5  # the 1e-7 inside the logarithm
    far = 100 * torch.eye(12)
    assert codebook_entropy_loss(far, far).item() == pytest.approx(-math.log(12), abs=1e-5)


def test_entropy_loss_in_chunks_equals_that_of_one():
    z, codebook = torch.randn(50, 4, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    found = []
    for chunk_size in (64, 7):
        leaves = z.clone().requires_grad_(), codebook.clone().requires_grad_()
        loss = codebook_entropy_loss(*leaves, chunk_size=chunk_size, inv_temperature=2.0)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for one, chunks in zip(*found, strict=True):
        torch.testing.assert_close(one, chunks)


def test_losses_pass_gradcheck():
    z, codebook = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    leaves = z.requires_grad_(), codebook.requires_grad_()
    assert torch.autograd.gradcheck(codebook_entropy_loss, leaves)


def test_straight_through_has_the_values_of_the_codes_bit_by_bit_and_an_identity_gradient():
    z = (1e4 * torch.randn(50, 3)).requires_grad_()
    z_q = torch.randn(50, 3).requires_grad_()
    y = straight_through(z, z_q)
    assert torch.equal(y, z_q)
    cotangent = torch.randn(50, 3)
    gradient, none = torch.autograd.grad(y, (z, z_q), cotangent, allow_unused=True)
    assert torch.equal(gradient, cotangent)
    assert none is None


def test_perturbed_features_send_their_gradient_to_the_tokens_alone():
    module = QuantizedPerturbation(4, num_codes=16, rate=1.0)
    z = torch.randn(2, 6, 4, requires_grad=True)
    features = module(z).features
    cotangent = torch.randn_like(features)
    features.backward(cotangent)
    assert torch.equal(z.grad, cotangent)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_alignment_gives_the_codebook_twice_the_mean_difference():
    z_q, z = torch.randn(6, 4).requires_grad_(), torch.randn(6, 4).requires_grad_()
    to_codes, to_tokens = torch.autograd.grad(vq_alignment_loss(z_q, z), (z_q, z))
    torch.testing.assert_close(to_codes, 2 * (z_q - z).detach() / 24)
    torch.testing.assert_close(to_tokens, 0.25 * 2 * (z - z_q).detach() / 24)


def test_perturbed_features_are_codes_where_those_of_dropout_are_not():
    module = QuantizedPerturbation(4, num_codes=16, rate=0.5)
    z = torch.randn(3, 40, 4)
    tokens = module(z)
    assert torch.equal(tokens.features, tokens.codebook[tokens.indices])
    dropped = F.dropout(tokens.quantized, 0.5)
    distance = torch.cdist(dropped.flatten(0, 1), tokens.codebook).amin(1)
    assert (distance > 1e-3).double().mean() > 0.5


def test_replaced_codes_stay_near_and_go_farther_with_temperature():
    codebook = torch.randn(400, 4)
    indices = torch.randint(400, (1, 4000))

    def displacement(**options):
        swapped = perturb_indices(indices, codebook, rate=1.0, seed=1, **options)
        return (codebook[swapped] - codebook[indices]).square().sum(-1).mean().item()

    distances = [displacement(temperature=t) for t in (0.1, 1.0, 10.0)]
    assert distances == sorted(distances)
    assert distances[1] < 0.5 * displacement(mode="uniform")
    assert distances[2] < displacement(mode="uniform")


def test_frozen_codes_are_saved_and_take_no_gradient():
    quantizer = ProjectedVectorQuantizer(4, num_codes=16)
    assert set(quantizer.state_dict()) == {"base", "projection.weight", "projection.bias"}
    assert not quantizer.base.requires_grad
    plain = ProjectedVectorQuantizer(64, num_codes=2000, learn_projection=False)
    assert plain.codebook() is plain.base
    # 128000 normal numbers of deviation 1/8.
    assert plain.base.std().item() == pytest.approx(1 / 8, rel=0.01)


def test_perturbation_can_be_asked_for_and_refused():
    module = QuantizedPerturbation(4, num_codes=16, rate=1.0)
    z = torch.randn(2, 6, 4)
    plain = module.quantizer(z)[1]
    assert torch.equal(module(z, perturb=False).indices, plain)
    assert (module.eval()(z, perturb=True).indices != plain).all()


def test_rate_and_temperature_may_change_without_another_graph(fresh_dynamo):
    module = QuantizedPerturbation(4, num_codes=16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    z = torch.randn(2, 6, 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(5):
            module.rate, module.temperature = step / 4, 1.0 + step
            found = compiled(z, seed=torch.tensor(3)).indices
            assert torch.equal(found, module(z, seed=3).indices)


def test_seg_loss_counts_confident_pixels_over_all_valid_ones():
    logits = torch.randn(2, 3, 5, 5)
    y = torch.randint(3, (2, 5, 5))
    views = torch.randn(2, 2, 3, 5, 5)
    teacher = 4 * torch.randn(2, 3, 5, 5)
    valid = torch.rand(2, 5, 5) < 0.8
    confidence, label = teacher.softmax(1).max(1)
    counted = (confidence >= 0.95) & valid
    assert 0 < counted.sum() < valid.sum()
    parts = [
        F.cross_entropy(v, label, reduction="none")[counted].sum() / valid.sum() for v in views
    ]
    expected = (5 * F.cross_entropy(logits, y) + sum(parts) / 2) / 2 + 0.1 * 0.7
    found = semi_supervised_seg_loss(logits, y, *views, teacher, auxiliary=0.7, valid=valid)
    torch.testing.assert_close(found, expected)


def test_seg_loss_sends_no_gradient_to_the_teacher():
    logits = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(4)]
    y = torch.randint(3, (2, 4))
    loss = semi_supervised_seg_loss(logits[0], y, *logits[1:], threshold=0.0)
    gradients = torch.autograd.grad(loss, logits, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, False, False, True]


def test_teacher_is_a_mean_first_and_an_exponential_one_later():
    student = torch.nn.Linear(1, 1, bias=False)
    teacher = torch.optim.swa_utils.AveragedModel(student, avg_fn=ramped_ema(0.75))
    averages = []
    for value in (1.0, 2.0, 3.0, 4.0, 10.0):
        torch.nn.init.constant_(student.weight, value)
        teacher.update_parameters(student)
        averages.append(teacher.module.weight.item())
    assert averages == pytest.approx([1.0, 1.5, 2.0, 2.5, 0.75 * 2.5 + 2.5])
