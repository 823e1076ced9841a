"""Depthwise-separable convolution of a whole pyramid, for one or two nets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effdet_kernels import _checks, _library
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments
from effdet_kernels.ops.separable_conv import reference


def separable_conv(
    x: Sequence[Tensor],
    dw_weight: Sequence[Tensor],
    pw_weight: Sequence[Tensor],
    scale: Sequence[Tensor] = (),
    shift: Sequence[Tensor] = (),
    *,
    pre_act: str = "none",
    act: str = "none",
) -> list[Tensor]:
    """y[n, l] = act(pw_weight[n] (dw_weight[n] * pre_act(x[n, l])) * scale[n, l] + shift[n, l]).

    n counts nets (their weights are shared by all levels), l levels (BN differs per level). Stride
    1, zeros around, so that sizes stay. Source: EfficientDet, arXiv:1911.09070, sections 3 and 4
    (BiFPN nodes, class and box nets).

    Args:
        x: maps [B, C, H, W] float32, float64, float16 or bfloat16, any strides (channels_last is
            read in place). Either n * l maps, net-major (all levels of net 0, then of net 1), or,
            where scale or shift tell the number of outputs, l maps that all nets read. Without
            scale and shift: n * l maps (repeat the list).
        dw_weight: per net [C, 1, k, k], k odd, dtype of ``x``; 1 or 2 nets.
        pw_weight: per net [O, C, 1, 1], dtype of ``x``; O may differ between nets.
        scale: empty (1), or n * l vectors [O], net-major, float32 (float64 with float64): the
            folded BN's factor.
        shift: empty (0), or n * l vectors like ``scale``.
        pre_act, act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or
            "mish".

    Returns:
        n * l maps [B, O, H, W], net-major, dtype of ``x``, channels_last.

    Accumulates in float32 (float64 with float64); the depthwise result is rounded to the dtype of
    ``x``. Under autocast x and the weights are cast, scale and shift are not. Differentiable in
    every tensor. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "separable_conv"
    x = _arguments.tensor_list(op, "x", x)
    dw_weight = _arguments.tensor_list(op, "dw_weight", dw_weight, (1, 2))
    nets = len(dw_weight)
    pw_weight = _arguments.tensor_list(op, "pw_weight", pw_weight, (nets,))
    outputs = len(scale) or len(shift) or len(x)
    if outputs % nets or len(x) not in (outputs, outputs // nets):
        raise ValueError(
            f"{op}: x: got {len(x)} maps for {nets} nets and {outputs} outputs,"
            f" takes one map per level, or one per net and level"
        )
    scale = _arguments.tensor_list(op, "scale", scale, (0, outputs))
    shift = _arguments.tensor_list(op, "shift", shift, (0, outputs))
    for i, level in enumerate(x):
        _arguments.feature_map(op, f"x[{i}]", level, like=x[0])
        if level.shape[:2] != x[0].shape[:2]:
            want = list(x[0].shape[:2])
            raise ValueError(
                f"{op}: x[{i}]: got {_checks.describe(level)},"
                f" takes the batch and channels {want} of x[0]"
            )
    for n, (dw, pw) in enumerate(zip(dw_weight, pw_weight, strict=True)):
        channels = x[0].shape[1]
        _arguments.depthwise_weight(op, f"dw_weight[{n}]", dw, x[0], channels)
        if dw.shape[2] % 2 == 0:
            raise ValueError(
                f"{op}: dw_weight[{n}]: got {_checks.describe(dw)}, takes an odd kernel size"
            )
        _arguments.dense(op, f"pw_weight[{n}]", pw, ("O", channels, 1, 1), x[0])
    for name, vectors in (("scale", scale), ("shift", shift)):
        for i, vector in enumerate(vectors):
            width = pw_weight[i // (outputs // nets)].shape[0]
            _arguments.channel_vector(op, f"{name}[{i}]", vector, width, x[0])
    _arguments.activation(op, "pre_act", pre_act)
    _arguments.activation(op, "act", act)
    return _separable_conv(x, dw_weight, pw_weight, scale, shift, pre_act, act)


def _out_spec(x, dw_weight, pw_weight, scale, shift, *_) -> list[TensorSpec]:
    outputs = len(scale) or len(shift) or len(x)
    levels = outputs // len(dw_weight)
    specs = []
    for i in range(outputs):
        level = x[i % len(x)]  # both for shared maps and for one map per output
        batch, _channels, height, width = level.shape
        shape = (batch, pw_weight[i // levels].shape[0], height, width)
        specs.append(_library.nchw(shape, level))
    return specs


_separable_conv = _library.define(
    "separable_conv(Tensor[] x, Tensor[] dw_weight, Tensor[] pw_weight, Tensor[] scale,"
    " Tensor[] shift, str pre_act, str act) -> Tensor[]",
    out_spec=_out_spec,
    impls={"reference": reference.separable_conv},
    differentiable=("x", "dw_weight", "pw_weight", "scale", "shift"),
    autocast=("x", "dw_weight", "pw_weight"),
)
