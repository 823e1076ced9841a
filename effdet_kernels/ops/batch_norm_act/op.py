"""Training batch normalisation with the activation that follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _checks, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu, _gradients
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops.batch_norm_act import reference


def batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, act: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias), mean and var over the batch.

    Both are per channel, over B, H and W. Source: batch normalisation, arXiv:1502.03167,
    algorithm 1.

    Args:
        x: [B, C, H, W] float32, float64, float16 or bfloat16, B at least 1, any strides.
        weight: [C] float32 (float64 with float64).
        bias: [C] like ``weight``.
        eps: added to the variance, at least 0.
        act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish".

    Returns:
        y [B, C, H, W], dtype of ``x``, channels_last; mean [C] and biased variance [C] in the dtype
        of ``weight``, for the caller to update running statistics with (those usually take
        var * n / (n - 1) with n = B * H * W).

    Statistics in float32 (float64 with float64). Under autocast x is cast, weight and bias are not.
    Differentiable in x, weight and bias, through y only: mean and var carry no gradient.
    Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "batch_norm_act"
    _arguments.feature_map(op, "x", x)
    if x.shape[0] < 1:
        raise ValueError(f"{op}: x: got {_checks.describe(x)}, takes a batch of at least 1")
    _arguments.channel_vector(op, "weight", weight, x.shape[1], x)
    _arguments.channel_vector(op, "bias", bias, x.shape[1], x)
    _checks.number(op, "eps", eps, least=0)
    _arguments.activation(op, "act", act)
    return _batch_norm_act(x, weight, bias, eps, act)


def _out_spec(x, *_) -> list[TensorSpec]:
    statistic = TensorSpec((x.shape[1],), accumulation_dtype(x.dtype), x.device)
    return [_library.nchw(x.shape, x), statistic, statistic]


def _fields(x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str) -> dict[str, Any]:
    """What the C++ kernels of both directions take."""
    batch, channels, height, width = x.shape
    workspace = _native.module().batch_norm_workspace(batch, height * width, channels)
    return {
        "dtype": _cpu.code(x.dtype),
        "act": _cpu.act_code(act),
        "batch": batch,
        "pixels": height * width,
        "channels": channels,
        "eps": eps,
        "x": x,
        "x_batch_stride": x.stride(0),
        "x_pixel_stride": _cpu.pixel_stride(x),
        "weight": _cpu.vectors(weight, x.dtype),
        "bias": _cpu.vectors(bias, x.dtype),
        "partial": torch.empty(workspace, dtype=torch.uint8),
    }


def _run_cpu(*args) -> tuple[Tensor, Tensor, Tensor]:
    x, *rest = _cpu.widened(args)
    y, mean, variance = _cpu.allocate(_out_spec(*args), x.dtype)
    fields = _fields(_cpu.pixels_inner(x), *rest)
    _native.launch("batch_norm_act", y=y, mean=mean, variance=variance, **fields)
    return y, mean, variance


def _backward_cpu(grads, *rest) -> list[Tensor]:
    *args, (mean, variance), needs = rest
    x, weight, bias, eps, act = _gradients.wide(args)
    (grad,) = _gradients.wide(grads[:1])
    grad, x = _cpu.pixels_inner(grad), _cpu.pixels_inner(x)
    dx = None
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    of_weight, of_bias = (torch.empty_like(mean) for _ in range(2))
    _native.launch(
        "batch_norm_act_backward",
        grad=grad,
        grad_batch_stride=grad.stride(0),
        grad_pixel_stride=_cpu.pixel_stride(grad),
        y=dx,
        mean=mean,
        variance=variance,
        grad_weight=of_weight,
        grad_bias=of_bias,
        **_fields(x, weight, bias, eps, act),
    )
    return _gradients.chosen((dx, of_weight, of_bias), needs)


_batch_norm_act = _library.define(
    "batch_norm_act(Tensor x, Tensor weight, Tensor bias, float eps, str act)"
    " -> (Tensor, Tensor, Tensor)",
    out_spec=_out_spec,
    impls={
        "cpu": _run_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.batch_norm_act.triton_fwd"),
        "reference": reference.batch_norm_act,
    },
    backwards={
        "cpu": _backward_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.batch_norm_act.triton_bwd"),
    },
    differentiable=("x", "weight", "bias"),
    nondifferentiable_outputs=(1, 2),
    saved_outputs=(1, 2),
    autocast=("x",),
)
