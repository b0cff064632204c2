"""Manifold entropy of adversarial training: the facts of the sheet of paper 55."""

import math

import pytest
import torch
from torch import nn

from regularizers.information import (
    ManifoldEntropy,
    RingBuffer,
    disomap_loss,
    dlle_loss,
    knn_entropy,
    nn_entropy_loss,
)

Z = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
BANK = torch.tensor([[0.0, 1.0], [3.0, 3.0]])
FORMS = ("log_mean", "mean_log")


@pytest.mark.parametrize("form", FORMS)
def test_worked_example(form):
    assert nn_entropy_loss(Z, BANK, form=form) == pytest.approx(0.693147, abs=1e-6)
    assert nn_entropy_loss(Z, BANK, form=form, distance="sq") == pytest.approx(0, abs=1e-6)


def test_log_of_the_mean_is_the_smaller_loss():
    z, bank = torch.randn(20, 3), torch.randn(30, 3)
    assert nn_entropy_loss(z, bank) < nn_entropy_loss(z, bank, form="mean_log")


@pytest.mark.parametrize("form", FORMS)
def test_loss_falls_by_twice_the_logarithm_of_a_scale_and_sees_no_shift(form):
    z, bank = torch.randn(20, 3, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    loss = lambda scale, shift: nn_entropy_loss(
        scale * z + shift, scale * bank + shift, form=form, eps=1e-300
    )
    torch.testing.assert_close(loss(3.0, 0.0), loss(1.0, 0.0) - 2 * math.log(3))
    torch.testing.assert_close(loss(1.0, 7.0), loss(1.0, 0.0))


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_that_stand_in_the_bank_stay_finite(form):
    z = BANK.clone().requires_grad_()
    loss = nn_entropy_loss(z, BANK, form=form)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8), abs=1e-4)
    assert torch.equal(z.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("form", FORMS)
def test_descent_moves_an_embedding_straight_away_from_its_nearest_entry(form):
    z, bank = torch.randn(10, 3, requires_grad=True), torch.randn(30, 3, requires_grad=True)
    nn_entropy_loss(z, bank, form=form).backward()
    nearest = bank[torch.cdist(z, bank).argmin(1)]
    cosine = torch.cosine_similarity(-z.grad, z - nearest)
    torch.testing.assert_close(cosine, torch.ones(10))
    assert bank.grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("distance", ["mse", "sq"])
def test_entropy_has_its_derivative(form, distance):
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bank = torch.randn(6, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: nn_entropy_loss(z, bank, form=form, distance=distance), z
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_give_float32(dtype):
    z, bank = torch.randn(20, 3).to(dtype), torch.randn(30, 3)
    found = nn_entropy_loss(z, bank)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, nn_entropy_loss(z.float(), bank))


def test_nan_in_gives_nan_out():
    z = Z.clone()
    z[0, 0] = torch.nan
    assert nn_entropy_loss(z, BANK).isnan()


def test_entropy_and_ring_compile(fresh_dynamo):
    ring = RingBuffer(16, 3)

    def step(z):
        loss = nn_entropy_loss(z, ring.rows)
        ring.push(z)
        return loss

    z = torch.randn(6, 3)
    expected = nn_entropy_loss(z, ring.rows.clone())
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(z)
    torch.testing.assert_close(found, expected)
    assert torch.equal(ring.oldest_first()[-6:], z)


def test_ring_starts_uniform_and_holds_the_last_rows_in_order():
    ring = RingBuffer(1000, 2)
    assert ring.rows.abs().max() < 1
    assert ring.rows.var() == pytest.approx(1 / 3, abs=0.03)
    rows = torch.arange(5000.0).reshape(2500, 2)
    for part in rows.split(300):
        ring.push(part)
    assert torch.equal(ring.oldest_first(), rows[-1000:])


def test_ring_never_shrinks_as_the_released_one_does():
    # The released bank holds 769, 514, 259, 4, 1, 1 rows after steps of 256; ours stays whole, so
    # that an embedding far from the last batch still finds its neighbour among older ones.
    ring = RingBuffer(1024, 2)
    for step in range(6):
        ring.push(torch.full((256, 2), float(step)))
    assert ring.rows[:, 0].unique().tolist() == [2, 3, 4, 5]
    released = torch.full((1, 2), 5.0)
    z = torch.tensor([[2.5, 2.5]])
    assert nn_entropy_loss(z, ring.rows) == pytest.approx(-math.log(0.25))
    assert nn_entropy_loss(z, released) == pytest.approx(-math.log(6.25))


def test_ring_is_saved_with_its_position():
    ring, other = RingBuffer(5, 2), RingBuffer(5, 2)
    ring.push(torch.randn(3, 2))
    other.load_state_dict(ring.state_dict())
    for twin in (ring, other):
        twin.push(torch.ones(1, 2))
    assert torch.equal(ring.oldest_first(), other.oldest_first())


def test_ring_takes_embeddings_without_their_history():
    ring = RingBuffer(5, 2)
    ring.push(torch.ones(2, 2, requires_grad=True))
    assert not ring.rows.requires_grad


def test_consistency_is_zero_for_the_identity_and_positive_for_noise():
    embed, x = nn.Linear(2, 8), torch.randn(16, 2)
    assert dlle_loss(embed, x, augment=lambda x: x) == 0
    small, large = (dlle_loss(embed, x, noise=noise) for noise in (1e-3, 1e-2))
    assert 0 < small < large < 1e-2


def test_images_are_flipped_along_either_axis():
    x = torch.rand(64, 1, 4, 4)
    seen = []
    dlle_loss(lambda x: seen.append(x) or x.flatten(1), x, noise=0.0)
    upright = (seen[1] == x.flip(3)).flatten(1).all(1)
    upside = (seen[1] == x.flip(2)).flatten(1).all(1)
    assert (upright ^ upside).all()
    assert 10 < upright.sum() < 54


def test_consistency_sends_no_gradient_through_its_target():
    embed, x = nn.Linear(2, 3), torch.randn(4, 2)
    augmented = torch.randn(4, 2)
    dlle_loss(embed, x, augment=lambda x: augmented).backward()
    error = (embed(x) - embed(augmented)).detach()
    torch.testing.assert_close(embed.weight.grad, 2 * error.T @ x / error.numel())


@pytest.mark.parametrize("alpha", ["uniform", "normal"])
def test_straight_lines_stay_straight_under_a_linear_map(alpha):
    x_a, x_b = torch.randn(2, 16, 2, dtype=torch.float64)
    linear, bent = nn.Linear(2, 8, dtype=torch.float64), lambda x: x**2
    assert disomap_loss(linear, x_a, x_b, alpha=alpha, target_noise=0.0) < 1e-25
    assert disomap_loss(bent, x_a, x_b, alpha=alpha, target_noise=0.0) > 1e-3


def test_mixing_has_a_share_for_every_sample_and_normal_ones_extrapolate():
    seen = []
    embed = lambda x: seen.append(x) or x.flatten(1)
    zeros, ones = torch.zeros(500, 1, 2, 2), torch.ones(500, 1, 2, 2)
    for alpha in ("uniform", "normal"):
        disomap_loss(embed, ones, zeros, alpha=alpha)
    uniform, normal = (x.flatten(1) for x in (seen[2], seen[5]))
    for share in (uniform, normal):
        assert torch.equal(share, share[:, :1].expand(-1, 4))
        assert len(share[:, 0].unique()) > 490
    assert uniform.min() >= 0
    assert uniform.max() <= 1
    assert normal.min() < 0
    assert normal.max() > 1


def test_target_of_the_mixture_is_noisy_and_detached():
    x_a, x_b = torch.randn(2, 400, 2)
    embed = nn.Linear(2, 8)
    assert disomap_loss(embed, x_a, x_b).item() == pytest.approx(0.05**2, rel=0.1)
    scale = torch.tensor(1.0, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    loss = disomap_loss(lambda x: scale * x**2, x_a, x_b, target_noise=0.0, generator=generator)
    share = torch.rand(400, 1, generator=generator.manual_seed(1))
    mixed, target = (share * x_a + (1 - share) * x_b) ** 2, share * x_a**2 + (1 - share) * x_b**2
    (gradient,) = torch.autograd.grad(loss, scale)
    torch.testing.assert_close(gradient, (2 * (mixed - target) * mixed).mean())


def test_random_terms_follow_the_generator():
    embed, x = nn.Linear(2, 8), torch.randn(2, 16, 2)
    seeded = lambda: torch.Generator().manual_seed(1)
    for call in (
        lambda: dlle_loss(embed, x[0], generator=seeded()),
        lambda: disomap_loss(embed, *x, generator=seeded()),
        lambda: RingBuffer(4, 2, generator=seeded()).rows.sum(),
    ):
        assert call() == call()


def _critic():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh())


def test_critic_terms_are_their_sum():
    critic = _critic()
    terms = ManifoldEntropy(4, bank_size=32, weight=0.5, warmup_epochs=10)
    bank = terms.real_bank.rows.clone()
    real, fake = torch.randn(8, 2), torch.randn(8, 2, requires_grad=True)
    found = terms.discriminator_terms(critic, real, fake, epoch=5)
    expected = found.critic + 0.25 * found.entropy + found.dlle + found.disomap
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.critic, critic(fake).mean() - critic(real).mean())
    torch.testing.assert_close(found.entropy, nn_entropy_loss(critic(real), bank))
    found.loss.backward()
    assert fake.grad is None


