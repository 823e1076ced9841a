"""NMS and soft-NMS of OpenVINO, OpenCV and torchvision.

Candidates come as boxes [B, N, 4] (x_min, y_min, x_max, y_max), scores [B, N] and classes [B, N] (int64), coordinates
being multiples of ``grid`` >= 0. Where a peer knows no classes, boxes of different classes are moved apart before the
clock runs, which is exact on the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("openvino", "opencv-python-headless", "torchvision")
SCORE_THRESHOLD = 0.001
Calls = tuple[Callable[[], Any], Callable[[Any], list[Tensor]]]


def openvino(
    device: str,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    max_det: int,
    sigma: float,
    iou_threshold: float,
    hard: bool,
    grid: float,
) -> Calls:
    """NonMaxSuppression-9: its weight is exp(-iou^2 / (2 sigma)), so half of our sigma is given.

    Above ``iou_threshold`` it removes a box in soft mode too, so there the threshold is 1.
    """
    import numpy as np
    import openvino as ov
    from openvino import opset9

    batch, count = scores.shape
    box_input = opset9.parameter([batch, count, 4], np.float32)
    score_input = opset9.parameter([batch, 1, count], np.float32)
    node = opset9.non_max_suppression(
        box_input,
        score_input,
        np.int64(max_det),
        np.float32(iou_threshold if hard else 1.0),
        np.float32(SCORE_THRESHOLD),
        np.float32(0 if hard else sigma / 2),
        box_encoding="corner",
        sort_result_descending=False,
        output_type="i64",
    )
    model = ov.Model([node.output(i) for i in range(3)], [box_input, score_input])
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    feed = {0: _apart(boxes, classes).numpy(), 1: scores[:, None].contiguous().numpy()}

    def finish(_: Any) -> list[Tensor]:
        chosen, rated, number = (torch.from_numpy(t.data) for t in request.output_tensors)
        chosen, rated = chosen[: int(number)], rated[: int(number)]
        images = [chosen[:, 0] == image for image in range(batch)]
        return _padded([(chosen[mine, 2], rated[mine, 2]) for mine in images], max_det)

    return lambda: request.infer(feed), finish


def opencv(
    device: str,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    max_det: int,
    sigma: float,
    iou_threshold: float,
    hard: bool,
    grid: float,
) -> Calls:
    """cv2.dnn, image by image. softNMSBoxes takes integer rectangles: in units of ``grid`` nothing is lost."""
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    rectangles = _rectangles(_apart(boxes, classes) / grid).round().int().numpy()
    plain = _rectangles(boxes).double().numpy()
    values, labels = scores.numpy(), classes.int().numpy()

    def soft(image: int) -> Any:
        return cv2.dnn.softNMSBoxes(
            rectangles[image], values[image], SCORE_THRESHOLD, 0.0, top_k=max_det, sigma=sigma
        )

    def greedy(image: int) -> Any:
        return cv2.dnn.NMSBoxesBatched(
            plain[image], values[image], labels[image], SCORE_THRESHOLD, iou_threshold
        )

    def finish(found: list[Any]) -> list[Tensor]:
        if hard:
            chosen = [torch.as_tensor(picks).flatten().long() for picks in found]
            rated = [scores[image, picks] for image, picks in enumerate(chosen)]
        else:
            rated, chosen = (
                [torch.as_tensor(v).flatten() for v in t] for t in zip(*found, strict=True)
            )
        return _padded(list(zip(chosen, rated, strict=True)), max_det)

    return lambda: [(greedy if hard else soft)(i) for i in range(len(boxes))], finish


def torchvision(
    device: str,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    max_det: int,
    sigma: float,
    iou_threshold: float,
    hard: bool,
    grid: float,
) -> Calls:
    """torchvision.ops.batched_nms (hard), image by image; only with its compiled operators."""
    import torchvision_or_stub

    if not torchvision_or_stub.prepare():
        raise ImportError(
            "torchvision's compiled operators do not load beside this torch: its NMS is not timed"
        )
    from torchvision.ops import batched_nms

    boxes, scores, classes = (t.to(device) for t in (boxes, scores, classes))

    def call() -> list[Tensor]:
        images = zip(boxes, scores, classes, strict=True)
        return [batched_nms(*image, iou_threshold)[:max_det] for image in images]

    def finish(found: list[Tensor]) -> list[Tensor]:
        found = [kept[scores[i, kept] > SCORE_THRESHOLD] for i, kept in enumerate(found)]
        return _padded([(kept, scores[i, kept]) for i, kept in enumerate(found)], max_det)

    return call, finish


def _apart(boxes: Tensor, classes: Tensor) -> Tensor:
    """Boxes moved by a multiple of their class that keeps classes from meeting."""
    return boxes + (classes * (boxes.max().ceil() + 1))[..., None]


def _rectangles(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)


def _padded(found: list[tuple[Tensor, Tensor]], width: int) -> list[Tensor]:
    device = found[0][1].device
    index = torch.full((len(found), width), -1, device=device)
    score = torch.zeros(len(found), width, device=device)
    for row, (chosen, rated) in enumerate(found):
        kept = min(width, len(chosen))
        index[row, :kept], score[row, :kept] = chosen[:kept], rated[:kept]
    return [index, score]
