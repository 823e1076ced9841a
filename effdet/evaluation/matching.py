"""Which detections of a class hit an object of it: PASCAL VOC's rule, with OpenImages' groups."""

from __future__ import annotations

import numpy as np


def match_detections(
    scores: np.ndarray,
    iou: np.ndarray,
    is_difficult: np.ndarray,
    ioa_of_groups: np.ndarray,
    threshold: float,
    group_of_weight: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Judge the detections of one class in one image.

    A detection belongs to the object that it overlaps most, if by the threshold or more. The first
    to belong to an object is a hit, further ones are false positives, as are those that belong to
    none; those of a difficult object do not count. One that is no hit and lies in a group by the
    threshold or more does not count either; all of a group together are one hit of the given weight.

    Args:
        scores: [n], falling.
        iou: [n, objects] with single objects.
        is_difficult: bool [objects].
        ioa_of_groups: [n, groups], the shares of each detection that lie in groups.
        threshold: the overlap that makes a match.
        group_of_weight: what finding a group is worth; 0: nothing.

    Returns:
        scores [k] of the detections that count, and how much of a hit each is, float64 [k].
    """
    owner, owned = _best(iou, threshold)
    ignored = owned & is_difficult[owner] if is_difficult.size else owned
    rivals = np.flatnonzero(owned & ~ignored)
    hit = np.zeros(len(scores), dtype=bool)
    hit[rivals[_first_of_each(owner[rivals])]] = True

    group, in_group = _best(ioa_of_groups, threshold)
    in_group &= ~hit & ~ignored
    counts = ~ignored & ~in_group
    labels = hit[counts].astype(np.float64)
    if not group_of_weight:
        return scores[counts], labels
    members = np.flatnonzero(in_group)
    best = members[_first_of_each(group[members])]
    return (
        np.concatenate([scores[counts], scores[best]]),
        np.concatenate([labels, np.full(len(best), float(group_of_weight))]),
    )


def _best(overlap: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Column of the largest value of each row, and whether that reaches the threshold."""
    if not overlap.shape[1]:
        return np.zeros(len(overlap), dtype=np.int64), np.zeros(len(overlap), dtype=bool)
    return overlap.argmax(axis=1), overlap.max(axis=1) >= threshold


def _first_of_each(values: np.ndarray) -> np.ndarray:
    """Where each distinct value comes first."""
    return np.unique(values, return_index=True)[1]
