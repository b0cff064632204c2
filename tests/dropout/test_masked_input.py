"""Masked-input regularization: the facts of the sheet of paper 19."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.dropout import (
    causal_right_window_mask,
    decay_parameter_groups,
    mask_inputs,
    masked_diffusion_loss,
    masked_input_loss,
)
from regularizers.ops.philox import philox_words

MASK = 20


def text(rows=4, length=33, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(MASK, (rows, length), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(MASK + 1, 8), nn.Linear(8, MASK))


def cross_entropy(net, tokens, targets, **options):
    return F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten(), **options)


def test_masks_are_the_documented_words():
    tokens = torch.zeros(3, 40, dtype=torch.long)
    _, is_masked = mask_inputs(tokens, 1, ratio_range=(0.2, 0.6), prefix=2, seed=7)
    for row in range(3):
        words = philox_words(torch.tensor(7), 41, stream=row).double() / 2**32
        ratio = 0.2 + 0.4 * words[40]
        expected = (words[:40] < ratio) & (torch.arange(40) >= 2)
        assert torch.equal(is_masked[row], expected)


def test_masked_positions_hold_the_mask_and_others_their_token():
    tokens, _ = text()
    masked, is_masked = mask_inputs(tokens, MASK, seed=1)
    assert (masked[is_masked] == MASK).all()
    assert torch.equal(masked[~is_masked], tokens[~is_masked])
    assert is_masked.any()


def test_prefix_is_never_masked():
    tokens = torch.zeros(50, 20, dtype=torch.long)
    _, is_masked = mask_inputs(tokens, 1, ratio_range=(1.0, 1.0), prefix=5, seed=0)
    assert not is_masked[:, :5].any()
    assert is_masked[:, 5:].all()


def test_ratio_of_zero_masks_nothing():
    tokens, _ = text()
    masked, is_masked = mask_inputs(tokens, MASK, ratio_range=(0.0, 0.0), seed=0)
    assert torch.equal(masked, tokens)
    assert not is_masked.any()


def test_fraction_of_a_row_is_its_ratio_and_a_quarter_on_average():
    # 4000 positions a row: 4 sigma = 4 sqrt(r (1 - r) / 4000) <= 0.032. Ratios are uniform on
    # [0, 0.5]: 4 sigma of their mean over 400 rows is 4 * 0.5 / sqrt(12 * 400) = 0.029.
    tokens = torch.zeros(400, 4008, dtype=torch.long)
    _, is_masked = mask_inputs(tokens, 1, seed=5)
    ratios = torch.stack(
        [philox_words(torch.tensor(5), 4009, stream=row)[-1] for row in range(400)]
    )
    ratios = 0.5 * ratios.double() / 2**32
    fraction = is_masked[:, 8:].double().mean(1)
    sigma = (ratios * (1 - ratios) / 4000).sqrt()
    # 400 rows at 5 sigma: one of them strays in 4000 such tests.
    assert ((fraction - ratios).abs() <= 5 * sigma + 1e-6).all()
    assert abs(fraction.mean() - 0.25) < 0.029


def test_fixed_count_masks_as_many_distinct_positions_in_every_row():
    tokens = torch.zeros(200, 30, dtype=torch.long)
    masked, is_masked = mask_inputs(tokens, 1, num_masked=7, prefix=3, seed=2)
    assert (is_masked.sum(1) == 7).all()
    assert not is_masked[:, :3].any()
    assert torch.equal(masked, is_masked.long())
    # Positions are equally likely: 200 * 7 / 27 = 51.9 times each, 4 sigma = 25.
    assert (is_masked[:, 3:].sum(0) - 51.9).abs().max() < 25


def test_fixed_count_takes_the_smallest_words():
    tokens = torch.zeros(2, 16, dtype=torch.long)
    _, is_masked = mask_inputs(tokens, 1, num_masked=4, prefix=2, seed=9)
    for row in range(2):
        words = philox_words(torch.tensor(9), 16, stream=row)[2:]
        assert set(is_masked[row].nonzero().flatten().tolist()) == {
            i + 2 for i in words.argsort()[:4].tolist()
        }


def test_rows_and_calls_get_other_masks():
    tokens = torch.zeros(2, 64, dtype=torch.long)
    first = mask_inputs(tokens, 1, num_masked=20)[1]
    second = mask_inputs(tokens, 1, num_masked=20)[1]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_equal_generators_give_equal_masks():
    tokens, _ = text()
    first, second = (
        mask_inputs(tokens, MASK, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_int32_tokens_keep_their_type():
    tokens, _ = text()
    masked, _ = mask_inputs(tokens.int(), MASK, seed=0)
    assert masked.dtype == torch.int32
    assert torch.equal(masked.long(), mask_inputs(tokens, MASK, seed=0)[0])


def test_weight_of_zero_leaves_the_ordinary_loss():
    tokens, targets = text()
    net = model()
    total, ntp, aux = masked_input_loss(net, tokens, targets, MASK, weight=0, ntp_weight=0.7)
    expected = cross_entropy(net, tokens, targets)
    torch.testing.assert_close(total, 0.7 * expected)
    torch.testing.assert_close(ntp, expected)
    assert aux.item() == 0


@pytest.mark.parametrize("nothing", [{"ratio_range": (0.0, 0.0)}, {"num_masked": 0}])
def test_masked_pass_is_left_out_where_nothing_can_be_masked(nothing):
    tokens, targets = text()
    net, calls = model(), []

    def counted(x):
        calls.append(x)
        return net(x)

    total, ntp, aux = masked_input_loss(counted, tokens, targets, MASK, **nothing)
    assert len(calls) == 1
    assert aux.item() == 0
    assert torch.equal(total, ntp)


def test_total_is_the_weighted_sum_of_both_passes():
    tokens, targets = text()
    net = model()
    total, ntp, aux = masked_input_loss(net, tokens, targets, MASK, seed=4)
    masked, _ = mask_inputs(tokens, MASK, seed=4)
    torch.testing.assert_close(ntp, cross_entropy(net, tokens, targets))
    torch.testing.assert_close(aux, cross_entropy(net, masked, targets))
    torch.testing.assert_close(total, ntp + 0.4 * aux)


def test_two_calls_with_one_pass_each_have_the_gradient_of_one_call():
    tokens, targets = text()
    both, apart = model(), model()
    masked_input_loss(both, tokens, targets, MASK, seed=4)[0].backward()
    masked_input_loss(apart, tokens, targets, MASK, weight=0)[0].backward()
    masked_input_loss(apart, tokens, targets, MASK, ntp_weight=0, seed=4)[0].backward()
    for first, second in zip(both.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad)


def test_masked_loss_of_one_position_is_that_tokens_cross_entropy():
    tokens, targets = text(rows=1)
    net = model()
    options = {"positions": "masked", "num_masked": 1, "seed": 3}
    _, _, aux = masked_input_loss(net, tokens, targets, MASK, **options)
    masked, is_masked = mask_inputs(tokens, MASK, num_masked=1, seed=3)
    position = is_masked.nonzero()[0, 1]
    row = position - 1
    assert targets[0, row] == tokens[0, position]
    torch.testing.assert_close(aux, F.cross_entropy(net(masked)[0, row], targets[0, row]))


def test_masked_loss_without_a_masked_position_is_zero_with_zero_gradients():
    tokens, targets = text(rows=1, length=10)
    net = model()
    # Position 0 has no row before it.
    _, _, aux = masked_input_loss(
        net, tokens[:, :1], targets[:, :1], MASK, positions="masked", num_masked=1, prefix=0, seed=0
    )
    aux.backward()
    assert aux.item() == 0
    assert all((parameter.grad == 0).all() for parameter in net.parameters())


@pytest.mark.parametrize("ignore_index", [-1, 0, 3])
def test_ignored_targets_do_not_count(ignore_index):
    tokens, targets = text()
    targets = targets.clone()
    targets[:, ::2] = ignore_index
    net = model()
    _, ntp, _ = masked_input_loss(net, tokens, targets, MASK, ignore_index=ignore_index)
    torch.testing.assert_close(ntp, cross_entropy(net, tokens, targets, ignore_index=ignore_index))
    _, ntp, _ = masked_input_loss(
        net, tokens, torch.full_like(targets, ignore_index), MASK, ignore_index=ignore_index
    )
    assert ntp.item() == 0


def test_targets_and_tokens_are_left_alone():
    tokens, targets = text()
    before = tokens.clone(), targets.clone()
    masked_input_loss(model(), tokens, targets, MASK, positions="masked")
    assert torch.equal(tokens, before[0])
    assert torch.equal(targets, before[1])


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_fused_head_gives_the_loss_and_gradients_of_the_whole_model(positions):
    tokens, targets = text()
    whole, parts = model(), model()
    first = masked_input_loss(whole, tokens, targets, MASK, positions=positions, seed=1)
    second = masked_input_loss(
        parts[0], tokens, targets, MASK, positions=positions, head=parts[1], seed=1
    )
    torch.testing.assert_close(first, second)
    first[0].backward()
    second[0].backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_right_window_reaches_the_masked_pass_alone():
    tokens, targets = text()
    net, masks = model(), []

    def attentive(x, attn_mask=None):
        masks.append(attn_mask)
        return net(x)

    masked_input_loss(attentive, tokens, targets, MASK, positions="masked", right_window=2)
    assert masks[0] is None
    assert torch.equal(masks[1], causal_right_window_mask(32, 2))


def test_model_arguments_reach_both_passes():
    tokens, targets = text()
    net, seen = model(), []

    def scaled(x, scale):
        seen.append(scale)
        return net(x) * scale

    masked_input_loss(scaled, tokens, targets, MASK, model_kwargs={"scale": 2.0})
    assert seen == [2.0, 2.0]


@pytest.mark.parametrize("window", [0, 1, 3, 9])
def test_right_window_mask_shows_what_it_says(window):
    mask = causal_right_window_mask(5, window)
    assert mask.shape == (1, 1, 5, 5)
    for i in range(5):
        for j in range(5):
            assert mask[0, 0, i, j].item() == (j <= i + window)


def test_diffusion_loss_of_a_constant_is_the_constant_in_expectation():
    # Given p, a sequence's sum is c / p times a binomial: variance c^2 (1 - p) / (p T). Its mean
    # over p uniform on (eps, 1) is c^2 (ln(1 / eps) - 1) / T: 4 sigma = 4 * 2 sqrt(5.9 / 2^18).
    constant = lambda masked, tokens: torch.full(tokens.shape, 2.0)
    loss = masked_diffusion_loss(constant, torch.zeros(2048, 128, dtype=torch.long), 1, seed=0)
    assert abs(loss.item() - 2) < 0.04


def test_diffusion_loss_divides_masked_losses_by_their_probability():
    tokens = torch.zeros(3, 16, dtype=torch.long)
    losses = torch.rand(3, 16, dtype=torch.float64)
    seen = []

    def record(masked, tokens):
        seen.append(masked == 1)
        return losses.where(masked == 1, torch.inf)  # a visible token's loss must not be read

    loss = masked_diffusion_loss(record, tokens, 1, eps=0.3, seed=6)
    words = torch.stack([philox_words(torch.tensor(6), 17, stream=row) for row in range(3)])
    p = 0.3 + 0.7 * words[:, -1:].double() / 2**32
    assert torch.equal(seen[0], words[:, :16].double() / 2**32 < p)
    # 24 of the word's 32 bits make the ratio.
    torch.testing.assert_close(loss, (losses / p)[seen[0]].sum() / 48, rtol=1e-6, atol=0)


def test_decay_leaves_out_embeddings_norms_vectors_and_frozen_parameters():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

    net = nn.Sequential(
        nn.Embedding(9, 4),
        nn.Linear(4, 4),
        Scale(),
        nn.LayerNorm((3, 4)),
        nn.MultiheadAttention(4, 2),
        nn.Conv2d(1, 2, 3),
        nn.Linear(4, 9, bias=False),
    )
    net[6].weight = net[0].weight  # tied
    net[5].weight.requires_grad_(False)
    decaying, others = decay_parameter_groups(net, 0.8)
    assert {id(p) for p in decaying["params"]} == {
        id(p) for p in (net[1].weight, net[4].in_proj_weight, net[4].out_proj.weight)
    }
    assert decaying["weight_decay"] == 0.8
    assert others["weight_decay"] == 0.0
    trained = [p for p in net.parameters() if p.requires_grad]
    assert len(decaying["params"]) + len(others["params"]) == len(trained)


def test_bad_input_names_the_argument():
    tokens, targets = text()
    loss = lambda **options: masked_input_loss(model(), tokens, targets, MASK, **options)
    mask = lambda **options: mask_inputs(tokens, MASK, **options)
    cases = [
        (TypeError, "tokens must", lambda: mask_inputs(tokens.float(), MASK)),
        (ValueError, "tokens must", lambda: mask_inputs(tokens[0], MASK)),
        (ValueError, "tokens must not contain", lambda: mask_inputs(tokens, int(tokens[0, 0]))),
        (ValueError, "mask_token_id must", lambda: mask_inputs(tokens, -1)),
        (ValueError, "ratio_range must", lambda: mask(ratio_range=(0.5, 0.2))),
        (ValueError, "ratio_range must", lambda: mask(ratio_range=(-0.1, 0.2))),
        (ValueError, "ratio_range must", lambda: mask(ratio_range=(0.1, 1.2))),
        (ValueError, "ratio_range must", lambda: mask(ratio_range=(0.0, math.nan))),
        (ValueError, "prefix must", lambda: mask(prefix=32)),
        (ValueError, "prefix must", lambda: mask(prefix=-1)),
        (ValueError, "num_masked must", lambda: mask(num_masked=25)),
        (ValueError, "num_masked must", lambda: mask(num_masked=-1)),
        (ValueError, "seed and generator", lambda: mask(seed=0, generator=torch.Generator())),
        (ValueError, "right_window must", lambda: loss(right_window=1)),
        (ValueError, "right_window must", lambda: loss(right_window=-1, positions="masked")),
        (ValueError, "positions must", lambda: loss(positions="some")),
        (ValueError, "weight must", lambda: loss(weight=-0.1)),
        (ValueError, "ntp_weight must", lambda: loss(ntp_weight=-1)),
        (
            ValueError,
            "targets must have",
            lambda: masked_input_loss(model(), tokens, targets[:, 1:], MASK),
        ),
        (
            ValueError,
            "targets must not contain",
            lambda: masked_input_loss(model(), tokens, targets.clone().fill_(MASK), MASK),
        ),
        (ValueError, "T must", lambda: causal_right_window_mask(0, 1)),
        (ValueError, "right_window must", lambda: causal_right_window_mask(3, -1)),
        (
            ValueError,
            "eps must",
            lambda: masked_diffusion_loss(lambda m, t: t.float(), tokens, MASK, eps=0.0),
        ),
        (
            ValueError,
            "per_token_loss_fn must",
            lambda: masked_diffusion_loss(lambda m, t: t.float().sum(), tokens, MASK),
        ),
        (TypeError, "model must", lambda: decay_parameter_groups([], 0.1)),
        (ValueError, "weight_decay must", lambda: decay_parameter_groups(nn.Linear(1, 1), -1)),
    ]
    for exception, message, call in cases:
        with pytest.raises(exception, match=message):
            call()


@pytest.mark.parametrize("options", [{}, {"positions": "masked", "num_masked": 5}])
def test_loss_compiles_to_one_graph(fresh_dynamo, options):
    tokens, targets = text()
    net = model()

    def step(seed):
        return masked_input_loss(net, tokens, targets, MASK, seed=seed, **options)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.tensor(3)), step(torch.tensor(3)))


class CausalMLP(nn.Module):
    """Predicts the next of 12 symbols from the last 8."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(13, 16)
        self.mlp = nn.Sequential(nn.Linear(8 * 16, 128), nn.ReLU(), nn.Linear(128, 12))

    def forward(self, tokens):
        past = F.pad(self.embedding(tokens), (0, 0, 7, 0))
        return self.mlp(past.unfold(1, 8, 1).flatten(2))


