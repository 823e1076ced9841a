"""Triton kernels of ``decode_topk``: one reading of all logits for the largest of each run, then a search from there.

The K best logits of an image are in its K best runs, where runs are ranked by their largest logit, equal ones by their
place: each run that is passed over has K before it whose largest logits come before all of its own. So it goes down:
of all runs the K best, of their parts the K best, of the logits in these the K best. Sizes depend on shapes alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._tl import ordered, revealed
from effdet_kernels.ops.decode_topk import op
from effdet_kernels.ops.detection_loss.triton_fwd import flat_maps, of_level

_SHORTEST, _LONGEST = 16, 1024  # runs
_MOST = 2**31 - 1  # logits of an image
_KEYS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROOM = tl.constexpr(16)  # images in lists of keys are a multiple of it apart, for vector loads


@triton.jit
def _largest(x_ptr, mask, key_ptr):
    """Of numbers [..., PART] the largest of the last dimension, as a key; NaN is as large as infinity."""
    x = tl.load(x_ptr, mask=mask, other=-float("inf"))
    wide = x if x.dtype == tl.float64 else x.to(tl.float32)
    largest = tl.max(tl.where(wide == wide, wide, float("inf")), len(x.shape) - 1)
    return ordered(largest.to(x.dtype)).to(key_ptr.dtype.element_ty)


@triton.jit
def _rank(key):
    """Unsigned integers in the order of keys."""
    if key.dtype == tl.int64:
        return key.to(tl.uint64, bitcast=True) + (1 << 63)
    half: tl.constexpr = 1 << (key.dtype.primitive_bitwidth - 1)
    return key.to(tl.int32).to(tl.uint32, bitcast=True) + half


@triton.jit
def _before(flags):
    """Of integers [ROWS, COLUMNS], in row-major order: the sum of those before each, and of all."""
    of_row = tl.sum(flags, 1)
    above = tl.cumsum(of_row, 0) - of_row
    return tl.cumsum(flags, 1) - flags + above[:, None], tl.sum(of_row, 0)


@triton.jit(do_not_specialize=["programs"])
def decode_topk_runs_kernel(
    key_ptr, logit_ptrs, units, first_rows, first_programs, programs, room_units,
    UNIT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: the keys of BLOCK runs, of RUN logits each, of a level of an image."""
    image = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    length = revealed(of_level(units, first_programs, program)) * UNIT
    row = (
        program - revealed(of_level(first_programs, first_programs, program))
    ) * BLOCK + tl.arange(0, BLOCK)
    at = (row * RUN)[:, None] + tl.arange(0, RUN)[None, :]
    logit_ptr = of_level(logit_ptrs, first_programs, program) + image * length
    key = _largest(logit_ptr + at, at < length, key_ptr)
    to = (
        image * (room_units * _ROOM) + revealed(of_level(first_rows, first_programs, program)) + row
    )
    tl.store(key_ptr + to, key, mask=row * RUN < length)


