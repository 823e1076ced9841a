"""Triton kernels of ``soft_nms``: candidates are sorted into groups by class, then a program per image picks.

A pick decays its own group only. Two classes in one group do no harm: the decay compares classes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._tl import number, ordered
from effdet_kernels.ops.soft_nms import op

_GROUPS = 32  # a warp has one in each lane
_ALIGN = tl.constexpr(4)  # a group's first place is a multiple of it, for vector loads


@triton.jit
def _candidates(
    boxes_ptr, scores_ptr, classes_ptr, num_valid_ptr, image, at, count, threshold, GROUPS: tl.constexpr
):  # fmt: skip
    """Of candidates ``at`` [BLOCK] of an image: boxes [BLOCK, 4], scores, classes, groups, and which are not finite.

    A candidate that takes no part is of group GROUPS.
    """
    exists = at < count
    if num_valid_ptr is not None:
        exists &= at < tl.load(num_valid_ptr + image)
    row = image * count + at
    box_at = row[:, None] * 4 + tl.arange(0, 4)[None, :]
    box = tl.load(boxes_ptr + box_at, mask=exists[:, None], other=0.0)
    score = tl.load(scores_ptr + row, mask=exists, other=0.0)
    finite = tl.sum((tl.abs(box) < float("inf")).to(tl.int32), 1) == 4
    finite &= tl.abs(score) < float("inf")
    kind = tl.zeros(at.shape, tl.int64)
    if classes_ptr is not None:
        kind = tl.load(classes_ptr + row, mask=exists, other=0)
    takes_part = exists & finite & (score > number(threshold, score.dtype))
    group = tl.where(takes_part, (kind & (GROUPS - 1)).to(tl.int32), GROUPS)
    return box, score, kind, group, exists & (finite == 0)


@triton.jit
def _members(counts_ptr, image, chunks, chunk, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[GROUPS]: an image's candidates in each group; how many of them are in the chunks before ``chunk``, and in it."""
    g = tl.arange(0, GROUPS)
    size = tl.zeros([GROUPS], tl.int32)
    before = tl.zeros([GROUPS], tl.int32)
    own = tl.zeros([GROUPS], tl.int32)
    for first in range(0, chunks, BLOCK_C):
        row = first + tl.arange(0, BLOCK_C)
        at = (image * chunks + row)[:, None] * GROUPS + g[None, :]
        counts = tl.load(
            counts_ptr + at, mask=(row < chunks)[:, None], other=0
        )  # [BLOCK_C, GROUPS]
        size += tl.sum(counts, 0)
        before += tl.sum(tl.where((row < chunk)[:, None], counts, 0), 0)
        own += tl.sum(tl.where((row == chunk)[:, None], counts, 0), 0)
    return size, before, own


@triton.jit
def _first_places(size):
    """[GROUPS]: where each group begins, given how many candidates it has."""
    room = (size + (_ALIGN - 1)) // _ALIGN * _ALIGN
    return tl.cumsum(room, 0) - room


