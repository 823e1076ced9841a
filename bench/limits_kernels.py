"""Triton kernels of ``python -m bench limits``: each loops over one thing, so that the slope over its trips is that
thing's time. With TRITON_INTERPRET=1 what has no counterpart on a CPU (clocks, early launches) is left out.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels.ops._tl import activate, reciprocal

WARPS = 8  # of a program; of 32 registers a thread at most, so that as many are resident as a GPU has threads for
_ON_GPU = tl.constexpr(not _triton.INTERPRET)

# Chain -------------------------------------------------------------------------------------------


@triton.jit
def chain_kernel(counts_ptr, EARLY: tl.constexpr):
    """Adds 1 to a count of each program. EARLY: the next launch may begin now, and waits before it reads."""
    if EARLY and _ON_GPU:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = counts_ptr + tl.program_id(0)
    tl.store(at, tl.load(at) + 1)


def chain(counts: Tensor, times: int, early: bool) -> None:
    """``times`` launches, each of as many programs as there are ``counts``, int32 [N]."""
    for _ in range(times):
        _triton.launch(
            chain_kernel, len(counts), counts, EARLY=early, launch_pdl=early, num_warps=1
        )


# Memory ------------------------------------------------------------------------------------------

BLOCK = 2048  # int32 of a tile, 8 KB: two loads of 16 bytes for each of 256 threads


@triton.jit
def copy_kernel(from_ptr, to_ptr, tiles, visits, BLOCK: tl.constexpr):
    """Tiles one after another, ``visits`` in all, from the first again after the last; past the L1 cache."""
    inside = tl.arange(0, BLOCK)
    for visit in range(tl.program_id(0), visits, tl.num_programs(0)):
        at = (visit & (tiles - 1)) * BLOCK + inside
        tl.store(to_ptr + at, tl.load(from_ptr + at, cache_modifier=".cg"))


@triton.jit
def read_kernel(from_ptr, sums_ptr, tiles, visits, BLOCK: tl.constexpr):
    """The same tiles, of which each program stores the sum, modulo 2^32."""
    inside = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for visit in range(tl.program_id(0), visits, tl.num_programs(0)):
        at = (visit & (tiles - 1)) * BLOCK + inside
        total += tl.load(from_ptr + at, cache_modifier=".cg")
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def copy(source: Tensor, target: Tensor, passes: int, programs: int) -> None:
    """Copies int32 [a power of two of tiles of BLOCK] ``passes`` times."""
    _visit(copy_kernel, source, target, passes, programs)


def read(source: Tensor, sums: Tensor, passes: int) -> None:
    """Reads it ``passes`` times; the sum of ``sums``, int32 [programs], is that of all that was read."""
    _visit(read_kernel, source, sums, passes, len(sums))


def _visit(kernel: Any, source: Tensor, result: Tensor, passes: int, programs: int) -> None:
    tiles = source.numel() // BLOCK
    options = {"BLOCK": BLOCK, "num_warps": WARPS}
    _triton.launch(kernel, programs, source, result, tiles, passes * tiles, **options)


# Rates -------------------------------------------------------------------------------------------

# Of each kind: how often a trip of the loop does it to each value, unrolled.
STEPS = {
    "ffma": 64,
    "ex2": 16,
    "tanh": 16,
    "rcp": 16,
    "swish": 16,
    "swish_tanh": 16,
    "to_bf16": 32,
}
VALUES = 1024  # of a program, 4 a thread


@triton.jit
def now():
    """The clock cycles of this multiprocessor and nanoseconds; on a CPU 0."""
    if _ON_GPU:
        cycles = tl.inline_asm_elementwise(
            "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
        return cycles, tl.extra.cuda.globaltimer()
    zero = tl.full((), 0, tl.int64)
    return zero, zero


@triton.jit
def store_since(begin, clocks_ptr):
    """What passed since ``now`` gave ``begin``, as this program's row of int64 [programs, 2]."""
    end = now()
    clocks_ptr += tl.program_id(0) * 2
    tl.store(clocks_ptr, end[0] - begin[0])
    tl.store(clocks_ptr + 1, end[1] - begin[1])


