"""Triton kernels of ``label_anchors``: anchors take their best boxes, boxes find their best anchors, and claim them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._tl import number, reciprocal
from effdet_kernels.ops.label_anchors import reference

_EPS = tl.constexpr(reference.EPS)
_APPROXIMATE = tl.constexpr(not _triton.INTERPRET)


@triton.jit
def _quotient(a, b):
    """a / b, rounded as a division is where b is neither huge nor tiny: so equal shares are equal numbers."""
    if _APPROXIMATE and b.dtype == tl.float32:
        r = reciprocal(b)
        q = a * r
        return tl.fma(tl.fma(-b, q, a), r, q)
    return a / b


@triton.jit
def _load_box(ptr, ACC: tl.constexpr):
    """The corners x1, y1, x2, y2 of one box."""
    x1, y1 = tl.load(ptr).to(ACC), tl.load(ptr + 1).to(ACC)
    x2, y2 = tl.load(ptr + 2).to(ACC), tl.load(ptr + 3).to(ACC)
    return x1, y1, x2, y2


@triton.jit
def _load_boxes(ptr, at, total, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The same of boxes ``at`` [BLOCK] of ``total``, 0 beyond."""
    corners = at[:, None] * 4 + tl.arange(0, 4)[None, :]
    boxes = tl.load(ptr + corners, mask=(at < total)[:, None], other=0.0).to(ACC)
    x, y = tl.split(tl.reshape(boxes, (BLOCK, 2, 2)))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1, y1, x2, y2


@triton.jit
def _iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Intersection over union; 0 where the boxes do not meet. The same bits in every kernel: no fusing is left open."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    inter = width * height
    both = tl.fma(bx2 - bx1, by2 - by1, (ax2 - ax1) * (ay2 - ay1))
    union = tl.fma(-width, height, both)
    return tl.where(inter > 0, _quotient(inter, union), 0.0)


@triton.jit
def _code(bx1, by1, bx2, by2, ax1, ay1, ax2, ay2):
    """ty, tx, th, tw of boxes b against anchors a."""
    width, height = ax2 - ax1, ay2 - ay1
    ty = (by1 + (by2 - by1) / 2 - (ay1 + height / 2)) / (height + _EPS)
    tx = (bx1 + (bx2 - bx1) / 2 - (ax1 + width / 2)) / (width + _EPS)
    th = tl.log((by2 - by1 + _EPS) / (height + _EPS))
    tw = tl.log((bx2 - bx1 + _EPS) / (width + _EPS))
    return ty, tx, th, tw


