"""Modules that put a model together with what surrounds it: detection, and training loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effdet_kernels import decode_topk
from effdet_kernels.ops.decode_topk.reference import rows as rows_of

from .anchors import AnchorLabeler, Anchors, generate_detections
from .distributed import all_reduce_sum, get_world_size
from .efficientdet import EfficientDet
from .loss import DetectionLoss
from .padding import Size, spatial_size
from .plan import Plans, images_of
from .postprocess import Suppression, batch_rows, clip_limits, detection_rows, swap_xy

__all__ = [
    "AnchorLabeler",
    "Anchors",
    "DetBenchPredict",
    "DetBenchTrain",
    "DetectionLoss",
    "generate_detections",
    "nn",  # programs that take everything use these two without an import of their own
    "torch",
    "unwrap_bench",
]


def _post_process(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    num_levels: int,
    num_classes: int,
    max_detection_points: int = 5000,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best (anchor, class) candidates of each image, not decoded.

    Args:
        cls_outputs: per level ``[B, A * num_classes, H, W]`` logits.
        box_outputs: per level ``[B, A * 4, H, W]`` codes.
        num_levels: how many of the levels to use.
        num_classes: number of classes.
        max_detection_points: candidates to keep; all of them where there are fewer.

    Returns:
        logits ``[B, K, 1]`` in descending order, codes ``[B, K, 4]``, anchor indices ``[B, K]``
        int64, classes ``[B, K]`` int64, 0-based. Of equal logits the lower anchor comes first,
        of one anchor's the lower class; NaN comes where infinity does.
    """
    codes = rows_of(box_outputs[:num_levels], 4)
    # No anchors are at hand, and the boxes that they would give are not wanted.
    anchors = torch.zeros(1, 4, device=codes.device).expand(codes.shape[1], 4)
    _, logits, anchor, classes = decode_topk(
        list(cls_outputs[:num_levels]),
        [level.detach() for level in box_outputs[:num_levels]],
        anchors,
        num_classes=num_classes,
        k=max_detection_points,
    )
    codes = codes.gather(1, anchor[..., None].expand(-1, -1, 4))
    return logits[..., None], codes, anchor, classes


def _batch_detection(
    batch_size: int,
    class_out: Tensor,
    box_out: Tensor,
    anchor_boxes: Tensor,
    indices: Tensor,
    classes: Tensor,
    img_scale: Tensor | None = None,
    img_size: Tensor | None = None,
    max_det_per_image: int = 100,
    soft_nms: bool = False,
) -> Tensor:
    """Detections of the candidates that ``_post_process`` returns, all images at once.

    Args:
        batch_size: B.
        class_out: ``[B, K, 1]`` logits.
        box_out: ``[B, K, 4]`` codes.
        anchor_boxes: ``[N, 4]`` (y_min, x_min, y_max, x_max).
        indices: ``[B, K]`` int64, anchors.
        classes: ``[B, K]`` int64, 0-based.
        img_scale: ``[B]``, original size / model-input size; ``None`` for no scaling.
        img_size: ``[B, 2]`` original (W, H); clips where ``img_scale`` is given too.
        max_det_per_image: rows per image.
        soft_nms: gaussian soft-NMS instead of NMS at IoU 0.5.

    Returns:
        ``[B, max_det_per_image, 6]`` float32 rows as ``DetBenchPredict`` returns them.
    """
    if class_out.shape[0] != batch_size:
        raise ValueError(f"class_out must have batch_size={batch_size}, got {class_out.shape[0]}")
    return batch_rows(
        class_out,
        box_out,
        anchor_boxes,
        indices,
        classes,
        img_scale,
        img_size,
        Suppression(soft_nms, max_det_per_image),
    )


def unwrap_bench(model: nn.Module) -> nn.Module:
    """The bare model inside any nesting of wrappers (``.module``) and benches (``.model``)."""
    for name in ("module", "model"):
        if hasattr(model, name):
            return unwrap_bench(getattr(model, name))
    return model