@triton.jit
def located(
    row_ptr, parent_ptr, units, firsts, first_rows, image, at, inside, kept, parents,
    UNIT: tl.constexpr, RUN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Of rows ``at`` of a list [B, kept]: first logit and length of the level; where in it the row's run is, or -1.

    row_ptr None: all rows. A row is the number of a run of RUN logits: among all of an image, or of EACH in every run
    that starts at parent_ptr [B, parents].
    """
    row = at
    if row_ptr is not None:
        row = tl.load(row_ptr + image * kept + at, mask=inside, other=0)
    if parent_ptr is None:
        where, table = row, first_rows
        offset = (row - revealed(of_level(first_rows, first_rows, row))) * RUN
    else:
        where = tl.load(parent_ptr + image * parents + row // EACH, mask=inside, other=-1)
        table = firsts
        offset = where - revealed(of_level(firsts, firsts, where)) + row % EACH * RUN
    first = revealed(of_level(firsts, table, where))
    length = revealed(of_level(units, table, where)) * UNIT
    return (
        first,
        length,
        tl.where(inside & (where >= 0) & (offset < length), offset, -1),
        where,
        table,
    )


@triton.jit(do_not_specialize=["kept", "parents"])
def decode_topk_parts_kernel(
    key_ptr, start_ptr, row_ptr, parent_ptr, logit_ptrs, units, firsts, first_rows,
    kept, parents, room_units,
    UNIT: tl.constexpr, RUN: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK runs of an image's list; where each starts, or -1, and the keys of its PARTS parts.

    ``located`` says what the list is. A part that does not exist has the lowest integer.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(kept, BLOCK)
    image = (program // blocks).to(tl.int64)
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < kept
    first, length, offset, where, table = located(
        row_ptr, parent_ptr, units, firsts, first_rows, image, at, inside, kept, parents, UNIT, RUN, EACH
    )  # fmt: skip
    tl.store(start_ptr + image * kept + at, tl.where(offset < 0, -1, first + offset), mask=inside)
    width: tl.constexpr = key_ptr.dtype.element_ty.primitive_bitwidth
    logit_ptr = of_level(logit_ptrs, table, where) + image * length + offset
    logit_ptr = tl.multiple_of(logit_ptr, VECTOR * width // 8)[:, None, None]
    left = tl.multiple_of(tl.where(offset < 0, 0, length - offset), VECTOR)
    part = tl.arange(0, PARTS) * (RUN // PARTS)
    element = part[None, :, None] + tl.arange(0, RUN // PARTS)[None, None, :]
    key = _largest(logit_ptr + element, element < left[:, None, None], key_ptr)  # [BLOCK, PARTS]
    key = tl.where(part[None, :] < left[:, None], key, -(1 << (width - 1)))
    to = image * (room_units * _ROOM) + at[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    tl.store(key_ptr + to, key.to(key_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["rows", "kept"])
def decode_topk_select_kernel(
    key_ptr, best_ptr, row_ptr, rows, room_units, kept, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A program: keys and numbers of the ``kept`` best rows of an image, equal ones in their order; their order stays.

    The key of the last one is found a byte at a time, by counting.
    """
    image = tl.program_id(0).to(tl.int64)
    key_ptr += image * (room_units * _ROOM)
    row_ptr += image * kept
    if best_ptr is not None:
        best_ptr += image * kept
    width: tl.constexpr = key_ptr.dtype.element_ty.primitive_bitwidth
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    byte = tl.arange(0, 256)
    need = kept
    last = _rank(tl.zeros((), key_ptr.dtype.element_ty)) * 0
    for shift in tl.static_range(width - 8, -8, -8):
        counts = tl.zeros([256], tl.int32)
        for begin in range(0, rows, ROWS * COLUMNS):
            at = begin + tl.arange(0, ROWS * COLUMNS)
            rank = _rank(tl.load(key_ptr + at, mask=at < room_units * _ROOM, other=0))
            counted = at < rows
            if shift < width - 8:
                counted &= (rank >> (shift + 8)) == last
            counts += tl.histogram(((rank >> shift) & 255).to(tl.int32), 256, mask=counted)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.sum((at_least >= need).to(tl.int32), 0) - 1
        need -= tl.sum(tl.where(byte > digit, counts, 0), 0)
        last = (last << 8) + digit.to(last.dtype)

    above = 0
    equal = 0
    for begin in range(0, rows, ROWS * COLUMNS):
        at = begin + tile
        key = tl.load(key_ptr + at, mask=at < rows, other=0)
        rank = _rank(key)
        is_above = (rank > last) & (at < rows)
        is_equal = (rank == last) & (at < rows)
        # Both are counted at once, in the two halves of an integer.
        before, total = _before(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16))
        equal_before = equal + (before >> 16)
        taken = is_above | (is_equal & (equal_before < need))
        to = above + (before & 0xFFFF) + tl.minimum(equal_before, need)
        if best_ptr is not None:
            tl.store(best_ptr + to, key, mask=taken)
        tl.store(row_ptr + to, at, mask=taken)
        above += total & 0xFFFF
        equal += total >> 16


