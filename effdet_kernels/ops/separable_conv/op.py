"""Depthwise-separable convolution of a whole pyramid, for one or two nets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_kernels import _checks, _cuda, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu, _statistics
from effdet_kernels.ops._activations import widen
from effdet_kernels.ops.separable_conv import reference
from effdet_kernels.ops.separable_conv.backward import backward
from effdet_kernels.ops.weighted_fusion.op import check_fusion, fusion_fields


def separable_conv(
    x: Sequence[Tensor],
    dw_weight: Sequence[Tensor],
    pw_weight: Sequence[Tensor],
    scale: Sequence[Tensor] = (),
    shift: Sequence[Tensor] = (),
    *,
    pre_act: str = "none",
    act: str = "none",
    method: str | None = None,
    fusion_weight: Tensor | None = None,
    resample: Sequence[str] | None = None,
    size: Sequence[int] | None = None,
    pool_padding: Sequence[int] = (0, 0, 0, 0),
    statistics: bool = False,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """y[n, l] = act(pw_weight[n] (dw_weight[n] * pre_act(x[n, l])) * scale[n, l] + shift[n, l]).

    n counts nets (their weights are shared by all levels), l levels (BN differs per level). Stride
    1, zeros around, so that sizes stay. With ``method`` the one map that is convolved is the
    weighted fusion of all of ``x``, made on load: a whole BiFPN node in one call. Source:
    EfficientDet, arXiv:1911.09070, sections 3 and 4 (BiFPN nodes, class and box nets).

    Args:
        x: maps [B, C, H, W] float32, float64, float16 or bfloat16, any strides (channels_last is
            read in place). Either n * l maps, net-major (all levels of net 0, then of net 1), or,
            where scale or shift tell the number of outputs, l maps that all nets read. Without
            scale and shift: n * l maps (repeat the list). With ``method``: 1 to 3 maps of any
            sizes.
        dw_weight: per net [C, 1, k, k], k odd, dtype of ``x``; 1 or 2 nets.
        pw_weight: per net [O, C, 1, 1], dtype of ``x``; O may differ between nets.
        scale: empty (1), or n * l vectors [O], net-major, float32 (float64 with float64): the
            folded BN's factor.
        shift: empty (0), or n * l vectors like ``scale``.
        pre_act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish".
        act: one of these.
        method: None, or "fastattn", "attn", "sum": how ``x`` is fused, as in ``weighted_fusion``,
            whose ``weight`` is ``fusion_weight`` here. There is one net and one output then.
        fusion_weight: [len(x)], any floating dtype; None with "sum" and without ``method``.
        resample: as in ``weighted_fusion``.
        size: (H, W) of the fused map, as in ``weighted_fusion``.
        pool_padding: as in ``weighted_fusion``.
        statistics: also return means and variances, for batch norms that follow.

    Returns:
        n * l maps [B, O, H, W], net-major, dtype of ``x``, channels_last. With ``statistics``: (these,
        the mean [O] of each, the variance [O] of each), in float32 (float64 with float64), of before
        the maps' rounding, over images and pixels, biased.

    Accumulates in float32 (float64 with float64); the depthwise result, and what is convolved, may
    be rounded to the dtype of ``x``. Under autocast x and the convolution weights are cast, the
    other vectors are not. Differentiable in every tensor, through the maps only. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "separable_conv"
    x, names, size, pool_padding = _check_maps(
        op, x, method, fusion_weight, resample, size, pool_padding
    )
    maps = len(x) if method is None else 1
    dw_weight = _arguments.tensor_list(
        op, "dw_weight", dw_weight, (1, 2) if method is None else (1,)
    )
    nets = len(dw_weight)
    pw_weight = _arguments.tensor_list(op, "pw_weight", pw_weight, (nets,))
    outputs = len(scale) or len(shift) or maps
    if outputs % nets or maps not in (outputs, outputs // nets):
        raise ValueError(
            f"{op}: x: got {maps} maps for {nets} nets and {outputs} outputs,"
            f" takes one map per level, or one per net and level"
        )
    scale = _arguments.tensor_list(op, "scale", scale, (0, outputs))
    shift = _arguments.tensor_list(op, "shift", shift, (0, outputs))
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
    _arguments.statistics(op, statistics, x[0])
    found = _separable_conv(
        x, dw_weight, pw_weight, scale, shift, pre_act, act,
        method or "none", fusion_weight, names, size, pool_padding, statistics,
    )  # fmt: skip
    if not statistics:
        return found
    return found[:outputs], found[outputs : 2 * outputs], found[2 * outputs :]


def _check_maps(
    op, x, method, fusion_weight, resample, size, pool_padding
) -> tuple[list[Tensor], str, list[int], list[int]]:
    """Checks x and how it is fused; returns them as the schema wants them."""
    if method is not None:
        return check_fusion(
            op, "fusion_weight", x, fusion_weight, method, resample, size, pool_padding
        )
    given = {"fusion_weight": fusion_weight, "resample": resample, "size": size}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{op}: {name}: got {_checks.describe(value)}, takes None without method"
            )
    x = _arguments.tensor_list(op, "x", x)
    for i, level in enumerate(x):
        _arguments.feature_map(op, f"x[{i}]", level, like=x[0])
        if level.shape[:2] != x[0].shape[:2]:
            want = list(x[0].shape[:2])
            raise ValueError(
                f"{op}: x[{i}]: got {_checks.describe(level)},"
                f" takes the batch and channels {want} of x[0]"
            )
    return x, "", [], []


