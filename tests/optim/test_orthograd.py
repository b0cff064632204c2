"""OrthoGrad: the projection's worked values, what it leaves alone, and any optimizer beneath."""

import copy
import math

import pytest
import torch
from torch import nn

from regularizers.optim import AdamHD, OrthoGrad, nlm_alignment, orthogonalize_grad_


def parameter(values, grad, dtype=torch.float64):
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = torch.tensor(grad, dtype=dtype)
    return p


def random_parameters(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    params = []
    for shape in shapes:
        p = nn.Parameter(draw(shape))
        p.grad = draw(shape)
        params.append(p)
    return params


def test_worked_example():
    p = parameter([3.0, 4.0], [1.0, 1.0])
    orthogonalize_grad_(p, rescale=False)
    torch.testing.assert_close(p.grad, torch.tensor([0.16, -0.12], dtype=torch.float64))
    p = parameter([3.0, 4.0], [1.0, 1.0])
    orthogonalize_grad_(p)
    want = torch.tensor([1.13137085, -0.84852814], dtype=torch.float64)
    torch.testing.assert_close(p.grad, want)


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 2, 3, 3)])
def test_gradient_is_orthogonal_to_the_weights_and_keeps_its_norm(shape):
    (p,) = random_parameters(shape)
    norm = p.grad.norm()
    orthogonalize_grad_([p])
    assert abs((p * p.grad).sum()) < 1e-13 * p.norm() * norm
    torch.testing.assert_close(p.grad.norm(), norm)


def test_rows_and_all_together_are_vectors_of_their_own():
    rows, every = random_parameters((5, 4), (6,)), random_parameters((5, 4), (6,))
    orthogonalize_grad_(rows, per="row")
    assert ((rows[0] * rows[0].grad).sum(1).abs() < 1e-13).all()
    assert abs(rows[1] @ rows[1].grad) < 1e-13
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in every]))
    flat.grad = torch.cat([p.grad.flatten() for p in every])
    orthogonalize_grad_(every, per="global")
    orthogonalize_grad_(flat)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in every]), flat.grad)
    assert abs((every[0] * every[0].grad).sum()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [-3.0, 0.37])
def test_a_gradient_along_the_weights_becomes_zero(dtype, factor):
    (p,) = random_parameters((40, 30), dtype=dtype)
    p.grad = factor * p.detach()
    orthogonalize_grad_(p)
    assert torch.equal(p.grad, torch.zeros_like(p))


def test_weights_of_zero_and_gradients_of_zero_stay():
    p = parameter([0.0, 0.0], [1.0, -2.0])
    orthogonalize_grad_(p)
    assert p.grad.tolist() == [1.0, -2.0]
    p = parameter([1.0, 2.0], [0.0, 0.0])
    orthogonalize_grad_(p)
    assert p.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("per", ["tensor", "row", "global"])
def test_odd_shapes_and_missing_gradients_are_taken(per):
    params = random_parameters((), (0,), (0, 3), (4, 1))
    idle = nn.Parameter(torch.ones(2))
    orthogonalize_grad_([*params, idle], per=per)
    assert idle.grad is None
    assert all(p.grad.isfinite().all() for p in params)
    orthogonalize_grad_([idle], per=per)


def test_memory_layout_and_dtypes_do_not_matter():
    (p,) = random_parameters((6, 4, 3, 3))
    q = nn.Parameter(p.detach().clone(memory_format=torch.channels_last))
    q.grad = p.grad.clone()
    (half,) = random_parameters((6, 4, 3, 3), dtype=torch.bfloat16)
    single = nn.Parameter(half.detach().float())
    single.grad = half.grad.float()
    storage = q.grad
    orthogonalize_grad_([p])
    orthogonalize_grad_([q, half])
    orthogonalize_grad_([single])
    assert q.grad is storage  # in place
    torch.testing.assert_close(q.grad, p.grad)
    torch.testing.assert_close(half.grad, single.grad.bfloat16())


def test_logits_of_a_homogeneous_network_keep_their_scale_to_first_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    net.double()
    x, y = torch.randn(20, 5).double(), torch.randint(3, (20,))
    nn.functional.cross_entropy(net(x), y).backward()
    norms = [p.norm().item() for p in net.parameters()]
    changes = []
    for eta in (1e-3, 1e-4):
        twin = copy.deepcopy(net)
        for p, q in zip(twin.parameters(), net.parameters(), strict=True):
            p.grad = q.grad.clone()
        OrthoGrad(twin.parameters(), lr=eta).step()
        changes.append([p.norm().item() - n for p, n in zip(twin.parameters(), norms, strict=True)])
    # Second order: a tenth of the step changes the norms by a hundredth.
    for large, small in zip(*changes, strict=True):
        assert small == pytest.approx(large / 100, rel=0.01)


def test_alignment_is_the_cosine_with_the_step():
    a, b = parameter([3.0, 4.0], [-3.0, -4.0]), parameter([1.0, 0.0], [0.0, 2.0])
    assert nlm_alignment([a, b], per="tensor").tolist() == pytest.approx([1.0, 0.0])
    want = 25 / math.sqrt(26 * 29)
    assert nlm_alignment([a, b]).item() == pytest.approx(want)
    assert nlm_alignment(parameter([0.0], [1.0])) == 0


