"""Lists of boxes with named fields, and what is done with them. Boxes are (y1, x1, y2, x2)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .fields import BoxListFields


class BoxList:
    """Boxes [n, 4] of floats, and fields with a value for each.

    Raises:
        ValueError: no such array, or a side is negative.
    """

    def __init__(self, data):
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 4:
            raise ValueError(f"data: got {_described(data)}; takes a numpy array [n, 4]")
        if data.dtype.kind != "f":
            raise ValueError(f"data: got {data.dtype}; takes floats")
        if not self._is_valid_boxes(data):
            raise ValueError("data: a box has a negative side; takes (y1, x1, y2, x2)")
        self.data = {BoxListFields.boxes: data}

    def num_boxes(self):
        """How many there are."""
        return len(self.get())

    def get_extra_fields(self):
        """Names of the fields other than the boxes."""
        return [name for name in self.data if name != BoxListFields.boxes]

    def has_field(self, field):
        """Whether there is a field of this name."""
        return field in self.data

    def add_field(self, field, field_data):
        """Add an array whose first dimension is the boxes.

        Raises:
            ValueError: the field exists, or has another length.
        """
        if self.has_field(field):
            raise ValueError(f"field: {field!r} exists already")
        if field_data.ndim < 1 or len(field_data) != self.num_boxes():
            raise ValueError(
                f"field_data: got {_described(field_data)}; takes [{self.num_boxes()}, ...]"
            )
        self.data[field] = field_data

    def get(self):
        """The boxes [n, 4]."""
        return self.data[BoxListFields.boxes]

    def get_field(self, field):
        """A field by name.

        Raises:
            ValueError: there is none.
        """
        if not self.has_field(field):
            raise ValueError(f"field: there is no {field!r}; takes one of {', '.join(self.data)}")
        return self.data[field]

    def get_coordinates(self):
        """[y1, x1, y2, x2], each [n]."""
        return list(self.get().T)

    def _is_valid_boxes(self, data):
        return not (data[:, :2] > data[:, 2:]).any()


class SortOrder:
    """Orders that `sort_by_field_boxlist` takes."""

    ASCEND = 1
    DESCEND = 2


def area(boxes):
    """Areas [n] of boxes [n, 4]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def intersection(boxes1, boxes2):
    """Areas [n, m] that boxes [n, 4] and [m, 4] have in common."""
    low = np.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    high = np.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    return np.prod(np.clip(high - low, 0, None), axis=2)


def iou(boxes1, boxes2):
    """Intersection over union [n, m]."""
    common = intersection(boxes1, boxes2)
    return common / (area(boxes1)[:, None] + area(boxes2)[None, :] - common)


def ioa(boxes1, boxes2):
    """Intersection over the area of the box of `boxes2`, [n, m]."""
    return intersection(boxes1, boxes2) / area(boxes2)[None, :]


def area_boxlist(boxlist):
    """`area` of a `BoxList`."""
    return area(boxlist.get())


def intersection_boxlist(boxlist1, boxlist2):
    """`intersection` of two `BoxList`s."""
    return intersection(boxlist1.get(), boxlist2.get())


def iou_boxlist(boxlist1, boxlist2):
    """`iou` of two `BoxList`s."""
    return iou(boxlist1.get(), boxlist2.get())


def ioa_boxlist(boxlist1, boxlist2):
    """`ioa` of two `BoxList`s."""
    return ioa(boxlist1.get(), boxlist2.get())


def gather_boxlist(boxlist, indices, fields=None):
    """The boxes at `indices` (numbers, or a bool each), with all fields or those named.

    Raises:
        ValueError: an index is out of range, or there is no such field.
    """
    indices = np.asarray(indices)
    count = boxlist.num_boxes()
    if indices.dtype != bool and indices.size and not 0 <= indices.min() <= indices.max() < count:
        raise ValueError(f"indices: got {indices.min()} to {indices.max()}; takes 0..{count - 1}")
    return _with_fields(
        boxlist.get()[indices],
        {name: boxlist.get_field(name)[indices] for name in _extra(boxlist, fields)},
    )


