"""Training batch normalisation with the activation that follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _checks, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu, _gradients
from effdet_kernels.ops.batch_norm_act import reference


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    act: str = "none",
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias), mean and var over the batch.

    Both are per channel, over B, H and W. Source: batch normalisation, arXiv:1502.03167,
    algorithm 1.

    Args:
        x: [B, C, H, W] float32, float64, float16 or bfloat16, B at least 1, any strides.
        weight: [C] float32 (float64 with float64).
        bias: [C] like ``weight``.
        eps: added to the variance, at least 0.
        act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish".
        mean: [C] like ``weight``, of x, known before: a convolution gives it with ``statistics``, or
            it is of the images of all ranks. None: computed.
        variance: [C] like ``weight``, biased, given if and only if ``mean`` is.

    Returns:
        (y [B, C, H, W], dtype of ``x``, channels_last; mean [C] and biased variance [C] in the dtype
        of ``weight``, for the caller to update running statistics with, which usually take
        var * n / (n - 1) with n = B * H * W). With ``mean`` and ``variance``: y.

    Statistics in float32 (float64 with float64). Under autocast x is cast, weight and bias are not.
    Differentiable in x, weight and bias, through y only: mean and var carry no gradient. The gradient of x is that of
    statistics of x also where they were given.
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
    if (mean is None) != (variance is None):
        name, other = ("variance", "mean") if variance is None else ("mean", "variance")
        raise ValueError(f"{op}: {name}: got None, takes a tensor where {other} is given")
    if mean is None or variance is None:
        y, mean, variance = _batch_norm_act(x, weight, bias, eps, act, None, None)
        return y, mean, variance
    _arguments.channel_vector(op, "mean", mean, x.shape[1], x)
    _arguments.channel_vector(op, "variance", variance, x.shape[1], x)
    return _batch_norm_act(x, weight, bias, eps, act, mean, variance)[0]


def _out_spec(x, *rest) -> list[TensorSpec]:
    y = _library.nchw(x.shape, x)
    return [y, *_library.moments(x.shape[1], x)] if rest[-1] is None else [y]


def _statistics(*args) -> tuple[int, ...]:
    """Positions of mean and variance among the outputs, where they were not given."""
    return () if args[6] is not None else (1, 2)


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


def _run_cpu(*args) -> list[Tensor]:
    x, weight, bias, eps, act, *given = _cpu.widened(args)
    y, *moments = _cpu.allocate(_out_spec(*args), x.dtype)
    mean, variance = moments or [_cpu.vectors(v, x.dtype) for v in given]
    fields = _fields(_cpu.pixels_inner(x), weight, bias, eps, act)
    fields.update(y=y, mean=mean, variance=variance, given=int(not moments))
    _native.launch("batch_norm_act", **fields)
    return [y, *moments]


def _backward_cpu(grads, *rest) -> list[Tensor]:
    x, weight, bias, eps, act, *given, saved, needs = _gradients.wide(rest)
    mean, variance = saved or [_cpu.vectors(v, x.dtype) for v in given]
    (grad,) = _gradients.wide(grads[:1])
    dx = _library.nchw(x.shape, x).empty() if needs[0] else None
    of_weight, of_bias = (torch.empty_like(mean) for _ in range(2))
    launch_backward(
        grad, x, weight, bias, eps, act, mean, variance, of_weight, of_bias, dx, given=False
    )
    return _gradients.chosen((dx, of_weight, of_bias), needs)


def launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: str,
    mean: Tensor,
    variance: Tensor,
    of_weight: Tensor,
    of_bias: Tensor,
    dx: Tensor | None,
    *,
    given: bool,
) -> None:
    """Writes the gradients of weight and bias, then dx, if it is a tensor, of them.

    With ``given`` they hold averages of these sums over all values, and only dx is written. Maps are float32 or
    float64; ``mean``, ``variance``, ``of_weight`` and ``of_bias`` dense.
    """
    grad, x = _cpu.pixels_inner(grad), _cpu.pixels_inner(x)
    _native.launch(
        "batch_norm_act_backward",
        grad=grad,
        grad_batch_stride=grad.stride(0),
        grad_pixel_stride=_cpu.pixel_stride(grad),
        y=dx,
        mean=mean,
        variance=variance,
        given=int(given),
        grad_weight=of_weight,
        grad_bias=of_bias,
        **_fields(x, weight, bias, eps, act),
    )


_batch_norm_act = _library.define(
    "batch_norm_act(Tensor x, Tensor weight, Tensor bias, float eps, str act, Tensor? mean,"
    " Tensor? variance) -> Tensor[]",
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
    nondifferentiable_outputs=_statistics,
    saved_outputs=_statistics,
    autocast=("x",),
)