@pytest.mark.slow
def test_masked_inputs_delay_over_fitting_of_little_data():
    # Sheet of paper 19, fact 8, in 400 steps: order-2 Markov source, 12 symbols, 1500 training
    # tokens. Means over 2 seeds were 5.7 without and 4.7 with masked inputs.
    torch.set_num_threads(1)  # many small calls

    def final_loss(weight, seed):
        torch.manual_seed(seed)
        steps = torch.distributions.Dirichlet(torch.full((12,), 0.3)).sample((12, 12)).cumsum(-1)
        symbols = [0, 1]
        for u in torch.rand(3500).tolist():
            symbols.append(min(int((steps[symbols[-2], symbols[-1]] < u).sum()), 11))
        tokens, validation = torch.tensor(symbols[:1501]), torch.tensor(symbols[1501:])
        inputs, targets = tokens[:-1].view(30, 50), tokens[1:].view(30, 50)
        net = CausalMLP()
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        for _ in range(400):
            rows = torch.randint(30, (8,))
            optimizer.zero_grad()
            masked_input_loss(net, inputs[rows], targets[rows], 12, weight=weight, prefix=0)[
                0
            ].backward()
            optimizer.step()
        with torch.no_grad():
            return cross_entropy(net, validation[None, :-1], validation[None, 1:]).item()

    without, with_masks = (sum(final_loss(w, s) for s in range(2)) / 2 for w in (0.0, 0.4))
    assert with_masks < without - 0.4