@triton.jit
def tanh(x):
    """In float32 about 2^-11 off, relatively."""
    if _ON_GPU:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def ex2(x):
    """2^x."""
    if _ON_GPU:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def two_bf16(x, y):
    """x and y as bfloat16 in the halves of a number that is taken for float32: nearly x."""
    if _ON_GPU:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;",
            "=r,f,f",
            [x, y],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        ).to(tl.float32, bitcast=True)
    # The interpreter does not round to nearest.
    upper, lower = x.to(tl.int32, bitcast=True), y.to(tl.int32, bitcast=True)
    upper += 0x7FFF + ((upper >> 16) & 1)
    lower += 0x7FFF + ((lower >> 16) & 1)
    return ((upper & -65536) | (lower >> 16 & 0xFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def stepped(x, scale, shift, KIND: tl.constexpr):
    """Of numbers in (0, 2) again such. What is added besides takes slots that the special functions leave free."""
    if KIND == "ffma":
        return x * scale + shift
    if KIND == "ex2":
        return ex2(-x)
    if KIND == "tanh":
        return tanh(x)
    if KIND == "rcp":
        return reciprocal(x + shift)  # 1 / (1 / x) would not be computed
    if KIND == "swish":
        return activate(x, "swish") + shift
    half = 0.5 * x  # swish_tanh
    return half * tanh(half) + (half + shift)


@triton.jit(do_not_specialize=["trips"])
def rate_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, clocks_ptr, trips,
    KIND: tl.constexpr, STEPS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """VALUES numbers a program, each taken through ``trips`` times STEPS steps that depend on each other."""
    program = tl.program_id(0)
    at = program * VALUES + tl.arange(0, VALUES)
    x, scale, shift = tl.load(x_ptr + at), tl.load(scale_ptr + at), tl.load(shift_ptr + at)
    begin = now()
    for _ in range(trips):
        for _ in tl.static_range(STEPS):
            if KIND == "to_bf16":
                x, scale = two_bf16(x, scale), x
            else:
                x = stepped(x, scale, shift, KIND)
    tl.store(y_ptr + at, x)
    store_since(begin, clocks_ptr)


def rate(kind: str, inputs: Tensor, result: Tensor, clocks: Tensor, trips: int) -> None:
    """Takes the first of three inputs, float32 [3, programs * VALUES], through the steps of ``kind``.

    The others are factors and summands, of the kinds that have them. Clocks, int64 [programs, 2]: cycles and
    nanoseconds.
    """
    _triton.launch(
        rate_kernel,
        len(clocks),
        *inputs, result, clocks, trips,
        KIND=kind, STEPS=STEPS[kind], VALUES=VALUES, num_warps=WARPS,
    )  # fmt: skip


# Matrix products ---------------------------------------------------------------------------------

# Rows, columns and depth of a program's tile, by the instruction that it takes on Hopper, and how many of them a
# multiprocessor holds there.
TILES = {"hgmma": (128, 256, 128, 1), "hmma": (32, 256, 64, 3)}


@triton.jit(do_not_specialize=["trips"])
def product_kernel(
    a_ptr, b_ptr, c_ptr, clocks_ptr, trips,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """c += a @ b, ``trips`` times; a and b stay in shared memory, c in registers until the end."""
    row, column, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    a = tl.load(a_ptr + row[:, None] * DEPTH + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * COLUMNS + column[None, :])
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = now()
    for _ in range(trips):
        total = tl.dot(a, b, total)
    c_ptr += tl.program_id(0) * ROWS * COLUMNS
    tl.store(c_ptr + row[:, None] * COLUMNS + column[None, :], total)
    store_since(begin, clocks_ptr)


def product(a: Tensor, b: Tensor, c: Tensor, clocks: Tensor, trips: int) -> None:
    """In each program ``trips`` times a [ROWS, DEPTH] @ b [DEPTH, COLUMNS]; c is float32 [programs, ROWS, COLUMNS]."""
    (rows, depth), columns = a.shape, b.shape[1]
    _triton.launch(
        product_kernel,
        len(clocks),
        a, b, c, clocks, trips,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=WARPS,
    )  # fmt: skip
