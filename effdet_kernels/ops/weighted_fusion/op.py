"""Weighted fusion of one to three maps, resampled on load: the first half of a BiFPN node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _checks, _cuda, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu, _gradients
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops.weighted_fusion import reference

METHODS = ("fastattn", "attn", "sum")
RESAMPLE = ("identity", "nearest", "bilinear", "max")
POOL = 3  # window of "max"; its stride is 2


def weighted_fusion(
    x: Sequence[Tensor],
    weight: Tensor | None,
    *,
    method: str = "fastattn",
    resample: Sequence[str] | None = None,
    size: Sequence[int] | None = None,
    pool_padding: Sequence[int] = (0, 0, 0, 0),
    act: str = "none",
) -> Tensor:
    """y = act(sum_i a_i * r_i(x_i)), a = relu(w) / (sum relu(w) + 1e-4), softmax(w) or 1.

    Source: EfficientDet, arXiv:1911.09070, section 3.3, equation for fast normalised fusion.

    Args:
        x: 1 to 3 maps [B, C, H_i, W_i] float32, float64, float16 or bfloat16, any strides.
        weight: [len(x)], any floating dtype; None with method "sum".
        method: "fastattn" (the ratio above), "attn" (softmax) or "sum".
        resample: r_i per map; "identity"; "nearest" (source pixel floor(i * H_i / H)); "bilinear"
            (half-pixel centres, no anti-aliasing); "max" (3x3 max-pool of stride 2 over the map
            padded with -inf by ``pool_padding``). None: "identity" for all.
        size: (H, W) of the output; None: that of ``x[0]``. "identity" and "max" must give exactly
            this size.
        pool_padding: (left, right, top, bottom) of "max", each 0 to 2.
        act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish".

    Returns:
        y [B, C, H, W], dtype of ``x``, channels_last.

    Weights are normalised, and maps summed, in float32 (float64 with float64). Under autocast x is
    cast, weight is not. Differentiable in x and weight; the gradient of a max-pool tie goes to the
    first maximum in row-major order. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "weighted_fusion"
    x, names, size, pool_padding = check_fusion(
        op, "weight", x, weight, method, resample, size, pool_padding
    )
    _arguments.activation(op, "act", act)
    return _weighted_fusion(x, weight, method, names, size, pool_padding, act)


def check_fusion(
    op: str,
    weight_name: str,
    x: Sequence[Tensor],
    weight: Tensor | None,
    method: str,
    resample: Sequence[str] | None,
    size: Sequence[int] | None,
    pool_padding: Sequence[int],
) -> tuple[list[Tensor], str, list[int], list[int]]:
    """Checks the arguments of a fusion; returns x, resample (joined by commas), size and pool_padding complete.

    For every op that fuses on load; ``weight_name`` is what ``op`` calls its weight.
    """
    x = _arguments.tensor_list(op, "x", x, (1, 2, 3))
    for i, level in enumerate(x):
        _arguments.feature_map(op, f"x[{i}]", level, like=x[0])
        if level.shape[:2] != x[0].shape[:2]:
            want = list(x[0].shape[:2])
            raise ValueError(
                f"{op}: x[{i}]: got {_checks.describe(level)},"
                f" takes the batch and channels {want} of x[0]"
            )
    _checks.choice(op, "method", method, METHODS)
    if method == "sum" and weight is not None:
        got = _checks.describe(weight)
        raise ValueError(f'{op}: {weight_name}: got {got}, takes None with "sum"')
    if method != "sum":
        _checks.tensor(op, weight_name, weight, (len(x),), device=x[0].device)
    size = x[0].shape[2:] if size is None else size
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"{op}: size: got {size!r}, takes (H, W)")
    size = list(size)
    for extent in size:
        _arguments.integer(op, "size", extent, least=1)
    pool_padding = _arguments.four_paddings(op, "pool_padding", pool_padding)
    if max(pool_padding) >= POOL:
        raise ValueError(f"{op}: pool_padding: got {pool_padding!r}, takes 0 to {POOL - 1} a side")
    names = ["identity"] * len(x) if resample is None else list(resample)
    if len(names) != len(x):
        raise ValueError(f"{op}: resample: got {len(names)} names, takes one per map: {len(x)}")
    for i, (level, how) in enumerate(zip(x, names, strict=True)):
        _checks.choice(op, f"resample[{i}]", how, RESAMPLE)
        _check_size(op, i, level, how, size, pool_padding)
    return x, ",".join(names), size, pool_padding


