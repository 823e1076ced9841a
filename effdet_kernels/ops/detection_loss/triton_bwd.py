"""Triton kernels of the backward of ``detection_loss``; the README has the formulas."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._tl import reciprocal
from effdet_kernels.ops.detection_loss.triton_fwd import (
    division,
    divisor,
    flat_labels,
    flat_maps,
    flat_targets,
    focal,
    of_level,
    place,
    settings,
    tile_labels,
)


@triton.jit
def _scalar(grad_ptr, ACC: tl.constexpr):
    """A loss's gradient; None: of a loss that nothing depends on."""
    if grad_ptr is None:
        return tl.full((), 0.0, ACC)
    return tl.load(grad_ptr).to(ACC)


@triton.jit
def _focal_slope(z, weight, GAMMA: tl.constexpr, SMOOTHING: tl.constexpr):
    """The derivative of the product of the first two results of ``focal``."""
    modulator, entropy, e = focal(z, weight, GAMMA, SMOOTHING)
    larger = reciprocal(1.0 + e)  # of p and 1 - p
    smaller = e * larger
    p = tl.where(z > 0, larger, smaller)
    rest = tl.where(z > 0, smaller, larger)
    return modulator * (rest * entropy * GAMMA + (p - SMOOTHING * 0.5))


@triton.jit(do_not_specialize=["batch", "segment"])
def detection_loss_bwd_class_kernel(
    positives_ptr, dx_ptrs, logit_ptrs, label_ptrs, grad_ptr, batch, units, firsts, segment,
    UNIT: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, ALPHA: tl.constexpr,
    GAMMA: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program: the logits' gradients of ``segment`` tiles of a level, BLOCK runs of VECTOR logits each."""
    program = tl.program_id(0)
    start, left = place(units, firsts, segment, program, UNIT, BLOCK * VECTOR)
    anchor = start // CLASSES
    offset = (start - anchor * CLASSES).to(tl.int32)
    logit_ptr = of_level(logit_ptrs, firsts, program) + start
    dx_ptr = of_level(dx_ptrs, firsts, program) + start
    label_ptr = of_level(label_ptrs, firsts, program) + anchor
    factor = _scalar(grad_ptr, ACC) / divisor(positives_ptr, batch, ACC)
    of_rest = factor * (1.0 - ALPHA)
    of_own = factor * -ALPHA
    run = tl.arange(0, BLOCK) * VECTOR
    for first in range(0, left, BLOCK * VECTOR):
        at = (first + run)[:, None] + tl.arange(0, VECTOR)[None, :]
        x = tl.load(logit_ptr + at, mask=at < left, other=0.0).to(ACC)
        weight, own, positives = tile_labels(
            label_ptr, offset + first + run, tl.cdiv(offset + left, CLASSES), CLASSES, VECTOR, ACC
        )
        if positives:
            dx = _focal_slope(tl.where(own, -x, x), weight, GAMMA, SMOOTHING)
            dx *= tl.where(own, of_own, of_rest)
        else:
            dx = _focal_slope(x, weight, GAMMA, SMOOTHING) * of_rest
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < left)


@triton.jit(do_not_specialize=["batch", "segment"])
def detection_loss_bwd_box_kernel(
    positives_ptr, dx_ptrs, code_ptrs, target_ptrs, grad_ptr, batch, units, firsts, segment,
    UNIT: tl.constexpr, ACC: tl.constexpr, DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: the codes' gradients of ``segment`` tiles of BLOCK of a level."""
    program = tl.program_id(0)
    start, left = place(units, firsts, segment, program, UNIT, BLOCK)
    code_ptr = of_level(code_ptrs, firsts, program) + start
    dx_ptr = of_level(dx_ptrs, firsts, program) + start
    target_ptr = of_level(target_ptrs, firsts, program) + start
    factor = _scalar(grad_ptr, ACC) / (4.0 * divisor(positives_ptr, batch, ACC))
    for first in range(0, left, BLOCK):
        at = first + tl.arange(0, BLOCK)
        code = tl.load(code_ptr + at, mask=at < left, other=0.0).to(ACC)
        target = tl.load(target_ptr + at, mask=at < left, other=0.0)
        error = code - target
        knee = tl.where(error < 0, tl.full((), -DELTA, ACC), tl.full((), DELTA, ACC))
        slope = tl.where(tl.abs(error) > DELTA, knee, error)  # a NaN stays
        slope *= tl.where(target == 0, 0.0, 1.0)
        tl.store(dx_ptr + at, (slope * factor).to(dx_ptr.dtype.element_ty), mask=at < left)


def run(grads: Sequence[Tensor | None], *rest) -> list[Tensor]:
    """The wanted gradients of the class maps, then of the box maps: a launch for each kind."""
    *tensors, positives, num_classes, alpha, gamma, delta, smoothing, legacy, needs = rest
    count = len(tensors[0])
    of_logits, of_codes = (
        [i for i in range(count) if wanted[i]] for wanted in (needs[:count], needs[count:])
    )
    cls_outputs, box_outputs, cls_targets, box_targets = tensors
    first = cls_outputs[0]
    wide = accumulation_dtype(first.dtype)
    constants = settings(first, num_classes, alpha, gamma, smoothing, legacy)
    positives = _gpu.dense(positives)
    found = []
    if of_logits:
        logits = flat_maps([cls_outputs[i] for i in of_logits])
        options = _triton.config("detection_loss", "bwd_class", first)
        programs, unit, levels = division(logits, options["BLOCK"] * constants["VECTOR"])
        found += _gpu.allocate([_library.nchw(x.shape, x) for x in logits])
        _triton.launch(
            detection_loss_bwd_class_kernel,
            programs,
            positives, tuple(found), logits, flat_labels([cls_targets[i] for i in of_logits]),
            grads[0], first.shape[0], *levels,
            UNIT=unit, **constants, **options,
            trips=(triton.cdiv(first.shape[0], 32), levels[-1]),
        )  # fmt: skip
    if of_codes:
        codes = flat_maps([box_outputs[i] for i in of_codes])
        options = _triton.config("detection_loss", "bwd_box", first)
        programs, unit, levels = division(codes, options["BLOCK"])
        of_boxes = _gpu.allocate([_library.nchw(x.shape, x) for x in codes])
        _triton.launch(
            detection_loss_bwd_box_kernel,
            programs,
            positives, tuple(of_boxes), codes, flat_targets([box_targets[i] for i in of_codes], wide),
            grads[1], first.shape[0], *levels,
            UNIT=unit, ACC=constants["ACC"], DELTA=float(delta), **options,
            trips=(triton.cdiv(first.shape[0], 32), levels[-1]),
        )  # fmt: skip
        found += of_boxes
    return found