@triton.jit(do_not_specialize=["count", "threshold"])
def label_anchors_fwd_kernel(
    box_ptr, class_ptr, anchor_ptr, label_ptr, code_ptr, hits_ptr, best_iou_ptr, best_anchor_ptr,
    total, count, blocks, stride_hits, threshold,
    ACC: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program: the targets of BLOCK anchors of an image but for claims, and each box's best anchor among them."""
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    block = program % blocks
    box_ptr += image * count * 4
    class_ptr += image * count
    anchor = block * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < total
    ax1, ay1, ax2, ay2 = _load_boxes(anchor_ptr, anchor, total, BLOCK, ACC)
    # What all anchors of the block lie in: most boxes do not meet it.
    left = tl.min(tl.where(inside, ax1, float("inf")), 0)
    top = tl.min(tl.where(inside, ay1, float("inf")), 0)
    right = tl.max(tl.where(inside, ax2, float("-inf")), 0)
    bottom = tl.max(tl.where(inside, ay2, float("-inf")), 0)
    best = tl.zeros((BLOCK,), ACC)
    match = tl.full((BLOCK,), -1, tl.int32)
    first = count  # the first real box
    for start in range(0, count, LANES):
        m = start + tl.arange(0, LANES)
        real = tl.load(class_ptr + m, mask=m < count, other=-1) > -1
        first = tl.minimum(first, tl.min(tl.where(real, m, count), 0))
        x1, y1, x2, y2 = _load_boxes(box_ptr, m, count, LANES, ACC)
        meets = real & (x1 < right) & (x2 > left) & (y1 < bottom) & (y2 > top)
        part = (image * count + m) * blocks + block
        tl.store(best_iou_ptr + part, tl.zeros((LANES,), ACC), mask=real & ~meets)
        box = tl.min(tl.where(meets, m, count), 0)
        while box < count:
            bx1, by1, bx2, by2 = _load_box(box_ptr + box * 4, ACC)
            iou = _iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
            match = tl.where(iou > best, box, match)
            best = tl.maximum(iou, best)
            highest, where = tl.max(iou, 0, return_indices=True, return_indices_tie_break_left=True)
            at = (image * count + box) * blocks + block
            tl.store(best_iou_ptr + at, highest)
            tl.store(best_anchor_ptr + at, block * BLOCK + where)
            box = tl.min(tl.where(meets & (m > box), m, count), 0)
    match = tl.where(match < 0, first, match)
    hit = inside & (match < count) & (best >= number(threshold, ACC))
    hits = tl.sum(hit.to(tl.int32), 0)
    tl.store(hits_ptr + image * stride_hits + block, hits)
    label = tl.full((BLOCK,), -1, tl.int64)
    code = tl.zeros((BLOCK, 4), ACC)
    if hits > 0:
        chosen = tl.where(hit, match, 0)
        label = tl.load(class_ptr + chosen, mask=hit, other=0).to(tl.int64) - 1
        bx1, by1, bx2, by2 = _load_boxes(box_ptr, chosen, count, BLOCK, ACC)
        ty, tx, th, tw = _code(bx1, by1, bx2, by2, ax1, ay1, ax2, ay2)
        code = tl.reshape(tl.join(tl.join(ty, th), tl.join(tx, tw)), (BLOCK, 4))
        code = tl.where(hit[:, None], code, 0.0)
    at = image * total + anchor
    tl.store(label_ptr + at, label, mask=inside)
    tl.store(code_ptr + at[:, None] * 4 + tl.arange(0, 4)[None, :], code, mask=inside[:, None])


@triton.jit(do_not_specialize=["blocks"])
def label_anchors_fwd_claim_kernel(
    class_ptr, best_iou_ptr, best_anchor_ptr, claim_ptr, blocks, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: the anchor that a box claims, the first of those of its largest IoU; -1 for padding."""
    box = tl.program_id(0).to(tl.int64)
    claim = -1
    if tl.load(class_ptr + box) > -1:
        claim = 0
        best = tl.full((), 0.0, ACC)
        for first in range(0, blocks, BLOCK):
            at = first + tl.arange(0, BLOCK)
            iou = tl.load(best_iou_ptr + box * blocks + at, mask=at < blocks, other=0.0)
            highest, where = tl.max(iou, 0, return_indices=True, return_indices_tie_break_left=True)
            if highest > best:
                best = highest
                claim = tl.load(best_anchor_ptr + box * blocks + first + where)
    tl.store(claim_ptr + box, claim)


@triton.jit(do_not_specialize=["threshold"])
def label_anchors_fwd_claimed_kernel(
    box_ptr, class_ptr, anchor_ptr, claim_ptr, label_ptr, code_ptr, hits_ptr,
    total, count, stride_hits, threshold,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: the targets of the anchor that a box claims, if no box before it does."""
    program = tl.program_id(0)
    image, m = (program // count).to(tl.int64), program % count
    box_ptr += image * count * 4
    class_ptr += image * count
    claim_ptr += image * count
    anchor = tl.load(claim_ptr + m)
    new = 0
    if anchor >= 0:
        ax1, ay1, ax2, ay2 = _load_box(anchor_ptr + anchor * 4, ACC)
        best = tl.full((), -1.0, ACC)
        before = 0
        for first in range(0, count, BLOCK):
            at = first + tl.arange(0, BLOCK)
            claim = tl.load(claim_ptr + at, mask=at < count, other=-1)
            before = tl.maximum(before, tl.max(((claim == anchor) & (at < m)).to(tl.int32), 0))
            bx1, by1, bx2, by2 = _load_boxes(box_ptr, at, count, BLOCK, ACC)
            iou = tl.where(claim >= 0, _iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2), -1.0)
            best = tl.maximum(best, tl.max(iou, 0))
        if before == 0:
            new = (best < number(threshold, ACC)).to(tl.int32)  # else it is a hit already
            at = image * total + anchor
            tl.store(label_ptr + at, tl.load(class_ptr + m).to(tl.int64) - 1)
            bx1, by1, bx2, by2 = _load_box(box_ptr + m * 4, ACC)
            ty, tx, th, tw = _code(bx1, by1, bx2, by2, ax1, ay1, ax2, ay2)
            tl.store(code_ptr + at * 4, ty)
            tl.store(code_ptr + at * 4 + 1, tx)
            tl.store(code_ptr + at * 4 + 2, th)
            tl.store(code_ptr + at * 4 + 3, tw)
    tl.store(hits_ptr + image * stride_hits + m, new)


def run(
    gt_boxes: Tensor, gt_classes: Tensor, anchors: Tensor, match_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Classes [B, N], codes [B, N, 4] and numbers of positives [B], in three launches."""
    batch, count, _ = gt_boxes.shape
    total, device = len(anchors), anchors.device
    boxes, classes, anchors = (t.contiguous() for t in (gt_boxes, gt_classes, anchors))
    if device.type == "cpu":  # elsewhere a check would wait for the device
        reference.check_finite(boxes[classes > -1])
    labels, codes = _gpu.allocate(
        [
            TensorSpec((batch, total), torch.int64, device),
            TensorSpec((batch, total, 4), anchors.dtype, device),
        ]
    )
    options = _triton.config("label_anchors", "fwd", anchors)
    blocks = triton.cdiv(total, options["BLOCK"])
    accumulator = _gpu.accumulator(anchors.dtype)
    threshold = _gpu.bits(match_threshold)
    # Anchors that take a box, of each block, and those that only a box claims, of each box.
    hits = torch.empty(batch, blocks + count, dtype=torch.int32, device=device)
    best_iou = torch.empty(batch, count, blocks, dtype=anchors.dtype, device=device)
    best_anchor = torch.empty(batch, count, blocks, dtype=torch.int32, device=device)
    claims = torch.empty(batch, count, dtype=torch.int32, device=device)
    _triton.launch(
        label_anchors_fwd_kernel,
        batch * blocks,
        boxes, classes, anchors, labels, codes, hits, best_iou, best_anchor,
        total, count, blocks, hits.stride(0), threshold,
        ACC=accumulator, **options, trips=(triton.cdiv(count, options["LANES"]), count),
    )  # fmt: skip
    options = _triton.config("label_anchors", "fwd_claim", anchors)
    _triton.launch(
        label_anchors_fwd_claim_kernel,
        batch * count,
        classes, best_iou, best_anchor, claims, blocks,
        ACC=accumulator, **options, trips=(triton.cdiv(blocks, options["BLOCK"]),),
    )  # fmt: skip
    options = _triton.config("label_anchors", "fwd_claimed", anchors)
    _triton.launch(
        label_anchors_fwd_claimed_kernel,
        batch * count if total else 0,
        boxes, classes, anchors, claims, labels, codes, hits[:, blocks:],
        total, count, hits.stride(0), threshold,
        ACC=accumulator, **options, trips=(triton.cdiv(count, options["BLOCK"]),),
    )  # fmt: skip
    if total == 0:
        hits.zero_()
    return labels, codes, hits.sum(1, dtype=anchors.dtype)
