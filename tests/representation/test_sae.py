"""Sparse autoencoders: the selection, the divergence, dead latents, and what the paper found."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.representation import TopKSAE, VariationalTopKSAE, dead_fraction
from regularizers.representation._sparse_rows import weighted_rows
from tests.harness import MethodContract


class TestTopKSAEContract(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return TopKSAE(8, 96, 4, dtype=dtype)

    def call(self, module, dtype):
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        return module(x.to(dtype)).recon

    def bad_inputs(self):
        build = TopKSAE
        return [
            (ValueError, "dim must", lambda: build(0, 8, 2)),
            (ValueError, "dict_size must", lambda: build(4, 0, 2)),
            (ValueError, "k must", lambda: build(4, 8, 9)),
            (ValueError, "k must", lambda: build(4, 8, 0)),
            (TypeError, "k must", lambda: build(4, 8, 2.0)),
            (ValueError, "aux_k must", lambda: build(4, 8, 2, aux_k=9)),
            (ValueError, "aux_weight must", lambda: build(4, 8, 2, aux_weight=-1.0)),
            (ValueError, "dead_after must", lambda: build(4, 8, 2, dead_after=0)),
            (ValueError, "x must", lambda: build(4, 8, 2)(torch.ones(3, 5))),
            (ValueError, "x must", lambda: build(4, 8, 2)(torch.ones(4))),
            (TypeError, "x must", lambda: build(4, 8, 2)(torch.ones(3, 4, dtype=torch.int64))),
            (TypeError, "sae must", lambda: dead_fraction(nn.Linear(2, 2))),
        ]


class TestVariationalTopKSAEContract(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return VariationalTopKSAE(8, 96, 4, variance="learned", dtype=dtype)

    def call(self, module, dtype):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
        return module(x.to(dtype)).recon

    def bad_inputs(self):
        build = VariationalTopKSAE
        return [
            (ValueError, "k must", lambda: build(4, 8, 9)),
            (ValueError, "variance must", lambda: build(4, 8, 2, variance="free")),
            (ValueError, "sigma must", lambda: build(4, 8, 2, sigma=0.0)),
            (ValueError, "kl_weight must", lambda: build(4, 8, 2, kl_weight=-0.1)),
            (ValueError, "kl_mask must", lambda: build(4, 8, 2, kl_mask="some")),
            (ValueError, "kl_warmup_steps must", lambda: build(4, 8, 2, kl_warmup_steps=-1)),
            (ValueError, "log_var_range must", lambda: build(4, 8, 2, log_var_range=(2.0, -6.0))),
            (ValueError, "log_var_init must", lambda: build(4, 8, 2, log_var_init=3.0)),
            (TypeError, "generator must", lambda: build(4, 8, 2)(torch.ones(3, 4), generator=1)),
        ]


def _gradients(module, loss):
    return torch.autograd.grad(loss, list(module.parameters()))


@pytest.mark.parametrize("k", [5, 90], ids=["sparse", "dense"])
def test_sum_of_rows_and_its_gradients_are_those_of_the_dense_product(k):
    rows = torch.randn(240, 7, dtype=torch.float64, requires_grad=True)
    values, indices = torch.randn(11, 240, dtype=torch.float64).topk(k)
    values.requires_grad_()
    dense = torch.zeros(11, 240, dtype=torch.float64).scatter(1, indices, values) @ rows
    found = weighted_rows(values, indices, rows)
    torch.testing.assert_close(found, dense)
    grad = torch.randn_like(dense)
    for got, want in zip(
        torch.autograd.grad(found, (values, rows), grad),
        torch.autograd.grad(dense, (values, rows), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_sparse_and_dense_sums_are_both_used():
    rows = torch.randn(240, 7, requires_grad=True)

    def node(k):
        return weighted_rows(torch.ones(2, k), torch.arange(k).expand(2, k), rows).grad_fn.name()

    assert "EmbeddingBag" in node(20)
    assert "Mm" in node(21)


def test_second_derivative_of_the_sparse_sum_raises():
    rows = torch.randn(240, 7, requires_grad=True)
    values = torch.ones(2, 3, requires_grad=True)
    result = weighted_rows(values, torch.arange(3).expand(2, 3), rows)
    (gradient,) = torch.autograd.grad(result.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.sum().backward()


def test_output_is_that_of_the_formula():
    sae = TopKSAE(6, 20, 3).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    pre = F.relu(x @ sae.encoder.weight.T + sae.encoder.bias)
    least = pre.topk(3).values[:, -1:]
    features = torch.where(pre >= least, pre, 0)
    output = sae(x)
    torch.testing.assert_close(output.features, features)
    torch.testing.assert_close(output.recon, features @ sae.decoder + sae.decoder_bias)
    assert (output.features.count_nonzero(1) <= 3).all()


def test_decoder_bias_is_subtracted_on_request():
    sae = TopKSAE(6, 20, 3, subtract_decoder_bias=True)
    with torch.no_grad():
        sae.decoder_bias.normal_()
    x = torch.randn(4, 6)
    plain = F.linear(x - sae.decoder_bias, sae.encoder.weight, sae.encoder.bias).relu()
    torch.testing.assert_close(sae(x).pre, plain)


def test_leading_dimensions_are_tokens():
    sae = TopKSAE(6, 20, 3)
    x = torch.randn(2, 3, 4, 6)
    output, flat = sae(x), sae(x.flatten(0, 2))
    assert output.recon.shape == x.shape
    assert output.features.shape == (2, 3, 4, 20)
    assert torch.equal(output.recon.flatten(0, 2), flat.recon)
    assert torch.equal(sae.loss(x).recon, sae.loss(x.flatten(0, 2)).recon)


def test_nan_reaches_the_loss():
    x = torch.randn(3, 6)
    x[1, 2] = torch.nan
    assert TopKSAE(6, 20, 3).loss(x).total.isnan()


def test_loss_of_no_tokens_is_zero_with_a_graph():
    loss = TopKSAE(6, 20, 3).loss(torch.empty(0, 6))
    assert loss.total == 0
    loss.total.backward()


@pytest.mark.parametrize("mask", ["all", "topk"])
@pytest.mark.parametrize("variance", ["fixed", "learned", "none"])
def test_built_on_another_device_it_runs_there(variance, mask):
    # Scheduled numbers are kept on the host; the meta device stands for any other.
    sae = VariationalTopKSAE(6, 90, 3, variance=variance, kl_mask=mask, device="meta")
    loss = sae.loss(torch.empty(5, 6, device="meta"))
    assert loss.total.device.type == "meta"
    loss.total.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_types_is_float32(dtype):
    assert TopKSAE(6, 20, 3, dtype=dtype).loss(torch.randn(4, 6, dtype=dtype)).total.dtype == (
        torch.float32
    )


def test_autocast_trains():
    sae = VariationalTopKSAE(6, 80, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sae.loss(torch.randn(4, 6))
    assert loss.total.dtype == torch.float32
    loss.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


@pytest.mark.parametrize("silent", [0, 10**6], ids=["alive", "dead"])
@pytest.mark.parametrize("dict_size", [32, 128], ids=["dense", "sparse"])
def test_without_noise_and_divergence_it_is_the_plain_autoencoder_bit_for_bit(dict_size, silent):
    torch.manual_seed(0)
    plain = TopKSAE(8, dict_size, 4, aux_k=6)
    variational = VariationalTopKSAE(
        8, dict_size, 4, aux_k=6, variance="none", kl_weight=0.0, unit_norm_decoder=True
    )
    variational.load_state_dict(plain.state_dict(), strict=False)
    plain.silent_tokens.fill_(silent)
    variational.silent_tokens.fill_(silent)
    x = torch.randn(16, 8)
    losses = plain.loss(x), variational.loss(x)
    assert (losses[0].aux > 0) == (silent > 0)
    assert torch.equal(losses[0].total, losses[1].total)
    for one, other in zip(
        _gradients(plain, losses[0].total), _gradients(variational, losses[1].total), strict=True
    ):
        assert torch.equal(one, other)


def _with_means(means, **options):
    """An autoencoder whose means are given numbers, whatever the input."""
    sae = VariationalTopKSAE(2, len(means), 1, aux_weight=0.0, **options)
    with torch.no_grad():
        sae.encoder.weight.zero_()
        sae.encoder.bias.copy_(torch.tensor(means))
    return sae


@pytest.mark.parametrize("variance", ["fixed", "none"])
def test_divergence_of_known_means(variance):
    sae = _with_means([1.0, 2.0, 0.0], variance=variance)
    assert sae.loss(torch.ones(5, 2)).kl.item() == 2.5


def test_divergence_with_a_learned_variance():
    sae = _with_means([1.0], variance="learned", log_var_init=-2.0)
    assert sae.loss(torch.ones(5, 2)).kl.item() == pytest.approx(1.06767, abs=1e-5)


def test_divergence_of_the_selected_latent_only():
    sae = _with_means([1.0, 2.0, 0.0], variance="none", kl_mask="topk")
    assert sae.loss(torch.ones(5, 2)).kl.item() == 2.0


@pytest.mark.parametrize(
    ("mask", "reached"), [("all", [True, True, False]), ("topk", [False, True, False])]
)
def test_divergence_reaches_the_latents_of_its_mask(mask, reached):
    sae = _with_means([1.0, 2.0, -1.0], variance="none", kl_mask=mask)
    sae.loss(torch.ones(5, 2)).kl.backward()
    assert (sae.encoder.bias.grad != 0).tolist() == reached


def test_divergence_is_a_sum_over_latents_and_a_mean_over_tokens():
    sae = VariationalTopKSAE(6, 20, 3, sigma=0.5)
    x = torch.randn(9, 6)
    mean = sae.eval()(x).pre
    expected = 0.5 * (mean**2 + 0.25 - 1 - torch.tensor(0.25).log()).sum(1).mean()
    torch.testing.assert_close(sae.loss(x).kl, expected)
    torch.testing.assert_close(sae.loss(x.repeat(2, 1)).kl, expected)


def test_learned_variance_is_clamped():
    sae = VariationalTopKSAE(2, 4, 1, variance="learned", log_var_range=(-3.0, 1.0))
    with torch.no_grad():
        sae.log_variance.bias.fill_(9.0)
        sae.encoder.weight.zero_()
    # mean 0, log variance 1: (e - 1 - 1) / 2 a latent
    assert sae.loss(torch.ones(3, 2)).kl.item() == pytest.approx(4 * 0.5 * (torch.e - 2), rel=1e-6)


def test_weight_of_the_divergence_rises_over_the_warm_up():
    sae = VariationalTopKSAE(6, 20, 3, kl_weight=2.0, kl_warmup_steps=4, aux_weight=0.0)
    weights = []
    for _ in range(6):
        loss = sae.loss(torch.randn(9, 6))
        weights.append(((loss.total - loss.recon) / loss.kl).item())
    # recon and total are rounded to about 1e-7 of themselves
    assert weights == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0], abs=1e-4)
    before = sae.kl_steps.item()
    sae.eval().loss(torch.randn(9, 6))
    assert sae.kl_steps.item() == before == 6


def test_samples_have_the_mean_and_variance_of_the_latents():
    sae = _with_means([1.0, 2.0, 0.5], sigma=1.0)
    drawn = sae(torch.ones(10_000, 2)).pre
    # standard errors: 0.01 of the mean and 0.014 of the variance
    assert (drawn.mean(0) - torch.tensor([1.0, 2.0, 0.5])).abs().max() < 0.05
    assert (drawn.var(0) - 1).abs().max() < 0.05


def test_selection_of_samples_is_by_magnitude_and_keeps_the_sign():
    sae = VariationalTopKSAE(6, 20, 3)
    output = sae(torch.randn(50, 6))
    largest = output.pre.abs().topk(3).indices
    assert torch.equal(output.indices.sort(1).values, largest.sort(1).values)
    assert torch.equal(output.values, output.pre.gather(1, output.indices))
    assert (output.features < 0).any()
    assert (output.features.count_nonzero(1) <= 3).all()


def test_evaluation_is_deterministic_and_has_no_negative_features():
    sae = VariationalTopKSAE(6, 20, 3).eval()
    x = torch.randn(50, 6)
    state = torch.get_rng_state()
    assert torch.equal(sae(x).features, sae(x).features)
    assert (sae(x).features >= 0).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(sae(x, sample=True).pre, sae(x).pre)


def test_equal_generators_give_equal_draws_and_leave_the_default_one_alone():
    sae = VariationalTopKSAE(6, 20, 3)
    x = torch.randn(50, 6)
    state = torch.get_rng_state()
    first, second = (sae.loss(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.total, second.total)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_on_kept_samples_is_exact():
    # At fixed noise the reconstruction is smooth in the parameters wherever the selection is.
    sae = VariationalTopKSAE(4, 12, 2, variance="learned").double()
    x = torch.randn(3, 4, dtype=torch.float64)
    names = [name for name, _ in sae.named_parameters()]

    def recon(*parameters):
        draw = {"generator": torch.Generator().manual_seed(0)}
        return torch.func.functional_call(
            sae, dict(zip(names, parameters, strict=True)), x, draw
        ).recon

    leaves = [parameter.detach().clone().requires_grad_() for parameter in sae.parameters()]
    assert torch.autograd.gradcheck(recon, leaves)


def test_silent_tokens_are_counted_in_training_only():
    sae = TopKSAE(6, 20, 3, dead_after=100)
    x = torch.randn(50, 6)
    active = (sae(x).features != 0).any(0)
    assert not sae.silent_tokens.any()
    sae.loss(x)
    assert torch.equal(sae.silent_tokens, torch.where(active, 0, 50))
    assert dead_fraction(sae) == 0
    sae.loss(x)
    assert dead_fraction(sae) == pytest.approx(1 - active.double().mean().item())
    before = sae.silent_tokens.clone()
    sae.eval().loss(x)
    assert torch.equal(sae.silent_tokens, before)


def test_counter_is_part_of_the_state():
    sae = TopKSAE(6, 20, 3)
    sae.loss(torch.randn(50, 6))
    other = TopKSAE(6, 20, 3)
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other.silent_tokens, sae.silent_tokens)


def test_counter_takes_the_batch_in_before_it_names_the_dead():
    sae = TopKSAE(6, 20, 20, dead_after=5)
    sae.silent_tokens.fill_(10)
    with torch.no_grad():
        sae.encoder.bias.fill_(100.0)  # everything fires
    assert sae.loss(torch.randn(4, 6)).aux == 0


def test_auxiliary_term_is_that_of_the_formula():
    sae = TopKSAE(6, 20, 2, aux_k=3, dead_after=10).double().eval()
    sae.silent_tokens[torch.arange(0, 20, 2)] = 10
    with torch.no_grad():
        sae.decoder_bias.normal_()
    x = torch.randn(30, 6, dtype=torch.float64)
    output = sae(x)
    error = (x - output.recon).detach()
    dead = output.pre.clone()
    dead[:, 1::2] = 0
    dead = dead * (dead >= dead.topk(3).values[:, -1:])
    variance = (error - error.mean(0)).square().sum(1).mean()
    expected = (error - dead @ sae.decoder).square().sum(1).mean() / (variance + 1e-8)
    loss = sae.loss(x)
    torch.testing.assert_close(loss.aux, expected)
    torch.testing.assert_close(loss.total, loss.recon + expected / 32)


def test_auxiliary_term_moves_dead_latents_only():
    sae = TopKSAE(6, 20, 2, aux_k=3, dead_after=10).eval()
    sae.silent_tokens[:5] = 10
    sae.loss(torch.randn(30, 6)).aux.backward()
    assert (sae.decoder.grad[:5] != 0).any()
    assert not sae.decoder.grad[5:].any()
    assert sae.decoder_bias.grad is None


def test_fewer_dead_latents_than_places_leave_the_others_alone():
    sae = TopKSAE(6, 20, 2, aux_k=10, dead_after=10).eval()
    sae.silent_tokens[3] = 10
    sae.loss(torch.randn(30, 6)).aux.backward()
    assert sae.decoder.grad.any(1).nonzero().flatten().tolist() == [3]


def test_one_token_has_no_auxiliary_term():
    sae = TopKSAE(6, 20, 2).eval()
    sae.silent_tokens.fill_(10**6)
    assert sae.loss(torch.randn(1, 6)).aux == 0


def test_compiled_loss_is_one_graph_with_equal_results(fresh_dynamo):
    for silent in (0, 10**6):
        sae = VariationalTopKSAE(8, 128, 4, variance="none", kl_warmup_steps=3)
        sae.silent_tokens.fill_(silent)
        twin = copy.deepcopy(sae)
        compiled = torch.compile(twin.loss, fullgraph=True, backend="aot_eager")
        x = torch.randn(16, 8)
        for _ in range(2):
            torch.testing.assert_close(tuple(compiled(x)), tuple(sae.loss(x)))
        assert torch.equal(twin.silent_tokens, sae.silent_tokens)


def test_attached_optimizer_keeps_the_norm_of_the_rows():
    sae = TopKSAE(6, 20, 3)
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.5)
    sae.attach(optimizer)
    x = torch.randn(30, 6)
    sae.loss(x).total.backward()
    start = sae.decoder.detach().clone()
    optimizer.step()
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(20))
    assert (sae.decoder.grad * start).sum(1).abs().max() < 1e-5
    assert not torch.equal(sae.decoder, start)


def test_free_decoder_is_left_alone():
    sae = TopKSAE(6, 20, 3, unit_norm_decoder=False)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.full((20,), 0.1))
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.5)
    sae.attach(optimizer)
    sae.loss(torch.randn(30, 6)).total.backward()
    optimizer.step()
    assert (sae.decoder.norm(dim=1) - 0.1).abs().max() > 1e-3


def test_encoder_starts_as_the_decoder():
    sae = TopKSAE(6, 20, 3)
    assert torch.equal(sae.encoder.weight, sae.decoder)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(20))


def test_weights_are_assigned_in_place():
    sae = VariationalTopKSAE(6, 20, 3)
    before = sae.kl_weight
    sae.kl_weight, sae.aux_weight, sae.sigma = 0.25, 0.5, 2.0
    assert (before.item(), sae.aux_weight.item(), sae.sigma.item()) == (0.25, 0.5, 2.0)
    with pytest.raises(ValueError, match="kl_weight must"):
        sae.kl_weight = -1.0


def _trained(build, steps=200):
    """Alive fraction and unexplained variance on 16-d data from 32 sparse directions."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(32, 16, generator=generator), dim=1)

    def data(tokens):
        draws = torch.rand(2, tokens, 32, generator=generator)
        return (draws[0] * (draws[1] < 4 / 32)) @ directions

    torch.manual_seed(0)
    sae = build()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        sae.loss(data(64)).total.backward()
        optimizer.step()
    x = data(2000)
    output = sae.eval()(x)
    unexplained = (x - output.recon).square().sum() / (x - x.mean(0)).square().sum()
    return (output.features != 0).any(0).double().mean().item(), unexplained.item()


@pytest.mark.slow
def test_divergence_silences_latents_and_noise_makes_it_worse():
    # The paper's negative result. Sheet of paper 62: alive 0.98, 0.45 and 0.16, unexplained
    # variance 0.13, 0.15 and 1.00.
    free = {"unit_norm_decoder": False, "aux_weight": 0.0}
    plain = _trained(lambda: TopKSAE(16, 64, 4, **free))
    penalty = _trained(
        lambda: VariationalTopKSAE(16, 64, 4, variance="none", kl_weight=0.3, **free)
    )
    both = _trained(lambda: VariationalTopKSAE(16, 64, 4, kl_weight=0.3, **free))
    assert penalty[0] < plain[0] - 0.2
    assert both[0] < plain[0] - 0.2
    assert plain[1] < 0.25
    assert both[1] > 0.8