def test_a_fitted_linear_classifier_is_aligned_until_projected():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 30, generator=generator)
    y = torch.randint(3, (20,), generator=generator)
    W = nn.Parameter(torch.zeros(3, 30))
    optimizer = torch.optim.SGD([W], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(X @ W.T, y).backward()
        optimizer.step()
    assert nlm_alignment(W) > 0.9
    orthogonalize_grad_(W)
    assert abs(nlm_alignment(W)) < 1e-5


def test_a_step_adds_the_squares():
    (p,) = random_parameters((5, 4))
    before, grad, lr = p.norm().item() ** 2, p.grad.norm().item() ** 2, 0.3
    OrthoGrad([p], lr=lr).step()
    assert p.norm().item() ** 2 == pytest.approx(before + lr * lr * grad, rel=1e-13)


BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.1}),
    (AdamHD, {"lr": 0.1}),
]


@pytest.mark.parametrize(("base", "options"), BASES)
def test_it_is_the_base_on_projected_gradients(base, options):
    params = random_parameters((5, 4), (6,))
    twins = copy.deepcopy(params)
    have, want = OrthoGrad(params, base, **options), base(twins, **options)
    for t in range(3):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            q.grad = p.grad.clone()
        have.step()
        orthogonalize_grad_(twins)
        want.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_a_closure_is_projected_before_the_step():
    p, q = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = OrthoGrad([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 7.0
    q.grad = torch.ones(2)
    OrthoGrad([q], lr=0.1).step()
    assert torch.equal(p, q)


def test_a_group_can_stay_out():
    p, q = random_parameters((3,), (3,))
    grad = q.grad.clone()
    OrthoGrad([{"params": [p]}, {"params": [q], "orthogonalize": False}], lr=0.1).step()
    assert torch.equal(q.grad, grad)
    assert p.grad.norm() > 0


def test_schedulers_and_new_groups_reach_the_base():
    p, q = random_parameters((3,), (3,))
    optimizer = OrthoGrad([p], torch.optim.AdamW, lr=0.1, base_options={"eps": 1e-25})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    schedule.step()
    optimizer.add_param_group({"params": [q]})
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.base_optimizer.param_groups[0]["eps"] == 1e-25
    assert len(optimizer.base_optimizer.param_groups) == len(optimizer.param_groups) == 2
    optimizer.zero_grad()
    assert p.grad is None


def test_checkpoints_are_the_bases_and_groups_stay_shared_after_loading():
    (p,) = random_parameters((4, 3))
    optimizer = OrthoGrad([p], torch.optim.AdamW, lr=0.1)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    twin = nn.Parameter(p.detach().clone())
    resumed = OrthoGrad([twin], torch.optim.AdamW, lr=0.5)
    seen = []
    resumed.register_load_state_dict_post_hook(lambda _: seen.append(1))
    resumed.load_state_dict(saved)
    assert seen == [1]
    resumed.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.2
    twin.grad = p.grad.clone()
    optimizer.step()
    resumed.step()
    assert torch.equal(p, twin)
    torch.optim.AdamW([twin]).load_state_dict(saved)


def test_copies_step_on_their_own():
    (p,) = random_parameters((4, 3))
    optimizer = OrthoGrad([p], torch.optim.AdamW, lr=0.1, per="row", rescale=False)
    optimizer.step()
    twin_p, twin = copy.deepcopy((p, optimizer))
    assert (twin.per, twin.rescale) == ("row", False)
    twin_p.grad = p.grad.clone()
    before = p.detach().clone()
    twin.step()
    assert torch.equal(p, before)
    optimizer.step()
    assert torch.equal(p, twin_p)


def test_grad_scaler_skips_overflow():
    (p,) = random_parameters((3,), dtype=torch.float32)
    before = p.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    p.grad[0] = math.inf
    optimizer = OrthoGrad([p], lr=0.1)
    scaler.step(optimizer)
    assert torch.equal(p, before)


def test_bad_input_is_named_before_anything_changes():
    (p,) = random_parameters((3,))
    with pytest.raises(TypeError, match="base"):
        OrthoGrad([p], nn.Linear)
    with pytest.raises(ValueError, match="per"):
        OrthoGrad([p], per="column")
    with pytest.raises(ValueError, match="eps"):
        OrthoGrad([p], eps=-1.0)
    with pytest.raises(ValueError, match="params"):
        nlm_alignment([nn.Parameter(torch.ones(2))])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    kept = p.grad.clone()
    with pytest.raises(TypeError, match="params must have dense"):
        OrthoGrad([p, embedding.weight], lr=0.1).step()
    assert torch.equal(p.grad, kept)
    number = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    number.grad = torch.ones_like(number)
    with pytest.raises(TypeError, match="params"):
        orthogonalize_grad_(number)


@pytest.mark.slow
def test_modular_addition_is_grokked_with_projection_alone():
    p, steps = 31, 450
    a, b = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
    y = ((a + b) % p).flatten()
    one_hot = nn.functional.one_hot
    x = torch.cat([one_hot(a.flatten(), p), one_hot(b.flatten(), p)], 1).float()
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(0))
    seen, unseen = order[:576], order[576:]
    found = {}
    for projected in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(2 * p, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, p)
        )
        for parameter in net.parameters():
            parameter.data *= 2  # the projection keeps norms, and the default ones are too small
        groups = [{"params": list(net.parameters()), "orthogonalize": projected}]
        options = {"eps": 1e-25, "weight_decay": 0.0}
        optimizer = OrthoGrad(groups, torch.optim.AdamW, lr=1e-3, base_options=options)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[seen]), y[seen]).backward()
            optimizer.step()
        with torch.no_grad():
            found[projected] = (net(x[unseen]).argmax(1) == y[unseen]).float().mean().item()
    assert found[True] > 0.6
    assert found[False] < 0.1
