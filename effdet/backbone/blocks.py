"""The building blocks of the EfficientNet family.

Module names give the state-dict keys, and those are part of the file format of published weights:
`conv_pw`/`conv_exp`, `conv_dw`, `conv_pwl`, `bn1`..`bn3`, `se.conv_reduce`, `se.conv_expand`.

Sources: MobileNetV2 arXiv:1801.04381 (inverted residual), EfficientNet arXiv:1905.11946,
EfficientNet-EdgeTPU and EfficientNetV2 arXiv:2104.00298 (fused blocks), MixNet arXiv:1907.09595.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdet_kernels import squeeze_excite

from .. import fused
from ..padding import conv_padding, spatial_size


@dataclass(frozen=True)
class BlockArgs:
    """What one block is made of; channel counts are final, a depthwise kernel may be a mix."""

    in_channels: int
    mid_channels: int
    out_channels: int
    kernel: int | tuple[int, ...]
    stride: int
    se_channels: int
    se_act: str
    se_gate: str
    act: str
    skip: bool
    pw_splits: int
    pwl_splits: int
    pad_type: str
    bn_eps: float
    bn_momentum: float
    drop_path: float

    def norm(self, channels: int) -> nn.BatchNorm2d:
        """A batch norm of `channels`, with the block's eps and momentum."""
        return nn.BatchNorm2d(channels, eps=self.bn_eps, momentum=self.bn_momentum)

    def activation(self) -> nn.Module:
        """The block's activation as a module of its own."""
        return fused.activation_class(self.act)()


class MixedConv2d(nn.ModuleDict):
    """Equal shares of the channels through convolutions of their own (MixConv)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernels: tuple[int, ...], **kwargs: Any
    ) -> None:
        count = len(kernels)
        self.in_splits = _shares(in_channels, count)
        out_splits = _shares(out_channels, count)
        depthwise = kwargs.pop("depthwise", False)
        super().__init__(
            {
                str(i): nn.Conv2d(
                    c_in,
                    c_out,
                    kernel,
                    groups=c_in if depthwise else 1,
                    bias=False,
                    **kwargs,
                )
                for i, (c_in, c_out, kernel) in enumerate(
                    zip(self.in_splits, out_splits, kernels, strict=True)
                )
            }
        )

    def convs(self) -> list[nn.Conv2d]:
        """The convolutions, in the order of their shares of the channels."""
        return cast("list[nn.Conv2d]", list(self.values()))


def _shares(channels: int, count: int) -> list[int]:
    """Equal parts of `channels`; the first takes what is left over."""
    part = channels // count
    return [channels - part * (count - 1)] + [part] * (count - 1)


def pointwise_layer(in_channels: int, out_channels: int, splits: int) -> nn.Conv2d | MixedConv2d:
    """A 1x1 convolution without bias; with `splits` above 1 a mix of so many."""
    if splits > 1:
        return MixedConv2d(in_channels, out_channels, (1,) * splits)
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def depthwise_layer(channels: int, args: BlockArgs) -> nn.Conv2d | MixedConv2d:
    """The block's depthwise convolution without bias; of several kernel sizes a mix."""
    if isinstance(args.kernel, tuple):
        return MixedConv2d(channels, channels, args.kernel, stride=args.stride, depthwise=True)
    return nn.Conv2d(channels, channels, args.kernel, args.stride, groups=channels, bias=False)


