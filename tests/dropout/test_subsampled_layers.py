"""Subsampled layers in models: torch's own layers around them, conversion, schedule, ensemble."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.dropout import (
    SSASchedule,
    SubsampledSelfAttention,
    convert_attention,
    self_ensemble,
)
from tests.harness import MethodContract


def _x(batch=2, tokens=12, features=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, features, generator=generator).to(dtype)


def _encoder(layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers)


def _padding():
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[1, 8:] = True
    return mask


class TestMethod(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return SubsampledSelfAttention(8, 2, keep_ratio=0.5, dtype=dtype)

    def call(self, module, dtype):
        return module(*[_x(dtype=dtype)] * 3)[0]

    def inert(self, module):
        plain = nn.MultiheadAttention(8, 2, batch_first=True)
        plain.load_state_dict(module.state_dict())
        return module(*[_x()] * 3)[0], plain.eval()(*[_x()] * 3)[0]

    def bad_inputs(self):
        layer = lambda **options: lambda: SubsampledSelfAttention(8, 2, **options)
        module, x = SubsampledSelfAttention(8, 2), _x()
        model = nn.Sequential(SubsampledSelfAttention(8, 2))
        plain = nn.MultiheadAttention(8, 2)
        return [
            (ValueError, "dropout must", layer(dropout=0.1)),
            (ValueError, "add_bias_kv", layer(add_bias_kv=True)),
            (ValueError, "add_zero_attn", layer(add_zero_attn=True)),
            (ValueError, "kdim", layer(kdim=4)),
            (ValueError, "vdim", layer(vdim=4)),
            (ValueError, "num_heads", lambda: SubsampledSelfAttention(8, 3)),
            (ValueError, "mode", layer(mode="far")),
            (ValueError, "keep_ratio", layer(keep_ratio=0.0)),
            (ValueError, "num_keys", layer(num_keys=0)),
            (ValueError, "exactly one", layer(num_keys=3, keep_ratio=0.5)),
            (ValueError, "window", layer(window=4)),
            (ValueError, "sigma", layer(window=4, mode="local", sigma=-1.0)),
            (ValueError, "grid", layer(window=4, mode="local", grid=(2, 3, 4))),
            (ValueError, "need_weights", lambda: module(x, x, x, need_weights=True)),
            (ValueError, "query must", lambda: module(*[x[None]] * 3)),
            (ValueError, "model must", lambda: convert_attention(nn.Linear(2, 2))),
            (TypeError, "keep", lambda: convert_attention(plain, keep=0.5)),
            (ValueError, "keep_ratio", lambda: convert_attention(plain, keep_ratio=2.0)),
            (ValueError, "model must", lambda: SSASchedule(nn.Linear(2, 2))),
            (ValueError, "finetune_fraction", lambda: SSASchedule(model, finetune_fraction=1.5)),
            (ValueError, "keep_ratio", lambda: SSASchedule(model, keep_ratio=0.0)),
            (ValueError, "progress", lambda: SSASchedule(model).set_progress(2.0)),
            (ValueError, "model must", lambda: self_ensemble(nn.Linear(2, 2), x)),
            (ValueError, "num_samples", lambda: self_ensemble(model, x, num_samples=0)),
            (ValueError, "average", lambda: self_ensemble(model, x, average="median")),
        ]  # fmt: skip


def _twins(**options):
    """A plain layer and a subsampled one with its parameters, which sees every key."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=options.pop("batch_first", True))
    twin = SubsampledSelfAttention(8, 2, batch_first=plain.batch_first, **options)
    twin.load_state_dict(plain.state_dict())
    return plain, twin


# n = N - 1 of equal keys and values: the sampling path must give what dense attention gives.
def _all_equal(x):
    return x[:, :1].expand_as(x).contiguous()


