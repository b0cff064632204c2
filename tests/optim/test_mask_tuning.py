"""Mask tuning: binary masks on frozen weights (sheet of paper 51)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from regularizers.optim import (
    BinaryMask,
    GradientDropout,
    attach_masks,
    binarize_ste,
    fold_masks,
    mask_norm,
    masked_fraction,
    select_parameters,
    soft_kl,
)
from tests.harness import MethodContract


class TestMaskedLayer(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        layer = nn.Linear(6, 3, bias=False, dtype=dtype)
        attach_masks(layer, target=None)
        layer.parametrizations.weight.original.requires_grad_(True)
        return layer

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 30, dtype=dtype).reshape(5, 6))

    # A parametrized module's class is made on the fly: torch refuses to pickle it.
    def test_copies_and_pickles_give_equal_results(self):
        module = self.build(torch.float32)
        other = self.build(torch.float32)
        other.load_state_dict(module.state_dict())
        assert torch.equal(self.call(module, torch.float32), self.call(other, torch.float32))

    def bad_inputs(self):
        weight = torch.ones(2, 2)
        return [
            (TypeError, "weight must", lambda: BinaryMask(weight.long())),
            (ValueError, "threshold must be below", lambda: BinaryMask(weight, threshold=1e-2)),
            (ValueError, "init must", lambda: BinaryMask(weight, init=(0.1, 0.0))),
            (ValueError, "init must", lambda: BinaryMask(weight, init=float("nan"))),
            (TypeError, "m must", lambda: binarize_ste(weight.long(), 0.0)),
            (TypeError, "model must", lambda: attach_masks(weight)),
        ]


def _encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Linear(8, 3))


def test_binarize_is_a_step_with_the_gradient_of_the_identity():
    m = torch.tensor([0.004, 0.005, 0.006], requires_grad=True)
    b = binarize_ste(m, 0.005)
    assert b.tolist() == [0.0, 0.0, 1.0]
    (grad,) = torch.autograd.grad((b * torch.tensor([1.0, 2.0, 3.0])).sum(), m)
    assert grad.tolist() == [1.0, 2.0, 3.0]


def test_masks_that_begin_at_one_leave_outputs_identical():
    model, x = _encoder(), torch.randn(2, 5, 8)
    expected = model(x)
    masks = attach_masks(model)
    assert sorted(masks) == ["0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight"]
    assert torch.equal(model(x), expected)
    assert masked_fraction(model) == 0


@pytest.mark.parametrize("grad", [True, False])
def test_masks_act_on_attention_in_evaluation(grad):
    model, x = _encoder().eval(), torch.randn(2, 5, 8)
    expected = _encoder().eval()
    for mask in attach_masks(model).values():
        with torch.no_grad():
            mask.score[::2] = 0
    attention = expected[0].self_attn
    with torch.no_grad():
        attention.in_proj_weight[::2] = 0
        attention.out_proj.weight[::2] = 0
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), expected(x))


def test_score_gradient_is_weight_gradient_times_weight():
    layer = nn.Linear(5, 4)
    plain = nn.Linear(5, 4)
    plain.load_state_dict(layer.state_dict())
    mask = attach_masks(layer, target=None)["weight"]
    x = torch.randn(7, 5)
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(mask.score.grad, plain.weight.grad * plain.weight.detach())


def test_only_scores_train_and_frozen_weights_get_no_gradient():
    model = _encoder()
    masks = attach_masks(model)
    model(torch.randn(2, 5, 8)).square().sum().backward()
    scores = {id(mask.score) for mask in masks.values()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in scores), name
        assert (parameter.grad is not None) == (id(parameter) in scores), name


def test_without_freezing_other_parameters_keep_training():
    model = _encoder()
    attach_masks(model, freeze=False)
    assert model[1].weight.requires_grad
    assert not model[0].self_attn.parametrizations.in_proj_weight.original.requires_grad


def test_zero_weights_never_move_their_scores():
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[:, 2] = 0
    mask = attach_masks(layer, target=None)["weight"]
    optimizer = torch.optim.Adam([mask.score], lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    assert torch.equal(mask.score[:, 2], torch.full((4,), 1e-2))
    assert not torch.any(mask.score[:, 3] == 1e-2)


def test_scores_of_half_precision_weights_are_float32():
    layer = nn.Linear(4, 2, dtype=torch.bfloat16)
    mask = attach_masks(layer, target=None)["weight"]
    assert mask.score.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16


def test_uniform_scores_mask_the_share_below_the_threshold():
    layer = nn.Linear(100, 100)
    generator = torch.Generator().manual_seed(0)
    attach_masks(layer, target=None, init=(0.0, 1e-2), generator=generator)
    # Four standard errors of a share of 1/2 over 1e4 draws.
    assert abs(masked_fraction(layer).item() - 0.5) < 0.02


def test_whole_names_stand_for_themselves_only():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "ba": nn.Linear(2, 2)})
    assert list(attach_masks(model, target=["a.weight"])) == ["a.weight"]


def test_target_may_be_a_function():
    model = _encoder()
    masks = attach_masks(model, target=lambda name, p: p.shape == (3, 8))
    assert list(masks) == ["1.weight"]


def test_shared_weights_have_one_mask_and_stay_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    masks = attach_masks(model, target=None)
    assert list(masks) == ["0.weight"]
    with torch.no_grad():
        masks["0.weight"].score[0, 0] = 0
    assert model[0].weight[0, 0] == model[2].weight[0, 0] == 0
    fold_masks(model)
    assert model[0].weight is model[2].weight


@pytest.mark.parametrize("target", [("mlp",), [], lambda name, p: False])
def test_target_that_fits_nothing_is_an_error_and_freezes_nothing(target):
    model = _encoder()
    with pytest.raises(ValueError, match="target must fit"):
        attach_masks(model, target=target)
    assert all(p.requires_grad for p in model.parameters())


def test_threshold_at_the_initial_score_is_an_error_before_anything_changes():
    model = _encoder()
    with pytest.raises(ValueError, match="threshold must be below"):
        attach_masks(model, init=5e-3)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_second_attachment_is_an_error():
    model = _encoder()
    attach_masks(model)
    with pytest.raises(ValueError, match="parametrizations"):
        attach_masks(model)


def test_folding_writes_the_masked_weights_under_the_former_names():
    model, x = _encoder(), torch.randn(2, 5, 8)
    names = set(model.state_dict())
    for mask in attach_masks(model).values():
        with torch.no_grad():
            mask.score[1] = 0
    expected = model(x)
    assert fold_masks(model) is model
    assert set(model.state_dict()) == names
    assert not any(isinstance(module, BinaryMask) for module in model.modules())
    torch.testing.assert_close(model(x), expected)
    assert (model[0].self_attn.in_proj_weight[1] == 0).all()


def test_norm_of_scores_sums_over_tensors():
    model = _encoder()
    masks = attach_masks(model)
    expected = sum(1e-2 * mask.score.numel() ** 0.5 for mask in masks.values())
    assert abs(mask_norm(model).item() - expected) < 1e-6
    mask_norm(model).backward()
    assert all(mask.score.grad is not None for mask in masks.values())


@pytest.mark.parametrize("function", [masked_fraction, mask_norm, fold_masks])
def test_meters_need_masks(function):
    with pytest.raises(ValueError, match="attach_masks"):
        function(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must"):
        function(None)


class _Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.Linear(4, 4)
        self.faint = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        with torch.no_grad():
            self.used.weight.mul_(1e-3)

    def forward(self, x):
        return self.used(x) + 0.1 * self.faint(x)


def _square(model, x):
    return (model(x) - 1).square().mean()


def test_selection_ranks_by_the_gradient_and_leaves_the_model_alone():
    model = _Branches().requires_grad_(False)
    batches = [torch.randn(8, 4) for _ in range(3)]
    assert select_parameters(model, _square, batches) == ["used.weight"]
    assert select_parameters(model, _square, batches, top=1.0) == [
        "used.weight",
        "faint.weight",
        "unused.weight",
    ]
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_selection_by_the_masks_gradient_weighs_with_the_weight():
    batches = [torch.randn(8, 4) for _ in range(3)]
    assert select_parameters(_Branches(), _square, batches, by="mask") == ["faint.weight"]


def test_selected_names_are_targets():
    model = _Branches()
    names = select_parameters(model, _square, [torch.randn(8, 4)], top=0.6)
    assert sorted(attach_masks(model, target=names)) == sorted(names)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("top must", lambda m: select_parameters(m, _square, [], top=0.0)),
        ("top must", lambda m: select_parameters(m, _square, [], top=1.5)),
        ("by must", lambda m: select_parameters(m, _square, [], by="size")),
        ("loader must", lambda m: select_parameters(m, _square, [])),
        ("loss_fn must", lambda m: select_parameters(m, lambda m, x: torch.ones(()), [0])),
        ("model must", lambda m: select_parameters(nn.ReLU(), _square, [0])),
    ],
)
def test_bad_selection_names_the_argument(match, call):
    model = _Branches()
    with pytest.raises(ValueError, match=match):
        call(model)
    assert all(p.requires_grad for p in model.parameters())


def _tune(drop_strength, seed, noise):
    """Tune masks on few labels; accuracy on the new task before and after, on the old one after."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    x = torch.randn(1000, 20)
    new, old = (x[:, :2].sum(1) > 0).long(), (x[:, :3].sum(1) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), old).backward()
        optimizer.step()
    few, labels = x[:32], torch.where(torch.rand(32) < noise, 1 - new[:32], new[:32])
    with torch.no_grad():
        teacher = model(few)

    def accuracy(y):
        return (model(x[500:]).argmax(1) == y[500:]).double().mean().item()

    before = accuracy(new)
    scores = [mask.score for mask in attach_masks(model, target=None).values()]
    tuner = torch.optim.Adam(scores, lr=2e-4)
    dropout = GradientDropout(drop_strength=drop_strength)
    for step in range(60):
        tuner.zero_grad()
        logits = model(few)
        task = F.cross_entropy(logits, labels)
        dropout.backward(task, soft_kl(logits, teacher), scores, seed=step)
        tuner.step()
    return before, accuracy(new), accuracy(old)


def _mean_of_seeds(drop_strength, noise):
    runs = [_tune(drop_strength, seed, noise) for seed in range(4)]
    return [sum(column) / 4 for column in zip(*runs, strict=True)]


def test_masks_alone_adapt_a_frozen_model_to_a_new_task():
    before, after, _ = _mean_of_seeds(1.0, noise=0.0)
    assert after > before + 0.04  # .796 to .859, from 32 labels


def test_gradient_dropout_keeps_more_of_the_old_knowledge_under_noisy_labels():
    _, plain_new, plain_old = _mean_of_seeds(0.0, noise=0.2)
    _, new, old = _mean_of_seeds(1.0, noise=0.2)
    assert old > plain_old + 0.005  # .730 against .713
    assert new > plain_new  # .748 against .734
