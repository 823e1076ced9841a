"""The convolutions and the resampling that the FPN and the heads are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from effdet_kernels import weighted_fusion

from . import fused
from .padding import Padding, Size, conv_padding, pair, resolve_padding, spatial_size

Layer = Callable[..., nn.Module]


class SequentialList(nn.Sequential):
    """`nn.Sequential` over a list of feature maps."""

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """The list of maps through each module in turn."""
        for module in self:
            x = module(x)
        return x


class ConvBnAct2d(nn.Module):
    """Convolution, then norm, then activation; the last two may be absent (`None`)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        padding: str = "",
        bias: bool = False,
        norm_layer: Layer | None = nn.BatchNorm2d,
        act_layer: Layer | None = nn.SiLU,
    ) -> None:
        super().__init__()
        self.pad_type = padding
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, dilation=dilation, bias=bias
        )
        self.bn = None if norm_layer is None else norm_layer(out_channels)
        self.act = None if act_layer is None else act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] -> [B, out_channels, H', W']."""
        conv = self.conv
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1):
            return fused.pointwise(x, conv, self.bn, self.act)
        return fused.dense(x, conv, self.bn, self.act, conv_padding(x, conv, self.pad_type))


class SeparableConv2d(nn.Module):
    """Depthwise convolution, pointwise convolution, then norm and activation (may be `None`)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        padding: str = "",
        bias: bool = False,
        channel_multiplier: float = 1.0,
        pw_kernel_size: int = 1,
        norm_layer: Layer | None = nn.BatchNorm2d,
        act_layer: Layer | None = nn.SiLU,
    ) -> None:
        super().__init__()
        self.pad_type = padding
        middle = int(in_channels * channel_multiplier)
        self.conv_dw = nn.Conv2d(
            in_channels,
            middle,
            kernel_size,
            stride,
            dilation=dilation,
            groups=in_channels,
            bias=False,
        )
        self.conv_pw = nn.Conv2d(middle, out_channels, pw_kernel_size, bias=bias)
        self.bn = None if norm_layer is None else norm_layer(out_channels)
        self.act = None if act_layer is None else act_layer()
        self.one_op = (  # whether the op separable_conv computes this
            (stride, dilation, pw_kernel_size) == (1, 1, 1)
            and kernel_size % 2 == 1
            and middle == in_channels
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] -> [B, out_channels, H', W']."""
        if self.one_op:
            return fused.separable([x], [(self.conv_dw, self.conv_pw)], [self.bn], self.act)[0]
        y = fused.dense(x, self.conv_dw, None, None, conv_padding(x, self.conv_dw, self.pad_type))
        padding = conv_padding(y, self.conv_pw, self.pad_type)
        return fused.dense(y, self.conv_pw, self.bn, self.act, padding)

    def of_fused(self, maps: list[Tensor], pre_act: nn.Module, fusion: dict[str, Any]) -> Tensor:
        """`forward` of pre_act(the fusion of `maps`), in one op; only where `one_op`."""
        nets = [(self.conv_dw, self.conv_pw)]
        return fused.separable(maps, nets, [self.bn], self.act, pre_act, fusion)[0]


class Interpolate2d(nn.Module):
    """`F.interpolate` as a module; `size` is (H, W), `align_corners` only acts if interpolating."""

    def __init__(
        self,
        size: int | Size | None = None,
        scale_factor: float | tuple[float, float] | None = None,
        mode: str = "nearest",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.scale_factor = scale_factor
        self.mode = mode
        self.align_corners = None if mode == "nearest" else align_corners

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [B, C, H, W] at the module's size or scale."""
        return F.interpolate(
            input,
            self.size,
            self.scale_factor,
            self.mode,
            self.align_corners,
            recompute_scale_factor=False,
        )


