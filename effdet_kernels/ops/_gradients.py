"""What the backwards of the convolution ops are composed of: launchers of csrc/cpu/gradients.h.

Everything is float32 or float64 here: a backward widens its arguments first (``wide``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _native
from effdet_kernels.ops import _cpu
from effdet_kernels.ops._activations import widen

_HALF = (torch.bfloat16, torch.float16)


def wide(values: Iterable[Any]) -> list[Any]:
    """``values`` with bfloat16 and float16 tensors, also in lists, in float32."""
    return [
        [widen(v) for v in value]
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)
        else widen(value)
        if isinstance(value, Tensor) and value.dtype in _HALF
        else value
        for value in values
    ]


def wanted(variables: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
    """``needs`` sorted to ``variables``: a flag for a tensor, a list of flags for a list, False for None."""
    flags = iter(needs)
    return [
        [next(flags) for _ in value]
        if isinstance(value, (list, tuple))
        else next(flags)
        if isinstance(value, Tensor)
        else False
        for value in variables
    ]


def chosen(found: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """The gradients that are wanted."""
    return [g for g, need in zip(found, needs, strict=True) if need and g is not None]


def affine(
    grad: Tensor,
    z: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of y = act(z * scale + shift): the gradients of z, scale (if z is given) and shift.

    grad and z [B, C, H, W]; z may be None where there is no activation; its gradient is ``grad`` itself where there
    is no scale either. With ``overwrite`` z, dense, becomes its gradient: a map less to allocate.
    """
    batch, channels, height, width = grad.shape
    if batch == 0:
        zero = grad.new_zeros(channels)
        return torch.zeros_like(grad), zero, zero
    grad = _cpu.pixels_inner(grad)
    z = None if z is None else _cpu.pixels_inner(z)
    pixels = height * width
    delta = z if overwrite else None
    if delta is None and not (z is None and scale is None):
        delta = torch.empty(grad.shape, dtype=grad.dtype, memory_format=torch.channels_last)
    of_scale, of_shift = (torch.empty(channels, dtype=grad.dtype) for _ in range(2))
    blocks = _native.module().gradient_blocks(batch, pixels)
    packed = _cpu.affine(scale, shift, channels, grad.dtype)
    _native.launch(
        "affine_gradient",
        dtype=_cpu.code(grad.dtype),
        act=_cpu.act_code(act),
        batch=batch,
        pixels=pixels,
        channels=channels,
        grad=grad,
        grad_batch_stride=grad.stride(0),
        grad_pixel_stride=_cpu.pixel_stride(grad),
        z=z,
        z_batch_stride=0 if z is None else z.stride(0),
        z_pixel_stride=0 if z is None else _cpu.pixel_stride(z),
        scale=packed[0],
        shift=packed[1],
        delta=delta,
        grad_scale=of_scale,
        grad_shift=of_shift,
        partial=torch.empty(blocks * 2 * channels, dtype=grad.dtype),
    )
    return grad if delta is None else delta, of_scale, of_shift


def product(
    a: _cpu.MapFields, rows: int, b: _cpu.MapFields, columns: int, gate: Tensor | None = None
) -> Tensor:
    """[rows, columns]: the sums over images and pixels of a[., r] * b[., c] * gate[image, c].

    The kernel has vectors of b and single numbers of a: the wider map is b, as far as it depends on this function.
    """
    dtype, batch = a[0].dtype, a[0].shape[0]
    if batch == 0:
        return torch.zeros(rows, columns, dtype=dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    transposed = rows > columns and gate is None
    if transposed:
        a, rows, b, columns = b, columns, a, rows
    segments = _native.module().product_segments(batch, a[1], a[2])
    _native.launch(
        "product_gradient",
        dtype=_cpu.code(dtype),
        batch=batch,
        rows=rows,
        columns=columns,
        transposed=int(transposed),
        a=a,
        b=b,
        gate=None if gate is None else _cpu.vectors(gate, dtype),
        out=out,
        partial=torch.empty(segments * rows * columns, dtype=dtype),
    )
    return out


def gate(grad: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Of y = x * gate[b, c]: the gradient of gate; ``grad``, dense, becomes that of x."""
    batch, channels = gate.shape
    out = torch.empty(batch, channels, dtype=grad.dtype)
    if batch == 0:
        return out
    x = _cpu.pixels_inner(x)
    pixels = x.shape[2] * x.shape[3]
    blocks = _native.module().gradient_blocks(batch, pixels)
    _native.launch(
        "gate_gradient",
        dtype=_cpu.code(grad.dtype),
        batch=batch,
        pixels=pixels,
        channels=channels,
        grad=grad,
        x=x,
        x_batch_stride=x.stride(0),
        x_pixel_stride=_cpu.pixel_stride(x),
        gate=_cpu.vectors(gate, grad.dtype),
        grad_gate=out,
        partial=torch.empty(blocks * channels, dtype=grad.dtype),
    )
    return out


def depthwise_weight(
    x: Tensor, grad: Tensor, kernel: int, stride: int, padding: Sequence[int]
) -> Tensor:
    """The gradient [C, 1, k, k] of a depthwise convolution's weight; grad is that of its result."""
    batch, channels = x.shape[:2]
    if batch == 0:
        return x.new_zeros(channels, 1, kernel, kernel)
    out = torch.empty(channels, 1, kernel, kernel, dtype=x.dtype)
    strips = -(-grad.shape[2] // _native.module().STRIP_ROWS)
    _native.launch(
        "depthwise_gradient",
        dtype=_cpu.code(x.dtype),
        batch=batch,
        channels=channels,
        kernel=kernel,
        stride=stride,
        left=padding[0],
        top=padding[2],
        x=_cpu.map_fields(_cpu.channels_inner(x)),
        grad=_cpu.map_fields(_cpu.channels_inner(grad)),
        out=out,
        partial=torch.empty(batch * strips * kernel * kernel * channels, dtype=x.dtype),
    )
    return out
