"""Glue between modules and the ops of `effdet_kernels`: convolution, then normalisation, then act.

The modules own the parameters, the ops do the arithmetic. For a norm that follows a convolution
there are three cases, looked up at every call, so that freezing or replacing a module just works:

* `nn.BatchNorm2d` or `nn.SyncBatchNorm` that uses its running statistics: folded to (scale, shift)
  into the op's epilogue. The fold is differentiable, so frozen batch norm can be fine-tuned.
* one that uses batch statistics: the op computes the bare convolution and `batch_norm_act` follows;
  the module's running statistics are updated here, as torch would. An `nn.SyncBatchNorm` that
  trains in several processes takes the statistics of the images of all (`sync_norm`).
* anything else (`GroupNorm`, a subclass with its own forward): the module is called, then the
  activation.

Convolutions, norms and activations that are fused are not called as modules, so forward hooks on
them do not fire; hooks on the blocks that contain them do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdet_kernels import (
    batch_norm_act,
    dense_conv,
    depthwise_conv,
    expand_depthwise,
    mbconv,
    pointwise_conv,
    separable_conv,
)
from effdet_kernels.ops.mbconv.op import MOST_EXCITED

from . import graph
from .folding import BatchNorm, fold, fold_norm, is_batch_norm, is_folded, stable
from .padding import Padding
from .recompute import computing_again
from .sync_norm import group_of, synchronised_norm_act

ConvNorm = tuple[nn.Conv2d, nn.Module | None]
_T = TypeVar("_T")
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hard_swish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
}
_OP_NAMES = {
    nn.Identity: "none",
    nn.SiLU: "swish",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hard_swish",
    nn.LeakyReLU: "leaky_relu",
    nn.Mish: "mish",
}


def activation_class(name: str) -> type[nn.Module]:
    """The module class of the activation called `name`.

    Raises:
        ValueError: no such name; the message lists the names.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"act_type: got {name!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def op_activation(act: nn.Module | None) -> tuple[str, nn.Module | None]:
    """`act` as (the name for an op, the module to call after it): one of the two does nothing."""
    if act is None:
        return "none", None
    name = _OP_NAMES.get(type(act))
    if name is None or (isinstance(act, nn.LeakyReLU) and act.negative_slope != 0.01):
        return "none", act
    return name, None


