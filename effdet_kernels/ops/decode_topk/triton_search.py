"""Triton kernels that find the K best logits of each image: all logits are read once.

The K best logits are in the K best runs of logits, where runs are ranked by their largest logit and equal ones by their
place: before a run that is passed over are K, whose largest logits come before all of its own. So it goes down: of all
runs the K best, of the parts of these the K best, ..., at last of the logits. Sizes depend on shapes alone.
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
from effdet_kernels.ops.detection_loss.triton_fwd import of_level

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
def key_rank(key):
    """Unsigned integers in the order of keys."""
    half: tl.constexpr = 1 << (key.dtype.primitive_bitwidth - 1)
    if key.dtype == tl.int64:
        bits = key.to(tl.uint64, bitcast=True)
    else:
        bits = key.to(tl.int32).to(tl.uint32, bitcast=True)
    return bits + half


@triton.jit
def _before(flags):
    """Of integers [ROWS, COLUMNS], in row-major order: the sum of those before each, and of all."""
    of_row = tl.sum(flags, 1)
    above = tl.cumsum(of_row, 0) - of_row
    return tl.cumsum(flags, 1) - flags + above[:, None], tl.sum(of_row, 0)


@triton.jit(do_not_specialize=["programs", "room_units"])
def decode_topk_runs_kernel(
    key_ptr, logit_ptrs, units, first_rows, first_programs, programs, room_units,
    UNIT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: the keys of BLOCK runs, of RUN logits each, of a level of an image."""
    image = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    length = revealed(of_level(units, first_programs, program)) * UNIT
    first_row = (program - revealed(of_level(first_programs, first_programs, program))) * BLOCK
    row = first_row + tl.arange(0, BLOCK)
    at = (row * RUN)[:, None] + tl.arange(0, RUN)[None, :]
    logit_ptr = of_level(logit_ptrs, first_programs, program) + image * length
    key = _largest(logit_ptr + at, at < length, key_ptr)
    to = revealed(of_level(first_rows, first_programs, program)) + row
    tl.store(key_ptr + image * (room_units * _ROOM) + to, key, mask=row * RUN < length)


@triton.jit
def block_of_list(kept, BLOCK: tl.constexpr):
    """The program's image, places of its list of ``kept``, and which of them are in it."""
    program = tl.program_id(0)
    blocks = tl.cdiv(kept, BLOCK)
    place = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), place, place < kept


