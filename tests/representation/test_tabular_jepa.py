"""T-JEPA: contracts of the predictor and the model, and the facts of the sheet of paper 83."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers._shared.transformer import Transformer
from regularizers.representation import (
    FeaturePredictor,
    FeatureTokenizer,
    TabularJEPA,
    ema_update_,
    jepa_loss,
)
from tests.harness import DTYPES, MethodContract


class TestFeaturePredictor(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return FeaturePredictor(7, 6, hidden_dim=8, depth=1).to(dtype)

    def call(self, module, dtype):
        context = torch.linspace(-1, 1, 36, dtype=dtype).view(3, 2, 6)
        seen = torch.tensor([[0, 2], [1, 3], [5, 6]])
        return module(context, seen, torch.tensor([[1, 3, 4], [0, 2, 6], [0, 1, 2]]))

    def bad_inputs(self):
        return [
            (ValueError, "num_positions must", lambda: FeaturePredictor(0, 6)),
            (ValueError, "dim must", lambda: FeaturePredictor(7, 0)),
            (ValueError, "num_heads must", lambda: FeaturePredictor(7, 6, num_heads=4)),
            (ValueError, "hidden_dim must", lambda: FeaturePredictor(7, 6, hidden_dim=0)),
            (ValueError, "depth must", lambda: FeaturePredictor(7, 6, num_heads=2, depth=-1)),
        ]


def _model(dtype=torch.float32, num_reg_tokens=1, features=10, **options):
    torch.manual_seed(0)
    return TabularJEPA(
        FeatureTokenizer(features, [], 8, num_reg_tokens=num_reg_tokens),
        Transformer(8, 1, 2),
        FeaturePredictor(num_reg_tokens + features, 8, depth=1, num_heads=2),
        **options,
    ).to(dtype)


def _rows(dtype=torch.float32, count=6):
    return torch.linspace(-2, 2, count * 10, dtype=torch.float64).sin().view(count, 10).to(dtype)


class _Recorder(nn.Module):
    """An encoder that keeps what it is given."""

    def forward(self, x):
        self.seen = x
        return x


def test_equal_embeddings_cost_nothing():
    x = torch.randn(3, 4)
    assert jepa_loss(x, x) == 0


def test_loss_is_a_mean_over_everything():
    pred, target = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    assert jepa_loss(pred, target) == F.mse_loss(pred, target)
    doubled = jepa_loss(pred.repeat(2, 1, 1), target.repeat(2, 1, 1))
    torch.testing.assert_close(doubled, jepa_loss(pred, target))


def test_no_gradient_reaches_the_target_of_the_loss():
    pred, target = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    jepa_loss(pred, target).backward()
    assert target.grad is None
    assert pred.grad is not None


def test_momentum_of_one_changes_nothing_and_of_zero_copies():
    online, target = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    online(torch.randn(9, 3))
    before = copy.deepcopy(target.state_dict())
    ema_update_(target, online, 1.0)
    assert all(torch.equal(x, before[name]) for name, x in target.state_dict().items())
    ema_update_(target, online, 0.0)
    after = online.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in target.state_dict().items())


def test_average_follows_the_formula():
    online, target = nn.Linear(3, 4), nn.Linear(3, 4)
    expected = 0.9 * target.weight + 0.1 * online.weight
    ema_update_(target, online, 0.9)
    torch.testing.assert_close(target.weight, expected.detach())


def test_average_may_be_wider_than_the_module():
    online, target = nn.Linear(3, 4).bfloat16(), nn.Linear(3, 4)
    expected = 0.996 * target.weight + 0.004 * online.weight.float()
    ema_update_(target, online, 0.996)
    torch.testing.assert_close(target.weight, expected.detach())


def test_modules_that_differ_are_refused():
    with pytest.raises(ValueError, match="target must"):
        ema_update_(nn.Linear(3, 4), nn.Linear(3, 5), 0.5)
    with pytest.raises(ValueError, match="'bias'"):
        ema_update_(nn.Linear(3, 4), nn.Linear(3, 4, bias=False), 0.5)
    with pytest.raises(ValueError, match="m must"):
        ema_update_(nn.Linear(3, 4), nn.Linear(3, 4), 1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_learning_parameter_gets_a_gradient_in_every_dtype(dtype):
    model = _model(dtype)
    output = model(_rows(dtype), seed=0)
    assert output.loss.dtype == dtype
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target_"):
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all(), name


def test_no_gradient_flows_through_the_target_branch():
    model, x = _model(), _rows().requires_grad_()
    output = model(x, seed=0)
    assert not output.target.requires_grad
    assert output.prediction.requires_grad


def test_prediction_and_target_have_the_shapes_of_the_masks():
    model = _model(num_contexts=2, num_targets=3)
    contexts, targets = model.sample_masks(6, seed=4)
    output = model(_rows(), masks=(contexts, targets))
    assert output.prediction.shape == (3, 2, 6, targets.shape[2], 8)
    assert output.target.shape == output.prediction.shape
    assert output.loss == jepa_loss(output.prediction, output.target)


def test_targets_are_outputs_of_the_average_on_all_features():
    model = _model(num_contexts=2)
    contexts, targets = model.sample_masks(6, seed=4)
    output = model(_rows(), masks=(contexts, targets))
    full = model.encode(_rows(), target=True)
    for number, features in enumerate(targets):
        expected = torch.stack([full[row, features[row]] for row in range(6)])
        for context in range(2):
            torch.testing.assert_close(output.target[number, context], expected)


def test_context_has_its_tokens_and_those_of_regularization_and_no_other():
    model = _model(num_reg_tokens=2)
    model.encoder = _Recorder()
    contexts, targets = model.sample_masks(6, seed=4)
    model(_rows(), masks=(contexts, targets))
    tokens = model.tokenizer(_rows())
    expected = torch.stack([
        torch.cat([tokens[row, :2], tokens[row, 2 + contexts[0, row]]]) for row in range(6)
    ])  # fmt: skip
    torch.testing.assert_close(model.encoder.seen, expected)


def test_a_target_feature_does_not_influence_the_context_encoding():
    model = _model()
    model.encoder = _Recorder()
    contexts = torch.tensor([0, 3, 5]).expand(1, 6, 3)
    masks = contexts, torch.tensor([1, 2]).expand(4, 6, 2)
    x = _rows()
    first = model(x, masks=masks)
    seen = model.encoder.seen
    permuted = x.clone()
    permuted[:, 2] = x[:, 2].flip(0)
    second = model(permuted, masks=masks)
    assert torch.equal(model.encoder.seen, seen)
    assert torch.equal(first.prediction, second.prediction)
    assert not torch.equal(first.target, second.target)


def test_positions_tell_the_predictor_which_feature_is_asked():
    model = _model()
    masks = torch.tensor([0, 3, 5]).expand(1, 6, 3), torch.tensor([1, 2]).expand(4, 6, 2)
    prediction = model(_rows(), masks=masks).prediction
    assert (prediction[..., 0, :] - prediction[..., 1, :]).abs().max() > 1e-3


def _places_seen(model):
    """Places of context and target tokens that the predictor gets in 20 calls."""
    recorder = model.predictor = _PlaceRecorder()
    for seed in range(20):
        model(_rows(), seed=seed)
    return tuple(set(torch.cat([x.flatten() for x in kind]).tolist()) for kind in recorder.seen)


class _PlaceRecorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = [], []

    def forward(self, context, context_places, target_places):
        self.seen[0].append(context_places)
        self.seen[1].append(target_places)
        return context[:, :1].expand(-1, target_places.shape[1], -1)


def test_regularization_tokens_are_always_seen_and_never_asked_for():
    contexts, targets = _places_seen(_model(num_reg_tokens=3))
    assert contexts == set(range(13))
    assert targets == set(range(3, 13))


def test_reference_takes_features_for_places():
    # As the authors' code: the regularization token is asked for, the last feature never is.
    model = _model(match_reference=True)
    assert _places_seen(model) == (set(range(10)), set(range(10)))
    asked = model.predictor.seen[1][0].view(4, 6, -1)
    assert (asked == asked[0]).all()


def test_encoding_gives_a_token_for_every_feature():
    model = _model(num_reg_tokens=2)
    tokens = model.encoder(model.tokenizer(_rows()))
    torch.testing.assert_close(model.encode(_rows()), tokens[:, 2:])
    assert model.encode(_rows()).shape == (6, 10, 8)


def test_encoding_can_be_fine_tuned():
    model = _model()
    model.encode(_rows()).square().sum().backward()
    assert model.tokenizer.weight.grad.abs().sum() > 0


def test_momentum_rises_linearly():
    model = _model(momentum=(0.5, 1.0))
    with torch.no_grad():
        model.tokenizer.bias.add_(1.0)
    before = model.target_tokenizer.bias.clone()
    model.update_target(0.5)
    torch.testing.assert_close(model.target_tokenizer.bias, before + 0.25)
    model.update_target(1.0)
    torch.testing.assert_close(model.target_tokenizer.bias, before + 0.25)


def test_averages_stay_in_evaluation():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    model = TabularJEPA(
        FeatureTokenizer(10, [], 8), nn.TransformerEncoder(layer, 1), FeaturePredictor(11, 8)
    ).train()
    assert model.encoder.training
    assert not any(module.training for module in model.target_encoder.modules())
    targets = [model(_rows(), seed=0).target for _ in range(2)]
    assert torch.equal(*targets)


def test_categorical_features_are_taken():
    torch.manual_seed(0)
    model = TabularJEPA(
        FeatureTokenizer(4, [3, 2], 8), Transformer(8, 1, 2), FeaturePredictor(7, 8, num_heads=2)
    )
    categories = torch.stack([torch.arange(6) % 3, torch.arange(6) % 2], 1)
    model(_rows()[:, :4], categories, seed=0).loss.backward()
    assert model.tokenizer.table.grad is not None


def test_state_dict_round_trip_gives_equal_results():
    model, other = _model(), _model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    first, second = (module(_rows(), seed=3) for module in (model, other))
    assert torch.equal(first.loss, second.loss)


def test_masks_are_drawn_from_the_seed():
    model = _model()
    masks = model.sample_masks(6, seed=9)
    assert torch.equal(model(_rows(), seed=9).loss, model(_rows(), masks=masks).loss)


def test_compiles_to_one_graph_with_masks_given(fresh_dynamo):
    model = _model()
    masks = model.sample_masks(6, seed=9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(_rows(), masks=masks)
    output.loss.backward()
    torch.testing.assert_close(output.loss, model(_rows(), masks=masks).loss)


def test_bad_input_names_the_argument():
    model, tokenizer = _model(), FeatureTokenizer(10, [], 8)
    contexts, targets = model.sample_masks(6, seed=0)
    none = targets[:, :2]
    build = lambda *modules, **options: TabularJEPA(
        *(modules or (tokenizer, nn.Identity(), nn.Identity())), **options
    )
    for exception, name, call in [
        (TypeError, "encoder must", lambda: build(tokenizer, lambda x: x, nn.Identity())),
        (ValueError, "momentum must", lambda: build(momentum=(0.9, 1.1))),
        (ValueError, "context_share must", lambda: build(context_share=(0.3, 0.2))),
        (ValueError, "num_targets must", lambda: build(num_targets=0)),
        (ValueError, "num_features must", lambda: build(num_contexts=5)),
        (ValueError, "masks must have contexts", lambda: model(_rows(), masks=(none, targets))),
        (ValueError, "masks must have targets", lambda: model(_rows(), masks=(contexts, none))),
        (ValueError, "masks must", lambda: model(_rows(), masks=(contexts, targets), seed=1)),
        (ValueError, "numerical must", lambda: model(_rows()[:, :9])),
        (ValueError, "progress must", lambda: model.update_target(1.5)),
        (ValueError, "target must", lambda: jepa_loss(torch.ones(3), torch.ones(4))),
        (TypeError, "pred must", lambda: jepa_loss(torch.ones(3).int(), torch.ones(3))),
    ]:  # fmt: skip
        with pytest.raises(exception, match=name):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("num_reg_tokens", [0, 1])
def test_training_predicts_better_than_the_mean_and_does_not_collapse(num_reg_tokens):
    # Sheet of paper 83, fact 8: 12 columns of a latent with 4 dimensions. Tokens of features start
    # as large as their positions here, which makes 200 steps enough.
    torch.set_num_threads(1)
    latent = torch.randn(1000, 4)
    x = torch.tanh(0.5 * latent @ torch.randn(4, 12)) + 0.1 * torch.randn(1000, 12)
    x = (x - x.mean(0)) / x.std(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = TabularJEPA(
        FeatureTokenizer(12, [], 16, num_reg_tokens=num_reg_tokens),
        nn.TransformerEncoder(layer, 2),
        FeaturePredictor(num_reg_tokens + 12, 16, depth=1),
    )
    with torch.no_grad():
        for tokenizer in (model.tokenizer, model.target_tokenizer):
            tokenizer.weight.mul_(4)
    before = model.encode(x).var(0).mean()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(200):
        loss = model(x[torch.randint(1000, (64,))], seed=step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(step / 200)
    with torch.no_grad():
        error = sum(model(x, seed=1000 + draw).loss for draw in range(3)) / 3
    variance = model.encode(x, target=True).var(0).mean()  # the error of each feature's mean
    assert error < 0.95 * variance
    assert variance > before / 2
