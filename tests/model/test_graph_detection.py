"""Detection as one CUDA graph, from image to rows, on the stand-in for a GPU."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import effdet
from effdet.anchors import Anchors
from effdet.graph import Graph
from effdet.plan import use_plan
from effdet_kernels import _library
from effdet_kernels.ops.decode_topk import reference

from .networks import image

pytestmark = pytest.mark.usefixtures("one_thread")


def detector() -> nn.Module:
    torch.manual_seed(0)
    options = {"num_classes": 3, "pretrained_backbone": False}
    return effdet.create_model("efficientdet_nano", "predict", **options).eval()


def sync_free_decode(cls_outputs, box_outputs, anchors, num_classes, k, limits, strides):
    """`decode_topk` as a kernel computes it: without a value on the host. Here: no ties, no NaN."""
    rows = [m.permute(0, 2, 3, 1).flatten(1) for m in cls_outputs]
    logits, flat = torch.cat(rows, 1).topk(min(k, sum(row.shape[1] for row in rows)))
    codes = torch.cat(
        [m.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for m in box_outputs], 1
    )
    index = flat // num_classes
    code = codes.gather(1, index[:, :, None].expand(-1, -1, 4))
    if strides is not None:
        anchors = reference.grid(anchors, strides, cls_outputs).to(code.dtype)
    corners = anchors.index_select(0, index.flatten()).view(*index.shape, 4)
    size = corners[..., 2:] - corners[..., :2]
    centre = code[..., :2].flip(-1) * size + (corners[..., 2:] + corners[..., :2]) / 2
    half = code[..., 2:].flip(-1).exp() * size / 2
    boxes = torch.cat([centre - half, centre + half], -1)
    if limits is not None:
        boxes = boxes.clamp(min=0).minimum(limits.repeat(1, 2)[:, None])
    return boxes, logits, index, flat % num_classes


@pytest.fixture
def bench(captures, monkeypatch):
    """A bench whose ops wait for nothing."""
    monkeypatch.setattr(_library.OPS["decode_topk"], "impls", {"reference": sync_free_decode})
    return detector()


def rows(bench, x, info=None):
    with torch.no_grad():
        return bench(x, info)


def info_of(batch=2):
    return {"img_scale": torch.rand(batch) + 1, "img_size": torch.tensor([[90.0, 60.0]] * batch)}


def test_detection_is_one_graph(bench, captures):
    for _ in range(2):
        for info in (None, info_of()):
            x = image()
            got = rows(bench, x, info)
            with use_plan(False):
                assert torch.equal(got, rows(bench, x, info))
    assert [c.replays for c in captures] == [2, 2]
    assert not bench.model._plans._plans


def test_detection_follows_settings_and_the_head(bench, captures):
    x = image()
    rows(bench, x)
    bench.soft_nms = not bench.soft_nms
    bench.max_det_per_image = 7
    got = rows(bench, x)
    with use_plan(False):
        assert got.shape == (2, 7, 6) and torch.equal(got, rows(bench, x))
    bench.model.reset_head(num_classes=5)
    assert rows(bench, x)[..., 5].max() <= 5
    assert [c.replays for c in captures] == [1, 1, 1]
    assert not any(module.training for module in bench.modules())


def test_detection_follows_the_options_of_a_call(bench, captures):
    x = image()
    seen = []
    for options in (
        {},
        {"soft_nms": True},
        {"sigma": 0.1, "soft_nms": True},
        {"iou_threshold": 0.1},
        {"score_threshold": 0.02},
        {"max_det": 3},
        {"class_agnostic": True},
        {"max_per_class": 2},
    ):
        with torch.no_grad():
            got = [bench(x, **options) for _ in range(2)]
            with use_plan(False):
                want = bench(x, **options)
        assert torch.equal(got[0], want) and torch.equal(got[1], want)
        seen.append(want)
    assert [c.replays for c in captures] == [2] * len(seen)
    assert all(got.shape != seen[0].shape or not torch.equal(got, seen[0]) for got in seen[1:])


def test_detection_with_integers_or_on_another_image_size(bench, captures):
    info = info_of()
    want = rows(bench, image(), info)
    rows(bench, image(), {**info, "img_size": info["img_size"].long()})
    assert [c.replays for c in captures] == [2]
    for height in range(32, 32 * 10, 32):  # more sizes than anchors are kept for
        rows(bench, image(1, height, 32))
    x = image()
    got = rows(bench, x, info)
    with use_plan(False):
        assert torch.equal(got, rows(bench, x, info)) and got.shape == want.shape


def test_detection_by_a_graph_follows_the_anchors(bench, captures):
    x = image()
    config = bench.config
    arguments = config.num_scales, config.aspect_ratios, config.anchor_scale, x.shape[2:]
    bench.anchors = Anchors(config.min_level, config.max_level, *arguments).eval()
    state = copy.deepcopy(bench.anchors.state_dict())
    exact = rows(bench, x)
    bench.anchors.boxes += 1
    moved = rows(bench, x)
    with use_plan(False):
        assert torch.equal(moved, rows(bench, x))
    assert not torch.equal(moved, exact)
    bench.anchors.boxes -= 2
    with use_plan(False):
        want = rows(bench, x)
    assert torch.equal(rows(bench, x), want) and not torch.equal(want, moved)
    bench.anchors.load_state_dict(state)
    assert torch.equal(rows(bench, x), exact)
    assert [c.replays for c in captures] == [2, 2]  # of a grid, of stored anchors


def test_detection_that_cannot_be_captured_still_runs_the_network_by_a_graph(
    captures, caplog, monkeypatch
):
    def waits(*args):
        assert args[0][0].sum().item() is not None
        return sync_free_decode(*args)

    monkeypatch.setattr(_library.OPS["decode_topk"], "impls", {"reference": waits})
    bench, x = detector(), image()
    with caplog.at_level(logging.INFO, logger="effdet"):
        got = rows(bench, x)
    with use_plan(False):
        assert torch.equal(got, rows(bench, x))
    assert "on the host" in caplog.text
    assert [c.replays for c in captures] == [0, 1]


def test_a_bench_around_another_module_is_not_captured(bench, captures):
    bench.model = nn.DataParallel(bench.model)
    rows(bench, image())
    assert [type(p) for p in bench.model.module._plans._plans.values()] == [Graph]
    assert not bench._plans._plans


def test_warmup_of_detection(bench, captures):
    bench.warmup(64, batch=2)
    bench.warmup(64, batch=2, img_info=False)
    rows(bench, image())
    rows(bench, image(), info_of())
    assert [c.replays for c in captures] == [2, 2]


def test_copies_have_graphs_of_their_own(bench, captures):
    x = image()
    want = rows(bench, x)
    assert torch.equal(rows(copy.deepcopy(bench), x), want)
    assert [c.replays for c in captures] == [1, 1]
