"""Dense convolution with BN and activation, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels import _checks, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu, _gradients, _statistics
from effdet_kernels.ops.dense_conv import reference


def dense_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    act: str = "none",
    statistics: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """y[b, o] = act(conv(x[b], weight[o]) * scale[o] + shift[o]).

    conv is the 2-d cross-correlation of zero-padded x over all channels. Source: the stem of
    EfficientNet, arXiv:1905.11946, and the fused MBConv of EfficientNetV2, arXiv:2104.00298
    section 3.2.

    Args:
        x: [B, C, H, W] float32, float64, float16 or bfloat16, any strides, all read in place (in
            Triton: channels_last, or few channels).
        weight: [O, C, k, k], dtype of ``x``.
        scale: [O] float32 (float64 with float64), the folded BN's factor; None: 1.
        shift: [O] like ``scale``; None: 0.
        stride: of both axes, at least 1.
        padding: zeros (left, right, top, bottom), in pixels.
        act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish".
        statistics: also return mean and variance, for a batch norm that follows.

    Returns:
        y [B, O, (H + top + bottom - k) // stride + 1, (W + left + right - k) // stride + 1], dtype
        of ``x``, channels_last. With ``statistics``: (y, mean [O], variance [O], float32, float64 with
        float64): of y before its rounding, over images and pixels, biased.

    Accumulates in float32 (float64 with float64). Under autocast x and weight are cast, scale and
    shift are not. Differentiable in x, weight, scale and shift, through y only. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "dense_conv"
    _arguments.feature_map(op, "x", x)
    _arguments.dense(op, "weight", weight, ("O", x.shape[1], "k", "k"), x)
    if weight.shape[2] != weight.shape[3] or weight.shape[2] < 1 or weight.shape[0] < 1:
        got = _checks.describe(weight)
        raise ValueError(f"{op}: weight: got {got}, takes a square kernel and some channels")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            _arguments.channel_vector(op, name, vector, weight.shape[0], x)
    _arguments.integer(op, "stride", stride, least=1)
    padding = _arguments.four_paddings(op, "padding", padding)
    _arguments.activation(op, "act", act)
    _arguments.convolved_size(op, x, weight.shape[2], stride, padding)
    _arguments.statistics(op, statistics, x)
    outputs = _dense_conv(x, weight, scale, shift, stride, padding, act, statistics)
    return tuple(outputs) if statistics else outputs[0]


def _out_spec(x, weight, scale, shift, stride, padding, act, statistics=False) -> list[TensorSpec]:
    size = _arguments.convolved_size("dense_conv", x, weight.shape[2], stride, padding)
    y = _library.nchw((x.shape[0], weight.shape[0], *size), x)
    return [y, *_library.moments(weight.shape[0], x)] if statistics else [y]


def _run_cpu(*args) -> list[Tensor]:
    """Without statistics."""
    x, *rest = _cpu.widened(args)
    if rest[0].shape[2] > _native.MAX_KERNEL:
        return reference.dense_conv(*args)
    (y,) = _cpu.allocate(_out_spec(*args), x.dtype)
    return [_launch(y, x, *rest)]


def _launch(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
    dilation: int = 1,
) -> Tensor:
    """Writes y, of x with zeros between its pixels, which are ``dilation`` apart."""
    if y.shape[0] == 0:
        return y
    batch, channels, height, width = x.shape
    scale, shift = _cpu.affine(scale, shift, weight.shape[0], x.dtype)
    left, _, top, _ = padding
    _native.launch(
        "dense_conv",
        dtype=_cpu.code(x.dtype),
        act=_cpu.act_code(act),
        batch=batch,
        in_channels=channels,
        height=height,
        width=width,
        out_channels=y.shape[1],
        out_height=y.shape[2],
        out_width=y.shape[3],
        kernel=weight.shape[2],
        stride=stride,
        dilation=dilation,
        left=left,
        top=top,
        x=x,
        batch_stride=x.stride(0),
        channel_stride=x.stride(1),
        row_stride=x.stride(2),
        pixel_stride=x.stride(3),
        weights=_cpu.pack_dense(weight),
        scale=scale,
        shift=shift,
        y=y,
    )
    return y


def _backward_cpu(grads, *rest) -> list[Tensor]:
    *args, needs = rest
    x, weight, scale, shift, stride, padding, act, _ = _gradients.wide(args)
    (grad,) = _gradients.wide(grads[:1])
    if weight.shape[2] > _native.MAX_KERNEL:
        return _library.reference_backward(reference.dense_conv, grads, args, range(4), needs)
    of_x, of_weight, of_scale, of_shift = _gradients.wanted((x, weight, scale, shift), needs)
    delta, d_scale, d_shift = grad, None, None
    if scale is not None or act != "none" or of_shift:
        z = None
        if act != "none" or of_scale:
            (z,) = _run_cpu(x, weight, None, None, stride, padding, "none")
        delta, d_scale, d_shift = _gradients.affine(grad, z, scale, shift, act, overwrite=True)
    d_x = d_weight = None
    if of_x:
        before = [weight.shape[2] - 1 - side for side in padding]
        (d_x,) = _cpu.allocate([_library.nchw(x.shape, x)], x.dtype)
        spread = weight.flip(2, 3).permute(1, 0, 2, 3)
        _launch(d_x, delta, spread, None, None, 1, before, "none", dilation=stride)
    if of_weight:
        d_weight = _weight_gradient(x, delta, weight, stride, padding)
    found = d_x, d_weight, d_scale, d_shift
    return _gradients.chosen(found, (of_x, of_weight, of_scale, of_shift))


def _weight_gradient(
    x: Tensor, delta: Tensor, weight: Tensor, stride: int, padding: Sequence[int]
) -> Tensor:
    """A product per kernel row i: in channels-last memory the k pixels under it are k * C numbers in a row."""
    out, channels, k, _ = weight.shape
    x = F.pad(x, tuple(padding)).contiguous(memory_format=torch.channels_last)
    height, width = delta.shape[2:]
    step = x.shape[3] * channels
    grad = _cpu.map_fields(_cpu.channels_inner(delta))
    rows = []
    for i in range(k):
        window = x[:, :, i:], height, width, x.shape[2] * step, stride * step, stride * channels
        rows.append(_gradients.product(window, k * channels, grad, out).view(k, channels, out))
    return torch.stack(rows).permute(3, 2, 0, 1)


_dense_conv = _library.define(
    "dense_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, SymInt stride,"
    " SymInt[] padding, str act, bool statistics) -> Tensor[]",
    out_spec=_out_spec,
    impls={
        "cpu": _statistics.after_kernel(_run_cpu),
        "triton": _triton.deferred("effdet_kernels.ops.dense_conv.triton_fwd"),
        "reference": reference.dense_conv,
    },
    backwards={
        "cpu": _backward_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.dense_conv.triton_bwd"),
    },
    differentiable=("x", "weight", "scale", "shift"),
    nondifferentiable_outputs=_statistics.positions,
    autocast=("x", "weight"),
)