@triton.jit
def located(
    row_ptr, parent_ptr, logit_ptrs, units, firsts, first_rows, image, at, inside, kept, parents,
    UNIT: tl.constexpr, RUN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Of rows ``at`` of a list [B, kept]: logits of the level, its first one's place, its length, a run's place in it.

    row_ptr None: all rows. A row is the number of a run of RUN logits: among all of an image, or among EACH in each run
    that starts at parent_ptr [B, parents]. The place is -1 where there is no run.
    """
    row = at
    if row_ptr is not None:
        row = tl.load(row_ptr + image * kept + at, mask=inside, other=0)
    if parent_ptr is None:
        known, table = row, first_rows
        place = (row - revealed(of_level(first_rows, first_rows, row))) * RUN
    else:
        known = tl.load(parent_ptr + image * parents + row // EACH, mask=inside, other=-1)
        table = firsts
        place = known - revealed(of_level(firsts, firsts, known)) + row % EACH * RUN
    first = revealed(of_level(firsts, table, known))
    length = revealed(of_level(units, table, known)) * UNIT
    level_ptr = of_level(logit_ptrs, table, known) + image * length
    exists = inside & (known >= 0) & (place < length)
    return level_ptr, first, length, tl.where(exists, place, -1)


@triton.jit(do_not_specialize=["kept", "parents", "room_units"])
def decode_topk_parts_kernel(
    key_ptr, start_ptr, row_ptr, parent_ptr, logit_ptrs, units, firsts, first_rows,
    kept, parents, room_units,
    UNIT: tl.constexpr, RUN: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK runs of an image's list: where each starts, or -1, and the keys of its PARTS parts.

    ``located`` says what the list is. A part that does not exist has the lowest integer.
    """
    image, at, inside = block_of_list(kept, BLOCK)
    level_ptr, first, length, place = located(
        row_ptr, parent_ptr, logit_ptrs, units, firsts, first_rows, image, at, inside, kept, parents,
        UNIT, RUN, EACH,
    )  # fmt: skip
    tl.store(start_ptr + image * kept + at, tl.where(place < 0, -1, first + place), mask=inside)
    width: tl.constexpr = key_ptr.dtype.element_ty.primitive_bitwidth
    run_ptr = tl.multiple_of(level_ptr + place, VECTOR * width // 8)[:, None, None]
    left = tl.multiple_of(tl.where(place < 0, 0, length - place), VECTOR)
    part = tl.arange(0, PARTS) * (RUN // PARTS)
    element = part[None, :, None] + tl.arange(0, RUN // PARTS)[None, None, :]
    key = _largest(run_ptr + element, element < left[:, None, None], key_ptr)  # [BLOCK, PARTS]
    key = tl.where(part[None, :] < left[:, None], key, -(1 << (width - 1)))
    to = image * (room_units * _ROOM) + at[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    tl.store(key_ptr + to, key.to(key_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["rows", "room_units", "kept"])
def decode_topk_select_kernel(
    key_ptr, best_ptr, row_ptr, rows, room_units, kept, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A program: the numbers, and keys, of an image's ``kept`` best rows, the first of equal ones; in ascending order.

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
    last = tl.zeros((), tl.uint64 if width == 64 else tl.uint32)
    for shift in tl.static_range(width - 8, -8, -8):
        counts = tl.zeros([256], tl.int32)
        for begin in range(0, rows, ROWS * COLUMNS):
            at = begin + tl.arange(0, ROWS * COLUMNS)
            rank = key_rank(tl.load(key_ptr + at, mask=at < room_units * _ROOM, other=0))
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
        rank = key_rank(key)
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


def _select(keys: Tensor, rows: int, kept: int, last: bool) -> tuple[Tensor | None, Tensor | None]:
    """Keys (only of the ``last`` selection) and numbers of the ``kept`` best of ``rows``; None for numbers: of all."""
    if rows <= kept:
        return keys[:, :rows].contiguous(), None
    batch = keys.shape[0]
    best = torch.empty(batch, kept, dtype=keys.dtype, device=keys.device) if last else None
    numbers = torch.empty(batch, kept, dtype=torch.int32, device=keys.device)
    options = _triton.config("decode_topk", "select", keys)
    blocks = triton.cdiv(rows, options["ROWS"] * options["COLUMNS"])
    _triton.launch(
        decode_topk_select_kernel, batch, keys, best, numbers, rows, _room_units(rows), kept, **options,
        trips=(blocks,) * (keys.element_size() + 1),
    )  # fmt: skip
    return best, numbers


def search(
    maps: Sequence[Tensor], kept: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """The ``kept`` best logits of each image, by their place in it.

    Returns:
        Their keys [B, kept], and what ``located`` takes to find them: row_ptr, parent_ptr, EACH.
    """
    first = maps[0]
    batch, itemsize = first.shape[0], first.element_size()
    unit, units, firsts = levels(maps)
    lengths = _lengths(maps)
    run = _SHORTEST
    while (
        run < _LONGEST and sum(lengths) >= 24 * kept * run
    ):  # at least 12 runs for each that is wanted
        run *= 2
    options = _triton.config("decode_topk", "runs", first)
    options["BLOCK"] //= run
    counts = [triton.cdiv(length, run) for length in lengths]
    programs = [triton.cdiv(count, options["BLOCK"]) for count in counts]
    first_rows = _firsts(counts)
    rows = sum(counts)
    keys = _keys(batch, rows, first)
    _triton.launch(
        decode_topk_runs_kernel, batch * sum(programs),
        keys, maps, units, first_rows, _firsts(programs), sum(programs), _room_units(rows),
        UNIT=unit, RUN=run, **options,
    )  # fmt: skip
    best, numbers = _select(keys, rows, kept, last=False)
    parents, each = None, 1
    addresses = [x.data_ptr() for x in maps]
    while run > 1:
        part = run // 8 if run > 16 else 1
        runs = min(rows, kept)
        rows = runs * (run // part)
        options = _triton.config("decode_topk", "parts", first)
        options["BLOCK"] //= run
        starts = torch.empty(batch, runs, dtype=torch.int32, device=first.device)
        keys = _keys(batch, rows, first)
        aligned = math.gcd(16, run * itemsize, unit * itemsize, *addresses)
        _triton.launch(
            decode_topk_parts_kernel, batch * triton.cdiv(runs, options["BLOCK"]),
            keys, starts, numbers, parents, maps, units, firsts, first_rows,
            runs, 0 if parents is None else parents.shape[1], _room_units(rows),
            UNIT=unit, RUN=run, EACH=each, PARTS=run // part, VECTOR=aligned // itemsize, **options,
        )  # fmt: skip
        best, numbers = _select(keys, rows, kept, last=part == 1)
        parents, each, run = starts, run // part, part
    return best, numbers, parents, each
