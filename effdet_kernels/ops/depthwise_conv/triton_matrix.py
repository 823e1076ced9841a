"""Depthwise products on matrix units, two taps at a time.

8 channels of pixels under a tap and the same 8 under another are a row [16] of the left factor. The right one [16, 8]
is the two taps' weights as diagonal matrices, one above the other. 1 product in 8 is of use, where one diagonal matrix
[16, 16] a tap would use 1 in 16. A program has 16 channels, two groups of 8: the least that memory hands out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def within(c, channels, WHOLE: tl.constexpr):
    """Which of the channels c there are; with WHOLE all."""
    if WHOLE:
        inside = tl.zeros(c.shape, tl.int32) == 0
    else:
        inside = c < channels
    return inside


@triton.jit
def pairs(
    weight_ptr, first_channel, channels,
    K: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The right factors [16, 8], by groups, rows of the kernel, and pairs of its columns j and j + STEP.

    STEP columns begin a pair, STEP do not, and so on; what lies beyond the kernel is zero.
    """
    own = (tl.arange(0, 16) % 8)[:, None] == tl.arange(0, 8)[None, :]
    first, second = own & (tl.arange(0, 16) < 8)[:, None], own & (tl.arange(0, 16) >= 8)[:, None]
    found = ()
    for group in tl.static_range(2):
        c = first_channel + group * 8 + tl.arange(0, 8)
        inside = within(c, channels, WHOLE)
        weight_ptrs = weight_ptr + c * (K * K)
        for i in tl.static_range(K):
            for j in tl.static_range(K):
                if j // STEP % 2 == 0:
                    weight = tl.load(weight_ptrs + (i * K + j), mask=inside, other=0.0).to(DTYPE)
                    pair = tl.where(first, weight[None, :], 0.0)
                    if j + STEP < K:
                        after = tl.load(weight_ptrs + (i * K + j + STEP), mask=inside, other=0.0)
                        pair = tl.where(second, after.to(DTYPE)[None, :], pair)
                    found = found + (pair.to(DTYPE),)
    return found


