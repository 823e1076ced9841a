"""Batch norm in training over the images of all processes: one collective forward and one backward.

The processes have the same model and call it in the same order; numbers of images and pixels may differ. On a CPU
`nn.parallel.DistributedDataParallel` refuses a model that has an `nn.SyncBatchNorm` already: wrap it first, then
convert `wrapped.module`, whose parameters and buffers stay the same tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effdet_kernels import _dispatch, _native, batch_norm_act, batch_norm_grad, use_backend
from effdet_kernels.ops._activations import moments

from .native_plan import NotPlannableError


def group_of(norm: nn.Module) -> Any:
    """The process group over whose images `norm` normalises; None where it is this process alone.

    As in torch, an `nn.SyncBatchNorm` in eval mode, or one of a process outside of its group, is alone.
    """
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def synchronised_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    group: Any,
    *,
    eps: float,
    act: str,
    statistics: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm_act` with mean and variance of the images of all processes of `group`.

    Every process of the group must call it, and run the backward of the result or none of them. Gradients: that of x is
    of the sum over the processes of their losses, those of weight and bias are this process's shares, which
    `nn.parallel.DistributedDataParallel` averages. Compilers run it as it is.

    Args:
        x: [B, C, H, W], this process's images, B may be 0; under autocast it is cast as `batch_norm_act` casts it.
        weight: [C] float32 (float64 with float64).
        bias: [C] like `weight`.
        group: of torch.distributed, on a backend that takes tensors on the device of `x`.
        eps: added to the variance.
        act: as `batch_norm_act` takes it.
        statistics: mean and biased variance [C] of x where they are known.

    Returns:
        (y like `x`; mean and unbiased variance [C] of all images in the dtype of `weight`, without gradient).

    Raises:
        ValueError: all processes together have less than two values per channel; on all of them.
    """
    if _native.recording():
        raise NotPlannableError("statistics of the images of several processes")
    run = _normalised
    if (
        torch.compiler.is_compiling()
    ):  # not a decorator: it would import the compiler with this file
        run = torch.compiler.disable(_normalised)
    return run(x, weight, bias, group, eps, act, statistics)


def _normalised(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    group: Any,
    eps: float,
    act: str,
    statistics: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    mean, variance, count = _moments_of_all(x.detach(), statistics, group)
    own = mean.to(weight.dtype), variance.to(weight.dtype)
    y = _Normalised.apply(x, weight, bias, *own, count, group, {"eps": eps, "act": act})
    return y, own[0], (variance * (count / (count - 1))).to(weight.dtype)


@torch.no_grad()
def _moments_of_all(
    x: Tensor, statistics: Sequence[Tensor], group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] of all processes' maps, and their values per channel [], all float64.

    The same bits on every process. Without reading a number from the device, where a map has two values.
    """
    channels = x.shape[1]
    here = x.numel() // channels
    mean, variance = statistics or (moments(x) if here else x.new_zeros(2, channels))
    size = mean.new_full((1,), here, dtype=torch.float64)
    own = torch.cat([mean.double(), variance.double() * here, size])
    parts = own.new_empty(dist.get_world_size(group) * len(own))
    # The second is its name in older releases of torch.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(parts, own, group=group)
    means, squares, counts = parts.view(-1, len(own)).split([channels, channels, 1], 1)
    count = counts.sum()
    if here < 2 and count < 2:
        raise ValueError(
            "batch norm in training mode needs more than one value per channel, got an input of"
            f" size {tuple(x.shape)}, and no more on the other processes; use a larger batch or"
            " image, or put the layer in eval mode"
        )
    # Chan, Golub and LeVeque's merge, of all parts at once: squares are about each part's own mean.
    mean = (means * (counts / count)).sum(0)
    variance = (squares + counts * (means - mean).square()).sum(0) / count
    return mean, variance, count


class _Normalised(torch.autograd.Function):
    """`batch_norm_act` with given statistics, which are those of all processes also in the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        group: Any,
        how: dict[str, Any],
    ) -> Any:
        ctx.save_for_backward(x, weight, bias, mean, variance, count)
        ctx.group, ctx.how = group, how
        ctx.backend = _dispatch.requested()  # a backward may run in another thread
        if not len(x):
            return torch.empty_like(x)
        return batch_norm_act(x, weight, bias, mean=mean, variance=variance, **how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        *call, count = ctx.saved_tensors
        with use_backend(ctx.backend):
            sums = batch_norm_grad(grad, *call, **ctx.how)
            # Also where x needs no gradient here: it may on another process, which waits.
            averages = sums.clone()
            dist.all_reduce(averages, group=ctx.group)
            averages /= count
            dx = None
            if ctx.needs_input_grad[0]:
                dx = batch_norm_grad(grad, *call, averages=averages, **ctx.how)
        return dx, sums[0], sums[1], *[None] * 5
