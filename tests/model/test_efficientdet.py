"""The network as a torch module: input sizes, batch norm modes, replaced parts, dtypes, hooks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from effdet import EfficientDet, create_model, get_efficientdet_config
from effdet.anchors import get_feat_sizes
from effdet.efficientdet import FpnCombine, HeadNet, ResampleFeatureMap
from effdet_kernels import use_backend

SIZE = (64, 96)


def nano(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model("efficientdet_nano", pretrained_backbone=False, num_classes=3, **kwargs)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model whose batch norm statistics have seen images, in eval mode."""
    model = nano()
    for _ in range(3):
        model(images(4))
    return model.eval()


def images(batch: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn((batch, 3, *size), generator=torch.Generator().manual_seed(batch))


def flat(outputs: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    return torch.cat([y.flatten() for ys in outputs for y in ys])


class CalledNorm(nn.BatchNorm2d):
    """Batch norm with a forward of its own, which the network must call instead of fusing."""

    def forward(self, y: Tensor) -> Tensor:
        return super().forward(y)


def unfused(model: nn.Module) -> nn.Module:
    """A copy in which torch's own batch norm runs."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CalledNorm
    return copied


def nano_with(**entries: object) -> nn.Module:
    """The small model with other config entries."""
    config = get_efficientdet_config("efficientdet_nano")
    config.update({"num_classes": 3, **entries})
    torch.manual_seed(0)
    return EfficientDet(config, pretrained_backbone=False)


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (65, 97), (33, 200), (8, 8), (1, 1)])
def test_any_input_size(trained: nn.Module, size: tuple[int, int]) -> None:
    with torch.no_grad():
        cls, box = trained(images(1, size))
    expected = get_feat_sizes(size, 7)[3:]
    assert [tuple(y.shape[2:]) for y in cls] == expected
    assert [tuple(y.shape[2:]) for y in box] == expected
    assert {y.shape[1] for y in cls} == {27} and {y.shape[1] for y in box} == {36}
    assert all(y.isfinite().all() for y in cls + box)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (8, 200), (200, 1), (1, 1)])
@pytest.mark.parametrize("pad_type", ["", "same"])
def test_levels_of_one_row_or_column(pad_type: str, size: tuple[int, int]) -> None:
    """Such as 1 x 2, from which the next level's 1 x 1 is pooled."""
    model = nano_with(pad_type=pad_type).eval()
    x = images(1, size)
    with torch.no_grad():
        actual = model(x)
        with use_backend("reference"):
            expected = model(x)
        assert model.plan_reason(x) is None
    assert [tuple(y.shape[2:]) for y in actual[0]] == get_feat_sizes(size, 7)[3:]
    torch.testing.assert_close(flat(actual), flat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad_type", ["", "same"])
@pytest.mark.parametrize("downsample", ["max", "avg"])
def test_one_row_is_pooled_as_larger_maps_are(downsample: str, pad_type: str) -> None:
    rule = ResampleFeatureMap(4, 4, (4, 4), (2, 2), pad_type=pad_type, downsample=downsample)
    x = images(2, (1, 2))
    pool = nn.MaxPool2d(3, 2, 1) if downsample == "max" else nn.AvgPool2d(3, 2, 1)
    torch.testing.assert_close(rule(x, (1, 1)), pool(x)[..., :1])
    torch.testing.assert_close(rule(x.mT, (1, 1)), pool(x.mT)[..., :1, :])


def test_a_side_that_keeps_its_size_is_not_pooled() -> None:
    x = images(2, (4, 6))
    rule = ResampleFeatureMap(3, 3, (4, 6), (4, 3))
    torch.testing.assert_close(rule(x), nn.functional.max_pool2d(x, (1, 3), (1, 2), (0, 1)))


def test_empty_batch(trained: nn.Module) -> None:
    with torch.no_grad():
        cls, _box = trained(torch.zeros(0, 3, *SIZE))
    assert cls[0].shape == (0, 27, 8, 12)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 3, 64)])
def test_wrong_rank_is_named(trained: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"):
        trained(torch.zeros(shape))


def test_memory_layout_of_the_input_does_not_matter(trained: nn.Module) -> None:
    x = images()
    with torch.no_grad():
        expected = flat(trained(x))
        assert torch.equal(flat(trained(x.to(memory_format=torch.channels_last))), expected)
        wide = torch.cat([x, x], dim=3)[..., : SIZE[1]]
        assert torch.equal(flat(trained(wide)), expected)


@pytest.mark.parametrize("training", [False, True])
def test_fused_norms_equal_called_norms(trained: nn.Module, training: bool) -> None:
    model = copy.deepcopy(trained).double().train(training)
    x = images().double()
    expected = flat(unfused(model)(x))
    torch.testing.assert_close(flat(model(x)), expected, rtol=1e-9, atol=1e-9)


def norm_state(model: nn.Module) -> dict[str, Tensor]:
    keys = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith(keys)}


@pytest.mark.parametrize("momentum", [0.01, None])
def test_running_statistics_are_updated_as_torch_does(trained: nn.Module, momentum: float | None):
    model = copy.deepcopy(trained).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    first, before = norms[0], copy.deepcopy(norms[0])
    model(images().double())
    stem = nn.functional.conv2d(
        nn.functional.pad(images().double(), (0, 1, 0, 1)), model.backbone.conv_stem.weight, None, 2
    )
    before(stem)
    torch.testing.assert_close(first.running_mean, before.running_mean)
    torch.testing.assert_close(first.running_var, before.running_var)
    assert all(n.num_batches_tracked == before.num_batches_tracked for n in norms)


def test_eval_mode_changes_no_state(trained: nn.Module) -> None:
    before = norm_state(trained)
    trained(images())
    assert all(torch.equal(v, before[k]) for k, v in norm_state(trained).items())