@triton.jit(do_not_specialize=["threshold"])
def soft_nms_count_kernel(
    boxes_ptr, scores_ptr, classes_ptr, num_valid_ptr, counts_ptr, dropped_ptr,
    count, chunks, threshold, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: a chunk of BLOCK candidates of an image; how many are in each group, how many are not finite."""
    program = tl.program_id(0).to(tl.int64)
    at = (program % chunks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    _, _, _, group, dropped = _candidates(
        boxes_ptr, scores_ptr, classes_ptr, num_valid_ptr, program // chunks, at, count, threshold, GROUPS
    )  # fmt: skip
    counts = tl.histogram(group, GROUPS, mask=group < GROUPS)
    tl.store(counts_ptr + program * GROUPS + tl.arange(0, GROUPS), counts)
    tl.store(dropped_ptr + program, tl.sum(dropped.to(tl.int32), 0))


@triton.jit(do_not_specialize=["threshold"])
def soft_nms_place_kernel(
    boxes_ptr, scores_ptr, classes_ptr, num_valid_ptr, counts_ptr,
    box_ptr, score_ptr, kind_ptr, index_ptr, count, room_units, chunks, threshold,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program: moves a chunk's candidates to their groups, in order. Boxes go to four rows, a coordinate each."""
    program = tl.program_id(0).to(tl.int64)
    image, chunk = program // chunks, (program % chunks).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    _, _, _, group, _ = _candidates(
        boxes_ptr, scores_ptr, classes_ptr, num_valid_ptr, image, chunk * BLOCK + lane, count, threshold, GROUPS
    )  # fmt: skip
    size, before, own = _members(counts_ptr, image, chunks, chunk, GROUPS, BLOCK_C)
    # Where a group's first candidate of the chunk goes, less where it is among the chunk's sorted ones.
    shift = _first_places(size) + before - (tl.cumsum(own, 0) - own)

    by_group = tl.sort(group * BLOCK + lane)
    group = by_group // BLOCK
    takes_part = group < GROUPS
    to = image * room_units * _ALIGN + lane + tl.gather(shift, tl.where(takes_part, group, 0), 0)
    at = chunk * BLOCK + by_group % BLOCK
    row = image * count + at
    tl.store(index_ptr + to, at, mask=takes_part)
    tl.store(score_ptr + to, tl.load(scores_ptr + row, mask=takes_part, other=0.0), mask=takes_part)
    if classes_ptr is not None:
        kind = tl.load(classes_ptr + row, mask=takes_part, other=0)
        tl.store(kind_ptr + to, kind, mask=takes_part)
    for side in tl.static_range(4):
        x = tl.load(boxes_ptr + row * 4 + side, mask=takes_part, other=0.0)
        tl.store(box_ptr + (image * 3 + side) * room_units * _ALIGN + to, x, mask=takes_part)


@triton.jit
def _overlap(ax0, ay0, ax1, ay1, bx0, by0, bx1, by1):
    """Intersection over union of boxes, in the reference's order of operations; 0 where the union is empty."""
    zero = tl.zeros(bx0.shape, bx0.dtype)
    width = tl.maximum(tl.minimum(ax1, bx1) - tl.maximum(ax0, bx0), zero)
    height = tl.maximum(tl.minimum(ay1, by1) - tl.maximum(ay0, by0), zero)
    intersection = width * height
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    if union.dtype == tl.float32:
        quotient = tl.div_rn(
            intersection, union
        )  # / is up to 2 ulp off: equal boxes would not reach 1
    else:
        quotient = intersection / union
    return tl.where(union > 0, quotient, zero)