def test_generator_terms_are_their_sum_and_reach_the_samples():
    critic = _critic()
    terms = ManifoldEntropy(4, bank_size=32, weight=0.5, warmup_epochs=0, form="mean_log")
    bank = terms.fake_bank.rows.clone()
    fake = torch.randn(8, 2, requires_grad=True)
    found = terms.generator_terms(critic, fake, epoch=0)
    torch.testing.assert_close(found.loss, found.critic + 0.5 * found.entropy)
    torch.testing.assert_close(found.critic, -critic(fake).mean())
    torch.testing.assert_close(found.entropy, nn_entropy_loss(critic(fake), bank, form="mean_log"))
    found.loss.backward()
    assert fake.grad.abs().min() > 0


def test_each_ring_remembers_its_own_embeddings():
    critic, terms = _critic(), ManifoldEntropy(4, bank_size=32)
    real, fake = torch.randn(2, 8, 2)
    terms.discriminator_terms(critic, real, fake, epoch=0)
    terms.generator_terms(critic, fake, epoch=0)
    assert torch.equal(terms.real_bank.oldest_first()[-8:], critic(real))
    assert torch.equal(terms.fake_bank.oldest_first()[-8:], critic(fake))


def test_weight_rises_over_the_warmup():
    terms = ManifoldEntropy(4, weight=2.0, warmup_epochs=100)
    assert [terms.entropy_weight(epoch) for epoch in (0, 25, 100, 500)] == [0, 0.5, 2, 2]
    assert ManifoldEntropy(4, warmup_epochs=0).entropy_weight(0) == 1


