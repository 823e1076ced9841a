"""Plans that are CUDA graphs, on a stand-in for a GPU that replays what was captured: numbers, memory, weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from effdet import plan as plan_module
from effdet_kernels import use_backend

from .networks import build, flat, image, load_others, same, unplanned

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "tf_efficientdet_lite0", "efficientdet_q0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_layouts_are_those_of_the_modules(captures, name, dtype):
    model = build(name).to(dtype)
    for _ in range(2):
        x = image(2, 96, 128).to(dtype)
        got, want = flat(model, x), unplanned(model, x)
        assert same(got, want)
        assert [y.stride() for y in got] == [y.stride() for y in want]
    assert [c.replays for c in captures] == [2]


def test_a_graph_belongs_to_shape_strides_dtype_and_backend(captures):
    model, x = build(), image()
    channels_last = x.contiguous(memory_format=torch.channels_last)
    for count, other in enumerate((x, channels_last, x[:1], x[..., :32], image(2, 96, 64)), 1):
        for _ in range(2):
            assert same(flat(model, other), unplanned(model, other))
        assert len(captures) == count
    with use_backend("reference"):
        assert same(flat(model, x), unplanned(model, x))
    assert len(captures) == 6
    model.double()
    assert same(flat(model, x.double()), unplanned(model, x.double()))
    assert len(captures) == 7


def test_at_most_eight_graphs_are_kept_the_latest(captures):
    model = build()
    sides = range(32, 32 + 32 * 9, 32)
    for side in sides:
        flat(model, image(1, side, side))
    assert len(model._plans._plans) == plan_module._MAX_PLANS == 8
    flat(model, image(1, sides[1], sides[1]))
    assert len(captures) == 9
    flat(model, image(1, sides[0], sides[0]))  # the one that went
    assert len(captures) == 10


def test_results_are_fresh_memory(captures):
    model = build()
    first = flat(model, image())
    kept = [y.clone() for y in first]
    second = flat(model, image())
    assert same(first, kept) and not same(first, second)
    (plan,) = model._plans._plans.values()
    groups = first, second, plan._outputs, plan._inputs, list(model.parameters())
    memory = [t.untyped_storage().data_ptr() for group in groups for t in group]
    assert len(set(memory)) == len(memory)
    for y in first:
        y.fill_(torch.nan)
    assert all(y.isfinite().all() for y in flat(model, image()))


def test_the_image_is_left_alone(captures):
    model, x = build(), image()
    before = x.clone()
    flat(model, x)
    flat(model, x)
    assert torch.equal(x, before)


def _in_place(model):
    with torch.no_grad():
        model.class_net.predict.conv_pw.bias.add_(1)


def _through_data(model):
    model.class_net.predict.conv_pw.bias.data.add_(1)


def _statistics(model):
    model.backbone.bn1.running_mean.add_(0.5)


def _fusion_weight(model):
    with torch.no_grad():
        model.fpn.cell[0].fnode[0].combine.edge_weights.mul_(torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize(
    "change", [_in_place, _through_data, load_others, _statistics, _fusion_weight]
)
def test_new_values_of_weights_need_no_new_graph(captures, change):
    model, x = build("tf_efficientdet_d0"), image(1)
    before = flat(model, x)
    change(model)
    after = flat(model, x)
    assert not same(before, after) and same(after, unplanned(model, x))
    assert [c.replays for c in captures] == [2]


def _assigned(model):
    state = {k: v * 0.9 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _data_replaced(model):
    weight = model.backbone.conv_stem.weight
    weight.data = weight.data * 2


def _data_of_the_second_replaced(model):
    bias = model.backbone.bn1.bias
    bias.data = bias.data + 1


def _parameter_replaced(model):
    conv = model.box_net.predict.conv_pw
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def _module_replaced(model):
    model.backbone.act1 = nn.ReLU().eval()


@pytest.mark.parametrize(
    "change",
    [
        _assigned,
        _data_replaced,
        _data_of_the_second_replaced,
        _parameter_replaced,
        _module_replaced,
    ],
)
def test_weights_at_other_places_and_other_modules_do(captures, change):
    model, x = build("tf_efficientdet_d0"), image(1)
    before = flat(model, x)
    change(model)
    after = flat(model, x)
    assert not same(before, after) and same(after, unplanned(model, x))
    assert [c.replays for c in captures] == [1, 1]


def test_a_model_that_is_moved_or_trained_gives_its_graphs_memory_back(captures):
    model = build()
    flat(model, image())
    model.to(torch.float32)  # changes nothing
    model.eval()
    assert model._plans._plans
    model.double()
    assert not model._plans._plans
    flat(model, image().double())
    model.train()
    assert not model._plans._plans


def test_copies_have_graphs_of_their_own(captures):
    model, x = build(), image()
    want = flat(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(flat(other, x), want)
    assert len(captures) == 3


def test_warmup_makes_the_plans(captures):
    model = build()
    model.warmup((96, 64), 64, batch=2)
    assert [c.replays for c in captures] == [1, 1]
    flat(model, image())
    assert [c.replays for c in captures] == [1, 2]
    model.warmup(64, memory_format=torch.channels_last)
    assert len(captures) == 3
    with pytest.raises(ValueError, match="warmup: got a model in training mode"):
        model.train().warmup(64)


def test_warmup_on_a_cpu():
    model = build()
    model.warmup((96, 128), batch=2)
    assert [type(plan).__name__ for plan in model._plans._plans.values()] == ["Plan"]
    model.bfloat16().warmup(64)
    (plan,) = model._plans._plans.values()
    assert plan._outputs[0][1] == torch.bfloat16