def sort_by_field_boxlist(boxlist, field, order=SortOrder.DESCEND):
    """The boxes in the order of a field [n]; equal values keep their order.

    Raises:
        ValueError: there is no such field [n], or no such order.
    """
    values = boxlist.get_field(field)
    if values.ndim != 1:
        raise ValueError(f"field: {field!r} is {_described(values)}; takes one [n]")
    if order not in (SortOrder.ASCEND, SortOrder.DESCEND):
        raise ValueError(f"order: got {order!r}; takes SortOrder.ASCEND or SortOrder.DESCEND")
    key = values if order == SortOrder.ASCEND else -values
    return gather_boxlist(boxlist, np.argsort(key, kind="stable"))


def non_max_suppression(boxlist, max_output_size=10000, iou_threshold=1.0, score_threshold=-10.0):
    """The boxes scored above the threshold, from the best down, without those that overlap a better one.

    Args:
        boxlist: has "scores" [n].
        max_output_size: at most so many.
        iou_threshold: in [0, 1]; IoU above it is overlap.
        score_threshold: boxes scored above it are looked at.

    Raises:
        ValueError: an argument is out of range, or there are no scores.
    """
    return suppressed(boxlist, iou_boxlist, max_output_size, iou_threshold, score_threshold)


def suppressed(
    boxlist: BoxList,
    overlap: Callable[[BoxList, BoxList], np.ndarray],
    max_output_size: int,
    threshold: float,
    score_threshold: float,
) -> BoxList:
    """`non_max_suppression` by any measure of overlap."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"iou_threshold: got {threshold}; takes [0, 1]")
    if max_output_size < 0:
        raise ValueError(f"max_output_size: got {max_output_size}; takes 0 or more")
    boxlist = filter_scores_greater_than(boxlist, score_threshold)
    boxlist = sort_by_field_boxlist(boxlist, BoxListFields.scores)
    if threshold == 1.0:  # nothing overlaps by more
        return gather_boxlist(boxlist, np.arange(min(max_output_size, boxlist.num_boxes())))
    kept: list[int] = []
    left = np.arange(boxlist.num_boxes())
    while left.size and len(kept) < max_output_size:
        best, left = left[:1], left[1:]
        kept.extend(best)
        common = overlap(gather_boxlist(boxlist, best), gather_boxlist(boxlist, left))
        left = left[~(common[0] > threshold)]
    return gather_boxlist(boxlist, np.array(kept, dtype=np.int64))


def multi_class_non_max_suppression(boxlist, score_thresh, iou_thresh, max_output_size):
    """`non_max_suppression` of each class for itself.

    Args:
        boxlist: has "scores" [n, classes] (or [n], for one class).
        score_thresh: boxes scored above it are looked at.
        iou_thresh: in [0, 1]; IoU above it is overlap.
        max_output_size: at most so many of a class.

    Returns:
        The boxes from the best down, with "scores" [k] and "classes" [k] from 0.

    Raises:
        ValueError: see `non_max_suppression`.
    """
    return suppressed_by_class(boxlist, iou_boxlist, score_thresh, iou_thresh, max_output_size)


def suppressed_by_class(
    boxlist: BoxList,
    overlap: Callable[[BoxList, BoxList], np.ndarray],
    score_thresh: float,
    iou_thresh: float,
    max_output_size: int,
) -> BoxList:
    """`multi_class_non_max_suppression` by any measure of overlap; masks are kept."""
    scores = boxlist.get_field(BoxListFields.scores).reshape(boxlist.num_boxes(), -1)
    everything = np.arange(boxlist.num_boxes())
    kept_fields = [BoxListFields.masks] if boxlist.has_field(BoxListFields.masks) else []
    of_classes = []
    for number, column in enumerate(scores.T):
        of_class = gather_boxlist(boxlist, everything, kept_fields)
        of_class.add_field(BoxListFields.scores, column)
        of_class = suppressed(of_class, overlap, max_output_size, iou_thresh, score_thresh)
        classes = np.full(of_class.num_boxes(), float(number))
        of_class.add_field(BoxListFields.classes, classes)
        of_classes.append(of_class)
    return sort_by_field_boxlist(concatenate_boxlist(of_classes), BoxListFields.scores)


def scale(boxlist, y_scale, x_scale):
    """Coordinates times these factors."""
    return _moved(boxlist, boxlist.get() * np.array([y_scale, x_scale, y_scale, x_scale]))


def clip_to_window(boxlist, window, filter_nonoverlapping=True):
    """Boxes clipped to a window (y1, x1, y2, x2); those without area there are left out if asked."""
    window = np.asarray(window)
    clipped = _moved(
        boxlist, np.clip(boxlist.get(), np.tile(window[:2], 2), np.tile(window[2:], 2))
    )
    return gather_boxlist(clipped, area_boxlist(clipped) > 0) if filter_nonoverlapping else clipped


def prune_non_overlapping_boxes(boxlist1, boxlist2, minoverlap=0.0):
    """The boxes of `boxlist1` of which a box of `boxlist2` covers at least this share."""
    covered = ioa_boxlist(boxlist2, boxlist1) >= minoverlap
    return gather_boxlist(boxlist1, covered.any(axis=0))


def prune_outside_window(boxlist, window):
    """The boxes that lie wholly inside a window (y1, x1, y2, x2), and their numbers [k]."""
    boxes, window = boxlist.get(), np.asarray(window)
    inside = (boxes[:, :2] >= window[:2]).all(axis=1) & (boxes[:, 2:] <= window[2:]).all(axis=1)
    kept = np.flatnonzero(inside)
    return gather_boxlist(boxlist, kept), kept


def concatenate_boxlist(boxlists, fields=None):
    """All boxes, with the fields of the first list or those named.

    Raises:
        ValueError: not a list of `BoxList`s, or one lacks a field.
    """
    if not isinstance(boxlists, list) or not boxlists:
        raise ValueError(f"boxlists: got {_described(boxlists)}; takes a list with at least one")
    if not all(isinstance(boxlist, BoxList) for boxlist in boxlists):
        raise ValueError("boxlists: takes BoxLists only")
    names = _extra(boxlists[0], fields)
    return _with_fields(
        np.concatenate([boxlist.get() for boxlist in boxlists]),
        {name: np.concatenate([b.get_field(name) for b in boxlists]) for name in names},
    )


def filter_scores_greater_than(boxlist, thresh):
    """The boxes with a score above `thresh`.

    Raises:
        ValueError: not a `BoxList` with "scores" [n].
    """
    if not isinstance(boxlist, BoxList):
        raise ValueError(f"boxlist: got {_described(boxlist)}; takes a BoxList")
    scores = boxlist.get_field(BoxListFields.scores)
    if scores.ndim != 1:
        raise ValueError(f"boxlist: its scores are {_described(scores)}; takes [n]")
    return gather_boxlist(boxlist, scores > thresh)


def change_coordinate_frame(boxlist, window):
    """Coordinates relative to a window (y1, x1, y2, x2): its corners become (0, 0) and (1, 1)."""
    window = np.asarray(window)
    corner, size = np.tile(window[:2], 2), np.tile(window[2:] - window[:2], 2)
    return _moved(boxlist, (boxlist.get() - corner) / size)


def _extra(boxlist: BoxList, fields: list[str] | None) -> list[str]:
    """The fields to keep beside the boxes."""
    names = boxlist.get_extra_fields() if fields is None else fields
    return [name for name in names if name != BoxListFields.boxes]


def _moved(boxlist: BoxList, boxes: np.ndarray) -> BoxList:
    return _with_fields(boxes, {name: boxlist.get_field(name) for name in _extra(boxlist, None)})


def _with_fields(boxes: np.ndarray, fields: dict[str, np.ndarray]) -> BoxList:
    boxlist = BoxList(boxes)
    for name, values in fields.items():
        boxlist.add_field(name, values)
    return boxlist


def _described(value: object) -> str:
    shape = f" of shape {value.shape}" if isinstance(value, np.ndarray) else ""
    return type(value).__name__ + shape
