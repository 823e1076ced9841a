"""Precision, recall and what is computed from them."""

from __future__ import annotations

import numpy as np


def compute_precision_recall(scores, labels, num_gt):
    """Precision and recall at each detection, from the highest score down.

    Args:
        scores: [n].
        labels: [n] bool, or float: how much of a hit each detection is; 0 is a false positive.
        num_gt: number of objects (or their total weight) that could be found.

    Returns:
        (precision [n], recall [n]), both float64; (None, None) if there is nothing to find.

    Raises:
        ValueError: shapes or types do not fit, or there are more hits than objects.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if labels.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores, labels: got shapes {scores.shape} and {labels.shape}; take equal ones [n]"
        )
    if labels.dtype != bool and labels.dtype.kind != "f":
        raise ValueError(f"labels: got {labels.dtype}; takes bool or float")
    if num_gt < labels.sum():
        raise ValueError(f"num_gt: got {num_gt}, less than the {labels.sum()} hits in labels")
    if num_gt == 0:
        return None, None
    labels = labels[np.argsort(-scores, kind="stable")].astype(np.float64)
    hits = np.cumsum(labels)
    return hits / (hits + np.cumsum(labels <= 0)), hits / num_gt


def compute_average_precision(precision, recall):
    """Area under the curve of the best precision at each recall or a higher one.

    That is PASCAL VOC's metric since 2010. `precision`, `recall`: [n] as of
    `compute_precision_recall`; both None give NaN.

    Raises:
        ValueError: different sizes, values outside [0, 1], or recalls that decrease.
    """
    if precision is None and recall is None:
        return np.nan
    if precision is None or recall is None:
        raise ValueError("precision, recall: one is None; take two arrays, or None for both")
    precision, recall = (np.asarray(values, dtype=np.float64) for values in (precision, recall))
    if precision.shape != recall.shape or recall.ndim != 1:
        raise ValueError(
            f"precision, recall: got shapes {precision.shape} and {recall.shape}; take equal ones [n]"
        )
    for name, values in (("precision", precision), ("recall", recall)):
        if ((values < 0) | (values > 1)).any():
            raise ValueError(f"{name}: got {values.min()} to {values.max()}; takes [0, 1]")
    steps = np.diff(recall, prepend=0.0)
    if (steps < 0).any():
        raise ValueError("recall: decreases; takes the recalls from the highest score down")
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return np.float64(steps @ best)


def compute_cor_loc(num_gt_imgs_per_class, num_images_correctly_detected_per_class):
    """Share of a class's images in which it was located, [classes]; NaN without images."""
    images = np.asarray(num_gt_imgs_per_class, dtype=np.float64)
    return np.divide(
        num_images_correctly_detected_per_class,
        images,
        out=np.full(images.shape, np.nan),
        where=images > 0,
    )


def compute_median_rank_at_k(tp_fp_list, k):
    """Median of the ranks (from 0) of the hits among the first `k` detections of each image.

    `tp_fp_list`: for each image the hits [n] from the highest score down. NaN without a hit.
    """
    ranks = np.concatenate([np.flatnonzero(labels[:k]) for labels in tp_fp_list])
    return np.median(ranks) if len(ranks) else np.float64(np.nan)


def compute_recall_at_k(tp_fp_list, num_gt, k):
    """Share of `num_gt` objects among the first `k` detections of each image."""
    return np.float64(sum(labels[:k].sum() for labels in tp_fp_list)) / num_gt
