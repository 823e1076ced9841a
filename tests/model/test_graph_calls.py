"""Which calls a CUDA graph takes, and what becomes of the others; on the stand-in for a GPU."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from effdet import graph as graph_module
from effdet.plan import NotPlannableError, use_plan

from .networks import Reads, build, flat, image, in_threads, plan_reason, same, tensors, unplanned

pytestmark = pytest.mark.usefixtures("one_thread")


def test_hooks_and_modes_run_module_by_module(captures):
    model, x, seen = build(), image(), []
    flat(model, x)
    handle = model.backbone.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    flat(model, x)
    assert seen == [1] and "hooks" in plan_reason(model, x)
    handle.remove()
    model.fpn.train()
    flat(model, x)
    assert "training" in plan_reason(model, x)
    model.eval()
    flat(model, x)
    assert [c.replays for c in captures] == [1, 1]


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
    assert "on the host" in plan_reason(model, x)
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
    assert plan_reason(model, x) == f"the capture failed: {reason}"
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

    in_threads(work, 4)
    assert not wrong and [c.replays for c in captures] == [40]
