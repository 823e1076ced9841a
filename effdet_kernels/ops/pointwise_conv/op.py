"""1x1 convolution with squeeze-excite gate, BN, activation and residual, in one pass."""

from __future__ import annotations

from torch import Tensor

from effdet_kernels import _checks, _cuda, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu, _gradients, _statistics
from effdet_kernels.ops.pointwise_conv import reference


def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """y[b, o] = act(sum_c weight[o, c] * gate[b, c] * x[b, c] * scale[o] + shift[o]) + residual[b,
    o].

    Source: expansion and projection of MBConv, MobileNetV2 arXiv:1801.04381 section 3, with the
    gate of squeeze-excite arXiv:1709.01507; the lateral convolutions of BiFPN, arXiv:1911.09070
    section 3.

    Args:
        x: [B, C, H, W] float32, float64, float16 or bfloat16, any strides (channels_last is read in
            place).
        weight: [O, C, 1, 1], dtype of ``x``.
        scale: [O] float32 (float64 with float64), the folded BN's factor; None: 1.
        shift: [O] like ``scale``; None: 0.
        gate: [B, C], dtype of ``x`` or float32; None: 1.
        residual: [B, O, H, W], dtype of ``x``, added after the activation; None: 0.
        act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish".
        statistics: also return mean and variance, for a batch norm that follows.

    Returns:
        y [B, O, H, W], dtype of ``x``, channels_last. With ``statistics``: (y, mean [O], variance [O],
        float32, float64 with float64): of y before its rounding, over images and pixels, biased.

    Accumulates in float32 (float64 with float64). Under autocast x, weight, gate and residual are
    cast, scale and shift are not. Differentiable in every tensor, through y only. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "pointwise_conv"
    _arguments.feature_map(op, "x", x)
    batch, channels, height, width = x.shape
    _arguments.dense(op, "weight", weight, ("O", channels, 1, 1), x)
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            _arguments.channel_vector(op, name, vector, weight.shape[0], x)
    if gate is not None:
        _checks.tensor(op, "gate", gate, (batch, channels), device=x.device)
    if residual is not None:
        shape = (batch, weight.shape[0], height, width)
        _arguments.dense(op, "residual", residual, shape, x)
    _arguments.activation(op, "act", act)
    _arguments.statistics(op, statistics, x)
    outputs = _pointwise_conv(x, weight, scale, shift, gate, residual, act, statistics)
    return (outputs[0], outputs[1], outputs[2]) if statistics else outputs[0]


def _out_spec(x, weight, *rest) -> list[TensorSpec]:
    batch, _channels, height, width = x.shape
    y = _library.nchw((batch, weight.shape[0], height, width), x)
    return [y, *_library.moments(weight.shape[0], x)] if rest[-1] else [y]


def run_cpu(*args) -> Tensor:
    """The map alone."""
    x, weight, scale, shift, gate, residual, act = _cpu.widened(args)
    (y,) = _cpu.allocate(_out_spec(*args, False), x.dtype)
    out_channels, channels = weight.shape[:2]
    if x.shape[0] == 0:
        return y
    x = _cpu.pixels_inner(x)
    residual = None if residual is None else _cpu.pixels_inner(residual)
    gate = None if gate is None else _cpu.vectors(gate, x.dtype)
    scale, shift = _cpu.affine(scale, shift, out_channels, x.dtype)
    _native.launch(
        "pointwise_conv",
        dtype=_cpu.code(x.dtype),
        act=_cpu.act_code(act),
        batch=x.shape[0],
        pixels=x.shape[2] * x.shape[3],
        in_channels=channels,
        out_channels=out_channels,
        x=x,
        x_batch_stride=x.stride(0),
        x_pixel_stride=_cpu.pixel_stride(x),
        weights=_cpu.pack_dense(weight),
        scale=scale,
        shift=shift,
        gate=gate,
        residual=residual,
        residual_batch_stride=0 if residual is None else residual.stride(0),
        residual_pixel_stride=0 if residual is None else _cpu.pixel_stride(residual),
        y=y,
    )
    return y


def backward(grads, *rest) -> list[Tensor]:
    """The C++ kernels' backward; the README has the formulas."""
    *args, needs = rest
    x, weight, scale, shift, gate, residual, act, _ = _gradients.wide(args)
    grad = _gradients.wide(grads[:1])[0]
    of_x, of_weight, of_scale, of_shift, of_gate, of_residual = _gradients.wanted(
        (x, weight, scale, shift, gate, residual), needs
    )
    delta, d_scale, d_shift = grad, None, None
    if scale is not None or act != "none" or of_shift:
        z = None
        if act != "none" or of_scale:
            z = run_cpu(x, weight, None, None, gate, None, "none")
        delta, d_scale, d_shift = _gradients.affine(grad, z, scale, shift, act, overwrite=True)
    delta = _cpu.channels_inner(delta)
    dx = d_gate = d_weight = None
    if of_x or of_gate:
        dx = run_cpu(delta, weight.permute(1, 0, 2, 3), None, None, None, None, "none")
        if gate is not None:
            d_gate = _gradients.gate(dx, x, gate)
    if of_weight:
        maps = _cpu.map_fields(delta), _cpu.map_fields(_cpu.channels_inner(x))
        d_weight = _gradients.product(maps[0], len(weight), maps[1], weight.shape[1], gate)
        d_weight = d_weight[:, :, None, None]
    found = dx, d_weight, d_scale, d_shift, d_gate, grad
    return _gradients.chosen(found, (of_x, of_weight, of_scale, of_shift, of_gate, of_residual))


_pointwise_conv = _library.define(
    "pointwise_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? gate,"
    " Tensor? residual, str act, bool statistics) -> Tensor[]",
    out_spec=_out_spec,
    impls={
        "cpu": _statistics.after_kernel(lambda *args: [run_cpu(*args)]),
        "triton": _triton.deferred("effdet_kernels.ops.pointwise_conv.triton_fwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.pointwise_conv.cuda"),
        "reference": reference.pointwise_conv,
    },
    backwards={
        "cpu": backward,
        "triton": _triton.deferred("effdet_kernels.ops.pointwise_conv.triton_bwd"),
    },
    differentiable=("x", "weight", "scale", "shift", "gate", "residual"),
    nondifferentiable_outputs=_statistics.positions,
    autocast=("x", "weight", "gate", "residual"),
)
