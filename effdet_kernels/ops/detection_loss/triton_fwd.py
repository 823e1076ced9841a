"""Triton kernels of ``detection_loss``: one launch for all levels, whose logits and codes are flat arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._tl import revealed
from effdet_kernels.ops.detection_loss import reference

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def of_level(values, firsts, program):
    """The one of ``values``, one per level, of the level that ``program`` is in; levels begin at ``firsts``."""
    found = values[0]
    for level in tl.static_range(1, len(values)):
        found = tl.where(program >= revealed(firsts[level]), values[level], found)
    return found


@triton.jit
def place(units, firsts, segment, program, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Where in its level a program of ``segment`` tiles starts, and how many elements it has."""
    first = revealed(of_level(firsts, firsts, program))
    start = (program - first).to(tl.int64) * segment * TILE
    left = (revealed(of_level(units, firsts, program)) - start // UNIT) * UNIT
    return start, tl.minimum(left, segment * TILE).to(tl.int32)


@triton.jit
def _log_one_plus(e):
    """log(1 + e) / e for e in [0, 1]; in float32 at most 3 units in the last place off."""
    if e.dtype == tl.float64:
        near = 1.0 + e
        rounded = near == 1.0
        return tl.where(rounded, 1.0, tl.log(near) / tl.where(rounded, 1.0, near - 1.0))
    p = e * 0.00536482967 - 0.030065814
    p = p * e + 0.0792045668
    p = p * e - 0.137538046
    p = p * e + 0.191536561
    p = p * e - 0.248571634
    p = p * e + 0.33321324
    p = p * e - 0.499996483
    return p * e + 1.0


@triton.jit
def focal(z, weight, GAMMA: tl.constexpr, SMOOTHING: tl.constexpr):
    """Of a logit z whose probability p should be 0: p ** gamma * 2 ** weight, cross-entropy, exp(-abs(z))."""
    e = tl.exp2(tl.abs(z) * -_LOG2_E)
    softplus = tl.maximum(z, 0.0) + e * _log_one_plus(e)
    modulator = tl.exp2((z - softplus) * (GAMMA * _LOG2_E) + weight)
    return modulator, softplus - z * (SMOOTHING * 0.5), e


@triton.jit
def tile_labels(
    label_ptr, at, anchors, CLASSES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr
):
    """Of runs of VECTOR <= CLASSES logits, of one anchor or two each, that begin at ``at`` [BLOCK].

    Returns, [BLOCK, VECTOR] each, -inf for logits of ignored anchors and of no anchor and else 0, and whether a logit
    is of its anchor's class; and whether there is such a class among the anchors.
    """
    anchor = at // CLASSES
    offset = at - anchor * CLASSES
    rest = CLASSES - offset  # logits from the run's begin to the anchor's end
    label = tl.load(label_ptr + anchor, mask=anchor < anchors, other=-2).to(tl.int32)
    two = (rest < VECTOR) & (anchor + 1 < anchors)
    following = tl.load(label_ptr + anchor + 1, mask=two, other=-2).to(tl.int32)
    j = tl.arange(0, VECTOR)[None, :]
    weight = tl.where(label == -2, float("-inf"), 0.0).to(ACC)
    weight_following = tl.where(following == -2, float("-inf"), 0.0).to(ACC)
    weight = tl.where(j < rest[:, None], weight[:, None], weight_following[:, None])
    own = tl.where(label < 0, -1, label - offset)
    own_following = tl.where(following < 0, -1, following + rest)
    own = (j == own[:, None]) | (j == own_following[:, None])
    return weight, own, tl.max(tl.maximum(label, following)) >= 0


@triton.jit(do_not_specialize=["segment"])
def detection_loss_fwd_class_kernel(
    parts_ptr, logit_ptrs, label_ptrs, units, firsts, segment,
    UNIT: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, ALPHA: tl.constexpr,
    GAMMA: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program: the focal losses of ``segment`` tiles of a level, added up; a tile is BLOCK runs of VECTOR logits."""
    program = tl.program_id(0)
    start, left = place(units, firsts, segment, program, UNIT, BLOCK * VECTOR)
    anchor = start // CLASSES
    offset = (start - anchor * CLASSES).to(tl.int32)
    logit_ptr = of_level(logit_ptrs, firsts, program) + start
    label_ptr = of_level(label_ptrs, firsts, program) + anchor
    run = tl.arange(0, BLOCK) * VECTOR
    of_rest = tl.zeros((BLOCK, VECTOR), ACC)
    of_own = tl.zeros((BLOCK,), ACC)
    for first in range(0, left, BLOCK * VECTOR):
        at = (first + run)[:, None] + tl.arange(0, VECTOR)[None, :]
        x = tl.load(logit_ptr + at, mask=at < left, other=0.0).to(ACC)
        weight, own, positives = tile_labels(
            label_ptr, offset + first + run, tl.cdiv(offset + left, CLASSES), CLASSES, VECTOR, ACC
        )
        if positives:
            modulator, entropy, _ = focal(tl.where(own, -x, x), weight, GAMMA, SMOOTHING)
            loss = modulator * entropy
            of_own += tl.sum(tl.where(own, loss, 0.0), 1)
            of_rest += tl.where(own, 0.0, loss)
        else:
            modulator, entropy, _ = focal(x, weight, GAMMA, SMOOTHING)
            # Not a sum, which would move behind the branch, away from its product.
            of_rest = tl.fma(modulator, entropy, of_rest)
    total = ALPHA * tl.sum(of_own, 0) + (1.0 - ALPHA) * tl.sum(tl.sum(of_rest, 1), 0)
    tl.store(parts_ptr + program, total)


@triton.jit(do_not_specialize=["segment"])
def detection_loss_fwd_box_kernel(
    parts_ptr, code_ptrs, target_ptrs, units, firsts, segment,
    UNIT: tl.constexpr, ACC: tl.constexpr, DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: the huber losses of ``segment`` tiles of BLOCK codes of a level, added up."""
    program = tl.program_id(0)
    start, left = place(units, firsts, segment, program, UNIT, BLOCK)
    code_ptr = of_level(code_ptrs, firsts, program) + start
    target_ptr = of_level(target_ptrs, firsts, program) + start
    total = tl.zeros((BLOCK,), ACC)
    for first in range(0, left, BLOCK):
        at = first + tl.arange(0, BLOCK)
        code = tl.load(code_ptr + at, mask=at < left, other=0.0).to(ACC)
        target = tl.load(target_ptr + at, mask=at < left, other=0.0)
        error = tl.abs(code - target)
        quadratic = tl.minimum(error, tl.full((), DELTA, ACC))
        loss = 0.5 * quadratic * quadratic + DELTA * (error - quadratic)
        total += loss * tl.where(target == 0, 0.0, 1.0)  # a NaN stays
    tl.store(parts_ptr + program, tl.sum(total, 0))


@triton.jit
def divisor(positives_ptr, batch, ACC: tl.constexpr):
    """The positives of all images, and 1."""
    count = tl.zeros((32,), ACC)
    for first in range(0, batch, 32):
        image = first + tl.arange(0, 32)
        count += tl.load(positives_ptr + image, mask=image < batch, other=0).to(ACC)
    return tl.sum(count, 0) + 1.0


@triton.jit(do_not_specialize=["class_parts", "parts", "batch"])
def detection_loss_fwd_total_kernel(
    parts_ptr, positives_ptr, cls_loss_ptr, box_loss_ptr, class_parts, parts, batch,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The only program: adds up the parts of either loss, in their order, and divides."""
    of_classes = tl.zeros((BLOCK,), ACC)
    of_boxes = tl.zeros((BLOCK,), ACC)
    for first in range(0, parts, BLOCK):
        at = first + tl.arange(0, BLOCK)
        part = tl.load(parts_ptr + at, mask=at < parts, other=0.0)
        of_classes += tl.where(at < class_parts, part, 0.0)
        of_boxes += tl.where(at < class_parts, 0.0, part)
    count = divisor(positives_ptr, batch, ACC)
    tl.store(cls_loss_ptr, tl.sum(of_classes, 0) / count)
    tl.store(box_loss_ptr, tl.sum(of_boxes, 0) / (4.0 * count))


def flat_maps(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The maps, copied where they are not dense with channels inside."""
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in maps)


def flat_labels(labels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The labels, copied where they are not dense."""
    return tuple(t.contiguous() for t in labels)


def flat_targets(targets: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The box targets in ``dtype``, dense."""
    return tuple(t.to(dtype).contiguous() for t in targets)


def division(maps: Sequence[Tensor], tile: int) -> tuple[int, int, tuple[Any, ...]]:
    """How levels are divided: the number of programs, UNIT, and the kernels' ``units, firsts, segment``."""
    unit = _gpu.alignment(*(x.numel() for x in maps))
    tiles = [triton.cdiv(x.numel(), tile) for x in maps]
    segment = max(1, triton.cdiv(sum(tiles), 16384))  # more programs would not fill a GPU better
    programs = [triton.cdiv(count, segment) for count in tiles]
    firsts = itertools.accumulate(programs[:-1], initial=0)
    units = (x.numel() // unit for x in maps)
    return sum(programs), unit, (_gpu.opaque(*units), _gpu.opaque(*firsts), segment)


def settings(
    x: Tensor, num_classes: int, alpha: float, gamma: float, smoothing: float, legacy: bool
) -> dict[str, Any]:
    """Constants of the kernels of logits like ``x``."""
    return {
        "ACC": _gpu.accumulator(x.dtype),
        "CLASSES": num_classes,
        "ALPHA": float(alpha),
        "GAMMA": float(gamma),
        "SMOOTHING": 0.0 if legacy else float(smoothing),
        "VECTOR": min(16 // x.element_size(), 1 << num_classes.bit_length() - 1),
    }


def run(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    cls_targets: Sequence[Tensor],
    box_targets: Sequence[Tensor],
    num_positives: Tensor,
    num_classes: int,
    alpha: float,
    gamma: float,
    delta: float,
    label_smoothing: float,
    legacy_focal: bool,
) -> tuple[Tensor, Tensor]:
    """Class and box loss, 0-d: sums of parts of the maps, then the sum of these in a fixed order."""
    first = cls_outputs[0]
    for label in cls_targets:
        if (
            label.device.type == "cpu" and label.numel()
        ):  # elsewhere a check would wait for the device
            reference.check_range(int(label.min()), int(label.max()), num_classes)
    wide = accumulation_dtype(first.dtype)
    constants = settings(first, num_classes, alpha, gamma, label_smoothing, legacy_focal)
    options = _triton.config("detection_loss", "fwd_class", first)
    logits = flat_maps(cls_outputs)
    programs, unit, levels = division(logits, options["BLOCK"] * constants["VECTOR"])
    box_options = _triton.config("detection_loss", "fwd_box", first)
    codes = flat_maps(box_outputs)
    box_programs, box_unit, box_levels = division(codes, box_options["BLOCK"])
    parts = torch.empty(programs + box_programs, dtype=wide, device=first.device)
    _triton.launch(
        detection_loss_fwd_class_kernel,
        programs,
        parts, logits, flat_labels(cls_targets), *levels,
        UNIT=unit, **constants, **options,
        trips=(levels[-1],),
    )  # fmt: skip
    _triton.launch(
        detection_loss_fwd_box_kernel,
        box_programs,
        parts[programs:], codes, flat_targets(box_targets, wide), *box_levels,
        UNIT=box_unit, ACC=constants["ACC"], DELTA=float(delta), **box_options,
        trips=(box_levels[-1],),
    )  # fmt: skip
    scalar = TensorSpec((), wide, first.device)
    cls_loss, box_loss = _gpu.allocate([scalar, scalar])
    options = _triton.config("detection_loss", "fwd_total", first)
    _triton.launch(
        detection_loss_fwd_total_kernel,
        1,
        parts, _gpu.dense(num_positives), cls_loss, box_loss,
        programs, programs + box_programs, first.shape[0],
        ACC=constants["ACC"], **options,
        trips=(triton.cdiv(programs + box_programs, options["BLOCK"]), triton.cdiv(first.shape[0], 32)),
    )  # fmt: skip
    return cls_loss, box_loss