class _DetBench(nn.Module):
    """A model with its anchors and detection settings.

    ``max_detection_points``, ``max_det_per_image`` and ``soft_nms`` are copied from the model's
    config and may be changed, as may ``score_threshold``, ``iou_threshold``, ``sigma``,
    ``class_agnostic`` and ``max_per_class``: see ``effdet.postprocess.Suppression``, whose
    defaults ``None`` stands for. ``config``, ``num_classes`` and ``num_levels`` are read from the
    model, so that they are right after ``reset_head``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not hasattr(unwrap_bench(model), "config"):
            raise TypeError(
                "model must have a .config, as EfficientDet has, got "
                f"{type(unwrap_bench(model)).__name__}"
            )
        self.model = model
        self.anchors = Anchors.from_config(self.config)
        self.max_detection_points = self.config.max_detection_points
        self.max_det_per_image = self.config.max_det_per_image
        self.soft_nms = self.config.soft_nms
        self.score_threshold: float | None = None
        self.iou_threshold: float | None = None
        self.sigma: float | None = None
        self.class_agnostic = False
        self.max_per_class: int | None = None
        self._head_key = _head_key(self.config)

    @property
    def config(self):
        return unwrap_bench(self.model).config

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def num_levels(self) -> int:
        return self.config.num_levels

    def _follow_head(self) -> bool:
        """Rebuild what depends on the model's head if that changed; whether it did."""
        key = _head_key(self.config)
        if key == self._head_key:
            return False
        anchors = Anchors.from_config(self.config).to(self.anchors.boxes.device)
        self.anchors = anchors.train(self.training)
        self._head_key = key
        return True

    def suppression(self, **changed: Any) -> Suppression:
        """The bench's settings, but for those of ``changed`` that are not ``None``.

        Raises:
            TypeError, ValueError: as ``Suppression``.
        """
        own = {
            "soft_nms": self.soft_nms,
            "max_det": self.max_det_per_image,
            "score_threshold": self.score_threshold,
            "iou_threshold": self.iou_threshold,
            "sigma": self.sigma,
            "class_agnostic": self.class_agnostic,
            "max_per_class": self.max_per_class,
        }
        given = [*own.items(), *changed.items()]
        return Suppression(**{name: value for name, value in given if value is not None})

    def set_suppression(self, *, max_det: int, **options: Any) -> None:
        """Make these the bench's settings, by the names of ``effdet.postprocess.Suppression``.

        Raises:
            TypeError, ValueError: as ``Suppression``.
        """
        self.suppression(max_det=max_det, **options)
        self.max_det_per_image = max_det
        for name, value in options.items():
            setattr(self, name, value)

    def anchors_for(self, image_size: Size) -> tuple[Tensor, Tensor | None]:
        """``anchors`` and ``strides`` of ``decode_topk`` for images of a size."""
        grid = self.anchors.grid(image_size)
        return (swap_xy(self.anchors.boxes_for(image_size)), None) if grid is None else grid

    def _detect(
        self,
        cls_outputs: Sequence[Tensor],
        box_outputs: Sequence[Tensor],
        anchors: Tensor,
        strides: Tensor | None,
        img_scale: Tensor | None,
        img_size: Tensor | None,
        suppression: Suppression,
    ) -> Tensor:
        boxes, logits, _, classes = decode_topk(
            cls_outputs,
            box_outputs,
            anchors,
            num_classes=self.num_classes,
            k=self.max_detection_points,
            limits=clip_limits(img_size, img_scale, cls_outputs[0].shape[0]),
            strides=strides,
        )
        return detection_rows(boxes.float(), logits, classes, img_scale, suppression)