def test_frozen_norms_in_a_training_model_use_and_keep_their_statistics(trained: nn.Module):
    model = copy.deepcopy(trained).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    before = norm_state(model)
    x = images().double()
    outputs = flat(model(x))
    torch.testing.assert_close(outputs, flat(copy.deepcopy(model).eval()(x)))
    outputs.square().sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in norm_state(model).items())
    assert model.backbone.bn1.weight.grad is None
    assert model.backbone.conv_stem.weight.grad.abs().sum() > 0


def test_frozen_statistics_leave_scale_and_shift_trainable(trained: nn.Module) -> None:
    model = copy.deepcopy(trained).double()
    x = images().double()
    flat(model(x)).square().sum().backward()
    reference = unfused(copy.deepcopy(trained).double())
    flat(reference(x)).square().sum().backward()
    theirs = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-7, atol=1e-9, msg=key)


def to_group_norm(norm: nn.BatchNorm2d) -> nn.Module:
    return nn.GroupNorm(1, norm.num_features)


def to_identity(norm: nn.BatchNorm2d) -> nn.Module:
    return nn.Identity()


@pytest.mark.parametrize("replace", [to_group_norm, to_identity])
def test_replaced_norms_are_called(replace: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    model = nano().train()
    calls = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                new = replace(child)
                new.register_forward_hook(lambda module, *_: calls.append(module))
                setattr(parent, name, new)
    flat(model(images())).sum().backward()
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(set(map(id, calls))) == len(calls) >= max(len(norms), 50)


def test_sync_batch_norm_conversion_keeps_keys_and_outputs(trained: nn.Module) -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(trained))
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    assert converted.state_dict().keys() == trained.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(flat(converted(images())), flat(trained(images())))


def test_norms_without_statistics_or_affine() -> None:
    model = nano()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                plain = nn.BatchNorm2d(child.num_features, affine=False, track_running_stats=False)
                setattr(parent, name, plain)
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(flat(model.eval()(x)), flat(model.train()(x)))


def test_one_value_per_channel_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        nano().train()(images(1, (64, 64)))


def test_a_replaced_activation_is_used(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    model.class_net.act = nn.Tanh()
    model.box_net.act = nn.SiLU()
    with torch.no_grad():
        (cls, box), (cls_before, box_before) = model(images()), trained(images())
    assert all(torch.equal(a, b) for a, b in zip(box, box_before, strict=True))
    assert not torch.allclose(cls[0], cls_before[0])


@pytest.mark.parametrize("level_first", [False, True])
def test_toggling_the_head_layout_changes_keys_but_no_output(level_first: bool) -> None:
    model = nano_with(head_bn_level_first=level_first).eval()
    keys = list(model.class_net.state_dict())
    with torch.no_grad():
        before = flat(model(images()))
        model.toggle_head_bn_level_first()
        assert torch.equal(flat(model(images())), before)
    toggled = list(model.class_net.state_dict())
    key = "bn_rep.0.1.bn.weight"
    assert (key in keys, key in toggled) == (not level_first, level_first)
    model.toggle_head_bn_level_first()
    assert list(model.class_net.state_dict()) == keys


def test_heads_want_one_map_per_level(trained: nn.Module) -> None:
    with pytest.raises(ValueError, match="got 2 maps, expected 5"):
        trained.class_net([torch.zeros(1, 32, 8, 8)] * 2)


def test_nodes_of_four_inputs_are_refused() -> None:
    info = [{"num_chs": 4, "size": (8, 8)}] * 4
    with pytest.raises(ValueError, match="inputs_offsets: got 4"):
        FpnCombine(info, 4, (0, 1, 2, 3), (8, 8))
    with pytest.raises(ValueError, match="weight_method"):
        FpnCombine(info, 4, (0, 1), (8, 8), weight_method="mean")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(trained: nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        expected = flat(trained(images()))
        actual = flat(copy.deepcopy(trained).to(dtype)(images().to(dtype)))
    assert actual.dtype == dtype
    # The roundings of about 60 layers in sequence add up like a random walk.
    bound = 60**0.5 * torch.finfo(dtype).eps * expected.abs().max()
    assert (actual.float() - expected).abs().max() <= bound


@pytest.mark.parametrize("training", [False, True])
def test_autocast(trained: nn.Module, training: bool) -> None:
    model = copy.deepcopy(trained).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = flat(model(images()))
    assert outputs.dtype == torch.bfloat16
    outputs.float().sum().backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


def test_hooks_on_called_modules_fire(trained: nn.Module) -> None:
    model, seen = copy.deepcopy(trained), []
    called = [model.backbone, model.backbone.blocks[2][0], model.fpn, model.fpn.cell[0]]
    called += [model.fpn.cell[0].fnode[3], model.class_net, model.box_net]
    for module in called:
        module.register_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        model(images())
    assert sorted(map(id, seen)) == sorted(map(id, called))


def test_copies_and_pickles_give_the_same_outputs(trained: nn.Module) -> None:
    with torch.no_grad():
        expected = flat(trained(images()))
        assert torch.equal(flat(copy.deepcopy(trained)(images())), expected)
        assert torch.equal(flat(pickle.loads(pickle.dumps(trained))(images())), expected)


def test_drop_path_only_acts_in_training() -> None:
    model = nano_with(backbone_args={"drop_path_rate": 0.5})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        assert not torch.equal(flat(model(images())), flat(model(images())))
        model.eval()
        assert torch.equal(flat(model(images())), flat(model(images())))


def test_a_class_head_of_another_config_fits(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    model.class_net = HeadNet(model.config, num_outputs=7)
    assert model.eval()(images())[0][0].shape[1] == 7 * 9
