"""Dense convolution with BN and activation, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effdet_kernels import _checks, _library, _native
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu
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
) -> Tensor:
    """y[b, o] = act(conv(x[b], weight[o]) * scale[o] + shift[o]).

    conv is the 2-d cross-correlation of zero-padded x over all channels. Source: the stem of
    EfficientNet, arXiv:1905.11946, and the fused MBConv of EfficientNetV2, arXiv:2104.00298
    section 3.2.

    Args:
        x: [B, C, H, W] float32, float64, float16 or bfloat16, any strides, all read in place.
        weight: [O, C, k, k], dtype of ``x``.
        scale: [O] float32 (float64 with float64), the folded BN's factor; None: 1.
        shift: [O] like ``scale``; None: 0.
        stride: of both axes, at least 1.
        padding: zeros (left, right, top, bottom), in pixels.
        act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish".

    Returns:
        y [B, O, (H + top + bottom - k) // stride + 1, (W + left + right - k) // stride + 1], dtype
        of ``x``, channels_last.

    Accumulates in float32 (float64 with float64). Under autocast x and weight are cast, scale and
    shift are not. Differentiable in x, weight, scale and shift. Deterministic.

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
    return _dense_conv(x, weight, scale, shift, stride, padding, act)


def _out_spec(x, weight, scale, shift, stride, padding, act) -> list[TensorSpec]:
    size = _arguments.convolved_size("dense_conv", x, weight.shape[2], stride, padding)
    return [_library.nchw((x.shape[0], weight.shape[0], *size), x)]


def _run_cpu(*args) -> Tensor:
    x, weight, scale, shift, stride, padding, act = _cpu.widened(args)
    if weight.shape[2] > _native.MAX_KERNEL:
        return reference.dense_conv(*args)
    (y,) = _cpu.allocate(_out_spec(*args), x.dtype)
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


_dense_conv = _library.define(
    "dense_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, SymInt stride,"
    " SymInt[] padding, str act) -> Tensor",
    out_spec=_out_spec,
    impls={"cpu": _run_cpu, "reference": reference.dense_conv},
    differentiable=("x", "weight", "scale", "shift"),
    autocast=("x", "weight"),
)
