"""Triton kernel of ``decode_topk``: decodes what ``triton_search`` finds, in the order of ``triton_sort``."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._tl import revealed
from effdet_kernels.ops.decode_topk import op
from effdet_kernels.ops.decode_topk.triton_search import block_of_list, levels, located, search
from effdet_kernels.ops.decode_topk.triton_sort import sort
from effdet_kernels.ops.detection_loss.triton_fwd import flat_maps, of_level


@triton.jit
def _level_of(firsts, logit):
    """The number of the level of a logit."""
    level = tl.zeros_like(logit)
    for i in tl.static_range(1, len(firsts)):
        level += (logit >= revealed(firsts[i])).to(level.dtype)
    return level


@triton.jit
def corners(
    code_ptrs, anchor_ptr, stride_ptr, units, firsts, widths, image, anchor, inside, classes,
    per_location, UNIT: tl.constexpr, ACC: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Of anchors, along SIDE (0: x, 1: y): size, half of the box's, and the box's two corners.

    And where in the maps of codes that of the offset is; that of the size is two further. stride_ptr None: all anchors
    are given. Else those of each level's first location, of which there are ``per_location``; rows have ``widths``.
    """
    logit = anchor * classes
    first = revealed(of_level(firsts, firsts, logit)) // classes
    length = revealed(of_level(units, firsts, logit)) * UNIT // classes
    at = (image * length + (anchor - first)) * 4 + (1 - SIDE)
    code_ptr = of_level(code_ptrs, firsts, logit) + at
    offset = tl.load(code_ptr, mask=inside, other=0.0).to(ACC)
    extent = tl.load(code_ptr + 2, mask=inside, other=0.0).to(ACC)
    given = anchor
    if stride_ptr is not None:
        level = _level_of(firsts, logit)
        location = (anchor - first) // per_location
        width = revealed(of_level(widths, firsts, logit))
        step = location // width if SIDE == 1 else location % width
        stride = tl.load(stride_ptr + level * 2 + SIDE, mask=inside, other=0.0).to(ACC)
        given = level * per_location + (anchor - first - location * per_location)
    low_ptr = anchor_ptr + given.to(tl.int64) * 4 + SIDE
    low = tl.load(low_ptr, mask=inside, other=0.0).to(ACC)
    high = tl.load(low_ptr + 2, mask=inside, other=0.0).to(ACC)
    size = high - low
    half = tl.exp(extent) * size * 0.5
    middle = (low + high) * 0.5
    if stride_ptr is not None:
        middle += step.to(ACC) * stride
    centre = offset * size + middle
    return size, half, centre - half, centre + half, at


@triton.jit
def _clipped(x, limit):
    """x in [0, limit]; NaN stays."""
    return tl.minimum(tl.where(x < 0, 0.0, x), limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["kept", "parents", "classes", "per_location"])
def decode_topk_decode_kernel(
    box_ptr, logit_ptr, anchor_index_ptr, class_ptr, order_ptr, row_ptr, parent_ptr,
    logit_ptrs, code_ptrs, anchor_ptr, stride_ptr, limit_ptr, units, firsts, widths,
    kept, parents, classes, per_location,
    UNIT: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: the outputs of BLOCK picks of an image, logits that ``located`` finds."""
    image, pick, inside = block_of_list(kept, BLOCK)
    at = tl.load(order_ptr + image * kept + pick, mask=inside, other=0)
    level_ptr, first, _, place = located(
        row_ptr, parent_ptr, logit_ptrs, units, firsts, None, image, at, inside, kept, parents,
        UNIT, 1, EACH,
    )  # fmt: skip
    flat = first + place
    anchor = flat // classes
    to = image * kept + pick
    tl.store(logit_ptr + to, tl.load(level_ptr + place, mask=inside, other=0.0), mask=inside)
    tl.store(anchor_index_ptr + to, anchor.to(tl.int64), mask=inside)
    tl.store(class_ptr + to, (flat - anchor * classes).to(tl.int64), mask=inside)
    for side in tl.static_range(2):
        _, _, low, high, _ = corners(
            code_ptrs, anchor_ptr, stride_ptr, units, firsts, widths, image, anchor, inside, classes,
            per_location, UNIT, ACC, side,
        )  # fmt: skip
        if limit_ptr is not None:
            limit = tl.load(limit_ptr + image * 2 + side).to(ACC)
            low, high = _clipped(low, limit), _clipped(high, limit)
        tl.store(box_ptr + to * 4 + side, low, mask=inside)
        tl.store(box_ptr + to * 4 + side + 2, high, mask=inside)


def widths(maps: Sequence[Tensor], strides: Tensor | None) -> tuple[int, ...] | None:
    """The ``corners`` argument; with None for strides it is not needed."""
    return None if strides is None else _gpu.opaque(*(x.shape[3] for x in maps))


def run(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    num_classes: int,
    k: int,
    limits: Tensor | None,
    strides: Tensor | None,
) -> list[Tensor]:
    """Boxes [B, K, 4], logits, anchor indices and classes [B, K], best first: search, sort, decode."""
    specs = op._out_spec(cls_outputs, box_outputs, anchors, num_classes, k, limits, strides)
    outputs = _gpu.allocate(specs)
    batch, kept = outputs[1].shape
    if kept == 0:
        return outputs
    maps = flat_maps(cls_outputs)
    keys, rows, parents, each = search(maps, kept)
    unit, units, firsts = levels(maps)
    options = _triton.config("decode_topk", "decode", maps[0])
    _triton.launch(
        decode_topk_decode_kernel, batch * triton.cdiv(kept, options["BLOCK"]),
        *outputs, sort(keys), rows, parents, maps, flat_maps(box_outputs),
        anchors.contiguous(), _gpu.dense(strides), _gpu.dense(limits), units, firsts, widths(maps, strides),
        kept, parents.shape[1], num_classes, maps[0].shape[1] // num_classes,
        UNIT=unit, EACH=each, ACC=_gpu.accumulator(maps[0].dtype), **options,
    )  # fmt: skip
    return outputs
