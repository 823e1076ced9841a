"""A whole block of EfficientNet in eval mode, from its input to its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdet_kernels import _checks, _cuda, _library
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments
from effdet_kernels.ops.depthwise_conv.op import _depthwise_conv
from effdet_kernels.ops.expand_depthwise.op import _expand_depthwise
from effdet_kernels.ops.mbconv import reference
from effdet_kernels.ops.pointwise_conv.op import _pointwise_conv
from effdet_kernels.ops.squeeze_excite.op import GATES, _squeeze_excite, check_parameters

# Elements of a weight of squeeze-excite up to which CUDA kernels do without a launch of its own: every block of the
# projection reads them.
MOST_EXCITED = 2**16


def mbconv(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_scale: Tensor | None,
    expand_shift: Tensor | None,
    dw_weight: Tensor,
    dw_scale: Tensor,
    dw_shift: Tensor,
    se_reduce_weight: Tensor,
    se_reduce_bias: Tensor,
    se_expand_weight: Tensor,
    se_expand_bias: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    act: str = "swish",
    se_act: str = "swish",
    gate: str = "sigmoid",
    residual: bool = False,
) -> Tensor:
    """y = weight (g * w) * scale + shift, plus x with ``residual``.

    w = act(depthwise(e) * dw_scale + dw_shift) with e = act(expand(x) * expand_scale +
    expand_shift), or e = x without ``expand_weight``; g = gate(se_expand(se_act(se_reduce(mean of
    w)))). Source: MBConv, MobileNetV2 arXiv:1801.04381 section 3, with squeeze-and-excitation,
    arXiv:1709.01507 section 3, as EfficientNet arXiv:1905.11946 has it.

    The same as ``expand_depthwise`` or ``depthwise_conv``, ``squeeze_excite`` and
    ``pointwise_conv``, and made of them where no kernel does it in less; those have gradients, this
    has none.

    Args:
        x: [B, C, H, W] float32, float64, float16 or bfloat16, any strides (channels_last is read in
            place).
        expand_weight: [E, C, 1, 1], dtype of ``x``; None: E is C.
        expand_scale: [E] float32 (float64 with float64): the BN that follows, folded, its factor;
            None without ``expand_weight``.
        expand_shift: [E] like ``expand_scale``, its offset.
        dw_weight: [E, 1, k, k], dtype of ``x``.
        dw_scale: [E] like ``expand_scale``.
        dw_shift: [E] like ``expand_scale``.
        se_reduce_weight: [R, E, 1, 1], any floating dtype, the same for the four of squeeze-excite.
        se_reduce_bias: [R].
        se_expand_weight: [E, R, 1, 1].
        se_expand_bias: [E].
        weight: [O, E, 1, 1], dtype of ``x``.
        scale: [O] like ``expand_scale``.
        shift: [O] like ``expand_scale``.
        stride: of the depthwise convolution, both axes, at least 1.
        padding: zeros (left, right, top, bottom) around e, in pixels.
        act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish".
        se_act: one of these.
        gate: "sigmoid" or "hard_sigmoid".
        residual: add x, which then has the shape of y.

    Returns:
        y [B, O, (H + top + bottom - k) // stride + 1, (W + left + right - k) // stride + 1], dtype
        of ``x``, channels_last.

    Accumulates in float32 (float64 with float64); e and w are rounded to the dtype of ``x``. Under
    autocast x and the weights of convolutions are cast, the other vectors and squeeze-excite are
    not. Not differentiable. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "mbconv"
    _arguments.feature_map(op, "x", x)
    channels = x.shape[1]
    vectors = {"expand_scale": expand_scale, "expand_shift": expand_shift}
    if expand_weight is not None:
        _arguments.dense(op, "expand_weight", expand_weight, ("E", channels, 1, 1), x)
        channels = expand_weight.shape[0]
        for name, vector in vectors.items():
            _arguments.channel_vector(op, name, vector, channels, x)
    for name, vector in vectors.items():
        if expand_weight is None and vector is not None:
            got = _checks.describe(vector)
            raise ValueError(f"{op}: {name}: got {got}, takes None without expand_weight")
    _arguments.depthwise_weight(op, "dw_weight", dw_weight, x, channels)
    _arguments.channel_vector(op, "dw_scale", dw_scale, channels, x)
    _arguments.channel_vector(op, "dw_shift", dw_shift, channels, x)
    excite = se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias
    check_parameters(op, "se_", excite, channels, x)
    _arguments.dense(op, "weight", weight, ("O", channels, 1, 1), x)
    _arguments.channel_vector(op, "scale", scale, weight.shape[0], x)
    _arguments.channel_vector(op, "shift", shift, weight.shape[0], x)
    _arguments.integer(op, "stride", stride, least=1)
    padding = _arguments.four_paddings(op, "padding", padding)
    _arguments.activation(op, "act", act)
    _arguments.activation(op, "se_act", se_act)
    _checks.choice(op, "gate", gate, GATES)
    size = _arguments.convolved_size(op, x, dw_weight.shape[2], stride, padding)
    if not isinstance(residual, bool):
        raise TypeError(f"{op}: residual: got {_checks.describe(residual)}, takes a bool")
    if residual and tuple(x.shape[1:]) != (weight.shape[0], *size):
        shape = [x.shape[0], weight.shape[0], *size]
        raise ValueError(
            f"{op}: residual: got True with x {list(x.shape)} and a result of {shape}, takes the same shapes"
        )
    tensors = (
        x, expand_weight, expand_scale, expand_shift, dw_weight, dw_scale, dw_shift,
        *excite, weight, scale, shift,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            f"{op}: got tensors that require gradients, takes none: it has no backward; those it is made of have"
        )
    return _mbconv(*tensors, stride, padding, act, se_act, gate, residual)


class Block(NamedTuple):
    """The arguments of the registered op, in order."""

    x: Tensor
    expand_weight: Tensor | None
    expand_scale: Tensor | None
    expand_shift: Tensor | None
    dw_weight: Tensor
    dw_scale: Tensor
    dw_shift: Tensor
    se_reduce_weight: Tensor
    se_reduce_bias: Tensor
    se_expand_weight: Tensor
    se_expand_bias: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    stride: int
    padding: Sequence[int]
    act: str
    se_act: str
    gate: str
    residual: bool

    @property
    def opening(self) -> tuple[Any, ...]:
        """What ``expand_depthwise``, or without an expansion ``depthwise_conv``, takes to make the wide map and its
        sums."""
        depthwise = self.dw_weight, self.dw_scale, self.dw_shift, self.stride, self.padding
        expansion = self[1:4] if self.expand_weight is not None else ()
        return self.x, *expansion, *depthwise, self.act, True

    @property
    def excite(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weights and biases of squeeze-excite, in the order of ``squeeze_excite``."""
        return (
            self.se_reduce_weight,
            self.se_reduce_bias,
            self.se_expand_weight,
            self.se_expand_bias,
        )

    @property
    def added(self) -> Tensor | None:
        """What the projection adds: x or nothing."""
        return self.x if self.residual else None


def _out_spec(*args) -> list[TensorSpec]:
    block = Block(*args)
    kernel = block.dw_weight.shape[2]
    size = _arguments.convolved_size("mbconv", block.x, kernel, block.stride, block.padding)
    return [_library.nchw((block.x.shape[0], block.weight.shape[0], *size), block.x)]


def _of_parts(backend: str) -> Callable[..., Tensor]:
    """What the three ops do on ``backend``, one after the other."""

    def run(*args):
        block = Block(*args)
        if block.expand_weight is None:
            wide, sums = _depthwise_conv.impls[backend](*block.opening, False)
        else:
            wide, sums = _expand_depthwise.impls[backend](*block.opening)
        count = wide.shape[2] * wide.shape[3]
        excite = *block.excite, count, block.se_act, block.gate
        gates = _squeeze_excite.impls[backend](sums, *excite)
        projection = block.weight, block.scale, block.shift, gates, block.added, "none", False
        return _pointwise_conv.impls[backend](wide, *projection)[0]

    return run


_mbconv = _library.define(
    "mbconv(Tensor x, Tensor? expand_weight, Tensor? expand_scale, Tensor? expand_shift,"
    " Tensor dw_weight, Tensor dw_scale, Tensor dw_shift, Tensor se_reduce_weight,"
    " Tensor se_reduce_bias, Tensor se_expand_weight, Tensor se_expand_bias, Tensor weight,"
    " Tensor scale, Tensor shift, SymInt stride, SymInt[] padding, str act, str se_act, str gate,"
    " bool residual) -> Tensor",
    out_spec=_out_spec,
    impls={
        "cpu": _of_parts("cpu"),
        "triton": _of_parts("triton"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.mbconv.cuda"),
        "reference": reference.mbconv,
    },
    autocast=("x", "expand_weight", "dw_weight", "weight"),
)  # fmt: skip