@pytest.mark.parametrize("options", [{"num_keys": 5}, {"window": 5, "mode": "local"}], ids=str)
def test_sampling_equal_tokens_gives_what_torch_gives(options):
    plain, twin = _twins(**options)
    x = _all_equal(_x())
    torch.testing.assert_close(twin(x, x, x)[0], plain(x, x, x)[0])
    torch.testing.assert_close(twin(x[0], x[0], x[0])[0], plain(x[0], x[0], x[0])[0])


def test_projections_of_different_inputs_and_sequence_first_agree_with_torch():
    plain, twin = _twins(num_keys=5, batch_first=False)
    query, memory = _x(tokens=3).transpose(0, 1), _all_equal(_x()).transpose(0, 1)
    expected = plain(query, memory, memory)[0]
    torch.testing.assert_close(twin(query, memory, memory)[0], expected)


@pytest.mark.parametrize("kind", ["bool", "float", "heads"])
def test_masks_mean_what_they_mean_in_torch(kind):
    # Each query may see two tokens, which are equal, so whichever is drawn gives the same result.
    _, twin = _twins(num_keys=11)
    x = _x(tokens=6).repeat_interleave(2, 1)
    hidden = torch.ones(12, 12, dtype=torch.bool)
    for token in range(12):
        hidden[token, token // 2 * 2 : token // 2 * 2 + 2] = False
    mask = hidden
    if kind == "float":
        mask = torch.zeros(12, 12).masked_fill(hidden, -torch.inf)
    if kind == "heads":
        mask = hidden.expand(4, 12, 12)
    found = twin(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(found, twin.eval()(x, x, x, attn_mask=mask)[0])


@pytest.mark.parametrize("floating", [False, True])
def test_padding_masks_of_both_kinds_hide_keys(floating):
    _, twin = _twins(num_keys=6)
    x = _x()
    mask = _padding()
    given = torch.zeros(2, 12).masked_fill(mask, -torch.inf) if floating else mask
    torch.manual_seed(1)
    expected = twin(x, x, x, key_padding_mask=given)[0]
    torch.manual_seed(1)
    noisy = x + 100 * mask.unsqueeze(-1)
    found = twin(noisy, noisy, noisy, key_padding_mask=given)[0]
    torch.testing.assert_close(found[~mask], expected[~mask])


def test_causality_without_a_mask_is_the_causal_mask():
    _, twin = _twins(num_keys=6)
    x = _x()
    mask = nn.Transformer.generate_square_subsequent_mask(12)
    for mode in (True, False):
        twin.train(mode)
        results = []
        for given in (None, mask):
            torch.manual_seed(1)
            results.append(twin(x, x, x, attn_mask=given, is_causal=True)[0])
        torch.testing.assert_close(*results)


def test_short_sequences_are_attended_to_densely():
    plain, twin = _twins(num_keys=50)
    x = _x()
    torch.testing.assert_close(twin(x, x, x)[0], plain(x, x, x)[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_converted_encoder_trains_on_samples_and_evaluates_as_before(masked, causal):
    encoder, x = _encoder(dropout=0.0), _x()
    padding = _padding() if masked else None
    mask = nn.Transformer.generate_square_subsequent_mask(12) if causal else None
    call = lambda: encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=causal)
    dense = call()
    with torch.no_grad():  # torch's fast path, on nested tensors where there is padding
        expected = encoder.eval()(x, mask=mask, src_key_padding_mask=padding)
    assert convert_attention(encoder.train(), num_keys=4) is encoder
    sampled = call()
    sampled.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    valid = ~padding if masked else torch.ones(2, 12, dtype=torch.bool)
    assert not torch.allclose(sampled[valid], dense[valid], atol=1e-3)
    with torch.no_grad():
        found = encoder.eval()(x, mask=mask, src_key_padding_mask=padding)
    torch.testing.assert_close(found[valid], expected[valid])


def test_the_fast_path_serves_converted_layers_in_evaluation_only():
    layer = convert_attention(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    calls = []
    attention = layer.self_attn
    attention.forward = lambda *args, **options: calls.append(1) or (args[0], None)
    with torch.no_grad():
        layer(_x())
        assert calls == []
        attention.sampling = True
        layer(_x())
        attention.sampling = None
        attention.train()
        layer(_x())
    assert len(calls) == 2


def test_sampling_forced_in_evaluation_samples():
    layer = convert_attention(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    layer.self_attn.sampling = True
    with torch.no_grad():
        assert not torch.equal(layer(_x()), layer(_x()))
        layer.self_attn.sampling = False
        assert torch.equal(layer.train().self_attn(*[_x()] * 3)[0],
                           layer.self_attn(*[_x()] * 3)[0])  # fmt: skip


def test_layers_of_one_pass_draw_different_keys(monkeypatch):
    from regularizers.dropout import subsampled_layers

    seen = []
    plain = subsampled_layers.subsampled_attention

    def spy(q, k, v, **options):
        state = torch.get_rng_state()
        seen.append(torch.randint(2**62, ()).item())
        torch.set_rng_state(state)
        return plain(q, k, v, **options)

    encoder = convert_attention(_encoder(layers=3))
    monkeypatch.setattr(subsampled_layers, "subsampled_attention", spy)
    encoder(_x())
    encoder(_x())
    assert len(set(seen)) == 6


def test_conversion_keeps_parameters_names_and_shared_modules():
    encoder = _encoder()
    encoder.twice = encoder.layers[0].self_attn
    parameters = dict(encoder.named_parameters())
    names = list(encoder.state_dict())
    convert_attention(encoder, keep_ratio=0.5)
    assert list(encoder.state_dict()) == names
    assert all(parameters[name] is p for name, p in encoder.named_parameters())
    assert encoder.twice is encoder.layers[0].self_attn


def test_conversion_can_be_limited_and_leaves_the_model_alone_where_it_fails():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    model.extra = nn.MultiheadAttention(8, 2, add_zero_attn=True)
    with pytest.raises(ValueError, match=r"add_zero_attn.*'extra'"):
        convert_attention(model)
    assert not any(isinstance(m, SubsampledSelfAttention) for m in model.modules())
    convert_attention(model, where=lambda name, _: name.endswith("self_attn"))
    kinds = {n for n, m in model.named_modules() if isinstance(m, SubsampledSelfAttention)}
    assert kinds == {"encoder.layers.0.self_attn", "decoder.layers.0.self_attn"}


def test_conversion_returns_a_model_that_is_an_attention_itself():
    plain = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    twin = convert_attention(plain, keep_ratio=0.5)
    assert isinstance(twin, SubsampledSelfAttention)
    assert not twin.training
    assert twin.in_proj_weight is plain.in_proj_weight


def test_schedule_ends_densely():
    encoder = convert_attention(_encoder(dropout=0.0))
    schedule = SSASchedule(encoder, finetune_fraction=0.25, keep_ratio=0.5)
    assert all(layer.self_attn.keep_ratio == 0.5 for layer in encoder.layers)
    x, dense = _x(), []
    for progress in (0.0, 0.74, 0.75, 1.0, 0.1):
        schedule.set_progress(progress)
        assert schedule.dense == (0.75 <= progress <= 1)
        dense.append(torch.equal(encoder(x), encoder(x)))
    assert dense == [False, False, True, True, False]
    expected = encoder.eval()(x)
    schedule.set_progress(1.0)
    torch.testing.assert_close(encoder.train()(x), expected)


class Classifier(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.encoder = convert_attention(_encoder(), **options)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x, padding=None):
        return self.head(self.dropout(self.encoder(x, src_key_padding_mask=padding)[:, 0]))


@pytest.mark.parametrize("padded", [False, True])
def test_ensemble_averages_passes_with_sampling_on_and_other_dropout_off(padded):
    model, x = Classifier(num_keys=4), _x()
    padding = _padding() if padded else None
    with torch.no_grad():
        found = {
            average: self_ensemble(
                model, x, padding=padding, num_samples=5, average=average,
                generator=torch.Generator().manual_seed(3),
            )
            for average in ("prob", "logit")
        }  # fmt: skip
        model.eval()
        generator = torch.Generator().manual_seed(3)
        for layer in model.encoder.layers:
            layer.self_attn.sampling, layer.self_attn.generator = True, generator
        model.encoder.use_nested_tensor = False
        logits = torch.stack([model(x, padding=padding) for _ in range(5)])
    assert logits.std(0).min() > 1e-4
    torch.testing.assert_close(found["logit"], logits.mean(0))
    torch.testing.assert_close(found["prob"], logits.softmax(-1).mean(0))


def test_ensemble_restores_every_state_also_after_an_error():
    model, x = Classifier(), _x()
    model.dropout.eval()
    model.encoder.layers[1].eval()
    model.encoder.layers[0].self_attn.sampling = False
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    self_ensemble(model, x, num_samples=2, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError):
        self_ensemble(model, x[..., :3], num_samples=2)
    assert [module.training for module in model.modules()] == modes
    assert model.encoder.layers[0].self_attn.sampling is False
    assert model.encoder.layers[1].self_attn.sampling is None
    assert all(layer.self_attn.generator is None for layer in model.encoder.layers)
    assert torch.backends.mha.get_fastpath_enabled()


def test_nested_tensors_are_refused_while_sampling():
    attention = SubsampledSelfAttention(8, 2)
    nested = torch.nested.as_nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with pytest.raises(ValueError, match="nested"):
        attention(nested, nested, nested)


TOKENS, CLASSES, MARKER, STEPS = 24, 8, 8, 150


def _marked(count, seed):
    """Random tokens with one marker; the answer is the token after it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, CLASSES, (count, TOKENS), generator=generator)
    place = torch.randint(0, TOKENS - 1, (count,), generator=generator)
    rows = torch.arange(count)
    x[rows, place] = MARKER
    return x, x[rows, place + 1]


class Reader(nn.Module):
    def __init__(self, keep_ratio):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES + 1, 16)
        self.place = nn.Parameter(0.1 * torch.randn(TOKENS, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)
        convert_attention(self, keep_ratio=keep_ratio)

    def forward(self, x):
        here = self.embedding(x)
        both = torch.cat([here, F.pad(here[:, :-1], (0, 0, 1, 0))], -1)  # each with the one before
        return self.head(self.encoder(both + self.place).mean(1))


def _trained(keep_ratio, steps):
    model = Reader(keep_ratio)
    schedule = SSASchedule(model)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    x, y = _marked(600, seed=1)
    torch.manual_seed(2)
    for step in range(steps):
        schedule.set_progress(step / steps)
        batch = torch.randint(0, 600, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_training_on_samples_makes_sub_models_usable_and_keeps_dense_accuracy():
    # Fact 8 of the sheet, made easy: shorter sequences, and every token knows the one before it.
    torch.set_num_threads(1)
    x, y = _marked(400, seed=3)
    losses = {}
    for ratio in (1.0, 0.5):
        model = _trained(ratio, STEPS)
        for layer in model.encoder.layers:
            layer.self_attn.sampling, layer.self_attn.keep_ratio = None, 0.5
        with torch.no_grad():
            accuracy = (model(x).argmax(1) == y).double().mean()
            for passes in (1, 16):
                generator = torch.Generator().manual_seed(0)
                p = self_ensemble(model, x, num_samples=passes, generator=generator)
                losses[ratio, passes] = F.nll_loss(p.clamp(min=1e-9).log(), y).item()
        assert accuracy > 0.97, ratio
    assert losses[0.5, 1] < 0.7 * losses[1.0, 1], losses
    for ratio in (1.0, 0.5):
        assert losses[ratio, 16] < losses[ratio, 1], losses