def _check_size(op: str, i: int, x: Tensor, how: str, size: list[int], padding: list[int]) -> None:
    """Checks that map i gives ``size`` where its resampling leaves no choice."""
    if how in ("nearest", "bilinear"):
        return
    got = tuple(x.shape[2:])
    if how == "max":
        got = _arguments.convolved_size(op, x, POOL, 2, padding)
    if got != tuple(size):
        raise ValueError(
            f"{op}: x[{i}]: got {_checks.describe(x)}, which {how!r} turns into {tuple(got)},"
            f" takes a map that becomes {tuple(size)}"
        )


def _out_spec(x, weight, method, resample, size, *_) -> list[TensorSpec]:
    return [_library.nchw((*x[0].shape[:2], *size), x[0])]


def _reference(x, weight, method, resample, size, pool_padding, act) -> Tensor:
    names = resample.split(",")
    return reference.weighted_fusion(x, weight, method, names, size, pool_padding, act)


def fusion_fields(
    weight: Tensor | None,
    method: str,
    resample: str,
    pool_padding: Sequence[int],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """How a C++ kernel fuses maps of ``dtype``."""
    codes = [RESAMPLE.index(name) for name in resample.split(",")]
    if weight is not None:
        weight = weight.to(accumulation_dtype(dtype)).contiguous()
    return {
        "resample": codes,
        "weight": weight,
        "method": METHODS.index(method),
        "pool_left": pool_padding[0],
        "pool_top": pool_padding[2],
    }


def run_cpu(*args) -> Tensor:
    """The fused map [B, C, *size], channels_last."""
    x, weight, method, resample, size, pool_padding, act = _cpu.widened(args)
    (y,) = _cpu.allocate(_out_spec(*args), x[0].dtype)
    if y.shape[0] == 0:
        return y
    _native.launch(
        "weighted_fusion",
        dtype=_cpu.code(y.dtype),
        act=_cpu.act_code(act),
        batch=y.shape[0],
        channels=y.shape[1],
        height=size[0],
        width=size[1],
        x=[_cpu.map_fields(_cpu.channels_inner(level)) for level in x],
        y=y,
        **fusion_fields(weight, method, resample, pool_padding, y.dtype),
    )
    return y


def gradients(
    grad: Tensor,
    x: Sequence[Tensor],
    weight: Tensor | None,
    method: str,
    resample: str,
    pool_padding: Sequence[int],
    of_x: Sequence[bool],
) -> tuple[list[Tensor | None], Tensor | None]:
    """Of the fusion without activation, given that of its result: the gradients of x, where wanted, and of weight."""
    batch, channels = grad.shape[:2]
    found = [
        torch.empty(level.shape, dtype=level.dtype, memory_format=torch.channels_last)
        if need
        else None
        for level, need in zip(x, of_x, strict=True)
    ]
    of_weight = None if weight is None else torch.empty(len(x), dtype=grad.dtype)
    if not batch:
        return found, None if of_weight is None else of_weight.zero_()
    _native.launch(
        "weighted_fusion_gradient",
        dtype=_cpu.code(grad.dtype),
        batch=batch,
        channels=channels,
        x=[_cpu.map_fields(_cpu.channels_inner(level)) for level in x],
        grad=_cpu.map_fields(_cpu.channels_inner(grad)),
        grad_x=found,
        grad_weight=of_weight,
        partial=torch.empty(batch * channels * len(x), dtype=torch.float64),
        **fusion_fields(weight, method, resample, pool_padding, grad.dtype),
    )
    return found, of_weight


def _backward_cpu(grads, *rest) -> list[Tensor]:
    *args, needs = rest
    x, weight, method, resample, size, pool_padding, act = _gradients.wide(args)
    (grad,) = _gradients.wide(grads)
    of_x, of_weight = _gradients.wanted((x, weight), needs)
    if act != "none":
        before = run_cpu(x, weight, method, resample, size, pool_padding, "none")
        grad, _, _ = _gradients.affine(grad, before, None, None, act)
    d_x, d_weight = gradients(grad, x, weight, method, resample, pool_padding, of_x)
    found = [g for g in d_x if g is not None]
    return found + ([d_weight] if of_weight and d_weight is not None else [])


# `resample` is one string, names joined by commas: torch.jit.trace cannot record a list of strings.
_weighted_fusion = _library.define(
    "weighted_fusion(Tensor[] x, Tensor? weight, str method, str resample, SymInt[] size,"
    " SymInt[] pool_padding, str act) -> Tensor",
    out_spec=_out_spec,
    impls={
        "cpu": run_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.weighted_fusion.triton_fwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.weighted_fusion.cuda"),
        "reference": _reference,
    },
    backwards={
        "cpu": _backward_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.weighted_fusion.triton_bwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.weighted_fusion.cuda_bwd"),
    },
    differentiable=("x", "weight"),
    autocast=("x",),
)
