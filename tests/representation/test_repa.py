"""REPA: alignment of a denoiser's tokens with those of a frozen encoder (sheet of paper 24)."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.generative import flow_matching_loss
from regularizers.representation import REPA, REPAProjector, repa_loss, sample_interpolant
from tests.harness import MethodContract


class _Denoiser(nn.Module):
    """Blocks of tokens [B, N, 8] that see the time."""

    def __init__(self, width=12):
        super().__init__()
        self.first = nn.Linear(9, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 8)

    def forward(self, x, t):
        times = t[:, None, None].expand(*x.shape[:2], 1)
        hidden = self.first(torch.cat([x, times], -1)).relu()
        return self.last(self.second(hidden).relu())


class TestREPA(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return REPA(_Denoiser(), "second", 12, [5, 6], projector_dim=7).to(dtype)

    def call(self, module, dtype):
        x = torch.linspace(0, 9, 2 * 4 * 8, dtype=torch.float64).sin().to(dtype).view(2, 4, 8)
        targets = [x[..., :5], x[..., 2:]]
        output, aligned = module(x, torch.tensor([0.2, 0.7], dtype=dtype), targets=targets)
        return output + aligned.to(dtype)

    def bad_inputs(self):
        h, model = torch.ones(2, 4, 5), _Denoiser()
        x, t = torch.ones(2, 4, 8), torch.ones(2)
        good = REPA(model, "second", 12, [5], projector_dim=7)
        wrong = REPA(model, "second", 11, [5], projector_dim=7)
        return [
            (ValueError, "tap names", lambda: REPA(model, "third", 12, [5])),
            (ValueError, "tap must", lambda: wrong(x, t, targets=h)),
            (ValueError, "target_dims must", lambda: REPA(model, "second", 12, [])),
            (ValueError, "weight must", lambda: REPA(model, "second", 12, [5], weight=-1.0)),
            (TypeError, "model must", lambda: REPA(print, "second", 12, [5])),
            (ValueError, "projector_dim must", lambda: REPAProjector(4, 5, projector_dim=0)),
            (ValueError, "target must have as many", lambda: good(x, t, targets=[h, h])),
            (ValueError, "target must have as many", lambda: repa_loss([], [])),
            (ValueError, "grid be given", lambda: repa_loss(h, torch.ones(2, 9, 5))),
            (ValueError, "grid must", lambda: repa_loss(h, torch.ones(2, 9, 5), grid=(2, 3))),
            (
                ValueError,
                "target_grid must",
                lambda: repa_loss(h, torch.ones(2, 6, 5), grid=(2, 2)),
            ),
            (ValueError, "target must have shape", lambda: repa_loss(h, h[..., :4])),
            (ValueError, "target must have shape", lambda: repa_loss(h, h[:1])),
            (TypeError, "hidden must", lambda: repa_loss(h.long(), h)),
            (ValueError, "temperature must", lambda: repa_loss(h, h, temperature=0.0)),
            (ValueError, "eps must", lambda: repa_loss(h, h, eps=0.0)),
            (ValueError, "similarity must", lambda: repa_loss(h, h, similarity="l2")),
            (ValueError, "reduction must", lambda: repa_loss(h, h, reduction="max")),
            (ValueError, "t must", lambda: sample_interpolant(x, x, t + 1)),
            (ValueError, "t must", lambda: sample_interpolant(x, x, t[:1])),
            (ValueError, "noise must", lambda: sample_interpolant(x, x[:1], t)),
            (ValueError, "path must", lambda: sample_interpolant(x, x, t, path="sine")),
        ]


def _pair(*shape):
    return torch.randn(2, *shape, dtype=torch.float64)


def test_agreement_is_minus_one_opposition_one_and_orthogonality_zero():
    h = torch.randn(2, 9, 6)
    scale = torch.rand(2, 9, 1) * 10 + 0.1
    assert repa_loss(h, scale * h).item() == pytest.approx(-1, abs=1e-6)
    assert repa_loss(h, -scale * h).item() == pytest.approx(1, abs=1e-6)
    turned = torch.stack([-h[..., 1], h[..., 0]], -1)
    assert repa_loss(h[..., :2], turned).item() == pytest.approx(0, abs=1e-6)


def test_lengths_of_tokens_are_nothing():
    h, z = _pair(2, 9, 6)
    for options in ({}, {"similarity": "nt_xent"}):
        scaled = repa_loss(
            h * torch.rand(2, 9, 1).add(0.1), z * torch.rand(2, 9, 1).add(0.1), **options
        )
        torch.testing.assert_close(scaled, repa_loss(h, z, **options))


def test_gradient_is_orthogonal_to_the_token():
    h, z = _pair(2, 9, 6)
    h.requires_grad_()
    repa_loss(h, z).backward()
    assert (h.grad * h).sum(-1).abs().max() < 1e-15
    assert h.grad.abs().max() > 1e-3


@pytest.mark.parametrize("similarity", ["cosine", "nt_xent"])
def test_target_gets_no_gradient(similarity):
    h, z = (tensor.clone().requires_grad_() for tensor in _pair(2, 9, 6))
    repa_loss(h, z, similarity=similarity).backward()
    assert z.grad is None
    assert h.grad is not None


@pytest.mark.parametrize("similarity", ["cosine", "nt_xent"])
def test_derivatives_are_right(similarity):
    h, z = _pair(2, 3, 4)
    call = lambda h: repa_loss(h, z, similarity=similarity)
    assert torch.autograd.gradcheck(call, h.clone().requires_grad_())


def test_encoders_are_averaged():
    (h, z), (g, y) = _pair(2, 9, 6), _pair(2, 9, 4)
    expected = (repa_loss(h, z) + repa_loss(g, y)) / 2
    torch.testing.assert_close(repa_loss([h, g], [z, y]), expected)


def test_reductions_are_over_samples():
    h, z = _pair(3, 9, 6)
    each = -F.cosine_similarity(h, z, dim=-1).mean(1)
    torch.testing.assert_close(repa_loss(h, z, reduction="none"), each)
    torch.testing.assert_close(repa_loss(h, z, reduction="sum"), each.sum())
    torch.testing.assert_close(repa_loss(h, z), each.mean())


def test_token_of_no_length_contributes_nothing_and_gets_no_gradient():
    h, z = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    h[0, 1] = 2.0
    h.requires_grad_()
    value = repa_loss(h, z)
    value.backward()
    assert value.item() == pytest.approx(-0.5)
    assert (h.grad[0, 0] == 0).all()
    assert h.grad.isfinite().all()


def test_nan_in_gives_nan_out():
    h, z = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    h[0, 0, 0] = math.nan
    assert repa_loss(h, z).isnan()
    assert repa_loss(z, h).isnan()


def test_half_types_give_float32():
    h, z = torch.randn(2, 2, 9, 6).half()
    found = repa_loss(h, z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), repa_loss(h.double(), z.double()), rtol=1e-5, atol=1e-6
    )


def test_contrast_is_cross_entropy_over_all_tokens_of_the_batch():
    h, z = _pair(3, 4, 6)
    scores = F.normalize(h, dim=-1).flatten(0, 1) @ F.normalize(z, dim=-1).flatten(0, 1).T / 0.2
    expected = F.cross_entropy(scores, torch.arange(12))
    found = repa_loss(h, z, similarity="nt_xent", temperature=0.2)
    torch.testing.assert_close(found, expected)


def test_contrast_tells_places_apart_and_the_cosine_does_not():
    # Every token the mean of the targets: well aligned, and of no use.
    z = torch.randn(4, 9, 6, dtype=torch.float64) + 3
    same = z.mean((0, 1)).expand_as(z)
    assert repa_loss(same, z) < -0.9
    contrast = repa_loss(same, z, similarity="nt_xent").item()
    assert contrast > math.log(36) - 0.5
    assert repa_loss(z, z, similarity="nt_xent").item() < contrast


def test_target_of_another_grid_is_resized_before_it_is_normalized():
    h, z = torch.randn(2, 6, 5).double(), 5 * torch.rand(2, 20, 5).double()
    image = z.mT.reshape(2, 5, 4, 5)
    resized = F.interpolate(image, size=(2, 3), mode="bilinear").flatten(2).mT
    found = repa_loss(h, z, grid=(2, 3), target_grid=(4, 5))
    torch.testing.assert_close(found, repa_loss(h, resized))
    normalized_first = repa_loss(h, F.normalize(z, dim=-1), grid=(2, 3), target_grid=(4, 5))
    assert abs(found - normalized_first) > 1e-4


def test_square_targets_need_no_grid_of_their_own():
    h, z = torch.randn(2, 4, 5), torch.randn(2, 9, 5)
    expected = repa_loss(h, z, grid=(2, 2), target_grid=(3, 3))
    assert repa_loss(h, z, grid=(2, 2)) == expected


def test_alignment_trains_blocks_up_to_the_tap_and_its_projector():
    repa = REPA(_Denoiser(), "first", 12, [5], projector_dim=7)
    _, aligned = repa(torch.randn(2, 4, 8), torch.rand(2), targets=torch.randn(2, 4, 5))
    aligned.backward()
    assert repa.model.first.weight.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in repa.projectors.parameters())
    for block in (repa.model.second, repa.model.last):
        assert all(p.grad is None or (p.grad == 0).all() for p in block.parameters())


def test_wrapper_returns_the_output_of_the_model_and_the_weighted_loss():
    repa = REPA(_Denoiser(), "second", 12, [5], weight=0.25, projector_dim=7)
    x, t, z = torch.randn(2, 4, 8), torch.rand(2), torch.randn(2, 4, 5)
    seen = []
    handle = repa.model.second.register_forward_hook(lambda m, i, output: seen.append(output))
    output, aligned = repa(x, t, targets=z)
    handle.remove()
    assert torch.equal(output, repa.model(x, t))
    torch.testing.assert_close(aligned, 0.25 * repa_loss(repa.projectors[0](seen[0]), z))
    repa.weight = 0.0
    assert repa(x, t, targets=z)[1] == 0


def test_wrapper_holds_on_to_no_activation():
    repa = REPA(_Denoiser(), "second", 12, [5], projector_dim=7)
    x, t = torch.randn(2, 4, 8), torch.rand(2)
    kept = []
    repa.model.second.register_forward_hook(lambda m, i, output: kept.append(weakref.ref(output)))
    repa(x, t, targets=torch.randn(2, 4, 5))
    repa.model(x, t)
    assert [reference() for reference in kept] == [None, None]


def test_wrapper_trains_under_autocast():
    repa = REPA(_Denoiser(), "second", 12, [5], projector_dim=7)
    x, t, z = torch.randn(2, 4, 8), torch.rand(2), torch.randn(2, 4, 5)
    for repa.similarity in ("cosine", "nt_xent"):
        expected = repa(x, t, targets=z)[1]
        with torch.autocast("cpu", torch.bfloat16):
            found = repa(x, t, targets=z)[1]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_two_wrappers_of_one_model_tap_their_own_blocks():
    model, z = _Denoiser(), torch.randn(2, 4, 5)
    first = REPA(model, "first", 12, [5], projector_dim=7)
    expected = first(x := torch.randn(2, 4, 8), t := torch.rand(2), targets=z)[1]
    REPA(model, "second", 12, [5], projector_dim=7)(x, t, targets=z)
    assert first(x, t, targets=z)[1] == expected


def test_block_that_does_not_run_is_named():
    model = _Denoiser()
    model.unused = nn.Linear(3, 12)
    repa = REPA(model, "unused", 12, [5], projector_dim=7)
    with pytest.raises(ValueError, match="tap 'unused' did not run"):
        repa(torch.randn(2, 4, 8), torch.rand(2), targets=torch.randn(2, 4, 5))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_is_the_derivative_of_the_path(path):
    x, noise = _pair(5, 3)
    t = torch.rand(5, dtype=torch.float64)
    _, velocity = sample_interpolant(x, noise, t, path=path)
    at = lambda t: sample_interpolant(x, noise, t, path=path)[0]
    torch.testing.assert_close((at(t + 1e-6) - at(t - 1e-6)) / 2e-6, velocity, rtol=1e-6, atol=1e-6)
    loss = flow_matching_loss(lambda x_t, t: velocity + 0 * x_t, x, noise=noise, t=t, path=path)
    assert loss == 0


def test_projector_is_three_layers_with_silu():
    projector = REPAProjector(4, 5)
    kinds = [type(layer) for layer in projector.layers]
    assert kinds == [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]
    assert projector.layers[0].out_features == 2048


def test_alignment_falls_and_the_velocity_does_not_suffer():
    # Sheet: 400 steps (300 here), against tanh of a random projection of the clean tokens.
    def train(weight):
        torch.manual_seed(0)
        project = torch.randn(8, 10)
        repa = REPA(_Denoiser(32), "first", 32, [10], weight=weight, projector_dim=32)
        optimizer = torch.optim.AdamW(repa.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(1)
        tail = []
        for step in range(300):
            x = torch.randn(32, 8, 8, generator=generator)
            noise = torch.randn(32, 8, 8, generator=generator)
            t = torch.rand(32, generator=generator)
            x_t, velocity = sample_interpolant(x, noise, t)
            targets = (x @ project).tanh()
            predicted, aligned = repa(x_t, t, targets=targets)
            loss = (predicted - velocity).square().mean()
            optimizer.zero_grad()
            (loss + aligned).backward()
            optimizer.step()
            if step >= 260:
                repa.weight = 1.0
                with torch.no_grad():
                    tail.append([repa(x_t, t, targets=targets)[1].item(), loss.item()])
                repa.weight = weight
        return torch.tensor(tail).mean(0)

    aligned, plain = train(0.5), train(0.0)
    assert aligned[0] < plain[0] - 0.4
    assert aligned[1] < 1.02 * plain[1]
