"""A backbone built from a `Spec`, giving the feature maps of chosen strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from .. import fused
from ..padding import conv_padding
from ..recompute import recomputed
from . import blocks
from .blocks import Block, BlockArgs
from .features import FeatureInfo
from .specs import Row, Spec, round_channels

_KINDS: dict[str, type[Block]] = {
    "ds": blocks.DepthwiseSeparableConv,
    "ir": blocks.InvertedResidual,
    "er": blocks.EdgeResidual,
    "cn": blocks.ConvBnAct,
}
_FEATURE_LOCATIONS = ("bottleneck", "expansion", "depthwise")


class EfficientNetFeatures(nn.Module):
    """Stem and stages; `forward` returns one map per entry of `out_indices`, finest first.

    `out_indices` count the strides 2, 4, 8, 16, 32 from 0; each stands for the last stage of that
    stride. `feature_location` "bottleneck" takes the stage's output; "expansion" (also called
    "depthwise") takes the wide map that its last block projects. `drop_path_rate` is that of the
    last block, growing linearly from 0.
    """

    def __init__(
        self,
        spec: Spec,
        out_indices: Sequence[int] = (2, 3, 4),
        drop_path_rate: float = 0.0,
        feature_location: str = "bottleneck",
        in_chans: int = 3,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if feature_location not in _FEATURE_LOCATIONS:
            raise ValueError(
                f"feature_location: got {feature_location!r}, expected one of"
                f" {', '.join(_FEATURE_LOCATIONS)}"
            )
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate: got {drop_path_rate}, expected 0 <= rate < 1")
        self.pad_type = spec.pad_type
        self.grad_checkpointing = False
        self.wide_features = feature_location != "bottleneck"
        self.conv_stem = nn.Conv2d(in_chans, spec.stem, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.stem, eps=spec.bn_eps, momentum=bn_momentum)
        self.act1 = fused.activation_class(spec.stem_act or spec.act)()

        self.blocks = nn.Sequential()
        total = sum(row.repeats for rows in spec.stages for row in rows)
        channels, reduction, count = spec.stem, 2, 0
        stages: list[dict[str, Any]] = []
        for rows in spec.stages:
            stage = nn.Sequential()
            for i, row in enumerate(_unroll(rows)):
                drop_path = drop_path_rate * count / total
                args = _block_args(spec, row, channels, bn_momentum, drop_path)
                stage.add_module(str(i), _KINDS[row.kind](args))
                channels, count = args.out_channels, count + 1
                reduction *= args.stride
            width = args.mid_channels if self.wide_features else channels
            module = f"blocks.{len(self.blocks)}"
            stages.append({"num_chs": width, "reduction": reduction, "module": module})
            self.blocks.add_module(str(len(self.blocks)), stage)

        last = {info["reduction"]: i for i, info in enumerate(stages)}
        by_index = [last[reduction] for reduction in sorted(last)]
        for index in out_indices:
            if not -len(by_index) <= index < len(by_index):
                raise ValueError(
                    f"out_indices: got {index}, expected 0 to {len(by_index) - 1}:"
                    f" the strides {', '.join(map(str, sorted(last)))}"
                )
        self._taken = [by_index[index] for index in out_indices]
        self.feature_info = FeatureInfo([stages[i] for i in self._taken])
        self.apply(_init_conv)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, in_chans, H, W] -> maps [B, C_i, H_i, W_i], H_i = ceil(H / reduction_i)."""
        padding = conv_padding(x, self.conv_stem, self.pad_type)
        x = fused.dense(x, self.conv_stem, self.bn1, self.act1, padding)
        features = {}
        for i, stage in enumerate(self.blocks):
            if i not in self._taken or not self.wide_features:
                x = features[i] = self._stage(stage, x)
                continue
            *first, last = cast("list[Block]", list(stage.children()))
            for block in first:
                x = block(x)
            wide, gate = last.expand(x)
            features[i] = wide if gate is None else wide * gate.to(wide.dtype)[:, :, None, None]
            x = last.project(wide, gate, x)
        return [features[i] for i in self._taken]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what is between blocks for the backward (but for blocks whose wide map is a feature)."""
        self.grad_checkpointing = enable

    def _stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and self.training):
            return stage(x)
        for block in stage.children():
            x = recomputed(block, x)
        return x


def _unroll(rows: tuple[Row, ...]) -> list[Row]:
    """One row per block: only the first block of a stage has the stride, and only it may have."""
    unrolled = [replace(row, repeats=1) for row in rows for _ in range(row.repeats)]
    return [unrolled[0], *(replace(row, stride=1) for row in unrolled[1:])]


def _block_args(
    spec: Spec, row: Row, in_channels: int, bn_momentum: float, drop_path: float
) -> BlockArgs:
    act = row.act or spec.act
    mid = row.mid_channels or round_channels(in_channels * row.expand)
    if spec.se_of_mid:
        se_channels = round_channels(mid * row.se) if row.se else 0
    else:
        se_channels = round(in_channels * row.se)
    same_shape = row.stride == 1 and in_channels == row.out_channels
    return BlockArgs(
        in_channels=in_channels,
        mid_channels=mid,
        out_channels=row.out_channels,
        kernel=row.kernel,
        stride=row.stride,
        se_channels=se_channels,
        se_act=spec.se_act or act,
        se_gate=spec.se_gate,
        act=act,
        skip=row.skip and same_shape,
        pw_splits=row.pw_splits,
        pwl_splits=row.pwl_splits,
        pad_type=spec.pad_type,
        bn_eps=spec.bn_eps,
        bn_momentum=bn_momentum,
        drop_path=drop_path,
    )


def _init_conv(module: nn.Module) -> None:
    """Normal with variance 2 / fan_out, the fan counted per group (arXiv:1905.11946's code)."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
