"""Triton kernels that order the picks of each image, stably: tiles are sorted, then merged."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels.ops.decode_topk.triton_search import key_rank


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
    pair = ((key_rank(key) >> SHIFT).to(tl.uint32).to(tl.int64) << 31) + (count - 1 - at)
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


def sort(keys: Tensor) -> Tensor:
    """[B, K]: the places of ``keys`` [B, K] in descending order, equal ones in theirs."""
    batch, count = keys.shape
    options = _triton.config("decode_topk", "sort", keys)
    tile = options["BLOCK"] = min(options["BLOCK"], triton.next_power_of_2(max(count, 16)))
    merge_options = _triton.config("decode_topk", "merge", keys)
    block = merge_options["BLOCK"] = min(merge_options["BLOCK"], tile)
    tiles = triton.cdiv(count, tile)
    order = None
    for shift in (0, 32) if keys.element_size() == 8 else (0,):
        tiled = torch.empty(batch, tiles, tile, dtype=torch.int64, device=keys.device)
        merged = torch.empty(batch, count, dtype=torch.int32, device=keys.device)
        _triton.launch(
            decode_topk_sort_kernel, batch * tiles, tiled, keys, order, count, SHIFT=shift, **options
        )  # fmt: skip
        _triton.launch(
            decode_topk_merge_kernel, batch * tiles * (tile // block),
            merged, tiled, order, count, TILE=tile, trips=(tiles,), **merge_options,
        )  # fmt: skip
        order = merged
    return order
