"""Anchor boxes of an image size, and the training targets relative to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from effdet_kernels import label_anchors as _label_anchors_op

from .object_detection import (
    ArgMaxMatcher,
    BoxList,
    FasterRcnnBoxCoder,
    IouSimilarity,
    TargetAssigner,
)
from .padding import halved
from .postprocess import clip_boxes_xyxy, decode_box_outputs, generate_detections, swap_xy
from .soft_nms import batched_nms, batched_soft_nms, remove_small_boxes

__all__ = [
    "MIN_CLASS_SCORE",
    "AnchorLabeler",
    "Anchors",
    "ArgMaxMatcher",
    "BoxList",
    "FasterRcnnBoxCoder",
    "IouSimilarity",
    "TargetAssigner",
    "batched_nms",
    "batched_soft_nms",
    "clip_boxes_xyxy",
    "decode_box_outputs",
    "generate_detections",
    "get_feat_sizes",
    "remove_small_boxes",
]

# Public constants that programs import; nothing here needs them.
MIN_CLASS_SCORE = -5.0
_DUMMY_DETECTION_SCORE = -1e5

_SIZES_KEPT = 8


def get_feat_sizes(image_size: tuple[int, int], max_level: int) -> list[tuple[int, int]]:
    """Feature map (H, W) at levels 0 to ``max_level``; each halves the one before, rounding up."""
    sizes = [(int(image_size[0]), int(image_size[1]))]
    for _ in range(max_level):
        height, width = sizes[-1]
        sizes.append((halved(height), halved(width)))
    return sizes


class Anchors(nn.Module):
    """The anchor boxes of every level, row and column of an image (arXiv:1911.09070, section 3).

    The buffer ``boxes`` is ``[N, 4]`` float32 (y_min, x_min, y_max, x_max) in pixels of an image of
    ``image_size``, not clipped. Its order: level, row, column, scale octave, aspect ratio. It
    stays float32 when the module is cast, since half precision would move boxes by up to half a
    pixel. A program may replace it, or write to it, but not through ``.data`` or numpy, which leaves
    no trace: then ``grid`` does not see it.

    Args:
        min_level: first pyramid level; level l has stride 2 ** l.
        max_level: last pyramid level.
        num_scales: octave scales per aspect ratio.
        aspect_ratios: (x, y) factor pairs, or numbers r meaning (sqrt(r), 1 / sqrt(r)).
        anchor_scale: anchor size in strides, one number or one per level.
        image_size: (H, W).

    Raises:
        ValueError: an argument is out of range.
    """

    boxes: Tensor

    def __init__(
        self,
        min_level: int,
        max_level: int,
        num_scales: int,
        aspect_ratios: Sequence[float | tuple[float, float]],
        anchor_scale: float | Sequence[float],
        image_size: tuple[int, int],
    ) -> None:
        super().__init__()
        if not 0 <= min_level <= max_level:
            raise ValueError(
                f"min_level and max_level must be 0 <= min <= max, got {min_level} and {max_level}"
            )
        if num_scales < 1 or len(aspect_ratios) < 1:
            raise ValueError(
                "num_scales and aspect_ratios must give at least one anchor per location, got "
                f"{num_scales} and {list(aspect_ratios)}"
            )
        levels = max_level - min_level + 1
        if isinstance(anchor_scale, Sequence):
            if len(anchor_scale) != levels:
                raise ValueError(
                    f"anchor_scale must be one number or {levels}, one per level, "
                    f"got {list(anchor_scale)}"
                )
            self.anchor_scales = list(anchor_scale)
        else:
            self.anchor_scales = [anchor_scale] * levels
        self.min_level = min_level
        self.max_level = max_level
        self.num_scales = num_scales
        self.aspect_ratios = aspect_ratios
        self.image_size = _checked_size(image_size)
        self.feat_sizes = get_feat_sizes(self.image_size, max_level)
        self.config = self._generate_configs()
        self.register_buffer("boxes", self._generate_boxes())
        self._other_sizes: dict[tuple[int, int, torch.device], Tensor] = {}
        self._grids: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self._seen: tuple[Tensor, int, int, bool] | None = None

    @classmethod
    def from_config(cls, config) -> Anchors:
        """Anchors of a model config."""
        return cls(
            config.min_level,
            config.max_level,
            config.num_scales,
            config.aspect_ratios,
            config.anchor_scale,
            config.image_size,
        )

    def get_anchors_per_location(self) -> int:
        """Anchors at each position of a map: scales times aspect ratios."""
        return self.num_scales * len(self.aspect_ratios)

    def boxes_for(self, image_size: tuple[int, int]) -> Tensor:
        """Anchors of images of another size (H, W), on the device of ``boxes``; some are kept."""
        size = _checked_size(image_size)
        if size == self.image_size:
            return self.boxes
        key = (*size, self.boxes.device)
        boxes = self._other_sizes.get(key)
        if boxes is None:
            boxes = self._generate_boxes(size).to(self.boxes.device)
            if torch.compiler.is_compiling():
                return boxes  # a tensor of the tracer
            if len(self._other_sizes) >= _SIZES_KEPT:
                self._other_sizes.clear()
            self._other_sizes[key] = boxes
        return boxes

    def grid(self, image_size: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """What ``boxes_for`` gives, in a few numbers: ``anchors`` and ``strides`` of ``decode_topk``.

        Returns:
            Per level the anchors of its first location ``[L, A, 4]``, here (x_min, y_min, x_max,
            y_max), and its stride ``[L, 2]``, (x, y), in pixels; float64 on a CPU, else float32;
            some are kept. None where ``boxes`` may have other values: they were replaced, and of
            replicas, of tensors without values or versions, and in code that is compiled or traced.
        """
        if any(isinstance(side, torch.SymInt) for side in image_size):
            return self._grid_of_any_size(image_size)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or "_is_replica" in vars(self):
            return None
        size = _checked_size(image_size)
        if type(self.boxes) is not Tensor or self.boxes.is_meta:
            return None
        if size == self.image_size and not self._boxes_are_generated():
            return None
        device = self.boxes.device
        key = (*size, device)
        grid = self._grids.get(key)
        if grid is None:
            dtype = torch.float64 if device.type == "cpu" else torch.float32
            other = None if size == self.image_size else size
            with torch.inference_mode(False):  # for calls with gradients as well
                first, stride = (t.to(device, dtype) for t in self._generate_grid(other))
            grid = first, stride
            if len(self._grids) >= _SIZES_KEPT:
                self._grids.clear()
            self._grids[key] = grid
        return grid

    def _grid_of_any_size(self, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """``grid``, float32, in an export of any size: that of all multiples of the last level's stride."""
        unit = 2**self.max_level
        if any(side % unit for side in image_size):
            raise ValueError(
                f"image_size: got {tuple(image_size)}, takes multiples of {unit} where it is dynamic"
            )
        first, stride = self._generate_grid((unit, unit))
        return first.to(self.boxes), stride.to(self.boxes)

    def level_sizes(self, image_size: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """Feature map (H, W) per pyramid level, of ``self.image_size`` by default."""
        sizes = self.feat_sizes
        if image_size is not None:
            sizes = get_feat_sizes(_checked_size(image_size), self.max_level)
        return sizes[self.min_level :]

    def _generate_configs(
        self, image_size: tuple[int, int] | None = None
    ) -> dict[int, list[tuple[tuple[float, float], float, float | tuple[float, float], float]]]:
        """Per level one (stride, octave, aspect, scale) per anchor of a location."""
        height, width = image_size or self.image_size
        configs = {}
        for level, (rows, columns), scale in zip(
            range(self.min_level, self.max_level + 1),
            self.level_sizes(image_size),
            self.anchor_scales,
            strict=True,
        ):
            stride = (height / rows, width / columns)
            configs[level] = [
                (stride, octave / self.num_scales, aspect, scale)
                for octave in range(self.num_scales)
                for aspect in self.aspect_ratios
            ]
        return configs

    def _generate_boxes(self, image_size: tuple[int, int] | None = None) -> Tensor:
        """All boxes ``[N, 4]`` float32, computed in float64."""
        configs = self.config if image_size is None else self._generate_configs(image_size)
        levels = []
        for (rows, columns), config in zip(
            self.level_sizes(image_size), configs.values(), strict=True
        ):
            (stride_y, stride_x), *_ = config[0]
            y = stride_y / 2 + np.arange(rows) * stride_y
            x = stride_x / 2 + np.arange(columns) * stride_x
            center = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)[:, :, None]
            half = np.array([_half_size(*entry) for entry in config])  # [A, 2]
            boxes = np.concatenate([center - half, center + half], axis=-1)  # [rows, columns, A, 4]
            levels.append(boxes.reshape(-1, 4))
        return torch.from_numpy(np.concatenate(levels).astype(np.float32))

    def _generate_grid(self, image_size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """``[L, A, 4]`` (x, y, x, y) of row 0 and column 0, and strides ``[L, 2]`` (x, y), float64."""
        configs = self.config if image_size is None else self._generate_configs(image_size)
        first, strides = [], []
        for config in configs.values():
            stride = np.array(config[0][0])
            half = np.array([_half_size(*entry) for entry in config])  # [A, 2], (y, x)
            corners = [(stride / 2 - half)[:, ::-1], (stride / 2 + half)[:, ::-1]]
            first.append(np.concatenate(corners, axis=-1))
            strides.append(stride[::-1])
        return torch.from_numpy(np.stack(first)), torch.from_numpy(np.stack(strides))

    def _boxes_are_generated(self) -> bool:
        """Whether ``boxes`` has the values that the arguments give; compared when it has changed."""
        boxes = self.boxes
        if boxes.is_inference():  # has no version
            return False
        address, version = boxes.data_ptr(), boxes._version
        seen = self._seen
        if seen is None or seen[0] is not boxes or seen[1:3] != (address, version):
            same = torch.equal(boxes.cpu(), self._generate_boxes())
            self._seen = seen = boxes, address, version, same
        return seen[3]

    def _apply(self, fn, recurse: bool = True) -> Anchors:
        boxes = self.boxes
        super()._apply(fn, recurse)
        if self.boxes.dtype != torch.float32:
            self.boxes = boxes.to(self.boxes.device)
        self._other_sizes.clear()
        self._grids.clear()
        self._seen = None
        return self


class AnchorLabeler:
    """Training targets: which class and box each anchor is to predict.

    An anchor is positive for the ground truth box that it overlaps most if their IoU is at least
    ``match_threshold``; besides, every ground truth box claims its best anchor, the first box
    where several claim one.

    Args:
        anchors: the ``Anchors`` to label.
        num_classes: classes of the model.
        match_threshold: least IoU of a positive.
    """

    def __init__(self, anchors: Anchors, num_classes: int, match_threshold: float = 0.5) -> None:
        self.anchors = anchors
        self.num_classes = num_classes
        self.match_threshold = match_threshold
        self.indices_cache: dict = {}  # public name; level slices need no cache

    def label_anchors(
        self,
        gt_boxes: Tensor,
        gt_classes: Tensor,
        filter_valid: bool = True,
        image_size: tuple[int, int] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """``batch_label_anchors`` of one image: no batch dimension in arguments and results."""
        classes, boxes, positives = self.batch_label_anchors(
            [gt_boxes], [gt_classes], filter_valid, image_size
        )
        return [level[0] for level in classes], [level[0] for level in boxes], positives[0]

    def batch_label_anchors(
        self,
        gt_boxes: Tensor | Sequence[Tensor],
        gt_classes: Tensor | Sequence[Tensor],
        filter_valid: bool = True,
        image_size: tuple[int, int] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Targets of a batch.

        Args:
            gt_boxes: ``[B, M, 4]`` (y_min, x_min, y_max, x_max) in model-input pixels, any float
                dtype, or one ``[M_b, 4]`` tensor per image.
            gt_classes: ``[B, M]`` 1-based, any real dtype, or one ``[M_b]`` tensor per image.
            filter_valid: leave out rows whose class is -1 or below, which is how batches are
                padded; ``False`` takes every row as a box.
            image_size: (H, W) of the images where it is not that of the anchors.

        Returns:
            per level ``[B, H, W, A]`` int64 class targets, 0-based, -1 for background;
            per level ``[B, H, W, A * 4]`` float32 codes (ty, tx, th, tw), 0 for background;
            ``[B]`` float32 number of positive anchors.

        Raises:
            ValueError: shapes do not agree; or, where the ground truth lies on the CPU, a class is
                above ``num_classes`` (not seen in compiled code) or a box is not finite.
        """
        boxes, classes = _batched_ground_truth(gt_boxes, gt_classes)
        # Reading values would wait for any other device; a compiler has none to read.
        if boxes.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_classes(classes)
        # Without the filter rows are labelled by their number, so that no class means padding.
        rows = classes if filter_valid else _row_numbers(gt_classes)
        size = self.anchors.image_size if image_size is None else image_size
        cls_target, box_target, positives = _label_anchors_op(
            swap_xy(boxes),
            rows,
            swap_xy(self.anchors.boxes_for(size)),
            match_threshold=self.match_threshold,
        )
        if not filter_valid and classes.shape[1]:
            row_class = classes.gather(1, cls_target.clamp(min=0)) - 1
            cls_target = torch.where(cls_target >= 0, row_class, cls_target)
        cls_levels, box_levels = self._split_levels(cls_target, box_target, size)
        return cls_levels, box_levels, positives

    def _split_levels(
        self, cls_target: Tensor, box_target: Tensor, image_size: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """``[B, N]`` and ``[B, N, 4]`` as contiguous ``[B, H, W, A]`` and ``[B, H, W, A * 4]``."""
        per_location = self.anchors.get_anchors_per_location()
        sizes = self.anchors.level_sizes(image_size)
        counts = [height * width * per_location for height, width in sizes]
        batch = cls_target.shape[0]
        cls_levels = [
            part.reshape(batch, *size, per_location)
            for part, size in zip(cls_target.split(counts, dim=1), sizes, strict=True)
        ]
        box_levels = [
            part.reshape(batch, *size, per_location * 4)
            for part, size in zip(box_target.split(counts, dim=1), sizes, strict=True)
        ]
        return cls_levels, box_levels

    def _check_classes(self, classes: Tensor) -> None:
        if classes.numel() and classes.max() > self.num_classes:
            image, row = (classes > self.num_classes).nonzero()[0].tolist()
            raise ValueError(
                f"gt_classes must be 1 to {self.num_classes} (num_classes), got "
                f"{int(classes[image, row])} in image {image}, row {row}"
            )


def _checked_size(image_size: tuple[int, int]) -> tuple[int, int]:
    size = tuple(int(side) for side in image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size must be two positive integers (H, W), got {image_size}")
    return size


def _half_size(
    stride: tuple[float, float],
    octave: float,
    aspect: float | tuple[float, float],
    scale: float,
) -> tuple[float, float]:
    """Half the (height, width) of an anchor."""
    if isinstance(aspect, Sequence):
        aspect_x, aspect_y = aspect
    else:
        aspect_x = np.sqrt(aspect)
        aspect_y = 1 / aspect_x
    base_y, base_x = (scale * side * 2**octave for side in stride)
    return base_y * aspect_y / 2.0, base_x * aspect_x / 2.0


def _row_numbers(gt_classes: Tensor | Sequence[Tensor]) -> Tensor:
    """``[B, M]`` int64, 1 to M in each image; -1 where a list is padded."""
    if isinstance(gt_classes, Tensor):
        numbers = torch.arange(1, gt_classes.shape[1] + 1, device=gt_classes.device)
        return numbers.expand_as(gt_classes)
    rows = [torch.arange(1, len(classes) + 1, device=classes.device) for classes in gt_classes]
    return pad_sequence(rows, True, -1.0)


def _batched_ground_truth(
    gt_boxes: Tensor | Sequence[Tensor], gt_classes: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``[B, M, 4]`` float32 boxes and ``[B, M]`` int64 classes; lists are padded with class -1."""
    if isinstance(gt_boxes, Tensor) and isinstance(gt_classes, Tensor):
        if gt_boxes.ndim != 3 or gt_boxes.shape != (*gt_classes.shape, 4):
            raise ValueError(
                "gt_boxes and gt_classes must be [B, M, 4] and [B, M], got "
                f"{list(gt_boxes.shape)} and {list(gt_classes.shape)}"
            )
        return gt_boxes.float(), gt_classes.long()
    if isinstance(gt_boxes, Tensor) or isinstance(gt_classes, Tensor):
        raise ValueError("gt_boxes and gt_classes must both be tensors or both be lists of tensors")
    boxes_shapes = [list(boxes.shape) for boxes in gt_boxes]
    classes_shapes = [list(classes.shape) for classes in gt_classes]
    if boxes_shapes != [[*shape, 4] for shape in classes_shapes] or any(
        len(shape) != 1 for shape in classes_shapes
    ):
        raise ValueError(
            "gt_boxes and gt_classes must hold [M, 4] and [M] tensors, one of each per image, "
            f"got {boxes_shapes} and {classes_shapes}"
        )
    return (
        pad_sequence([boxes.float() for boxes in gt_boxes], True, -1.0),
        pad_sequence([classes.long() for classes in gt_classes], True, -1.0),
    )