def pointwise(
    x: Tensor,
    conv: nn.Conv2d | MixedConv2d,
    norm: nn.Module,
    act: nn.Module | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused.pointwise` for one convolution or a mix."""
    if not isinstance(conv, MixedConv2d):
        return fused.pointwise(x, conv, norm, act, gate, residual)
    maps = x.split(conv.in_splits, dim=1)
    gates = [None] * len(maps) if gate is None else gate.split(conv.in_splits, dim=1)
    parts = zip(maps, conv.convs(), gates, strict=True)
    y = torch.cat([fused.pointwise(part, c, None, gate=g) for part, c, g in parts], dim=1)
    y = fused.norm_act(y, norm, act)
    return y if residual is None else y + residual


def depthwise(
    x: Tensor,
    conv: nn.Conv2d | MixedConv2d,
    norm: nn.Module,
    act: nn.Module,
    pad_type: str,
    squeeze: bool,
) -> tuple[Tensor, Tensor | None]:
    """`fused.depthwise` for one convolution or a mix."""
    if not isinstance(conv, MixedConv2d):
        return fused.depthwise(x, conv, norm, act, conv_padding(x, conv, pad_type), squeeze)
    parts = [
        fused.depthwise(part, c, None, None, conv_padding(part, c, pad_type), False)[0]
        for part, c in zip(x.split(conv.in_splits, dim=1), conv.convs(), strict=True)
    ]
    y = fused.norm_act(torch.cat(parts, dim=1), norm, act)
    return y, fused.spatial_sums(y) if squeeze else None


class SqueezeExcite(nn.Module):
    """Channel gates from channel means (arXiv:1709.01507)."""

    def __init__(self, channels: int, reduced: int, act: str, gate: str) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act1 = fused.activation_class(act)()
        self.conv_expand = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Hardsigmoid() if gate == "hard_sigmoid" else nn.Sigmoid()

    def forward(self, sums: Tensor, count: int) -> Tensor:
        """Sums over the `count` pixels of each map [B, C] -> gates [B, C]."""
        known = self.of_op()
        if known is not None:
            parameters, act, gate = known
            return squeeze_excite(sums, *parameters, count=count, act=act, gate=gate)
        reduce, expand = self.conv_reduce, self.conv_expand
        mean = (sums / count).to(reduce.weight.dtype)
        hidden = F.linear(mean, reduce.weight.flatten(1), reduce.bias)
        return self.gate(F.linear(self.act1(hidden), expand.weight.flatten(1), expand.bias))

    def of_op(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], str, str] | None:
        """What the op `squeeze_excite` takes for this: parameters, act, gate; None where it has no such thing."""
        reduce, expand = self.conv_reduce, self.conv_expand
        act, after = fused.op_activation(self.act1)
        gate = fused.op_gate(self.gate)
        if after is not None or gate is None or reduce.bias is None or expand.bias is None:
            return None
        return (reduce.weight, reduce.bias, expand.weight, expand.bias), act, gate


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv:1603.09382), scaled so that the mean stays."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """x with whole images set to 0, the others divided by the share that is kept."""
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0], *(1,) * (x.ndim - 1))).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """The probability, for `print(model)`."""
        return f"drop_prob={self.drop_prob:.3f}"


class Block(nn.Module):
    """`project(expand(x))`, plus x where shapes allow.

    The map between the two, times its gate, is the stage's wide feature.
    """

    se: nn.Module  # only of blocks that squeeze

    def __init__(self, args: BlockArgs) -> None:
        super().__init__()
        self.pad_type = args.pad_type
        self.has_skip = args.skip
        self.act = args.activation()
        self.drop_path = DropPath(args.drop_path) if args.drop_path else nn.Identity()

    def _squeeze_excite(self, args: BlockArgs, channels: int) -> nn.Module:
        if not args.se_channels:
            return nn.Identity()
        return SqueezeExcite(channels, args.se_channels, args.se_act, args.se_gate)

    def _gate(self, y: Tensor, sums: Tensor | None) -> Tensor | None:
        if sums is None:
            return None
        return self.se(sums, math.prod(spatial_size(y)))

    def expand(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x -> the wide map [B, mid, H', W'] and its channel gate [B, mid] or None."""
        raise NotImplementedError

    def _project(self, y: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        raise NotImplementedError

    def project(self, y: Tensor, gate: Tensor | None, x: Tensor) -> Tensor:
        """The wide map and its gate -> the block's output; x is the block's input."""
        if not self.has_skip:
            return self._project(y, gate, None)
        if self.training and isinstance(self.drop_path, DropPath):
            return self.drop_path(self._project(y, gate, None)) + x
        return self._project(y, gate, x)

    def _stages(self) -> tuple[Any, Any, Any] | None:
        """MBConv's expansion or None, depthwise and projection, each with its norm; None for other blocks."""
        return None

    def _in_one_op(self, x: Tensor) -> Tensor | None:
        stages = self._stages()
        if stages is None or self.training or not fused.is_plain(self.se, SqueezeExcite):
            return None
        conv_dw = stages[1][0]
        if not isinstance(conv_dw, nn.Conv2d):
            return None
        padding = conv_padding(x, conv_dw, self.pad_type)
        excite = cast(SqueezeExcite, self.se).of_op()
        return fused.block(x, *stages, excite, self.act, padding, self.has_skip)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in, H, W] -> [B, out, H', W'], in one op where one has the whole block."""
        whole = self._in_one_op(x)
        if whole is not None:
            return whole
        y, gate = self.expand(x)
        return self.project(y, gate, x)


class DepthwiseSeparableConv(Block):
    """Depthwise, squeeze-excite, 1x1 projection."""

    def __init__(self, args: BlockArgs) -> None:
        super().__init__(args)
        self.conv_dw = depthwise_layer(args.in_channels, args)
        self.bn1 = args.norm(args.in_channels)
        self.se = self._squeeze_excite(args, args.in_channels)
        self.conv_pw = pointwise_layer(args.in_channels, args.out_channels, args.pw_splits)
        self.bn2 = args.norm(args.out_channels)

    def _stages(self) -> tuple[Any, Any, Any]:
        return None, (self.conv_dw, self.bn1), (self.conv_pw, self.bn2)

    def expand(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x -> the depthwise result [B, in, H', W'] and its gate [B, in] or None."""
        squeeze = isinstance(self.se, SqueezeExcite)
        y, sums = depthwise(x, self.conv_dw, self.bn1, self.act, self.pad_type, squeeze)
        return y, self._gate(y, sums)

    def _project(self, y: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        return pointwise(y, self.conv_pw, self.bn2, gate=gate, residual=residual)


class InvertedResidual(Block):
    """MBConv: 1x1 expansion, depthwise, squeeze-excite, 1x1 projection."""

    def __init__(self, args: BlockArgs) -> None:
        super().__init__(args)
        self.conv_pw = pointwise_layer(args.in_channels, args.mid_channels, args.pw_splits)
        self.bn1 = args.norm(args.mid_channels)
        self.conv_dw = depthwise_layer(args.mid_channels, args)
        self.bn2 = args.norm(args.mid_channels)
        self.se = self._squeeze_excite(args, args.mid_channels)
        self.conv_pwl = pointwise_layer(args.mid_channels, args.out_channels, args.pwl_splits)
        self.bn3 = args.norm(args.out_channels)

    def _stages(self) -> tuple[Any, Any, Any]:
        return (self.conv_pw, self.bn1), (self.conv_dw, self.bn2), (self.conv_pwl, self.bn3)

    def expand(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x -> the depthwise result [B, mid, H', W'] and its gate [B, mid] or None."""
        squeeze = isinstance(self.se, SqueezeExcite)
        if isinstance(self.conv_pw, nn.Conv2d) and isinstance(self.conv_dw, nn.Conv2d):
            padding = conv_padding(x, self.conv_dw, self.pad_type)
            convs = self.conv_pw, self.bn1, self.conv_dw, self.bn2
            y, sums = fused.expand(x, *convs, self.act, padding, squeeze)
        else:
            wide = pointwise(x, self.conv_pw, self.bn1, self.act)
            y, sums = depthwise(wide, self.conv_dw, self.bn2, self.act, self.pad_type, squeeze)
        return y, self._gate(y, sums)

    def _project(self, y: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        return pointwise(y, self.conv_pwl, self.bn3, gate=gate, residual=residual)


class EdgeResidual(Block):
    """Fused MBConv: a dense expansion takes the place of expansion and depthwise."""

    def __init__(self, args: BlockArgs) -> None:
        super().__init__(args)
        kernel = cast(int, args.kernel)
        self.conv_exp = nn.Conv2d(
            args.in_channels, args.mid_channels, kernel, args.stride, bias=False
        )
        self.bn1 = args.norm(args.mid_channels)
        self.conv_pwl = nn.Conv2d(args.mid_channels, args.out_channels, 1, bias=False)
        self.bn2 = args.norm(args.out_channels)

    def expand(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x -> the dense convolution's result [B, mid, H', W']; there is no gate."""
        padding = conv_padding(x, self.conv_exp, self.pad_type)
        return fused.dense(x, self.conv_exp, self.bn1, self.act, padding), None

    def _project(self, y: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        return pointwise(y, self.conv_pwl, self.bn2, residual=residual)


class ConvBnAct(Block):
    """One convolution with norm and activation, plus the skip."""

    def __init__(self, args: BlockArgs) -> None:
        super().__init__(args)
        kernel = cast(int, args.kernel)
        self.conv = nn.Conv2d(args.in_channels, args.out_channels, kernel, args.stride, bias=False)
        self.bn1 = args.norm(args.out_channels)

    def expand(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x itself: there is one convolution, which `project` does."""
        return x, None

    def _project(self, y: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        if self.conv.kernel_size == (1, 1) and self.conv.stride == (1, 1):
            return pointwise(y, self.conv, self.bn1, self.act, residual=residual)
        y = fused.dense(y, self.conv, self.bn1, self.act, conv_padding(y, self.conv, self.pad_type))
        return y if residual is None else y + residual
