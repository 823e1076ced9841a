"""The first two convolutions of MBConv as one op: the expanded map need never be stored."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effdet_kernels import _cuda, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu, _gradients
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops.depthwise_conv import op as depthwise
from effdet_kernels.ops.expand_depthwise import reference
from effdet_kernels.ops.pointwise_conv import op as pointwise


def expand_depthwise(
    x: Tensor,
    expand_weight: Tensor,
    expand_scale: Tensor,
    expand_shift: Tensor,
    dw_weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    act: str = "none",
    squeeze: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = act(depthwise(e) * scale + shift), e = act(expand(x) * expand_scale + expand_shift).

    The depthwise convolution sees zeros around e, not around x. Source: MBConv, MobileNetV2
    arXiv:1801.04381 section 3, EfficientNet arXiv:1905.11946; squeeze-excite arXiv:1709.01507
    averages what ``squeeze`` sums.

    Args:
        x: [B, C, H, W] float32, float64, float16 or bfloat16, any strides (channels_last is read in
            place).
        expand_weight: [E, C, 1, 1], dtype of ``x``.
        expand_scale: [E] float32 (float64 with float64): the first BN, folded, its factor.
        expand_shift: [E] like ``expand_scale``, its offset.
        dw_weight: [E, 1, k, k], dtype of ``x``.
        scale: [E] like ``expand_scale``, the second BN's factor; None: 1.
        shift: [E] like ``expand_scale``, its offset; None: 0. Both None: y is the raw depthwise
            result, without activation, for statistics to be taken from it.
        stride: of the depthwise convolution, both axes, at least 1.
        padding: zeros (left, right, top, bottom) around the expanded map, in pixels.
        act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish";
            used twice.
        squeeze: also return the sums of y over each map.

    Returns:
        y [B, E, (H + top + bottom - k) // stride + 1, (W + left + right - k) // stride + 1], dtype
        of ``x``, channels_last. With ``squeeze``: (y, sums [B, E] float32, float64 with float64; of
        y before its rounding).

    Accumulates in float32 (float64 with float64); e is rounded to the dtype of ``x``. Under
    autocast x and the weights are cast, the vectors are not. Differentiable in every tensor.
    Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "expand_depthwise"
    _arguments.feature_map(op, "x", x)
    _arguments.dense(op, "expand_weight", expand_weight, ("E", x.shape[1], 1, 1), x)
    expanded = expand_weight.shape[0]
    _arguments.channel_vector(op, "expand_scale", expand_scale, expanded, x)
    _arguments.channel_vector(op, "expand_shift", expand_shift, expanded, x)
    _arguments.depthwise_weight(op, "dw_weight", dw_weight, x, expanded)
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            _arguments.channel_vector(op, name, vector, expanded, x)
    _arguments.integer(op, "stride", stride, least=1)
    padding = _arguments.four_paddings(op, "padding", padding)
    _arguments.activation(op, "act", act)
    _arguments.convolved_size(op, x, dw_weight.shape[2], stride, padding)
    outputs = _expand_depthwise(
        x,
        expand_weight,
        expand_scale,
        expand_shift,
        dw_weight,
        scale,
        shift,
        stride,
        padding,
        act,
        squeeze,
    )
    return (outputs[0], outputs[1]) if squeeze else outputs[0]


def _out_spec(
    x,
    expand_weight,
    expand_scale,
    expand_shift,
    dw_weight,
    scale,
    shift,
    stride,
    padding,
    act,
    squeeze,
) -> list[TensorSpec]:
    batch, expanded = x.shape[0], expand_weight.shape[0]
    size = _arguments.convolved_size("expand_depthwise", x, dw_weight.shape[2], stride, padding)
    y = _library.nchw((batch, expanded, *size), x)
    sums = TensorSpec((batch, expanded), accumulation_dtype(x.dtype), x.device)
    return [y, sums] if squeeze else [y]


def _run_cpu(*args) -> list[Tensor]:
    specs = _out_spec(*args)
    x, expand_weight, expand_scale, expand_shift, *rest = _cpu.widened(args)
    if rest[0].shape[2] > _native.MAX_KERNEL:
        return reference.expand_depthwise(*args)
    expansion = {
        "expand_weights": _cpu.pack_dense(expand_weight),
        "expand_act": _cpu.act_code(rest[5]),
    }
    vectors = _cpu.affine(expand_scale, expand_shift, expand_weight.shape[0], x.dtype)
    expansion["expand_scale"], expansion["expand_shift"] = vectors
    dw_weight, scale, shift, stride, padding, act, _ = rest
    raw = scale is None and shift is None
    last_act = "none" if raw else act
    return depthwise.launch(specs, x, expansion, dw_weight, scale, shift, stride, padding, last_act)


def _backward_cpu(grads, *rest) -> list[Tensor]:
    """Makes the expanded map again and goes back through both convolutions."""
    *args, needs = rest
    x, *expansion, dw_weight, scale, shift, stride, padding, act, squeeze = _gradients.wide(args)
    variables = [x, *expansion, dw_weight, scale, shift]
    flags = _gradients.wanted(variables, needs)
    raw = scale is None and shift is None
    expanded = pointwise.run_cpu(x, *expansion, None, None, act)
    inner = [any(flags[:4])]
    inner += [f for v, f in zip(variables[4:], flags[4:], strict=True) if v is not None]
    last_act = "none" if raw else act
    found = depthwise.backward(
        grads, expanded, dw_weight, scale, shift, stride, padding, last_act, squeeze, False, inner
    )
    if not inner[0]:
        return found
    d_expanded, *others = found
    return [
        *pointwise.backward([d_expanded], x, *expansion, None, None, act, False, flags[:4]),
        *others,
    ]


_expand_depthwise = _library.define(
    "expand_depthwise(Tensor x, Tensor expand_weight, Tensor expand_scale, Tensor expand_shift,"
    " Tensor dw_weight, Tensor? scale, Tensor? shift, SymInt stride, SymInt[] padding, str act,"
    " bool squeeze) -> Tensor[]",
    out_spec=_out_spec,
    impls={
        "cpu": _run_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.expand_depthwise.triton_fwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.expand_depthwise.cuda"),
        "reference": reference.expand_depthwise,
    },
    backwards={
        "cpu": _backward_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.expand_depthwise.triton_bwd"),
    },
    differentiable=(
        "x",
        "expand_weight",
        "expand_scale",
        "expand_shift",
        "dw_weight",
        "scale",
        "shift",
    ),
    autocast=("x", "expand_weight", "dw_weight"),
)
