"""Plans that are CUDA graphs: without a GPU on a stand-in that replays what was captured, with one on CUDA itself."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import effdet
from effdet import graph as graph_module
from effdet import plan as plan_module
from effdet.plan import NotPlannableError, use_plan
from effdet_kernels import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU: no CUDA device is visible to torch"
)


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def build(name="efficientdet_nano") -> nn.Module:
    """A small network whose norms have statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = effdet.create_model(name, num_classes=3, pretrained_backbone=False).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@torch.no_grad()
def flat(model, x) -> list[Tensor]:
    return tensors(model(x))


def unplanned(model, x) -> list[Tensor]:
    with use_plan(False):
        return flat(model, x)


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def image(batch=2, height=64, width=64) -> Tensor:
    return torch.randn(batch, 3, height, width)


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


def _loaded(model):
    model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})


def _statistics(model):
    model.backbone.bn1.running_mean.add_(0.5)


def _fusion_weight(model):
    with torch.no_grad():
        model.fpn.cell[0].fnode[0].combine.edge_weights.mul_(torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize("change", [_in_place, _through_data, _loaded, _statistics, _fusion_weight])
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


def test_hooks_and_modes_run_module_by_module(captures):
    model, x, seen = build(), image(), []
    flat(model, x)
    handle = model.backbone.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    flat(model, x)
    assert seen == [1] and "hooks" in model_reason(model, x)
    handle.remove()
    model.fpn.train()
    flat(model, x)
    assert "training" in model_reason(model, x)
    model.eval()
    flat(model, x)
    assert [c.replays for c in captures] == [1, 1]


@torch.no_grad()
def model_reason(model, x):
    return model.plan_reason(x)


def test_calls_that_no_graph_may_take(captures, monkeypatch):
    model, x = build(), image()
    assert model.plan_reason(x) == "gradients are enabled"
    with torch.no_grad():
        with use_plan(False):
            assert model.plan_reason(x) == "use_plan(False)"
            model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.plan_reason(x) == "autocast is enabled"
            model(x)
        with monkeypatch.context() as patch:
            patch.setattr(graph_module.CAPTURES["cpu"], "calls_capture", True)
            assert "captured" in model.plan_reason(x)
            model(x)
        replica = model._replicate_for_data_parallel()
        assert "DataParallel" in replica.plan_reason(x)
        with torch.overrides.TorchFunctionMode():
            assert model.plan_reason(x) == "a torch mode is active"
        model.train()
        assert model.plan_reason(x) == "the model is in training mode"
        model.eval()
        assert not captures
        assert model.plan_reason(x) is None
    assert len(captures) == 1


def test_gradients_flow_in_eval_mode(captures):
    x = image(1).requires_grad_()
    sum(y.sum() for y in tensors(build()(x))).backward()
    assert x.grad.isfinite().all() and not captures


class Reads(nn.Module):
    """An activation that looks at its input on the host."""

    def forward(self, x):
        return x * (2 if x.sum() > 0 else 3)


class Masks(nn.Module):
    def forward(self, x):
        return x[x > x.amin()].mean() + x


class Assigns(nn.Module):
    def forward(self, x):
        y = x.clone()
        y[x < 0] = 0
        return y


@pytest.mark.parametrize("activation", [Reads, Masks, Assigns])
def test_a_forward_that_waits_for_the_device_is_not_captured(captures, caplog, activation):
    model, x = build(), image()
    model.backbone.act1 = activation().eval()
    with caplog.at_level(logging.INFO, logger="effdet"):
        for _ in range(3):
            assert same(flat(model, x), unplanned(model, x))
    assert "on the host" in model_reason(model, x)
    assert len(captures) == 1 and not hasattr(captures[0], "steps")
    assert len(caplog.records) == 1
    assert "(2, 3, 64, 64)" in caplog.text


class Reverses(nn.Module):
    def forward(self, x):
        return x[:, :, torch.arange(x.shape[2]).flip(0).to(x.device)]


def test_indices_are_no_reason_to_wait(captures):
    model, x = build(), image()
    model.backbone.act1 = Reverses().eval()
    for _ in range(2):
        assert same(flat(model, x), unplanned(model, x))
    assert [c.replays for c in captures] == [2]


@pytest.fixture
def failing(captures):
    """A GPU on which no capture comes to its end."""

    class Failing(graph_module.CAPTURES["cpu"]):
        def capture(self, work):
            try:
                work()
                raise RuntimeError("operation not permitted")
            except RuntimeError:
                raise RuntimeError("the end of the capture") from None

    return Failing


@pytest.mark.parametrize("where", ["end", "inside"])
def test_a_failed_capture_falls_back_once_and_says_what_came_first(
    captures, failing, monkeypatch, where
):
    monkeypatch.setitem(graph_module.CAPTURES, "cpu", failing)
    model, x = build(), image()
    if where == "inside":
        forward, calls = model._network, []

        def network(x):
            calls.append(1)
            if len(calls) == 2:  # after the warm-up
                raise RuntimeError("out of memory")
            return forward(x)

        monkeypatch.setattr(model, "_network", network)
    first = flat(model, x)
    assert same(flat(model, x), first) and same(first, unplanned(model, x))
    assert len(captures) == 1
    reason = {"end": "the end of the capture", "inside": "out of memory"}[where]
    assert model_reason(model, x) == f"the capture failed: {reason}"
    error = model._plans._plans.popitem()[1]
    assert isinstance(error, NotPlannableError)
    assert error.__traceback__ is error.__cause__ is error.__context__ is None  # they hold memory


def test_a_failed_shape_does_not_spoil_another(captures, failing, monkeypatch):
    model = build()
    with monkeypatch.context() as patch:
        patch.setitem(graph_module.CAPTURES, "cpu", failing)
        flat(model, image())
    flat(model, image(1))
    flat(model, image())
    assert [c.replays for c in captures] == [0, 1]


def test_bad_images_are_refused_as_without_a_graph(captures):
    model = build()
    with torch.no_grad():
        with pytest.raises(ValueError, match="weight"):
            model(torch.randn(1, 4, 64, 64))
        with pytest.raises(TypeError, match="float64"):
            model(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert not model._plans._plans


def test_inference_mode_and_no_grad_share_a_graph(captures):
    model, x = build(), image()
    with torch.inference_mode():
        first = tensors(model(x))
        assert all(y.is_inference() for y in first)
    second = flat(model, x)
    assert same(first, second) and not any(y.is_inference() for y in second)
    assert [c.replays for c in captures] == [2]


def test_threads_may_call_one_model(captures):
    model, wrong = build(), []
    images = [image(1) for _ in range(4)]
    want = [unplanned(model, x) for x in images]

    def work(i):
        for _ in range(10):
            if not same(flat(model, images[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and [c.replays for c in captures] == [40]


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


# CUDA --------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_numbers_are_those_of_the_modules(dtype):
    model = build("tf_efficientdet_d0").to("cuda", dtype)
    for _ in range(3):
        x = image(2, 128, 160).to("cuda", dtype)
        got, want = flat(model, x), unplanned(model, x)
        assert model_reason(model, x) is None
        assert same(got, want) and [y.stride() for y in got] == [y.stride() for y in want]


@needs_gpu
def test_on_a_gpu_new_values_of_weights_are_read():
    model, x = build().cuda(), image().cuda()
    flat(model, x)
    (plan,) = model._plans._plans.values()
    _loaded(model)
    assert same(flat(model, x), unplanned(model, x))
    assert list(model._plans._plans.values()) == [plan]


@needs_gpu
def test_on_a_gpu_streams_and_threads_take_turns():
    model = build().cuda()
    images = [image(1, 256, 256).cuda() for _ in range(4)]
    want, wrong = [unplanned(model, x) for x in images], []
    model.warmup(256)
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not same(flat(model, images[i]), want[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    streams = [torch.cuda.Stream() for _ in images]  # from one thread, without waiting in between
    got = []
    for x, stream in zip(images * 5, streams * 5, strict=True):
        with torch.cuda.stream(stream):
            got.append(flat(model, x))
    torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(got, want * 5, strict=True))


@needs_gpu
def test_on_a_gpu_a_failed_capture_leaves_cuda_usable(monkeypatch):
    model, x = build().cuda(), image().cuda()
    model.backbone.act1 = Reads().eval()
    monkeypatch.setattr(graph_module, "_NoHost", contextlib.nullcontext)  # so that CUDA meets it
    before = torch.cuda.current_stream()
    assert same(flat(model, x), unplanned(model, x))
    assert model_reason(model, x).startswith("the capture failed: ")
    assert torch.cuda.current_stream() == before and not torch.cuda.is_current_stream_capturing()
    assert torch.rand(5, device="cuda").isfinite().all()
    torch.cuda.synchronize()
    other = build().cuda()
    assert same(flat(other, x), unplanned(other, x)) and model_reason(other, x) is None


@needs_gpu
def test_on_a_gpu_a_caller_may_capture_the_model():
    model, x = build().cuda(), image().cuda()
    with torch.no_grad():
        model(x)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            got = tensors(model(x))
        captured.replay()
    assert same(got, unplanned(model, x))


@needs_gpu
def test_on_a_gpu_a_graph_that_is_dropped_gives_its_memory_back():
    model, x = build().cuda(), image(8, 256, 256).cuda()
    flat(model, x)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    model.refresh()
    torch.cuda.empty_cache()
    assert held - torch.cuda.memory_reserved() >= x.nbytes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs, torch sees fewer")
def test_on_a_gpu_that_is_not_the_current_one():
    model, x = build().to("cuda:1"), image().to("cuda:1")
    with torch.cuda.device(0):
        for _ in range(2):
            assert same(flat(model, x), unplanned(model, x))
        assert model_reason(model, x) is None
        assert torch.cuda.current_device() == 0
