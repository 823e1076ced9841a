"""Depthwise convolution with BN, activation and the sums that squeeze-excite needs, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _cuda, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu, _gradients, _statistics
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops.depthwise_conv import reference


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
    statistics: bool = False,
) -> Tensor | tuple[Tensor, ...]:
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
        statistics: also return mean and variance, for a batch norm that follows; not with
            ``squeeze``.

    Returns:
        y [B, C, (H + top + bottom - k) // stride + 1, (W + left + right - k) // stride + 1], dtype
        of ``x``, channels_last. With ``squeeze``: (y, sums [B, C]). With ``statistics``: (y, mean
        [C], variance [C]), over images and pixels, biased. Sums and statistics are float32 (float64
        with float64), of y before its rounding.

    Accumulates in float32 (float64 with float64). Under autocast x and weight are cast, scale and
    shift are not. Differentiable in x, weight, scale and shift, not through mean and variance.
    Deterministic.

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
    _arguments.statistics(op, statistics, x)
    if squeeze and statistics:
        raise ValueError(f"{op}: statistics: got True, takes False with squeeze")
    outputs = _depthwise_conv(x, weight, scale, shift, stride, padding, act, squeeze, statistics)
    return tuple(outputs) if squeeze or statistics else outputs[0]


def _out_spec(
    x, weight, scale, shift, stride, padding, act, squeeze, statistics=False
) -> list[TensorSpec]:
    batch, channels = x.shape[:2]
    size = _arguments.convolved_size("depthwise_conv", x, weight.shape[2], stride, padding)
    y = _library.nchw((batch, channels, *size), x)
    sums = TensorSpec((batch, channels), accumulation_dtype(x.dtype), x.device)
    if squeeze:
        return [y, sums]
    return [y, *_library.moments(channels, x)] if statistics else [y]


def convolve(x: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> Tensor:
    """The raw result of the C++ kernel."""
    return run_cpu(x, weight, None, None, stride, padding, "none", False)[0]


def launch(
    specs: list[TensorSpec],
    x: Tensor,
    expansion: dict[str, Any],
    dw_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
    *,
    flipped: bool = False,
) -> list[Tensor]:
    """Runs the C++ kernel of this op, whose ``expansion`` is empty, and of ``expand_depthwise``."""
    outputs = _cpu.allocate(specs, x.dtype)
    if x.shape[0] == 0:
        return outputs
    y, *sums = outputs
    batch, channels, out_height, out_width = y.shape
    fields: dict[str, Any] = {
        "dilation": 1,
        "expand_weights": None,
        "expand_act": 0,
        "scale": None,
        "row_sums": None,
    }
    if scale is not None or shift is not None:
        fields["scale"], fields["shift"] = _cpu.affine(scale, shift, channels, x.dtype)
    if sums:
        rows = torch.empty(batch, out_height, channels, dtype=sums[0].dtype)
        fields.update(row_sums=rows, y_sums=sums[0])
    x = _cpu.channels_inner(x)
    left, _, top, _ = padding
    fields.update(expansion)
    _native.launch(
        "expand_depthwise",
        dtype=_cpu.code(x.dtype),
        act=_cpu.act_code(act),
        batch=batch,
        in_channels=x.shape[1],
        channels=channels,
        out_height=out_height,
        out_width=out_width,
        kernel=dw_weight.shape[2],
        stride=stride,
        left=left,
        top=top,
        x=_cpu.map_fields(x),
        weights=_cpu.pack_depthwise(dw_weight, flipped=flipped),
        y=y,
        **fields,
    )
    return outputs


def run_cpu(*args) -> list[Tensor]:
    """Without statistics."""
    x, weight, scale, shift, stride, padding, act, _ = _cpu.widened(args)
    if weight.shape[2] > _native.MAX_KERNEL:
        return reference.depthwise_conv(*args)
    return launch(_out_spec(*args), x, {}, weight, scale, shift, stride, padding, act)


def input_gradient(
    grad: Tensor, weight: Tensor, x: Tensor, stride: int, padding: Sequence[int]
) -> Tensor:
    """The gradient of x, given that of the convolution's raw result: a convolution of it, its pixels spread out."""
    k = weight.shape[2]
    before = [k - 1 - side for side in padding]
    spread = {"dilation": stride}
    specs = [_library.nchw(x.shape, x)]
    return launch(specs, grad, spread, weight, None, None, 1, before, "none", flipped=True)[0]


def backward(grads, *rest) -> list[Tensor]:
    """The C++ kernels' backward; the README has the formulas."""
    *args, needs = rest
    x, weight, scale, shift, stride, padding, act, squeeze, _ = _gradients.wide(args)
    if weight.shape[2] > _native.MAX_KERNEL:
        return _library.reference_backward(reference.depthwise_conv, grads, args, range(4), needs)
    grad, *of_sums = _gradients.wide(grads[: 1 + squeeze])
    if squeeze:
        grad = grad + of_sums[0].to(grad.dtype)[:, :, None, None]
    of_x, of_weight, of_scale, of_shift = _gradients.wanted((x, weight, scale, shift), needs)
    delta, d_scale, d_shift = grad, None, None
    if scale is not None or act != "none" or of_shift:
        z = None
        if act != "none" or of_scale:
            z = convolve(x, weight, stride, padding)
        delta, d_scale, d_shift = _gradients.affine(grad, z, scale, shift, act, overwrite=True)
    d_x = d_weight = None
    if of_x:
        d_x = input_gradient(delta, weight, x, stride, padding)
    if of_weight:
        d_weight = _gradients.depthwise_weight(x, delta, weight.shape[2], stride, padding)
    found = d_x, d_weight, d_scale, d_shift
    return _gradients.chosen(found, (of_x, of_weight, of_scale, of_shift))


_depthwise_conv = _library.define(
    "depthwise_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, SymInt stride,"
    " SymInt[] padding, str act, bool squeeze, bool statistics) -> Tensor[]",
    out_spec=_out_spec,
    impls={
        "cpu": _statistics.after_kernel(run_cpu),
        "triton": _triton.deferred("effdet_kernels.ops.depthwise_conv.triton_fwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.depthwise_conv.cuda"),
        "reference": reference.depthwise_conv,
    },
    backwards={
        "cpu": backward,
        "triton": _triton.deferred("effdet_kernels.ops.depthwise_conv.triton_bwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.depthwise_conv.cuda_bwd"),
    },
    differentiable=("x", "weight", "scale", "shift"),
    nondifferentiable_outputs=_statistics.positions,
    autocast=("x", "weight"),
)