@triton.jit(do_not_specialize=["count"])
def decode_topk_sort_kernel(
    sorted_ptr, key_ptr, order_ptr, count, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """A program: sorts BLOCK of the keys [B, count] of an image, taken in ``order``, the largest first.

    By 32 bits of their ranks, from SHIFT on; equal ones stay in order. What is sorted is (rank, count - 1 - place).
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(count, BLOCK)
    image = (program // tiles).to(tl.int64)
    at = program % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    source = at
    if order_ptr is not None:
        source = tl.load(order_ptr + image * count + at, mask=inside, other=0)
    key = tl.load(key_ptr + image * count + source, mask=inside, other=0)
    pair = ((_rank(key) >> SHIFT).to(tl.uint32).to(tl.int64) << 31) + (count - 1 - at)
    pair = tl.sort(tl.where(inside, pair, -1), descending=True)
    tl.store(sorted_ptr + program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), pair)


@triton.jit(do_not_specialize=["count"])
def decode_topk_merge_kernel(
    merged_ptr, sorted_ptr, order_ptr, count, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """A program: puts BLOCK pairs of an image's sorted tiles where they go in the order of all.

    That is the number of pairs before it, which is looked up in every tile.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(count, TILE)
    blocks = tiles * (TILE // BLOCK)
    image = (program // blocks).to(tl.int64)
    sorted_ptr += image * tiles * TILE
    pair = tl.load(sorted_ptr + program % blocks * BLOCK + tl.arange(0, BLOCK))
    to = tl.zeros([BLOCK], tl.int32)
    for tile in range(tiles):
        before = tl.zeros([BLOCK], tl.int32)
        half: tl.constexpr = TILE // 2
        for step in tl.static_range(half.bit_length()):
            other = tl.load(sorted_ptr + tile * TILE + before + ((half >> step) - 1))
            before += tl.where(other > pair, half >> step, 0)
        last = tl.load(sorted_ptr + tile * TILE + before)
        to += before + (last > pair).to(tl.int32)
    exists = pair >= 0
    source = (count - 1 - (pair & 0x7FFFFFFF)).to(tl.int32)
    if order_ptr is not None:
        source = tl.load(order_ptr + image * count + source, mask=exists, other=0)
    tl.store(merged_ptr + image * count + to, source, mask=exists)


@triton.jit
def corners(
    code_ptrs, anchor_ptr, units, firsts, image, anchor, inside, classes,
    UNIT: tl.constexpr, ACC: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Of anchors, along SIDE (0: x, 1: y): size; half of the box's; the box's two corners; where its offset's code
    is.
    """
    logit = anchor * classes
    first = revealed(of_level(firsts, firsts, logit)) // classes
    length = revealed(of_level(units, firsts, logit)) * UNIT // classes
    code_ptr = (
        of_level(code_ptrs, firsts, logit) + (image * length + (anchor - first)) * 4 + (1 - SIDE)
    )
    offset = tl.load(code_ptr, mask=inside, other=0.0).to(ACC)
    extent = tl.load(code_ptr + 2, mask=inside, other=0.0).to(ACC)
    low_ptr = anchor_ptr + anchor.to(tl.int64) * 4 + SIDE
    low = tl.load(low_ptr, mask=inside, other=0.0).to(ACC)
    high = tl.load(low_ptr + 2, mask=inside, other=0.0).to(ACC)
    size = high - low
    half = tl.exp(extent) * size * 0.5
    centre = offset * size + (low + high) * 0.5
    return size, half, centre - half, centre + half, code_ptr


@triton.jit(do_not_specialize=["kept", "parents", "classes"])
def decode_topk_decode_kernel(
    box_ptr, logit_ptr, anchor_index_ptr, class_ptr, order_ptr, row_ptr, parent_ptr,
    logit_ptrs, code_ptrs, anchor_ptr, limit_ptr, units, firsts, kept, parents, classes,
    UNIT: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: the outputs of BLOCK picks of an image, logits that ``located`` finds."""
    program = tl.program_id(0)
    blocks = tl.cdiv(kept, BLOCK)
    image = (program // blocks).to(tl.int64)
    pick = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pick < kept
    at = tl.load(order_ptr + image * kept + pick, mask=inside, other=0)
    first, length, offset, where, table = located(
        row_ptr, parent_ptr, units, firsts, None, image, at, inside, kept, parents, UNIT, 1, EACH
    )  # fmt: skip
    logit = tl.load(
        of_level(logit_ptrs, table, where) + image * length + offset, mask=inside, other=0.0
    )
    anchor = (first + offset) // classes
    to = image * kept + pick
    tl.store(logit_ptr + to, logit, mask=inside)
    tl.store(anchor_index_ptr + to, anchor.to(tl.int64), mask=inside)
    tl.store(class_ptr + to, (first + offset - anchor * classes).to(tl.int64), mask=inside)
    for side in tl.static_range(2):
        _, _, low, high, _ = corners(
            code_ptrs, anchor_ptr, units, firsts, image, anchor, inside, classes, UNIT, ACC, side
        )  # fmt: skip
        if limit_ptr is not None:
            limit = tl.load(limit_ptr + image * 2 + side).to(ACC)
            low = tl.minimum(tl.where(low < 0, 0.0, low), limit, propagate_nan=tl.PropagateNan.ALL)
            high = tl.minimum(
                tl.where(high < 0, 0.0, high), limit, propagate_nan=tl.PropagateNan.ALL
            )
        tl.store(box_ptr + to * 4 + side, low, mask=inside)
        tl.store(box_ptr + to * 4 + side + 2, high, mask=inside)


def levels(maps: Sequence[Tensor]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """UNIT, the kernels' ``units``, and the first logit of each level among those of an image."""
    lengths = _lengths(maps)
    if sum(lengths) > _MOST:
        raise ValueError(f"decode_topk: an image of {sum(lengths)} logits, kernels take {_MOST}")
    unit = _gpu.alignment(*lengths)
    return unit, _gpu.opaque(*(length // unit for length in lengths)), _firsts(lengths)


def _lengths(maps: Sequence[Tensor]) -> list[int]:
    return [x.shape[1:].numel() for x in maps]


def _firsts(counts: Sequence[int]) -> tuple[int, ...]:
    return _gpu.opaque(*itertools.accumulate(counts[:-1], initial=0))


def _room_units(rows: int) -> int:
    return triton.cdiv(rows, _ROOM.value)


def _keys(batch: int, rows: int, like: Tensor) -> Tensor:
    """Memory for a list of keys per image."""
    room = _room_units(rows) * _ROOM.value
    return torch.empty(batch, room, dtype=_KEYS[like.element_size()], device=like.device)


def sort(keys: Tensor) -> Tensor:
    """[B, K]: the places of ``keys`` [B, K] in descending order, equal ones in theirs."""
    batch, count = keys.shape
    options = _triton.config("decode_topk", "sort", keys)
    merge_options = _triton.config("decode_topk", "merge", keys)
    tiles = triton.cdiv(count, options["BLOCK"])
    order = None
    for shift in (0, 32) if keys.element_size() == 8 else (0,):
        tiled = torch.empty(batch, tiles, options["BLOCK"], dtype=torch.int64, device=keys.device)
        merged = torch.empty(batch, count, dtype=torch.int32, device=keys.device)
        _triton.launch(
            decode_topk_sort_kernel, batch * tiles, tiled, keys, order, count, SHIFT=shift, **options
        )  # fmt: skip
        _triton.launch(
            decode_topk_merge_kernel,
            batch * tiles * (options["BLOCK"] // merge_options["BLOCK"]),
            merged, tiled, order, count, TILE=options["BLOCK"], **merge_options,
            trips=(tiles,),
        )  # fmt: skip
        order = merged
    return order


def _select(keys: Tensor, rows: int, kept: int) -> tuple[Tensor, Tensor | None]:
    """Keys and numbers of the ``kept`` best of ``rows``, in their order; without numbers: all."""
    if rows <= kept:
        return keys, None
    batch = keys.shape[0]
    best = torch.empty(batch, kept, dtype=keys.dtype, device=keys.device)
    numbers = torch.empty(batch, kept, dtype=torch.int32, device=keys.device)
    options = _triton.config("decode_topk", "select", keys)
    blocks = triton.cdiv(rows, options["ROWS"] * options["COLUMNS"])
    _triton.launch(
        decode_topk_select_kernel, batch, keys, best, numbers, rows, _room_units(rows), kept, **options,
        trips=(blocks,) * (keys.element_size() + 1),
    )  # fmt: skip
    return best, numbers


def run(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    num_classes: int,
    k: int,
    limits: Tensor | None,
) -> list[Tensor]:
    specs = op._out_spec(cls_outputs, box_outputs, anchors, num_classes, k, limits)
    outputs = _gpu.allocate(specs)
    batch, kept = outputs[1].shape
    if kept == 0:
        return outputs
    maps = flat_maps(cls_outputs)
    first = maps[0]
    unit, units, firsts = levels(maps)
    lengths = _lengths(maps)
    length = _SHORTEST  # of a run
    while length < _LONGEST and sum(lengths) >= 24 * kept * length:
        length *= 2

    options = _triton.config("decode_topk", "runs", first)
    options["BLOCK"] //= length
    counts = [triton.cdiv(n, length) for n in lengths]
    programs = [triton.cdiv(n, options["BLOCK"]) for n in counts]
    first_rows = _firsts(counts)
    rows = sum(counts)
    keys = _keys(batch, rows, first)
    _triton.launch(
        decode_topk_runs_kernel, batch * sum(programs),
        keys, maps, units, first_rows, _firsts(programs), sum(programs), _room_units(rows),
        UNIT=unit, RUN=length, **options,
    )  # fmt: skip
    keys, numbers = _select(keys, rows, kept)
    runs, starts, each = min(rows, kept), None, 1
    while length > 1:
        part = 1 if length <= 16 else 8
        options = _triton.config("decode_topk", "parts", first)
        options["BLOCK"] //= length
        new_starts = torch.empty(batch, runs, dtype=torch.int32, device=first.device)
        rows = runs * (length // part)
        keys = _keys(batch, rows, first)
        addresses = [x.data_ptr() for x in maps]
        aligned = math.gcd(
            16, length * first.element_size(), unit * first.element_size(), *addresses
        )
        _triton.launch(
            decode_topk_parts_kernel, batch * triton.cdiv(runs, options["BLOCK"]),
            keys, new_starts, numbers, starts, maps, units, firsts, first_rows,
            runs, 0 if starts is None else starts.shape[1], _room_units(rows),
            UNIT=unit, RUN=length, EACH=each, PARTS=length // part,
            VECTOR=aligned // first.element_size(), **options,
        )  # fmt: skip
        starts, each, length = new_starts, length // part, part
        keys, numbers = _select(keys, rows, kept)
        runs = min(rows, kept)

    options = _triton.config("decode_topk", "decode", first)
    _triton.launch(
        decode_topk_decode_kernel, batch * triton.cdiv(kept, options["BLOCK"]),
        *outputs, sort(keys[:, :kept].contiguous()), numbers, starts, maps, flat_maps(box_outputs),
        anchors.contiguous(), _gpu.dense(limits), units, firsts,
        kept, starts.shape[1], num_classes,
        UNIT=unit, EACH=each, ACC=_gpu.accumulator(first.dtype), **options,
    )  # fmt: skip
    return outputs