@triton.jit(do_not_specialize=["rate", "iou_threshold", "threshold", "max_per_class"])
def soft_nms_pick_kernel(
    box_ptr, score_ptr, kind_ptr, index_ptr, taken_ptr, counts_ptr, dropped_parts_ptr,
    out_index_ptr, out_score_ptr, out_count_ptr, out_dropped_ptr,
    room_units, chunks, max_det, rate, iou_threshold, threshold, max_per_class,
    METHOD: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program: the picks of an image. The best candidate of each group is kept; a pick decays its group.

    ``taken_ptr`` counts the picks of each candidate's class; None: no limit.
    """
    image = tl.program_id(0).to(tl.int64)
    room = room_units * _ALIGN
    box_ptr += image * room * 4
    score_ptr += image * room
    index_ptr += image * room
    if kind_ptr is not None:
        kind_ptr += image * room
    if taken_ptr is not None:
        taken_ptr += image * room
    out_index_ptr += image * max_det
    out_score_ptr += image * max_det
    dtype: tl.constexpr = score_ptr.dtype.element_ty
    rate, iou_threshold = number(rate, dtype), number(iou_threshold, dtype)
    threshold = number(threshold, dtype)
    gone = ordered(tl.full((), -float("inf"), dtype))

    g = tl.arange(0, GROUPS)
    size, _, _ = _members(counts_ptr, image, chunks, 0, GROUPS, BLOCK_C)
    begin = _first_places(size)
    best = tl.full([GROUPS], 0, gone.dtype) + gone
    best_at = tl.zeros([GROUPS], tl.int32)
    for first in range(0, tl.max(size, 0), BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)[None, :]
        at = begin[:, None] + j  # [GROUPS, BLOCK_C]
        key = ordered(tl.load(score_ptr + at, mask=j < size[:, None], other=-float("inf")))
        top = tl.max(key, 1)
        at = tl.min(tl.where(key == top[:, None], at, room), 1)
        best_at = tl.where(top > best, at, best_at)
        best = tl.maximum(best, top)
    # From here on a lane has one group.
    best, best_at = tl.gather(best, g, 0), tl.gather(best_at, g, 0)
    size, begin = tl.gather(size, g, 0), tl.gather(begin, g, 0)
    best_index = tl.load(index_ptr + best_at, mask=best > gone, other=0)
    dropped = tl.zeros([BLOCK_C], tl.int32)
    for first in range(0, chunks, BLOCK_C):
        row = first + tl.arange(0, BLOCK_C)
        dropped += tl.load(dropped_parts_ptr + image * chunks + row, mask=row < chunks, other=0)
    tl.store(out_dropped_ptr + image, tl.sum(dropped, 0).to(tl.int64))

    found = 0
    top = tl.max(best, 0)
    while (found < max_det) & (top > gone):
        index = tl.min(tl.where(best == top, best_index, room), 0)
        chosen = (best == top) & (best_index == index)
        at = tl.sum(tl.where(chosen, best_at, 0), 0)
        first = tl.multiple_of(tl.sum(tl.where(chosen, begin, 0), 0), _ALIGN)
        last = first + tl.sum(tl.where(chosen, size, 0), 0)
        stop = first + tl.cdiv(last - first, _ALIGN) * _ALIGN  # masks of whole vectors
        tl.store(out_index_ptr + found, index.to(tl.int64))
        tl.store(out_score_ptr + found, tl.load(score_ptr + at))
        x0, y0 = tl.load(box_ptr + at), tl.load(box_ptr + room + at)
        x1, y1 = tl.load(box_ptr + 2 * room + at), tl.load(box_ptr + 3 * room + at)
        if kind_ptr is not None:
            kind = tl.load(kind_ptr + at)
        if taken_ptr is not None:
            taken = tl.load(taken_ptr + at) + 1

        next_best = tl.full([BLOCK], 0, gone.dtype) + gone
        next_at = tl.zeros([BLOCK], tl.int32) + first
        for block in range(first, last, BLOCK):
            j = block + tl.arange(0, BLOCK)
            inside = j < stop
            decays = j != at
            if kind_ptr is not None:
                decays &= tl.load(kind_ptr + j, mask=inside, other=0) == kind
            score = tl.load(score_ptr + j, mask=inside, other=-float("inf"))
            iou = _overlap(
                x0, y0, x1, y1,
                tl.load(box_ptr + j, mask=inside, other=0.0),
                tl.load(box_ptr + room + j, mask=inside, other=0.0),
                tl.load(box_ptr + 2 * room + j, mask=inside, other=0.0),
                tl.load(box_ptr + 3 * room + j, mask=inside, other=0.0),
            )  # fmt: skip
            iou = tl.where(decays, iou, 0.0)
            if METHOD == "gaussian":
                factor = tl.exp2(iou * iou * rate)
            elif METHOD == "linear":
                factor = tl.where(iou > iou_threshold, 1.0 - iou, 1.0)
            else:
                factor = tl.where(iou > iou_threshold, 0.0, 1.0)
            decayed = score * factor
            stays = (factor != 0) & (decayed > threshold) & (j != at) & (j < last)
            if taken_ptr is not None:
                tl.store(taken_ptr + j, tl.zeros([BLOCK], tl.int32) + taken, mask=inside & decays)
                stays &= (decays == 0) | (taken < max_per_class)
            score = tl.where(stays, decayed, -float("inf"))
            tl.store(score_ptr + j, score, mask=inside)
            key = ordered(score)
            next_at = tl.where(key > next_best, j, next_at)
            next_best = tl.maximum(next_best, key)
        group_best = tl.max(next_best, 0)
        group_at = tl.min(tl.where(next_best == group_best, next_at, room), 0)
        best = tl.where(chosen, group_best, best)
        best_at = tl.where(chosen, group_at, best_at)
        best_index = tl.where(chosen, tl.load(index_ptr + group_at), best_index)
        top = tl.max(best, 0)
        found += 1
        tl.debug_barrier()  # the next pick reads what other threads stored
    tl.store(out_count_ptr + image, tl.full((), found, tl.int64))
    for first in range(0, max_det, BLOCK):
        d = first + tl.arange(0, BLOCK)
        rest = (d >= found) & (d < max_det)
        tl.store(out_index_ptr + d, tl.full([BLOCK], -1, tl.int64), mask=rest)
        tl.store(out_score_ptr + d, tl.zeros([BLOCK], dtype), mask=rest)


def run(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    num_valid: Tensor | None,
    max_det: int,
    method: str,
    sigma: float,
    iou_threshold: float,
    score_threshold: float,
    max_per_class: int | None,
) -> list[Tensor]:
    """Indices and scores [B, max_det], counts and dropped [B]."""
    boxes, scores = boxes.contiguous(), scores.contiguous()
    classes, num_valid = _gpu.dense(classes), _gpu.dense(num_valid)
    batch, count = scores.shape
    outputs = _gpu.allocate(op._out_spec(boxes, scores, classes, num_valid, max_det))
    given = boxes, scores, classes, num_valid
    threshold = _gpu.bits(score_threshold)
    device = scores.device

    options = _triton.config("soft_nms", "place", scores)
    chunks = triton.cdiv(count, options["BLOCK"])
    rows = triton.cdiv(chunks, options["BLOCK_C"])
    counts = torch.empty(batch, chunks, _GROUPS, dtype=torch.int32, device=device)
    dropped = torch.empty(batch, chunks, dtype=torch.int32, device=device)
    room_units = triton.cdiv(count, _ALIGN.value) + _GROUPS
    room = room_units * _ALIGN.value
    candidates = (
        torch.empty(batch, 4, room, dtype=boxes.dtype, device=device),
        torch.empty(batch, room, dtype=scores.dtype, device=device),
        None if classes is None else torch.empty(batch, room, dtype=classes.dtype, device=device),
        torch.empty(batch, room, dtype=torch.int32, device=device),
    )
    taken = None
    if max_per_class is not None:
        taken = torch.zeros(batch, room, dtype=torch.int32, device=device)
    _triton.launch(
        soft_nms_count_kernel, batch * chunks,
        *given, counts, dropped, count, chunks, threshold,
        GROUPS=_GROUPS, BLOCK=options["BLOCK"], num_warps=options["num_warps"],
    )  # fmt: skip
    _triton.launch(
        soft_nms_place_kernel, batch * chunks,
        *given, counts, *candidates, count, room_units, chunks, threshold,
        GROUPS=_GROUPS, trips=(rows,), **options,
    )  # fmt: skip
    expected = count if classes is None else count // _GROUPS  # candidates of a group
    options = _triton.config("soft_nms", "pick", scores, expected)
    passes = triton.cdiv(expected, options["BLOCK"])
    _triton.launch(
        soft_nms_pick_kernel, batch,
        *candidates, taken, counts, dropped, *outputs, room_units, chunks, max_det,
        _gpu.bits(-1 / (sigma * math.log(2))), _gpu.bits(iou_threshold), threshold, max_per_class,
        METHOD=method, GROUPS=_GROUPS, **options,
        trips=(rows, triton.cdiv(expected, options["BLOCK_C"]), rows, max_det, max_det * passes, 1),
    )  # fmt: skip
    return outputs
