"""Blocks of intrinsic normal prototypes and the model they make up (sheet of paper 66)."""

import pytest
import torch
from torch import nn

from regularizers.representation import (
    INPDecoderBlock,
    INPExtractor,
    INPFormer,
    anomaly_map,
    coherence_loss,
    soft_mining_cosine_loss,
)
from tests.harness import MethodContract


def _spread(module):
    """Give linear weights a size at which every part matters, and biases too."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


class TestINPFormer(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return INPFormer(8, num_heads=2, num_prototypes=3, decoder_depth=2).to(dtype)

    def call(self, module, dtype):
        layers = torch.linspace(0, 20, 4 * 2 * 9 * 8, dtype=torch.float64).sin().to(dtype)
        return module.loss(module(list(layers.view(4, 2, 9, 8)))).to(dtype)

    def bad_inputs(self):
        model, layer = INPFormer(8, num_heads=2, decoder_depth=2), torch.ones(2, 9, 8)
        block = INPDecoderBlock(8, num_heads=2)
        return [
            (ValueError, "num_heads must", lambda: INPExtractor(8, num_heads=3)),
            (ValueError, "num_heads must", lambda: INPDecoderBlock(8, num_heads=3)),
            (ValueError, "num_prototypes must", lambda: INPExtractor(8, 0, num_heads=2)),
            (ValueError, "depth must", lambda: INPExtractor(8, num_heads=2, depth=0)),
            (ValueError, "mlp_ratio must", lambda: INPDecoderBlock(8, num_heads=2, mlp_ratio=0.0)),
            (ValueError, "decoder_depth must", lambda: INPFormer(8, num_heads=2, decoder_depth=3)),
            (ValueError, "power must", lambda: INPFormer(8, num_heads=2, power=-1.0)),
            (ValueError, "layers must", lambda: model([layer])),
            (ValueError, "layers must", lambda: model([])),
            (ValueError, "layers must", lambda: model([layer, layer[:, :4]])),
            (ValueError, "grid must", lambda: model([layer[:, :8]] * 2)),
            (ValueError, "grid must", lambda: model([layer] * 2, grid=(2, 4))),
            (ValueError, "x must", lambda: INPExtractor(8, num_heads=2)(layer[..., :7])),
            (TypeError, "x must", lambda: INPExtractor(8, num_heads=2)(layer.long())),
            (ValueError, "prototypes must", lambda: block(layer, layer[:1])),
            (ValueError, "prototypes must", lambda: block(layer, layer[:, :0])),
        ]


def test_extractor_is_cross_attention_of_the_learned_tokens():
    extractor = _spread(INPExtractor(8, 3, num_heads=2)).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    block = extractor.blocks[0]
    q = block.q(block.norm(extractor.prototypes)).unflatten(-1, (2, 4))
    k, v = (part.unflatten(-1, (2, 4)) for part in block.kv(block.norm(x)).chunk(2, -1))
    scores = torch.einsum("mhe,bnhe->bhmn", q, k) / 2
    found = torch.einsum("bhmn,bnhe->bmhe", scores.softmax(-1), v)
    p = extractor.prototypes + block.proj(found.flatten(2))
    torch.testing.assert_close(extractor(x), p + block.mlp(block.mlp_norm(p)))


def test_extractor_is_blind_to_the_order_of_tokens():
    extractor = _spread(INPExtractor(8, 3, num_heads=2, depth=2)).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(extractor(x[:, torch.randperm(9)]), extractor(x))


def test_linear_weights_begin_small_and_prototypes_normal():
    extractor = INPExtractor(64, 50, num_heads=2)
    weight = extractor.blocks[0].q.weight
    assert weight.abs().max() <= 0.03
    assert weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert extractor.prototypes.std().item() == pytest.approx(1, rel=0.1)
    assert extractor.blocks[0].norm.eps == 1e-8


def _decoder():
    block = _spread(INPDecoderBlock(8, num_heads=2)).double()
    nn.init.constant_(block.scale, 1.3)
    x, p = torch.randn(2, 9, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    return block, x, p


def test_decoder_is_the_formula():
    block, x, p = _decoder()
    heads = lambda z: z.unflatten(-1, (2, 4)).transpose(1, 2)
    unit = lambda z: z / z.norm(dim=-1, keepdim=True)
    k, v = block.kv(block.norm(p)).chunk(2, -1)
    attention = (block.scale * unit(heads(block.q(block.norm(x)))) @ unit(heads(k)).mT).relu()
    y = block.proj((attention @ heads(v)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x, p), y + block.mlp(block.mlp_norm(y)))
    assert (attention == 0).any()
    assert not torch.allclose(attention.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))


def test_decoder_sees_tokens_through_the_norm_alone():
    # A residual x + y would show both the scale and the shift.
    block, x, p = _decoder()
    expected = block(x, p)
    scale = 1 + 3 * torch.rand(2, 9, 1, dtype=torch.float64)
    shift = torch.randn(2, 9, 1, dtype=torch.float64)
    # The eps of the norm, 1e-8 beside variances of about 1, is what is left.
    torch.testing.assert_close(block(scale * x + shift, p), expected, rtol=1e-5, atol=1e-6)


def test_decoder_without_values_returns_zero_whatever_the_tokens():
    block = INPDecoderBlock(8, num_heads=2)  # its biases begin at 0
    nn.init.zeros_(block.kv.weight[8:])
    found = block(torch.randn(2, 9, 8), torch.randn(2, 3, 8))
    assert (found == 0).all()


def test_order_of_prototypes_is_nothing_and_that_of_tokens_carries_over():
    block, x, p = _decoder()
    order = torch.randperm(9)
    torch.testing.assert_close(block(x, p[:, [2, 0, 1]]), block(x, p))
    torch.testing.assert_close(block(x[:, order], p), block(x, p)[:, order])
    torch.testing.assert_close(coherence_loss(x, p[:, [2, 0, 1]]), coherence_loss(x, p))


def test_model_compares_averaged_layers_with_averaged_blocks_in_reverse():
    model = _spread(INPFormer(8, num_heads=2, num_prototypes=3, decoder_depth=4)).double()
    layers = list(torch.randn(4, 2, 6, 8, dtype=torch.float64))
    found = model(layers, grid=(2, 3))
    fused = torch.stack(layers).mean(0)
    prototypes = model.extractor(fused)
    y, rebuilt = model.bottleneck(fused), []
    for block in model.decoder:
        y = block(y, prototypes)
        rebuilt.append(y)
    as_map = lambda a, b: ((a + b) / 2).mT.reshape(2, 8, 2, 3)
    expected_e = [as_map(*layers[:2]), as_map(*layers[2:])]
    expected_d = [as_map(rebuilt[3], rebuilt[2]), as_map(rebuilt[1], rebuilt[0])]
    torch.testing.assert_close(found.encoder_feats, expected_e)
    torch.testing.assert_close(found.decoder_feats, expected_d)
    torch.testing.assert_close(found.prototypes, prototypes)
    expected = soft_mining_cosine_loss(expected_e, expected_d) + 0.2 * coherence_loss(
        fused, prototypes
    )
    torch.testing.assert_close(model.loss(found), expected)
    scores = anomaly_map(expected_e, expected_d, size=(4, 6))
    torch.testing.assert_close(model.score(found, size=(4, 6)), scores)


def test_model_trains_under_autocast():
    model, layer = _spread(INPFormer(8, num_heads=2, decoder_depth=2)), torch.randn(2, 9, 8)
    expected = model.loss(model([layer, layer]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(model([layer, layer]))
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_encoder_gets_no_gradient_from_the_model():
    model = INPFormer(8, num_heads=2, decoder_depth=2, groups=1)
    layer = torch.randn(2, 9, 8, requires_grad=True)
    model.loss(model([layer])).backward()
    assert layer.grad is None


def test_tokens_that_are_not_of_the_image_stand_out():
    # Sheet: 49 tokens of 16 dimensions from 2 of 6 directions an image, 5 of them replaced.
    torch.manual_seed(0)
    directions = nn.functional.normalize(torch.randn(6, 16), dim=1)

    def images(count):
        kinds = torch.stack([torch.randperm(6)[:2] for _ in range(count)])
        which = torch.gather(kinds, 1, torch.randint(2, (count, 49)))
        scale = 0.5 + torch.rand(count, 49, 1)
        return scale * (directions[which] + 0.05 * torch.randn(count, 49, 16))

    model = INPFormer(16, num_heads=2, num_prototypes=3, decoder_depth=1, groups=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(model([images(16)])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    x = images(40)
    odd = torch.zeros(40, 49, dtype=torch.bool)
    odd[:, :5] = True
    x[odd] = nn.functional.normalize(torch.randn(200, 16), dim=1)
    score = model.score(model([x]), size=7).flatten(1)
    chance_above = (score[odd][:, None] > score[~odd]).double().mean()
    assert chance_above > 0.9