class DetBenchPredict(_DetBench):
    """A model that returns detections.

    On a GPU the whole of it, around an ``EfficientDet``, runs as a CUDA graph in eval mode without
    gradients, if no op waits for the device (the log of ``effdet.plan`` says so at level INFO).

    Args:
        model: returns (class maps, box maps), one each per level, and has a ``config``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._plans = Plans(graphs_only=True)

    def forward(
        self,
        x: Tensor,
        img_info: Mapping[str, Tensor | None] | None = None,
        *,
        max_det: int | None = None,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
        sigma: float | None = None,
        soft_nms: bool | None = None,
        class_agnostic: bool | None = None,
        max_per_class: int | None = None,
    ) -> Tensor:
        """Detect objects in a batch of images of any size.

        Args:
            x: ``[B, 3, H, W]``, normalised.
            img_info: ``img_scale`` ``[B]``, original size / model-input size, and ``img_size``
                ``[B, 2]``, the original (W, H); either may be ``None``, other keys are ignored.
                With both, boxes are clipped to the image before NMS; with ``img_scale`` they are
                returned in pixels of the original. Without, in pixels of the model input.
            max_det: rows per image. This and what follows is as in
                ``effdet.postprocess.Suppression``, for this call; ``None``: the bench's own, which
                is ``max_det_per_image`` for this one.
            score_threshold: scores are above it.
            iou_threshold: NMS removes what overlaps by more.
            sigma: width of soft-NMS.
            soft_nms: soft-NMS instead of NMS.
            class_agnostic: boxes suppress those of other classes too.
            max_per_class: rows per image and class at most.

        Returns:
            ``[B, max_det, 6]`` float32 rows (x_min, y_min, x_max, y_max, score, class
            from 1) in descending order of score, then rows of zeros. A candidate whose box is
            not finite is left out and suppresses nothing.

        Raises:
            KeyError: ``img_info`` lacks one of the two keys.
            TypeError, ValueError: an option of the wrong type or out of its range.
        """
        suppression = self.suppression(
            max_det=max_det,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            sigma=sigma,
            soft_nms=soft_nms,
            class_agnostic=class_agnostic,
            max_per_class=max_per_class,
        )
        self._follow_head()
        img_scale = img_size = None
        if img_info is not None:
            if not isinstance(img_info, Mapping):
                raise TypeError(
                    "img_info must be a dictionary of img_scale [B] and img_size [B, 2], got "
                    f"{type(img_info).__name__}"
                )
            img_scale = _float(_require(img_info, "img_info", "img_scale"))
            img_size = _float(_require(img_info, "img_info", "img_size"))
        inputs = x, *self.anchors_for(spatial_size(x)), img_scale, img_size
        predict = functools.partial(self._predict, suppression)
        rows = None
        if type(self.model) is EfficientDet:  # anything else may do more than compute
            settings = self.max_detection_points, suppression
            rows = self._plans.run(self, predict, *inputs, settings=settings)
        return predict(*inputs) if rows is None else rows

    def _predict(
        self,
        suppression: Suppression,
        x: Tensor,
        anchors: Tensor,
        strides: Tensor | None,
        img_scale: Tensor | None,
        img_size: Tensor | None,
    ) -> Tensor:
        cls_outputs, box_outputs = self.model(x)
        return self._detect(
            cls_outputs, box_outputs, anchors, strides, img_scale, img_size, suppression
        )

    def warmup(
        self,
        *sizes: int | Size,
        batch: int = 1,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        img_info: bool = True,
    ) -> None:
        """``EfficientDet.warmup`` of detection: for calls with ``img_info``, or without.

        Raises:
            ValueError: the bench is in training mode.
        """
        with torch.no_grad():
            for x in images_of(self, sizes, batch, dtype, memory_format):
                scale, size = x.new_ones(batch), x.new_ones(batch, 2)
                self(x, {"img_scale": scale, "img_size": size} if img_info else None)

    def train(self, mode: bool = True) -> DetBenchPredict:
        """``nn.Module.train``; training mode drops the plans, whose memory it needs."""
        if mode:
            self._plans.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DetBenchPredict:
        super()._apply(fn, recurse)
        self._plans.clear_if_changed()
        return self


class DetBenchTrain(_DetBench):
    """A model that returns its training loss, and in eval mode its detections besides.

    Args:
        model: as for ``DetBenchPredict``.
        create_labeler: label ground truth boxes here. Otherwise the targets come labelled.
        global_loss: divide the losses by the positive anchors of all processes instead of this one's,
            times their number: the mean over processes is then the loss of all their images together.
    """

    def __init__(
        self, model: nn.Module, create_labeler: bool = True, *, global_loss: bool = False
    ) -> None:
        super().__init__(model)
        self.global_loss = global_loss
        self.anchor_labeler = (
            AnchorLabeler(self.anchors, self.num_classes) if create_labeler else None
        )
        self.loss_fn = DetectionLoss(self.config)

    def forward(self, x: Tensor, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch of images of any size.

        Args:
            x: ``[B, 3, H, W]``, normalised.
            target: with a labeler ``bbox`` ``[B, M, 4]`` (y_min, x_min, y_max, x_max) in
                model-input pixels and ``cls`` ``[B, M]`` from 1, rows of class -1 being padding,
                or a list with one tensor per image for each; without a labeler
                ``label_num_positives`` ``[B]`` and, per level i, ``label_cls_<i>`` and
                ``label_bbox_<i>`` as ``AnchorLabeler`` makes them. In eval mode also
                ``img_scale`` and ``img_size`` as for ``DetBenchPredict``.

        Returns:
            ``loss``, ``class_loss`` and ``box_loss``, 0-d; in eval mode also ``detections``
            ``[B, max_det_per_image, 6]``.

        Raises:
            TypeError: ``target`` is not a dictionary of batched values.
            KeyError: ``target`` lacks a key.
        """
        if not isinstance(target, Mapping):
            raise TypeError(
                "target must be one dictionary for the batch (bbox [B, M, 4], cls [B, M], ...), "
                f"got {type(target).__name__}"
            )
        self._follow_head()
        cls_outputs, box_outputs = self.model(x)
        input_size = spatial_size(x)
        if self.anchor_labeler is None:
            levels = range(self.num_levels)
            cls_targets = [_require(target, "target", f"label_cls_{i}") for i in levels]
            box_targets = [_require(target, "target", f"label_bbox_{i}") for i in levels]
            num_positives = _require(target, "target", "label_num_positives")
        else:
            cls_targets, box_targets, num_positives = self.anchor_labeler.batch_label_anchors(
                _require(target, "target", "bbox"),
                _require(target, "target", "cls"),
                image_size=input_size,
            )
        loss, class_loss, box_loss = self.loss_fn(
            cls_outputs, box_outputs, cls_targets, box_targets, num_positives
        )
        output = {"loss": loss, "class_loss": class_loss, "box_loss": box_loss}
        if self.global_loss:
            factor = _global_factor(num_positives)
            output = {name: value * factor.to(value.dtype) for name, value in output.items()}
        if not self.training:
            output["detections"] = self._detect(
                cls_outputs,
                box_outputs,
                *self.anchors_for(input_size),
                _require(target, "target", "img_scale"),
                _require(target, "target", "img_size"),
                self.suppression(),
            )
        return output

    def _follow_head(self) -> bool:
        changed = super()._follow_head()
        if changed:
            if self.anchor_labeler is not None:
                self.anchor_labeler.anchors = self.anchors
                self.anchor_labeler.num_classes = self.num_classes
            self.loss_fn.num_classes = self.num_classes
        return changed


def _global_factor(num_positives: Tensor) -> Tensor:
    """From losses divided by this process's positive anchors + 1 to those of all + 1, times the processes."""
    own = num_positives.sum().to(torch.float64)
    return (own + 1) * get_world_size() / (all_reduce_sum(own) + 1)


def _head_key(config) -> tuple:
    """What of a config decides the shape of anchors, targets and outputs."""
    aspects = tuple(tuple(a) if isinstance(a, Sequence) else a for a in config.aspect_ratios)
    scale = config.anchor_scale
    scales = tuple(scale) if isinstance(scale, Sequence) else scale
    return config.num_classes, config.num_scales, aspects, scales


def _float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float()


def _require(mapping: Mapping, name: str, key: str):
    if key not in mapping:
        raise KeyError(f"{name} has no {key!r}; it has {sorted(mapping)}")
    return mapping[key]
