"""Lists of boxes with a mask each, and what is done with them."""

from __future__ import annotations

import numpy as np

from .fields import BoxListFields
from .np_box_list import (
    BoxList,
    SortOrder,
    concatenate_boxlist,
    filter_scores_greater_than,
    gather_boxlist,
    sort_by_field_boxlist,
    suppressed,
    suppressed_by_class,
)

EPSILON = 1e-7


class MaskList(BoxList):
    """Boxes [n, 4] of floats, masks uint8 [n, height, width] of zeros and ones, and further fields.

    Raises:
        ValueError: the arrays are something else.
    """

    def __init__(self, box_data, mask_data):
        super().__init__(box_data)
        _check(mask_data, "mask_data")
        if len(mask_data) != len(box_data):
            raise ValueError(f"mask_data: got {len(mask_data)} masks for {len(box_data)} boxes")
        self.add_field(BoxListFields.masks, mask_data)

    def get_masks(self):
        """The masks [n, height, width]."""
        return self.get_field(BoxListFields.masks)


def boxlist_to_masklist(boxlist):
    """A `BoxList` with a field "masks" as a `MaskList`.

    Raises:
        ValueError: it has none.
    """
    masklist = MaskList(boxlist.get(), boxlist.get_field(BoxListFields.masks))
    for name in boxlist.get_extra_fields():
        if name != BoxListFields.masks:
            masklist.add_field(name, boxlist.get_field(name))
    return masklist


def area_mask(masks):
    """Areas float32 [n] in pixels."""
    _check(masks, "masks")
    return masks.sum(axis=(1, 2), dtype=np.float32)


def intersection_mask(masks1, masks2):
    """Pixels float32 [n, m] that masks [n, height, width] and [m, height, width] have in common.

    Raises:
        ValueError: they are no such masks, or differ in size.
    """
    _check(masks1, "masks1")
    _check(masks2, "masks2")
    if masks1.shape[1:] != masks2.shape[1:]:
        raise ValueError(
            f"masks2: of size {masks2.shape[1:]}; takes that of masks1, {masks1.shape[1:]}"
        )
    pixels = int(np.prod(masks1.shape[1:]))
    flat1, flat2 = (masks.reshape(-1, pixels).astype(np.float32) for masks in (masks1, masks2))
    return flat1 @ flat2.T


def iou_mask(masks1, masks2):
    """Intersection over union [n, m]; 0 for two empty masks."""
    common = intersection_mask(masks1, masks2)
    union = area_mask(masks1)[:, None] + area_mask(masks2)[None, :] - common
    return common / np.maximum(union, EPSILON)


def ioa_mask(masks1, masks2):
    """Intersection over the area of the mask of `masks2`, [n, m]; 0 for an empty one."""
    return intersection_mask(masks1, masks2) / np.maximum(area_mask(masks2)[None, :], EPSILON)


def area_masklist(masklist):
    """`area_mask` of a `MaskList`."""
    return area_mask(masklist.get_masks())


def intersection_masklist(masklist1, masklist2):
    """`intersection_mask` of two `MaskList`s."""
    return intersection_mask(masklist1.get_masks(), masklist2.get_masks())


def iou_masklist(masklist1, masklist2):
    """`iou_mask` of two lists with masks."""
    return iou_mask(*(boxes.get_field(BoxListFields.masks) for boxes in (masklist1, masklist2)))


def ioa_masklist(masklist1, masklist2):
    """`ioa_mask` of two `MaskList`s."""
    return ioa_mask(masklist1.get_masks(), masklist2.get_masks())


def gather_masklist(masklist, indices, fields=None):
    """As `gather_boxlist`; masks are always kept."""
    return boxlist_to_masklist(gather_boxlist(masklist, indices, _with_masks(fields)))


def sort_by_field_masklist(masklist, field, order=SortOrder.DESCEND):
    """As `sort_by_field_boxlist`."""
    return boxlist_to_masklist(sort_by_field_boxlist(masklist, field, order))


def non_max_suppression_mask(
    masklist, max_output_size=10000, iou_threshold=1.0, score_threshold=-10.0
):
    """As `non_max_suppression`, by the IoU of masks."""
    kept = suppressed(masklist, iou_masklist, max_output_size, iou_threshold, score_threshold)
    return boxlist_to_masklist(kept)


def multi_class_non_max_suppression_mask(masklist, score_thresh, iou_thresh, max_output_size):
    """As `multi_class_non_max_suppression`, by the IoU of masks."""
    kept = suppressed_by_class(masklist, iou_masklist, score_thresh, iou_thresh, max_output_size)
    return boxlist_to_masklist(kept)


def prune_non_overlapping_masklist(masklist1, masklist2, minoverlap=0.0):
    """The masks of `masklist1` of which a mask of `masklist2` covers at least this share."""
    covered = ioa_masklist(masklist2, masklist1) >= minoverlap
    return gather_masklist(masklist1, covered.any(axis=0))


def concatenate_masklist(masklists, fields=None):
    """As `concatenate_boxlist`; masks are always kept."""
    return boxlist_to_masklist(concatenate_boxlist(masklists, _with_masks(fields)))


def filter_scores_greater_than_masklist(masklist, thresh):
    """As `filter_scores_greater_than`."""
    return boxlist_to_masklist(filter_scores_greater_than(masklist, thresh))


def _with_masks(fields: list[str] | None) -> list[str] | None:
    return None if fields is None else [*(f for f in fields if f != "masks"), "masks"]


def _check(masks: np.ndarray, name: str) -> None:
    if not isinstance(masks, np.ndarray) or masks.ndim != 3 or masks.dtype != np.uint8:
        kind = f"{masks.dtype} {masks.shape}" if isinstance(masks, np.ndarray) else type(masks)
        raise ValueError(f"{name}: got {kind}; takes a uint8 array [n, height, width]")
