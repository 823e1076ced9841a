"""The two passes of the backward of ``batch_norm_act``, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from effdet_kernels import _checks, _library, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu, _gradients
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops.batch_norm_act.op import launch_backward
from effdet_kernels.ops.batch_norm_grad import reference


def batch_norm_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    eps: float,
    act: str = "none",
    averages: Tensor | None = None,
) -> Tensor:
    """Of y = batch_norm_act(x, weight, bias, ...): the sums that its gradients need, or the gradient of x from them.

    With n = (x - mean) / sqrt(variance + eps) and d = grad * act'(n * weight + bias), per channel:

        sums = (sum of d * n, sum of d)
        dx = weight / sqrt(variance + eps) * (d - averages[1] - n * averages[0])

    For statistics of more images than are here, those of other processes or of other calls: the sums of all of them
    are added up and divided by the number of all values before the second call. Source: batch normalisation,
    arXiv:1502.03167, the gradients below algorithm 1.

    Args:
        grad: [B, C, H, W], the gradient of y, dtype of ``x``, any strides.
        x: [B, C, H, W] float32, float64, float16 or bfloat16, any strides; B may be 0.
        weight: [C] float32 (float64 with float64).
        bias: [C] like ``weight``.
        mean: [C] like ``weight``, that y was made with.
        variance: [C] like ``weight``, biased, likewise.
        eps: what was added to the variance, at least 0.
        act: the activation of y, as ``batch_norm_act`` takes it.
        averages: [2, C] like ``weight``, the sums over all images divided by the number of their values per channel;
            None: the sums are wanted.

    Returns:
        Without ``averages`` the sums [2, C] over these images, in the dtype of ``weight``: they are the gradients of
        weight and of bias. With them dx [B, C, H, W], dtype of ``x``, channels_last.

    Sums in float32 (float64 with float64). Under autocast grad and x are cast, the vectors are not.
    Not differentiable. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "batch_norm_grad"
    _checks.tensor(op, "grad", grad, ("B", "C", "H", "W"))
    _checks.tensor(op, "x", x, ("B", "C", "H", "W"), device=grad.device)
    _arguments.feature_map(op, "x", x)
    _arguments.dense(op, "grad", grad, tuple(x.shape), x)
    vectors = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
    for name, vector in vectors.items():
        _arguments.channel_vector(op, name, vector, x.shape[1], x)
    _checks.number(op, "eps", eps, least=0)
    _arguments.activation(op, "act", act)
    if averages is not None:
        dtypes = (accumulation_dtype(x.dtype),)
        _checks.tensor(op, "averages", averages, (2, x.shape[1]), dtypes=dtypes, device=x.device)
    return _batch_norm_grad(grad, x, weight, bias, mean, variance, eps, act, averages)


def _out_spec(grad, x, *rest) -> list[TensorSpec]:
    if rest[-1] is not None:
        return [_library.nchw(x.shape, x)]
    return [TensorSpec((2, x.shape[1]), accumulation_dtype(x.dtype), x.device)]


def _run_cpu(*args) -> Tensor:
    grad, x, weight, bias, mean, variance, eps, act, averages = _gradients.wide(args)
    mean, variance = (_cpu.vectors(v, x.dtype) for v in (mean, variance))
    if averages is None:
        dx, sums = None, torch.empty(2, x.shape[1], dtype=mean.dtype)
    else:
        dx, sums = _library.nchw(x.shape, x).empty(), _cpu.vectors(averages, x.dtype)
    given = averages is not None
    along, total = sums
    launch_backward(grad, x, weight, bias, eps, act, mean, variance, along, total, dx, given=given)
    return sums if dx is None else dx


def _without_images(run):
    """``run``, which takes at least one image, for any number of them."""

    def call(*args):
        spec = _out_spec(*args)[0]
        return run(*args) if args[1].shape[0] else spec.empty().zero_()

    return call


_batch_norm_grad = _library.define(
    "batch_norm_grad(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
    " Tensor variance, float eps, str act, Tensor? averages) -> Tensor",
    out_spec=_out_spec,
    impls={
        "cpu": _without_images(_run_cpu),
        "triton": _without_images(
            _triton.deferred("effdet_kernels.ops.batch_norm_act.triton_bwd", "half")
        ),
        "reference": reference.batch_norm_grad,
    },
    autocast=("grad", "x"),
)
