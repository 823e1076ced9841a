"""Training by a plan: the numbers of module by module, and everything that must make it stand aside or start anew."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import effdet
from effdet.backbone.blocks import DropPath
from effdet.plan import use_plan
from effdet.training_plan import TrainingPlan
from effdet_kernels import use_backend

from .networks import in_threads

aten = torch.ops.aten


def build(name: str = "tf_efficientdet_d0", dtype=torch.float64, drop_path=0.2) -> nn.Module:
    """A network in training mode; float64, so that two ways of adding up differ by next to nothing."""
    torch.manual_seed(0)
    config = effdet.get_efficientdet_config(name)
    config.backbone_args.drop_path_rate = drop_path
    config.num_classes = 5
    model = effdet.EfficientDet(config, pretrained_backbone=False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model.to(dtype).train()


def images(*shape: int, dtype=torch.float64, seed=1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(maps: tuple[list[Tensor], list[Tensor]], seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for level in [*maps[0], *maps[1]]:
        weight = torch.randn(level.shape, generator=generator, dtype=torch.float64)
        total = total + (level.double() * weight).sum() / level.numel() ** 0.5
    return total


def step(model: nn.Module, x: Tensor, *, planned: bool = True, rng: int = 3) -> list[Tensor]:
    """Loss, the gradients of one forward and backward, and the buffers after it."""
    torch.manual_seed(rng)
    model.zero_grad()
    with use_plan(planned):
        loss = loss_of(model(x))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *[g.clone() for g in grads], *[b.clone() for b in model.buffers()]]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        bound = tolerance * (1 + want.double().abs().max())
        assert (got.double() - want.double()).abs().max() <= bound


def plan_of(model: nn.Module) -> TrainingPlan:
    plans = list(model._training_plans._plans.values())
    assert plans and isinstance(plans[-1], TrainingPlan), plans
    return plans[-1]


def both_ways(model: nn.Module, x: Tensor, steps: int = 1, tolerance: float = 0.0) -> None:
    """Trains the model by plan and a copy of it by modules, and compares everything after every step."""
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, other)]
    for i in range(steps):
        found = step(model, x, rng=i)
        expected = step(other, x, planned=False, rng=i)
        assert_equal(found, expected, tolerance)
        for optimizer in optimizers:
            optimizer.step()
    plan_of(model)
    assert not other._training_plans._plans


class _Strange(nn.Module):
    """Something that torch does: reads its argument, splits, changes in place."""

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.nn.functional.layer_norm(x, x.shape[1:]).split([1, 2], dim=1)
        return torch.cat([first.tanh(), rest.clone().mul_(0.5)], dim=1)


class _Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class _Before(nn.Module):
    """A backbone after something else."""

    def __init__(self, extra: nn.Module, backbone: nn.Module) -> None:
        super().__init__()
        self.extra, self.backbone = extra, backbone

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.backbone(self.extra(x))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("tf_efficientdet_d0", (2, 3, 256, 192)),
        ("tf_efficientdet_lite0", (3, 3, 192, 256)),
        ("efficientdet_q0", (2, 3, 256, 256)),
        ("tf_efficientdet_d1", (2, 3, 128, 256)),
    ],
)
def test_two_steps_are_those_of_the_modules(name, shape):
    model = build(name)
    both_ways(model, images(*shape), steps=2)
    by_torch = [step for step in plan_of(model).names if step.startswith("aten")]
    assert len(by_torch) < 0.05 * len(plan_of(model).names)


def test_images_in_any_layout():
    model, x = build(), images(2, 3, 64, 64)
    for given in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.repeat(1, 1, 1, 2)[..., ::2],
    ):
        both_ways(model, given)
    assert len(model._training_plans._plans) == 3
    assert len(model._training_plans._arenas) == 1


def test_float32():
    model, x = build(dtype=torch.float32), images(4, 3, 128, 128, dtype=torch.float32)
    found, expected = (step(copy.deepcopy(model), x, planned=planned) for planned in (True, False))
    for got, want in zip(found, expected, strict=True):
        assert (got - want).double().norm() <= 1e-2 * (1e-2 + want.double().norm())


def test_making_a_plan_draws_no_random_numbers_and_changes_no_buffer():
    model, x = build(), images(2, 3, 64, 64)
    model.backbone = _Before(_Noise(), model.backbone)
    before = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model._training_plans.find(model, model._network, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    both_ways(model, x, steps=2)


def test_stochastic_depth_draws_anew_in_every_step():
    model, x = build(), images(4, 3, 64, 64)
    first = [step(model, x, rng=rng)[0] for rng in (1, 2, 1)]
    assert first[0] != first[1]
    assert any("bernoulli" in name for name in plan_of(model).names)


def test_two_graphs_at_once():
    """Forwards before the first backward have memory of their own; in whatever order the backwards come."""
    model = build()
    other = copy.deepcopy(model)
    batches = [images(2, 3, 64, 64, seed=s) for s in (1, 2, 3)]
    found = []
    for m, planned in ((model, True), (other, False)):
        torch.manual_seed(0)
        with use_plan(planned):
            losses = [loss_of(m(x)) for x in batches]
        losses[1].backward()
        (losses[0] + losses[2]).backward()
        found.append([p.grad for p in m.parameters()])
    assert_equal(*found, 1e-12)  # torch adds the three up in another order
    assert len(model._training_plans._arenas) == 3


def test_memory_is_free_after_the_backward_even_if_the_loss_is_kept():
    model, x = build(), images(2, 3, 64, 64)
    step(model, x)
    arenas = model._training_plans._arenas
    kept = []
    assert len(arenas) == 1
    for _ in range(3):
        loss = loss_of(model(x))
        assert not arenas
        loss.backward()
        kept.append(loss)
        assert len(arenas) == 1
    loss = loss_of(model(x))
    assert not arenas
    del loss  # without a backward
    assert len(arenas) == 1
    model.eval()
    assert not arenas


def test_a_graph_that_is_kept_goes_back_twice():
    model, x = build(), images(2, 3, 64, 64)
    loss = loss_of(model(x))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.backward()
    assert_equal([p.grad for p in model.parameters()], once, 0.0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_weights_changed_before_the_backward_are_an_error():
    model, x = build(), images(2, 3, 64, 64)
    loss = loss_of(model(x))
    with torch.no_grad():
        model.class_net.predict.conv_pw.weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_no_second_derivative():
    model, x = build(), images(2, 3, 64, 64)
    loss = loss_of(model(x))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, [model.backbone.conv_stem.weight], create_graph=True)


def test_outputs_may_be_changed_in_place():
    model, x = build(drop_path=0.0), images(2, 3, 64, 64)
    expected = step(copy.deepcopy(model), x, planned=False)
    classes, boxes = model(x)
    for level in [*classes, *boxes]:
        level.mul_(2)
    loss_of((classes, boxes)).backward()
    found = [p.grad / 2 for p in model.parameters()]
    assert_equal(found, expected[1 : 1 + len(found)])


def test_only_what_is_trained_gets_a_gradient():
    model, x = build(), images(2, 3, 64, 64)
    model.backbone.requires_grad_(False)
    both_ways(model, x)
    assert all(p.grad is None for p in model.backbone.parameters())
    whole = plan_of(model)
    model.backbone.requires_grad_(True)
    both_ways(model, x)
    assert plan_of(model) is not whole
    assert len(plan_of(model).names) > len(whole.names)
    model.class_net.requires_grad_(False)
    model.box_net.requires_grad_(False)
    both_ways(model, x)


def test_an_output_without_gradient():
    model, x = build(drop_path=0.0), images(2, 3, 64, 64)
    for part in (model.backbone, model.fpn, model.box_net):
        part.requires_grad_(False)
    classes, boxes = model(x)
    plan_of(model)
    assert all(level.requires_grad for level in classes)
    assert not any(level.requires_grad for level in boxes)
    both_ways(model, x)


def test_frozen_norms_are_folded():
    model, x = build(), images(2, 3, 64, 64)
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    both_ways(model, x, steps=2)


def _move(model):
    weight = model.fpn.resample["3"].conv.conv.weight
    weight.data = weight.data.clone() * 1.5


def _replace(model):
    model.class_net.predict.conv_pw = copy.deepcopy(model.class_net.predict.conv_pw)
    with torch.no_grad():
        model.class_net.predict.conv_pw.weight.mul_(3)


def _freeze_a_norm(model):
    model.backbone.bn1.eval()


def _new_constant(model):
    model.backbone.bn1.momentum = 0.5


def _other_stochastic_depth(model):
    (*_, module) = [m for m in model.modules() if isinstance(m, DropPath)]
    module.drop_prob = 0.7


def _new_counter(model):
    model.backbone.bn1.num_batches_tracked = torch.tensor(7)


@pytest.mark.parametrize(
    "change",
    [_move, _replace, _freeze_a_norm, _new_constant, _other_stochastic_depth, _new_counter],
    ids=lambda f: f.__name__,
)
def test_a_changed_model_gets_a_new_plan(change: Callable[[nn.Module], None]):
    model, x = build(), images(2, 3, 64, 64)
    step(model, x)
    before = plan_of(model)
    change(model)
    both_ways(model, x)
    assert plan_of(model) is not before


def test_a_plan_outlives_an_evaluation():
    model, x = build(), images(2, 3, 64, 64)
    step(model, x)
    before = plan_of(model)
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    both_ways(model, x)
    assert plan_of(model) is before


def test_copies_have_plans_of_their_own():
    model, x = build(), images(2, 3, 64, 64)
    step(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other._training_plans._plans
        assert_equal(step(other, x), step(copy.deepcopy(model), x, planned=False))


def test_threads_train_models_of_their_own():
    models, x = [build(drop_path=0.0) for _ in range(2)], images(2, 3, 64, 64)
    expected = step(copy.deepcopy(models[0]), x, planned=False)
    found: dict[int, list[Tensor]] = {}
    in_threads(lambda i: found.update({i: step(models[i], x)}), 2)
    for i, model in enumerate(models):
        plan_of(model)
        assert_equal(found[i], expected)


REFUSALS = {
    "hook": lambda m: m.fpn.register_forward_hook(lambda *_: None),
    "backward hook": lambda m: m.fpn.register_full_backward_hook(lambda *_: None),
    "eval mode": lambda m: m.eval(),
    "nothing to train": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_model_is_not_planned_with(name):
    model, x = build(), images(2, 3, 64, 64)
    REFUSALS[name](model)
    assert model.plan_reason(x)
    model(x)
    assert not any(isinstance(p, TrainingPlan) for p in model._training_plans._plans.values())


def test_calls_that_are_not_planned():
    model, x = build(), images(2, 3, 64, 64)
    assert model.plan_reason(x) is None
    with use_plan(False):
        assert model.plan_reason(x) == "use_plan(False)"
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in model.plan_reason(x)
    with use_backend("reference"):
        assert "reference" in model.plan_reason(x)
    with torch.autograd.detect_anomaly(check_nan=False):
        assert "autograd" in model.plan_reason(x)
    assert "images" in model.plan_reason(x.requires_grad_())


def test_a_gradient_of_the_images_comes_module_by_module():
    model, x = build(drop_path=0.0), images(2, 3, 64, 64).requires_grad_()
    loss_of(model(x)).backward()
    assert x.grad is not None
    assert not model._training_plans._plans


class _Waiting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) < torch.inf else -x


class _Foreign(nn.Module):
    """Much that torch does."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(600):
            x = torch.sin(x)
        return x


@pytest.mark.parametrize(
    ("extra", "reason"), [(_Waiting(), "waits for a value"), (_Foreign(), "torch does")]
)
def test_networks_that_have_no_plan(extra, reason):
    model, x = build(drop_path=0.0), images(2, 3, 64, 64)
    model.backbone = _Before(extra, model.backbone)
    assert reason in model.plan_reason(x)
    other = copy.deepcopy(model)
    assert_equal(step(model, x), step(other, x, planned=False), 0.0)


def test_a_plan_leaves_to_torch_what_it_has_no_kernel_for():
    model, x = build(drop_path=0.0), images(2, 3, 64, 64)
    model.backbone = _Before(_Strange(), model.backbone)
    both_ways(model, x, steps=2)
    names = plan_of(model).names
    assert {"aten.tanh.default", "aten.cat.default"} <= set(names)
