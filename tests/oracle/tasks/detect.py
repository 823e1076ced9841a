"""Anchors, labels, losses, suppression and benches of PyPI effdet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops.boxes import batched_nms

from effdet import DetBenchPredict, DetBenchTrain, create_model
from effdet import loss as losses
from effdet.anchors import AnchorLabeler, Anchors, generate_detections
from effdet.bench import _batch_detection, _post_process
from effdet.config import default_detection_model_configs, get_efficientdet_config
from effdet.object_detection import (
    ArgMaxMatcher,
    BoxList,
    FasterRcnnBoxCoder,
    IouSimilarity,
    TargetAssigner,
)
from effdet.soft_nms import batched_soft_nms, soft_nms

from . import task


class _Maps(nn.Module):
    """Stands in for a model: returns the maps it was given."""

    def __init__(self, config: dict[str, Any], cls_outputs: list, box_outputs: list) -> None:
        super().__init__()
        self.config = default_detection_model_configs()
        self.config.update(config)
        self.outputs = cls_outputs, box_outputs

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.outputs


@task
def config_anchors(name: str) -> dict:
    anchors = Anchors.from_config(get_efficientdet_config(name))
    return {"boxes": anchors.boxes, "feat_sizes": anchors.feat_sizes, "config": anchors.config}


@task
def custom_anchors(arguments: dict) -> dict:
    return {"boxes": Anchors(**arguments).boxes}


@task
def label_batch(anchors: dict, gt_boxes, gt_classes, filter_valid: bool, threshold: float) -> dict:
    labeler = AnchorLabeler(Anchors(**anchors), 90, threshold)
    cls, box, positives = labeler.batch_label_anchors(gt_boxes, gt_classes, filter_valid)
    return {"cls": cls, "box": box, "positives": positives}


@task
def label_one(anchors: dict, gt_boxes: Tensor, gt_classes: Tensor) -> dict:
    cls, box, positives = AnchorLabeler(Anchors(**anchors), 90).label_anchors(gt_boxes, gt_classes)
    return {"cls": cls, "box": box, "positives": positives}


@task
def assign(anchors: Tensor, boxes: Tensor, labels: Tensor, matcher: dict, factors) -> dict:
    assigner = TargetAssigner(
        IouSimilarity(), ArgMaxMatcher(**matcher), FasterRcnnBoxCoder(factors)
    )
    cls, box, match = assigner.assign(BoxList(anchors), BoxList(boxes), labels)
    return {"cls": cls, "box": box, "match": match.match_results}


@task
def loss_and_gradients(
    cls_outputs: list, box_outputs: list, labels: dict, settings: dict
) -> dict[str, Any]:
    leaves = [output.requires_grad_() for output in (*cls_outputs, *box_outputs)]
    result = losses.loss_fn(cls_outputs, box_outputs, **labels, **settings)
    gradients = torch.autograd.grad(result[0], leaves)
    return {"losses": [value.detach() for value in result], "gradients": gradients}


@task
def elementwise_losses(logits: Tensor, targets: Tensor, codes: Tensor, goals: Tensor) -> dict:
    weights = goals.abs()
    return {
        "new": losses.new_focal_loss(logits, targets, 0.25, 1.5, 3.0),
        "unsmoothed": losses.new_focal_loss(logits, targets, 0.25, 2.0, 3.0, 0.0),
        "legacy": losses.focal_loss_legacy(logits, targets, 0.25, 1.5, 3.0),
        "huber": losses.huber_loss(codes, goals, 0.1),
        "huber_sum": losses.huber_loss(codes, goals, 0.1, weights, size_average=False),
        "smooth_l1": losses.smooth_l1_loss(codes, goals),
        "smooth_l1_sum": losses.smooth_l1_loss(codes, goals, 0.5, weights, size_average=False),
        "l1": losses.smooth_l1_loss(codes, goals, 0.0),
        "box": losses._box_loss(codes, goals, torch.tensor(5.0), 0.1),
        "one_hot": losses.one_hot(torch.tensor([[0, -1], [2, -2]]), 3),
    }


@task
def post_process(cls_outputs: list, box_outputs: list, num_classes: int, k: int) -> dict:
    levels = len(cls_outputs)
    return {"result": _post_process(cls_outputs, box_outputs, levels, num_classes, k)}


@task
def batch_detection(candidates: list, anchors: dict, img_scale, img_size, max_det: int) -> dict:
    cls, box, indices, classes = candidates
    boxes = Anchors(**anchors).boxes
    batch = _batch_detection(
        cls.shape[0], cls, box, boxes, indices, classes, img_scale, img_size, max_det
    )
    first = generate_detections(
        cls[0],
        box[0],
        boxes,
        indices[0],
        classes[0],
        None if img_scale is None else img_scale[0],
        None if img_size is None else img_size[0],
        max_det,
    )
    return {"batch": batch, "first": first}


@task
def predict_maps(config: dict, cls_outputs: list, box_outputs: list, img_info) -> dict:
    bench = DetBenchPredict(_Maps(config, cls_outputs, box_outputs))
    return {"rows": bench(torch.zeros(cls_outputs[0].shape[0], 3, 1, 1), img_info)}


@task
def train_maps(config: dict, cls_outputs: list, box_outputs: list, target: dict) -> dict:
    bench = DetBenchTrain(_Maps(config, cls_outputs, box_outputs)).eval()
    return dict(bench(torch.zeros(cls_outputs[0].shape[0], 3, 1, 1), target))


@task
def suppress(boxes: Tensor, scores: Tensor, classes: Tensor | None, settings: dict) -> dict:
    if classes is None:
        index, score = soft_nms(boxes, scores, **settings)
    else:
        index, score = batched_soft_nms(boxes, scores, classes, **settings)
    return {"index": index, "score": score}


@task
def suppress_each(sets: list[dict]) -> list[dict]:
    """``suppress`` of several sets; hard where the settings are of hard NMS, as in ``generate_detections``."""
    found = []
    for given in sets:
        settings = given["settings"]
        if settings.keys() == {"iou_threshold"}:
            index = batched_nms(given["boxes"], given["scores"], given["classes"], **settings)
            found.append({"index": index, "score": given["scores"][index]})
        else:
            found.append(suppress(**given))
    return found


@task
def d0_benches(
    image_size: tuple[int, int], state_dict: dict, x: Tensor, target: dict, points: int
) -> dict:
    predict = create_model(
        "tf_efficientdet_d0", "predict", image_size=image_size, pretrained_backbone=False
    )
    predict.model.load_state_dict(state_dict)
    train = DetBenchTrain(predict.model)
    predict.max_detection_points = train.max_detection_points = points
    predict.model.to(x.dtype)  # not the anchors: the labeler takes float32 only
    predict.eval()
    train.eval()
    with torch.no_grad():
        return {"rows": predict(x), "train": train(x, target)}