def _out_spec(
    x, dw_weight, pw_weight, scale, shift, pre_act, act, method, fusion_weight, resample, size,
    pool_padding, statistics=False,
) -> list[TensorSpec]:  # fmt: skip
    sizes = [level.shape[2:] for level in x] if method == "none" else [size]
    outputs = len(scale) or len(shift) or len(sizes)
    levels = outputs // len(dw_weight)
    # Right both for maps that the nets share and for one map per output.
    widths = [pw_weight[i // levels].shape[0] for i in range(outputs)]
    y = [
        _library.nchw((x[0].shape[0], width, *sizes[i % len(sizes)]), x[0])
        for i, width in enumerate(widths)
    ]
    if not statistics:
        return y
    means, variances = zip(*(_library.moments(width, x[0]) for width in widths), strict=True)
    return [*y, *means, *variances]


def _positions_of_statistics(*args) -> Sequence[int]:
    if not args[-1]:
        return ()
    outputs = len(_out_spec(*args))
    return range(outputs // 3, outputs)


def _reference(
    x, dw_weight, pw_weight, scale, shift, pre_act, act, method, fusion_weight, resample, *rest
) -> list[Tensor]:
    return reference.separable_conv(
        x, dw_weight, pw_weight, scale, shift, pre_act, act,
        None if method == "none" else method, fusion_weight, resample.split(","), *rest,
    )  # fmt: skip


_MAX_OUTPUTS = 12  # of one launch
_AS_IT_IS = fusion_fields(None, "sum", "identity", [0, 0, 0, 0], torch.float32)


def _run_cpu(*args) -> list[Tensor]:
    """Without statistics."""
    x, dw_weight, pw_weight, scale, shift, pre_act, act, method, fusion_weight, *how = _cpu.widened(
        args
    )
    if max(weight.shape[2] for weight in dw_weight) > _native.MAX_KERNEL:
        return _reference(*args)
    dtype = x[0].dtype
    y = _cpu.allocate(_out_spec(*args), dtype)
    if x[0].shape[0] == 0:
        return y
    maps = [_cpu.map_fields(_cpu.channels_inner(level)) for level in x]
    fusion = _AS_IT_IS
    if method != "none":
        fusion = fusion_fields(fusion_weight, method, how[0], how[2], dtype)
    levels = len(y) // len(dw_weight)
    in_place = _native.module().separable_product_dtype(_cpu.code(dtype)) == _cpu.code(dtype)
    packed = [
        {
            "dw_weights": _cpu.pack_depthwise(dw),
            "pw_weights": _cpu.pack_dense(pw if in_place else widen(pw)),
            "kernel": dw.shape[2],
        }
        for dw, pw in zip(dw_weight, pw_weight, strict=True)
    ]
    outputs = []
    for i, out in enumerate(y):
        width = out.shape[1]
        vectors = _cpu.affine(
            scale[i] if scale else None, shift[i] if shift else None, width, dtype
        )
        outputs.append(
            {
                "dtype": _cpu.code(dtype),
                "x": maps if method != "none" else [maps[i % len(maps)]],
                "y": out,
                "height": out.shape[2],
                "width": out.shape[3],
                "out_channels": width,
                "scale": vectors[0],
                "shift": vectors[1],
                **packed[i // levels],
            }
        )
    for first in range(0, len(y), _MAX_OUTPUTS):
        _native.launch(
            "separable_conv",
            dtype=_cpu.code(dtype),
            pre_act=_cpu.act_code(pre_act),
            act=_cpu.act_code(act),
            batch=x[0].shape[0],
            channels=x[0].shape[1],
            outputs=outputs[first : first + _MAX_OUTPUTS],
            **fusion,
        )
    return y


def _backward_cpu(grads, *rest) -> list[Tensor]:
    if max(weight.shape[2] for weight in rest[1]) > _native.MAX_KERNEL:
        return _separable_conv.backwards["reference"](grads, *rest)
    return backward(grads, *rest)


_separable_conv = _library.define(
    "separable_conv(Tensor[] x, Tensor[] dw_weight, Tensor[] pw_weight, Tensor[] scale,"
    " Tensor[] shift, str pre_act, str act, str method, Tensor? fusion_weight, str resample,"
    " SymInt[] size, SymInt[] pool_padding, bool statistics) -> Tensor[]",
    out_spec=_out_spec,
    impls={
        "cpu": _statistics.after_kernel(_run_cpu),
        "triton": _triton.deferred("effdet_kernels.ops.separable_conv.triton_fwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.separable_conv.cuda"),
        "reference": _reference,
    },
    backwards={
        "cpu": _backward_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.separable_conv.triton_bwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.separable_conv.cuda_bwd"),
    },
    differentiable=("x", "dw_weight", "pw_weight", "scale", "shift", "fusion_weight"),
    nondifferentiable_outputs=_positions_of_statistics,
    autocast=("x", "dw_weight", "pw_weight"),
)