@triton.jit
def load_pairs(
    x_ptr, exists, stride_w, width, column, first_channel, channels, J: tl.constexpr, K: tl.constexpr,
    STEP: tl.constexpr, BY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The left factors [BLOCK_W, 16] of a row at ``x_ptr`` for the pair of taps J and J + STEP, one for each group.

    Those of J are the pixels ``column`` [BLOCK_W], those of the other tap the pixels BY beside them.
    """
    channel, second = tl.arange(0, 16) % 8, tl.arange(0, 16) // 8
    at = column[:, None] + (second * BY)[None, :]
    inside = exists & (at >= 0) & (at < width)
    if J + STEP >= K:
        inside = inside & (second == 0)[None, :]
    found = ()
    for group in tl.static_range(2):
        c = first_channel + group * 8 + channel
        mask = inside & within(c, channels, WHOLE)[None, :]
        found = found + (tl.load(x_ptr + at * stride_w + c[None, :], mask=mask, other=0.0),)
    return found


@triton.jit
def load_row_pairs(
    x_ptr, row, height, stride_h, stride_w, width, column, first_channel, channels,
    K: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """STRIDE input rows from ``row`` on, each as left factors for all pairs of neighbouring columns of the kernel.

    The kernel's first column is in the columns ``column`` [BLOCK_W] of x.
    """
    found = ()
    for q in tl.static_range(STRIDE):
        source_row = row + q + tl.zeros_like(column)
        exists = ((source_row >= 0) & (source_row < height))[:, None]
        for j in tl.static_range(0, K, 2):
            found = found + load_pairs(
                x_ptr + (row + q) * stride_h, exists, stride_w, width, column + j, first_channel, channels,
                j, K, 1, 1, WHOLE,
            )  # fmt: skip
    return found


@triton.jit
def with_row_pairs(sums, weights, rows, K: tl.constexpr, STRIDE: tl.constexpr):
    """``sums``, of output rows by groups, newest first, and what ``rows`` add."""
    PAIRS: tl.constexpr = (K + 1) // 2
    for q in tl.static_range(STRIDE):
        for pair in tl.static_range(PAIRS):
            added = ()
            for k in tl.static_range(len(sums)):
                total = sums[k]
                if k // 2 * STRIDE + q < K:
                    left = rows[(q * PAIRS + pair) * 2 + k % 2]
                    right = weights[(k % 2 * K + k // 2 * STRIDE + q) * PAIRS + pair]
                    total = tl.dot(left, right, acc=total, out_dtype=total.dtype)
                added = added + (total,)
            sums = added
    return sums


@triton.jit
def with_column_pairs(dx, weights, delta, j: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr):
    """``dx``, by input rows, remainders of columns, groups, and what the pair of taps adds that begins with j."""
    PAIRS: tl.constexpr = len(weights) // (K * 2)
    PAIR: tl.constexpr = j // (2 * STRIDE) * STRIDE + j % (2 * STRIDE)
    added = ()
    for k in tl.static_range(len(dx)):
        total = dx[k]
        if k // 2 % STRIDE == j % STRIDE and k // (2 * STRIDE) < K:
            right = weights[(k % 2 * K + k // (2 * STRIDE)) * PAIRS + PAIR]
            total = tl.dot(delta[k % 2], right, acc=total, out_dtype=total.dtype)
        added = added + (total,)
    return added


@triton.jit
def squares(K: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr):
    """[16, 8] of zeros by rows of the kernel, pairs of its columns j and j + STEP, and groups.

    Two squares one above the other, of which the diagonals are the weights' gradients.
    """
    found = ()
    for _ in tl.static_range(K):
        for j in tl.static_range(K):
            if j // STEP % 2 == 0:
                for _ in tl.static_range(2):
                    found = found + (tl.zeros((16, 8), ACC),)
    return found


@triton.jit
def with_squares(dweight, x, delta, j: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr):
    """``dweight``, as ``squares``, and what the pair of taps adds that begins with j."""
    PAIRS: tl.constexpr = len(dweight) // (K * 2)
    PAIR: tl.constexpr = j // (2 * STRIDE) * STRIDE + j % (2 * STRIDE)
    added = ()
    for k in tl.static_range(len(dweight)):
        total = dweight[k]
        if k // 2 % PAIRS == PAIR:
            right = x[(k // (2 * PAIRS) * STRIDE + j % STRIDE) * 2 + k % 2]
            total = tl.dot(tl.trans(delta[k % 2]), right, acc=total, out_dtype=total.dtype)
        added = added + (total,)
    return added


@triton.jit
def of_square(
    dweight, i: tl.constexpr, j: tl.constexpr, group: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of tap (i, j) [8], of a group's channels."""
    PAIRS: tl.constexpr = len(dweight) // (K * 2)
    FIRST: tl.constexpr = j - j // STRIDE % 2 * STRIDE
    PAIR: tl.constexpr = FIRST // (2 * STRIDE) * STRIDE + FIRST % (2 * STRIDE)
    row = tl.arange(0, 16)
    own = (row - j // STRIDE % 2 * 8)[:, None] == tl.arange(0, 8)[None, :]
    return tl.sum(tl.where(own, dweight[(i * PAIRS + PAIR) * 2 + group], 0.0), 0)


@triton.jit
def spoilt(row):
    """[BLOCK_W, 8] of zeros, or NaN where a sum of one of the groups is not finite."""
    return (row[0] + row[1]) * 0.0


@triton.jit
def joined(parts):
    """The groups' [BLOCK_W, 8] as [BLOCK_W, 16]; what is one tensor as it is."""
    z = parts[0]
    if len(parts) == 2:
        z = tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1))
        z = tl.reshape(z, (z.shape[0], 16))
    return z
