"""Plans that are CUDA graphs, on CUDA itself."""

from __future__ import annotations

import contextlib

import pytest
import torch

import effdet
from effdet import graph as graph_module
from effdet.plan import use_plan

from .networks import (
    Reads,
    build,
    flat,
    image,
    in_threads,
    load_others,
    plan_reason,
    same,
    tensors,
    unplanned,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs an NVIDIA GPU: no CUDA device is visible to torch",
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_numbers_are_those_of_the_modules(dtype):
    model = build("tf_efficientdet_d0").to("cuda", dtype)
    for _ in range(3):
        x = image(2, 128, 160).to("cuda", dtype)
        got, want = flat(model, x), unplanned(model, x)
        assert plan_reason(model, x) is None
        assert same(got, want) and [y.stride() for y in got] == [y.stride() for y in want]


def test_on_a_gpu_new_values_of_weights_are_read():
    model, x = build().cuda(), image().cuda()
    flat(model, x)
    (plan,) = model._plans._plans.values()
    load_others(model)
    assert same(flat(model, x), unplanned(model, x))
    assert list(model._plans._plans.values()) == [plan]


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

    in_threads(work, 4)
    assert not wrong
    streams = [torch.cuda.Stream() for _ in images]  # from one thread, without waiting in between
    got = []
    for x, stream in zip(images * 5, streams * 5, strict=True):
        with torch.cuda.stream(stream):
            got.append(flat(model, x))
    torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(got, want * 5, strict=True))


def test_on_a_gpu_a_failed_capture_leaves_cuda_usable(monkeypatch):
    model, x = build().cuda(), image().cuda()
    model.backbone.act1 = Reads().eval()
    monkeypatch.setattr(graph_module, "_NoHost", contextlib.nullcontext)  # so that CUDA meets it
    before = torch.cuda.current_stream()
    assert same(flat(model, x), unplanned(model, x))
    assert plan_reason(model, x).startswith("the capture failed: ")
    assert torch.cuda.current_stream() == before and not torch.cuda.is_current_stream_capturing()
    assert torch.rand(5, device="cuda").isfinite().all()
    torch.cuda.synchronize()
    other = build().cuda()
    assert same(flat(other, x), unplanned(other, x)) and plan_reason(other, x) is None


def test_on_a_gpu_a_caller_may_capture_the_model():
    model, x = build().cuda(), image().cuda()
    with torch.no_grad():
        model(x)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            got = tensors(model(x))
        captured.replay()
    assert same(got, unplanned(model, x))


def test_on_a_gpu_a_graph_that_is_dropped_gives_its_memory_back():
    model, x = build().cuda(), image(8, 256, 256).cuda()
    flat(model, x)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    model.refresh()
    torch.cuda.empty_cache()
    assert held - torch.cuda.memory_reserved() >= x.nbytes


@contextlib.contextmanager
def no_waiting():
    """An error where torch waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_a_gpu_waiting_is_seen():
    x = torch.ones(3, device="cuda")
    for wait in (torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.nonzero):
        with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
            wait(x[:1])


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("with_info", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_on_a_gpu_detection_waits_for_nothing(soft, with_info, planned):
    torch.manual_seed(0)
    options = {"num_classes": 3, "pretrained_backbone": False}
    bench = effdet.create_model("efficientdet_nano", "predict", **options).eval().cuda()
    bench.soft_nms = soft
    x = image().cuda()
    info = {"img_scale": x.new_ones(2), "img_size": x.new_full((2, 2), 60.0)} if with_info else None
    with torch.no_grad(), use_plan(planned):
        want = bench(x, info)  # compiles kernels, brings anchors to the device
        with no_waiting():
            got = bench(x, info)
    assert torch.equal(got, want) and got[..., 4].any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs, torch sees fewer")
def test_on_a_gpu_that_is_not_the_current_one():
    model, x = build().to("cuda:1"), image().to("cuda:1")
    with torch.cuda.device(0):
        for _ in range(2):
            assert same(flat(model, x), unplanned(model, x))
        assert plan_reason(model, x) is None
        assert torch.cuda.current_device() == 0
