"""Triton kernels of the backward of ``decode_topk``: gradients go back to where the picks came from."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._gradients import chosen, wanted
from effdet_kernels.ops._tl import revealed
from effdet_kernels.ops.decode_topk.triton_fwd import corners, widths
from effdet_kernels.ops.decode_topk.triton_search import block_of_list, levels
from effdet_kernels.ops.decode_topk.triton_sort import sort
from effdet_kernels.ops.detection_loss.triton_fwd import flat_maps, of_level


@triton.jit(do_not_specialize=["kept", "classes"])
def decode_topk_bwd_logits_kernel(
    grad_ptr, anchor_index_ptr, class_ptr, dx_ptrs, units, firsts, kept, classes,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: the gradients of BLOCK picks' logits, to maps of zeros; no two have one place."""
    image, pick, inside = block_of_list(kept, BLOCK)
    at = image * kept + pick
    anchor = tl.load(anchor_index_ptr + at, mask=inside, other=0).to(tl.int32)
    logit = anchor * classes + tl.load(class_ptr + at, mask=inside, other=0).to(tl.int32)
    offset = logit - revealed(of_level(firsts, firsts, logit))
    length = revealed(of_level(units, firsts, logit)) * UNIT
    dx_ptr = of_level(dx_ptrs, firsts, logit) + image * length + offset
    tl.store(dx_ptr, tl.load(grad_ptr + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def _unclipped(grad, x, limit):
    """The gradient of x, given that of x in [0, limit], as torch has it: half where x is the limit."""
    clipped = tl.where(x > 0, x, 0.0)
    grad = tl.where((x >= 0) & (clipped <= limit), grad, 0.0)
    return tl.where(clipped == limit, grad * 0.5, grad)


@triton.jit(do_not_specialize=["kept", "classes", "per_location"])
def decode_topk_bwd_codes_kernel(
    grad_ptr, anchor_index_ptr, order_ptr, code_ptrs, anchor_ptr, stride_ptr, limit_ptr, dx_ptrs,
    units, firsts, widths, kept, classes, per_location,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK places of an image's picks in the order of their anchors; the first of each anchor adds up.

    All picks of an anchor have one box. The maps are of zeros.
    """
    image, place, inside = block_of_list(kept, BLOCK)
    grad_ptr += image * kept * 4
    anchor_index_ptr += image * kept
    order_ptr += image * kept
    pick = tl.load(order_ptr + place, mask=inside, other=0)
    anchor = tl.load(anchor_index_ptr + pick, mask=inside, other=0)
    follows = inside & (place > 0)
    before = tl.load(order_ptr + place - 1, mask=follows, other=0)
    first = inside & (tl.load(anchor_index_ptr + before, mask=follows, other=-1) != anchor)

    x0 = tl.zeros([BLOCK], ACC)
    y0 = tl.zeros([BLOCK], ACC)
    x1 = tl.zeros([BLOCK], ACC)
    y1 = tl.zeros([BLOCK], ACC)
    adds = first
    while tl.max(adds.to(tl.int32), 0) > 0:
        at = grad_ptr + pick * 4
        x0 += tl.load(at, mask=adds, other=0.0)
        y0 += tl.load(at + 1, mask=adds, other=0.0)
        x1 += tl.load(at + 2, mask=adds, other=0.0)
        y1 += tl.load(at + 3, mask=adds, other=0.0)
        place += 1
        adds &= place < kept
        pick = tl.load(order_ptr + place, mask=adds, other=0)
        adds &= tl.load(anchor_index_ptr + pick, mask=adds, other=-1) == anchor

    anchor = anchor.to(tl.int32)
    for side in tl.static_range(2):
        size, half, low, high, code_at = corners(
            code_ptrs, anchor_ptr, stride_ptr, units, firsts, widths, image, anchor, first, classes,
            per_location, UNIT, ACC, side,
        )  # fmt: skip
        of_low, of_high = (x0, x1) if side == 0 else (y0, y1)
        if limit_ptr is not None:
            limit = tl.load(limit_ptr + image * 2 + side).to(ACC)
            of_low, of_high = _unclipped(of_low, low, limit), _unclipped(of_high, high, limit)
        dx_ptr = of_level(dx_ptrs, firsts, anchor * classes) + code_at
        of_offset, of_extent = (of_low + of_high) * size, (of_high - of_low) * half
        tl.store(dx_ptr, of_offset.to(dx_ptr.dtype.element_ty), mask=first)
        tl.store(dx_ptr + 2, of_extent.to(dx_ptr.dtype.element_ty), mask=first)


def _zeros(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.zero_() for x in _gpu.allocate([_library.nchw(m.shape, m) for m in maps]))


def run(
    grads: Sequence[Tensor | None],
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    num_classes: int,
    k: int,
    limits: Tensor | None,
    strides: Tensor | None,
    picks: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The wanted gradients of the class and box maps, 0 but at the picks."""
    of_boxes, of_logits = grads[:2]
    of_cls, of_box = wanted((cls_outputs, box_outputs), needs)
    anchor_index, classes = (t.contiguous() for t in picks)
    batch, kept = anchor_index.shape
    unit, units, firsts = levels(cls_outputs)
    d_cls: tuple[Tensor, ...] = ()
    d_box: tuple[Tensor, ...] = ()
    if any(of_cls):
        d_cls = _zeros(cls_outputs)
        if of_logits is not None:
            options = _triton.config("decode_topk", "decode", of_logits)
            _triton.launch(
                decode_topk_bwd_logits_kernel, batch * triton.cdiv(kept, options["BLOCK"]),
                of_logits.contiguous(), anchor_index, classes, d_cls, units, firsts, kept, num_classes,
                UNIT=unit, **options,
            )  # fmt: skip
    if any(of_box):
        d_box = _zeros(box_outputs)
        if of_boxes is not None and kept:
            options = _triton.config("decode_topk", "decode", of_boxes)
            _triton.launch(
                decode_topk_bwd_codes_kernel, batch * triton.cdiv(kept, options["BLOCK"]),
                of_boxes.contiguous(), anchor_index, sort((-anchor_index).int()),
                flat_maps(box_outputs), anchors.contiguous(), _gpu.dense(strides), _gpu.dense(limits), d_box,
                units, firsts, widths(cls_outputs, strides), kept, num_classes,
                cls_outputs[0].shape[1] // num_classes,
                UNIT=unit, ACC=_gpu.accumulator(of_boxes.dtype), **options,
            )  # fmt: skip
    return [*chosen(d_cls, of_cls if d_cls else ()), *chosen(d_box, of_box if d_box else ())]
