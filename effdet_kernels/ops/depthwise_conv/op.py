"""Depthwise convolution with BN, activation and the sums that squeeze-excite needs, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effdet_kernels import _library, _native
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops.depthwise_conv import reference
from effdet_kernels.ops.expand_depthwise.op import launch


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    act: str = "none",
    squeeze: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[b, c] = act(conv(x[b, c], weight[c]) * scale[c] + shift[c]).

    conv is the 2-d cross-correlation of zero-padded x. Source: the depthwise
    convolutions of MBConv, MobileNetV2 arXiv:1801.04381 section 3 and EfficientNet
    arXiv:1905.11946; squeeze-excite arXiv:1709.01507 averages what ``squeeze`` sums.

    Args:
        x: [B, C, H, W] float32, float64, float16 or bfloat16, any strides (channels_last is read in
            place).
        weight: [C, 1, k, k], dtype of ``x``.
        scale: [C] float32 (float64 with float64), the folded BN's factor; None: 1.
        shift: [C] like ``scale``; None: 0.
        stride: of both axes, at least 1.
        padding: zeros (left, right, top, bottom), in pixels.
        act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish".
        squeeze: also return the sums of y over each map.

    Returns:
        y [B, C, (H + top + bottom - k) // stride + 1, (W + left + right - k) // stride + 1], dtype
        of ``x``, channels_last. With ``squeeze``: (y, sums [B, C] float32, float64 with float64; of
        y before its rounding).

    Accumulates in float32 (float64 with float64). Under autocast x and weight are cast, scale and
    shift are not. Differentiable in x, weight, scale and shift. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "depthwise_conv"
    _arguments.feature_map(op, "x", x)
    _arguments.depthwise_weight(op, "weight", weight, x, x.shape[1])
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            _arguments.channel_vector(op, name, vector, x.shape[1], x)
    _arguments.integer(op, "stride", stride, least=1)
    padding = _arguments.four_paddings(op, "padding", padding)
    _arguments.activation(op, "act", act)
    _arguments.convolved_size(op, x, weight.shape[2], stride, padding)
    outputs = _depthwise_conv(x, weight, scale, shift, stride, padding, act, squeeze)
    return (outputs[0], outputs[1]) if squeeze else outputs[0]


def _out_spec(x, weight, scale, shift, stride, padding, act, squeeze) -> list[TensorSpec]:
    batch, channels = x.shape[:2]
    size = _arguments.convolved_size("depthwise_conv", x, weight.shape[2], stride, padding)
    y = _library.nchw((batch, channels, *size), x)
    sums = TensorSpec((batch, channels), accumulation_dtype(x.dtype), x.device)
    return [y, sums] if squeeze else [y]


def _run_cpu(*args) -> list[Tensor]:
    x, weight, scale, shift, stride, padding, act, _ = _cpu.widened(args)
    if weight.shape[2] > _native.MAX_KERNEL:
        return reference.depthwise_conv(*args)
    return launch(_out_spec(*args), x, {}, weight, scale, shift, stride, padding, act)


_depthwise_conv = _library.define(
    "depthwise_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, SymInt stride,"
    " SymInt[] padding, str act, bool squeeze) -> Tensor[]",
    out_spec=_out_spec,
    impls={"cpu": _run_cpu, "reference": reference.depthwise_conv},
    differentiable=("x", "weight", "scale", "shift"),
    autocast=("x", "weight"),
)