def op_gate(gate: nn.Module) -> str | None:
    """The name that the op `squeeze_excite` has for `gate`, or None."""
    return {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hard_sigmoid"}.get(type(gate))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does and nothing else: no own forward, no hooks."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return isinstance(module, kind) and type(module).forward is kind.forward and not hooked


def norm_act(
    y: Tensor,
    norm: nn.Module | None,
    act: nn.Module | None,
    statistics: Sequence[Tensor] = (),
) -> Tensor:
    """`act(norm(y))` for what was not folded; updates running statistics.

    `statistics`: mean and biased variance of y where they are known.

    Raises:
        ValueError: batch statistics of a single value per channel were asked for.
    """
    if norm is None:
        return y if act is None else act(y)
    if not is_batch_norm(norm) or is_folded(norm):
        y = norm(y)
        return y if act is None else act(y)
    group = group_of(norm)
    count = y.numel() // y.shape[1]
    if count <= 1 and group is None:
        raise ValueError(
            "batch norm in training mode needs more than one value per channel, got an input of"
            f" size {tuple(y.shape)}; use a larger batch or image, or put the layer in eval mode"
        )
    weight = norm.weight if norm.weight is not None else y.new_ones(y.shape[1])
    bias = norm.bias if norm.bias is not None else y.new_zeros(y.shape[1])
    name, after = op_activation(act)
    how: dict[str, Any] = {"eps": norm.eps, "act": name}
    vectors = stable(weight), stable(bias)
    if group is not None:
        how["statistics"] = statistics
        y, mean, unbiased = synchronised_norm_act(y, *vectors, group, **how)
    else:
        if statistics:
            mean, var = statistics
            y = _map(batch_norm_act(y, *vectors, mean=mean, variance=var, **how))
        else:
            y, mean, var = batch_norm_act(y, *vectors, **how)
        unbiased = var * (count / (count - 1))
    if norm.training and norm.track_running_stats and not computing_again():
        _update_running_stats(norm, mean, unbiased)
    return y if after is None else after(y)


def _gives_statistics(x: Tensor, norms: Sequence[nn.Module | None]) -> bool:
    """Whether a convolution of x also takes the statistics of the batch norms that follow it."""
    return _statistics_are_free(x) and all(
        norm is not None and is_batch_norm(norm) and not is_folded(norm) for norm in norms
    )


def _statistics_are_free(x: Tensor) -> bool:
    """On a GPU they cost a convolution no pass over its map. On a CPU they would, and `batch_norm_act` needs none.

    A convolution refuses them of an empty batch.
    """
    return x.is_cuda and len(x) > 0


def _normed(
    result: Tensor | tuple[Tensor, ...], norm: nn.Module | None, act: nn.Module | None
) -> Tensor:
    """`norm_act` of a map, or of (map, mean, variance)."""
    y, *statistics = result if isinstance(result, tuple) else (result,)
    return norm_act(y, norm, act, statistics)


@torch.no_grad()
def _update_running_stats(norm: BatchNorm, mean: Tensor, unbiased_var: Tensor) -> None:
    # These buffers exist in a norm that tracks.
    count = cast(Tensor, norm.num_batches_tracked).add_(1)
    momentum = 1.0 / count.float() if norm.momentum is None else norm.momentum
    tracked = (norm.running_mean, mean), (norm.running_var, unbiased_var)
    for running, batch in cast("tuple[tuple[Tensor, Tensor], ...]", tracked):
        running.lerp_(batch.to(running.dtype), momentum)


def dense(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.Module | None,
    act: nn.Module | None,
    padding: Padding | None = None,
) -> Tensor:
    """`act(norm(conv(x)))`; `padding` (left, right, top, bottom) takes the place of the convolution's own.

    Convolutions with groups, dilation or other rarities go to torch.
    """
    if _is_dense(conv):
        pads = padding or (conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0])
        return _dense(x, conv, norm, act, cast("Padding", pads))
    if padding is not None:
        x = F.pad(x, padding)
    own = conv.padding if padding is None else 0
    weight, bias = conv.weight, conv.bias
    if is_folded(norm) and norm is not None:
        scale, shift = fold_norm(norm, bias)
        weight = (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        bias = shift.to(weight.dtype)
    y = F.conv2d(x, weight, bias, conv.stride, own, conv.dilation, conv.groups)
    if not is_folded(norm):
        return norm_act(y, norm, act)
    return y if act is None else act(y)


def _is_dense(conv: nn.Conv2d) -> bool:
    """Whether the op `dense_conv` computes what `conv` does."""
    square = conv.kernel_size[0] == conv.kernel_size[1] and conv.stride[0] == conv.stride[1]
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return square and plain and not isinstance(conv.padding, str)


def _dense(
    x: Tensor, conv: nn.Conv2d, norm: nn.Module | None, act: nn.Module | None, padding: Padding
) -> Tensor:
    how: dict[str, Any] = {"stride": conv.stride[0], "padding": padding}
    if not is_folded(norm):
        shift = None if conv.bias is None else stable(conv.bias)
        how["statistics"] = _gives_statistics(x, [norm])
        return _normed(dense_conv(x, conv.weight, shift=shift, **how), norm, act)
    name, after = op_activation(act)
    y = _map(dense_conv(x, conv.weight, *fold(norm, conv.bias), act=name, **how))
    return y if after is None else after(y)


def pointwise(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.Module | None,
    act: nn.Module | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`act(norm(conv(x * gate))) + residual` for a 1x1 convolution.

    Shapes: x [B, C, H, W], gate [B, C], residual and the result [B, O, H, W].
    """
    if not is_folded(norm):
        shift = None if conv.bias is None else stable(conv.bias)
        ahead = _gives_statistics(x, [norm])
        raw = pointwise_conv(x, conv.weight, shift=shift, gate=gate, statistics=ahead)
        y = _normed(raw, norm, act)
        return y if residual is None else y + residual
    name, after = op_activation(act)
    scale, shift = fold(norm, conv.bias)
    if after is None:
        vectors = scale, shift
        return _map(
            pointwise_conv(x, conv.weight, *vectors, gate=gate, residual=residual, act=name)
        )
    y = after(_map(pointwise_conv(x, conv.weight, scale, shift, gate=gate)))
    return y if residual is None else y + residual


def _map(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The map of what an op returns that was not asked for more."""
    return cast(Tensor, result)


def depthwise(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.Module | None,
    act: nn.Module | None,
    padding: Padding,
    squeeze: bool,
) -> tuple[Tensor, Tensor | None]:
    """`y = act(norm(conv(x)))` and, if `squeeze`, the sums of y over H and W, [B, C]."""
    stride = conv.stride[0]
    if not is_folded(norm):
        shift = None if conv.bias is None else stable(conv.bias)
        ahead = _gives_statistics(x, [norm])
        raw = depthwise_conv(
            x, conv.weight, shift=shift, stride=stride, padding=padding, statistics=ahead
        )
        y = _normed(raw, norm, act)
        return y, spatial_sums(y) if squeeze else None
    name, after = op_activation(act)
    scale, shift = fold(norm, conv.bias)
    fused_squeeze = squeeze and after is None
    result = depthwise_conv(
        x,
        conv.weight,
        scale,
        shift,
        stride=stride,
        padding=padding,
        act=name,
        squeeze=fused_squeeze,
    )
    y, sums = _with_sums(result)
    if fused_squeeze:
        return y, sums
    y = y if after is None else after(y)
    return y, spatial_sums(y) if squeeze else None


def expand(
    x: Tensor,
    conv_pw: nn.Conv2d,
    norm_pw: nn.Module,
    conv_dw: nn.Conv2d,
    norm_dw: nn.Module,
    act: nn.Module | None,
    padding: Padding,
    squeeze: bool,
) -> tuple[Tensor, Tensor | None]:
    """A 1x1 and a depthwise convolution, each with norm and `act`; result as of `depthwise`.

    One op as long as both norms are folded, two otherwise.
    """
    name, after = op_activation(act)
    if after is not None or not (is_folded(norm_pw) and is_folded(norm_dw)):
        y = pointwise(x, conv_pw, norm_pw, act)
        return depthwise(y, conv_dw, norm_dw, act, padding, squeeze)
    result = expand_depthwise(
        x,
        conv_pw.weight,
        *fold_norm(norm_pw, conv_pw.bias),
        conv_dw.weight,
        *fold_norm(norm_dw, conv_dw.bias),
        stride=conv_dw.stride[0],
        padding=padding,
        act=name,
        squeeze=squeeze,
    )
    return _with_sums(result)


def block(
    x: Tensor,
    expansion: ConvNorm | None,
    spatial: ConvNorm,
    projection: ConvNorm,
    excite: tuple[Sequence[Tensor], str, str] | None,
    act: nn.Module | None,
    padding: Padding,
    residual: bool,
) -> Tensor | None:
    """All of MBConv in one op, of which a GPU makes two launches; None where it is not that op, or that is slower.

    `excite`: what `squeeze_excite` takes beside the sums: its parameters, activation and gate.
    """
    if not graph.counts_launches(x):
        return None
    name, after = op_activation(act)
    stages = [stage for stage in (expansion, spatial, projection) if stage is not None]
    known = after is None and excite is not None and excite[0][0].numel() <= MOST_EXCITED
    folded = all(
        isinstance(conv, nn.Conv2d) and norm is not None and is_folded(norm)
        for conv, norm in stages
    )
    if not folded or not known:
        return None
    vectors = [
        v for conv, norm in stages for v in (conv.weight, *fold_norm(cast(Any, norm), conv.bias))
    ]
    opening = vectors[:-6] or (None, None, None)
    parameters, se_act, gate = cast("tuple[Sequence[Tensor], str, str]", excite)
    return mbconv(
        x,
        *opening,
        *vectors[-6:-3],
        *parameters,
        *vectors[-3:],
        stride=spatial[0].stride[0],
        padding=padding,
        act=name,
        se_act=se_act,
        gate=gate,
        residual=residual,
    )


def _with_sums(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """What an op with an argument `squeeze` returns, as (y, sums or None)."""
    return (result[0], result[1]) if isinstance(result, tuple) else (result, None)


def spatial_sums(y: Tensor) -> Tensor:
    """The sums [B, C] over the pixels of y [B, C, H, W], at least in float32."""
    return y.sum((2, 3), dtype=torch.promote_types(y.dtype, torch.float32))


def separable(
    x: Sequence[Tensor],
    nets: Sequence[tuple[nn.Conv2d, nn.Conv2d]],
    norms: Sequence[nn.Module | None],
    act: nn.Module | None,
    pre_act: nn.Module | None = None,
    fusion: dict[str, Any] | None = None,
) -> list[Tensor]:
    """`act(norm(conv_pw(conv_dw(pre_act(x)))))` of every map, each with a norm of its own.

    A net is (conv_dw, conv_pw), which its maps share; stride 1 and zero "same" padding. One net
    reads all of x; two read either the same maps or, net-major, half of them each; `norms` and the
    result are net-major. `pre_act` is one that an op knows. With `fusion`, the op's arguments of
    that name, the only map is fused from x.
    """
    before, _ = op_activation(pre_act)
    load = {"pre_act": before, **(fusion or {})}
    weights = [dw.weight for dw, _ in nets], [pw.weight for _, pw in nets]
    biases = _repeated([pw.bias for _, pw in nets], len(norms))
    name, after = op_activation(act)
    folded = [norm for norm in norms if is_folded(norm)]
    if len(folded) == len(norms) and any(norm is not None for norm in norms):
        folds = [fold(norm, bias) for norm, bias in zip(folded, biases, strict=True)]
    else:  # one bias for all maps of a net
        folds = _repeated([fold(None, pw.bias) for _, pw in nets], len(norms))
    scale = [factor for factor, _ in folds if factor is not None]
    shift = [term for _, term in folds if term is not None]
    if len(folded) == len(norms):
        y = cast("list[Tensor]", separable_conv(list(x), *weights, scale, shift, act=name, **load))
        return y if after is None else [after(level) for level in y]
    ahead = _gives_statistics(x[0], norms)
    raw = separable_conv(list(x), *weights, [], shift, statistics=ahead, **load)
    # A map of each level, or (maps, means, variances).
    levels: list[Any] = list(zip(*raw, strict=True)) if isinstance(raw, tuple) else raw
    return [_normed(level, norm, act) for level, norm in zip(levels, norms, strict=True)]


def _repeated(of_nets: list[_T], outputs: int) -> list[_T]:
    """What belongs to the nets, for each of their `outputs`, net-major."""
    return [value for value in of_nets for _ in range(outputs // len(of_nets))]