def test_knn_entropy_of_a_gaussian():
    assert knn_entropy(torch.randn(2000, 2)) == pytest.approx(
        math.log(2 * math.pi * math.e), abs=0.1
    )


def test_knn_entropy_grows_with_the_logarithm_of_a_scale():
    x = torch.randn(300, 3, dtype=torch.float64)
    difference = knn_entropy(5 * x, k=4) - knn_entropy(x, k=4)
    assert difference == pytest.approx(3 * math.log(5))


def test_repeated_samples_have_no_entropy():
    assert knn_entropy(torch.ones(5, 2)) == -math.inf


def test_bad_input_names_the_argument():
    terms = ManifoldEntropy(4, bank_size=4)
    x = torch.randn(8, 2)
    for exception, name, call in [
        (TypeError, "z must", lambda: nn_entropy_loss(Z.int(), BANK)),
        (ValueError, "z and bank must", lambda: nn_entropy_loss(Z, BANK[:, :1])),
        (ValueError, "z and bank must", lambda: nn_entropy_loss(Z[:0], BANK)),
        (ValueError, "eps must", lambda: nn_entropy_loss(Z, BANK, eps=0.0)),
        (ValueError, "form must", lambda: nn_entropy_loss(Z, BANK, form="log")),
        (ValueError, "distance must", lambda: nn_entropy_loss(Z, BANK, distance="cosine")),
        (ValueError, "bank_size must", lambda: terms.generator_terms(_critic(), x, 0)),
        (ValueError, "z and bank must", lambda: terms.generator_terms(lambda x: x, x[:2], 0)),
        (ValueError, "epoch must", lambda: terms.generator_terms(_critic(), x[:2], -1)),
        (ValueError, "fake must", lambda: terms.discriminator_terms(_critic(), x, x[:2], 0)),
        (ValueError, "dim must", lambda: ManifoldEntropy(0)),
        (ValueError, "warmup_epochs must", lambda: ManifoldEntropy(4, warmup_epochs=-1)),
        (ValueError, "weight must", lambda: ManifoldEntropy(4, weight=-1.0)),
        (ValueError, "size must", lambda: RingBuffer(0, 2)),
        (ValueError, "rows must be at most", lambda: RingBuffer(1, 2).push(x)),
        (ValueError, "rows must have", lambda: RingBuffer(9, 3).push(x)),
        (ValueError, "noise must", lambda: dlle_loss(_critic(), x, noise=-1.0)),
        (ValueError, "x_b must", lambda: disomap_loss(_critic(), x, x[:2])),
        (ValueError, "alpha must", lambda: disomap_loss(_critic(), x, x, alpha="beta")),
        (ValueError, "k must", lambda: knn_entropy(x, k=0)),
        (ValueError, "x must have", lambda: knn_entropy(x, k=8)),
    ]:
        with pytest.raises(exception, match=name):
            call()