class ResampleFeatureMap(nn.Module):
    """A 1x1 convolution if the width changes, then resampling to another level's size.

    A side grows: `upsample` interpolates. Otherwise `downsample` "max" or "avg" pools with kernel
    stride + 1, any other name interpolates. The sizes given here are only defaults; what is done
    follows the sizes met at run time.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Size,
        output_size: Size,
        pad_type: str = "",
        downsample: str | None = None,
        upsample: str | None = None,
        norm_layer: Layer | None = nn.BatchNorm2d,
        apply_bn: bool = False,
        redundant_bias: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = pair(input_size)
        self.output_size = pair(output_size)
        self.pad_type = pad_type
        self.downsample = downsample or "max"
        self.upsample = upsample or "nearest"
        self.conv = None
        if in_channels != out_channels:
            self.conv = ConvBnAct2d(
                in_channels,
                out_channels,
                kernel_size=1,
                padding=pad_type,
                bias=not apply_bn or redundant_bias,
                norm_layer=norm_layer if apply_bn else None,
                act_layer=None,
            )

    def forward(self, x: Tensor, output_size: Size | None = None) -> Tensor:
        """x [B, in_channels, H, W] -> [B, out_channels, *output_size]."""
        maps, how = fusion_inputs([self.project(x)], [self], output_size or self.output_size)
        return weighted_fusion(maps, None, method="sum", **how)

    def project(self, x: Tensor) -> Tensor:
        """Only the 1x1 convolution, at the size of x."""
        return x if self.conv is None else self.conv(x)

    def kind(self, size: Size, output_size: Size) -> tuple[str, Size, Size]:
        """What leads from one (H, W) to the other: its name, and kernel and stride if pooling."""
        if size == output_size:
            return "identity", (1, 1), (1, 1)
        if size[0] < output_size[0] or size[1] < output_size[1]:
            return self.upsample, (1, 1), (1, 1)
        return self.downsample, *_window(size, output_size)

    def resample(self, x: Tensor, output_size: Size) -> Tensor:
        """Only the resampling, by torch: for what the fusion op does not know."""
        size = spatial_size(x)
        kind, kernel, stride = self.kind(size, output_size)
        if kind == "identity":
            return x
        if kind not in ("max", "avg"):
            align_corners = None if kind in ("nearest", "nearest-exact", "area") else False
            return F.interpolate(x, output_size, mode=kind, align_corners=align_corners)
        padding = resolve_padding(self.pad_type, size, kernel, stride)
        if kind == "max":
            return F.max_pool2d(F.pad(x, padding, value=float("-inf")), kernel, stride)
        return F.avg_pool2d(F.pad(x, padding), kernel, stride)


def _window(size: Size, output_size: Size) -> tuple[Size, Size]:
    """(kernel, stride) of the pool from one (H, W) to one that is not larger on either side."""
    rows, columns = (
        n // out + (1 if n % out else 0) for n, out in zip(size, output_size, strict=True)
    )
    # One pixel stays one at any stride, also at the other side's: as in a model made for larger maps.
    stride = (columns if size[0] == 1 else rows), (rows if size[1] == 1 else columns)
    vertical, horizontal = (s + 1 if s > 1 else 1 for s in stride)
    return (vertical, horizontal), stride


def fusion_inputs(
    maps: list[Tensor], resamples: list[ResampleFeatureMap], output_size: Size
) -> tuple[list[Tensor], dict[str, Any]]:
    """The maps for an op that fuses on load, and its arguments resample, size and pool_padding.

    The op reads nearest, bilinear and 3x3 stride 2 max-pooled inputs in place; a map whose rule it
    does not know is resampled here. Shapes: maps [B, C, H_i, W_i].
    """
    ready, kinds = [], []
    pool_padding: Padding | None = None
    for x, rule in zip(maps, resamples, strict=True):
        size = spatial_size(x)
        kind, kernel, stride = rule.kind(size, output_size)
        foldable = kind in ("identity", "nearest", "bilinear")
        if kind == "max" and (kernel, stride) == ((3, 3), (2, 2)):
            padding = resolve_padding(rule.pad_type, size, kernel, stride)
            foldable = pool_padding in (None, padding)
            pool_padding = padding if foldable else pool_padding
        ready.append(x if foldable else rule.resample(x, output_size))
        kinds.append(kind if foldable else "identity")
    how = {
        "resample": tuple(kinds),
        "size": output_size,
        "pool_padding": pool_padding or (0, 0, 0, 0),
    }
    return ready, how
