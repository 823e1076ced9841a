"""What Triton kernels share: activations and their derivatives, on values in the accumulation dtype."""

from __future__ import annotations

import triton
import triton.language as tl

from effdet_kernels import _triton

# The GPU's approximations: one instruction for a reciprocal, where a division takes eight, and one for a power.
_APPROXIMATE = tl.constexpr(not _triton.INTERPRET)


@triton.jit
def reciprocal(x):
    """1 / x, x > 0; in float32 at most 1 ulp off."""
    if _APPROXIMATE and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def exp(x, FACTOR: tl.constexpr = 1.0):
    """e^(FACTOR x); in float32 about 2 ulp off more than a rounding of x, and 0 where the result would be subnormal."""
    if _APPROXIMATE and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [x * (1.4426950408889634 * FACTOR)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.exp(x * FACTOR)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); where exp overflows the result is 0."""
    return reciprocal(1.0 + exp(x, -1.0))  # triton 3.6 would compile -x to an instruction


@triton.jit
def _mish_ratio(x):
    """tanh(softplus(x)) = n / (n + 2) with n = e (e + 2), e = exp(x); 1 beyond 20."""
    e = exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    return n * reciprocal(n + 2.0)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation named ``ACT``; NaN stays NaN."""
    if ACT == "swish":
        return x * sigmoid(x)
    if ACT == "relu":
        return tl.where(x < 0, 0.0, x)
    if ACT == "relu6":
        return tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    if ACT == "hard_swish":
        inner = x + 3.0
        return x * tl.where(inner < 0, 0.0, tl.where(inner > 6, 6.0, inner)) * (1.0 / 6.0)
    if ACT == "leaky_relu":
        return tl.where(x < 0, 0.01 * x, x)
    if ACT == "mish":
        return x * _mish_ratio(x)
    return x


@triton.jit
def slope(x, ACT: tl.constexpr):
    """The derivative of the activation at ``x``; at a kink what torch takes."""
    if ACT == "swish":
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    if ACT == "relu":
        return tl.where(x > 0, 1.0, 0.0).to(x.dtype)
    if ACT == "relu6":
        return tl.where((x > 0) & (x < 6), 1.0, 0.0).to(x.dtype)
    if ACT == "hard_swish":
        return tl.where(x <= -3, 0.0, tl.where(x >= 3, 1.0, (2.0 * x + 3.0) * (1.0 / 6.0)))
    if ACT == "leaky_relu":
        return tl.where(x > 0, 1.0, tl.full(x.shape, 0.01, x.dtype))  # a literal would be float32
    if ACT == "mish":
        t = _mish_ratio(x)
        return t + x * (1.0 - t * t) * sigmoid(x)
    return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def revealed(number):
    """The number that ``_gpu.opaque`` made ``number`` of."""
    return (number - 3) >> 1


@triton.jit
def affine_act(z, scale_ptr, shift_ptr, at, inside, ACT: tl.constexpr):
    """act(z * scale + shift) of z [ROWS, BLOCK]; vectors at channels ``at`` [BLOCK]; None: 1 and 0."""
    if scale_ptr is not None:
        z = z * tl.load(scale_ptr + at, mask=inside, other=0.0)[None, :]
    if shift_ptr is not None:
        z = z + tl.load(shift_ptr + at, mask=inside, other=0.0)[None, :]
    return activate(z, ACT)


@triton.jit
def affine_act_gradient(grad, z, scale_ptr, shift_ptr, at, inside, ACT: tl.constexpr):
    """Of y = act(z * scale + shift), all [ROWS, BLOCK]: the gradients of z and of z * scale + shift."""
    v = z
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0)[None, :]
        v = v * scale
    if shift_ptr is not None:
        v = v + tl.load(shift_ptr + at, mask=inside, other=0.0)[None, :]
    before = grad
    if ACT != "none":
        before = grad * slope(v, ACT)
    delta = before
    if scale_ptr is not None:
        delta = before * scale
    return delta, before


@triton.jit
def merged_moments(means, spreads, counts):
    """Chan's formula along the first axis: counts [N], some of them 0; means and sums of squares about them [N, BLOCK].

    Returns mean, sum of squares and count of all.
    """
    count = tl.sum(counts, 0)
    mean = tl.sum(means * counts[:, None], 0) / tl.maximum(count, 1.0)
    apart = means - mean[None, :]
    return mean, tl.sum(spreads + apart * apart * counts[:, None], 0), count


@triton.jit
def store_merged_moments(
    parts_ptr, counts_ptr, part, mean, spread, count, at, inside, channels, counting
):
    """What ``merged_moments`` gives, as a part for ``batch_norm_act.triton_fwd.merge_statistics``.

    The program with ``counting`` stores the count.
    """
    parts_ptr += part.to(tl.int64) * 2 * channels + at
    tl.store(parts_ptr, mean, mask=inside)
    tl.store(parts_ptr + channels, spread, mask=inside)
    tl.store(counts_ptr + part, count, mask=counting)


@triton.jit
def store_moments(parts_ptr, counts_ptr, part, z, exists, at, inside, channels, counting):
    """A part of the rows that exist of a tile z [ROWS, BLOCK], as ``store_merged_moments`` lays it out."""
    count = tl.sum(exists.to(z.dtype), 0)
    mean = tl.sum(tl.where(exists[:, None], z, 0.0), 0) / tl.maximum(count, 1.0)
    centred = tl.where(exists[:, None], z - mean[None, :], 0.0)
    spread = tl.sum(centred * centred, 0)
    store_merged_moments(
        parts_ptr, counts_ptr, part, mean, spread, count, at, inside, channels, counting
    )


@triton.jit
def number(bits, dtype: tl.constexpr):
    """The number that a launcher passed as ``_gpu.bits``."""
    return tl.full((), bits, tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def ordered(x):
    """int32, or int64 of float64, in the order of the numbers x, none of which is NaN; -0 is 0."""
    width: tl.constexpr = x.dtype.primitive_bitwidth
    if width == 64:
        bits = x.to(tl.int64, bitcast=True)
    elif width == 32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, -(1 << (width - 1)) - bits, bits)