def _modes_reached(weight, seed):
    """How many of 8 Gaussians on a ring a small GAN reaches in 400 steps; weight 0: plain."""
    torch.manual_seed(seed)
    angle = 2 * math.pi * torch.arange(8) / 8
    centers = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    mlp = lambda inner, outer: nn.Sequential(
        nn.Linear(inner, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outer)
    )
    generator, critic = mlp(4, 2), mlp(2, 8).append(nn.Tanh())
    terms = ManifoldEntropy(8, bank_size=512, weight=weight, warmup_epochs=100, form="mean_log")
    for_generator, for_critic = (
        torch.optim.Adam(module.parameters(), lr=2e-3, betas=(0.5, 0.9), fused=True)
        for module in (generator, critic)
    )
    for step in range(400):
        real = centers[torch.randint(8, (128,))] + 0.05 * torch.randn(128, 2)
        fake = generator(torch.randn(128, 4))
        if weight:
            loss = terms.discriminator_terms(critic, real, fake, step).loss
        else:
            loss = critic(fake.detach()).mean() - critic(real).mean()
        for_critic.zero_grad()
        loss.backward()
        for_critic.step()
        if step % 2 == 0:
            loss = (
                terms.generator_terms(critic, fake, step).loss if weight else -critic(fake).mean()
            )
            for_generator.zero_grad()
            loss.backward()
            for_generator.step()
    with torch.no_grad():
        samples = generator(torch.randn(1000, 4))
    return int((torch.cdist(centers, samples).amin(1) < 0.4).sum())


@pytest.mark.slow
def test_entropy_makes_a_gan_reach_more_modes_of_a_ring():
    # Sheet of paper 55, with fewer steps at a larger rate: a mean of 1.3 modes becomes 5.
    torch.set_num_threads(1)
    plain, ours = (sum(_modes_reached(weight, seed) for seed in range(3)) for weight in (0, 0.1))
    assert ours / 3 >= plain / 3 + 1.5
