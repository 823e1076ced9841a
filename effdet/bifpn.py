"""The feature pyramid: repeated cells of nodes that fuse maps of several levels.

EfficientDet, arXiv:1911.09070, section 3: fusion weights in 3.2 and 3.3, the cell in figure 2(d).
All (H, W) sizes are known from the maps at run time, so a model takes any input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from effdet_kernels import weighted_fusion

from . import fused
from .anchors import get_feat_sizes
from .config import get_fpn_config
from .layers import (
    ConvBnAct2d,
    Layer,
    ResampleFeatureMap,
    SeparableConv2d,
    SequentialList,
    fusion_inputs,
)
from .padding import Size, halved, pair, spatial_size
from .recompute import recomputed

FeatureInfo = list[dict[str, Any]]
_WEIGHT_METHODS = ("fastattn", "attn", "sum")
_MAX_INPUTS = 3


def next_size(size: Size) -> Size:
    """The (H, W) of the next coarser level."""
    return halved(size[0]), halved(size[1])


class FpnCombine(nn.Module):
    """Fuses 1 to 3 maps of the running list into one map of `output_size`.

    `fastattn`: sum of w_i x_i / (sum of w + 1e-4) with w = relu(edge_weights); `attn`: softmax
    weights; `sum`: no weights.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        fpn_channels: int,
        inputs_offsets: Sequence[int],
        output_size: Size,
        pad_type: str = "",
        downsample: str | None = None,
        upsample: str | None = None,
        norm_layer: Layer | None = nn.BatchNorm2d,
        apply_resample_bn: bool = False,
        redundant_bias: bool = False,
        weight_method: str = "attn",
    ) -> None:
        super().__init__()
        if not 1 <= len(inputs_offsets) <= _MAX_INPUTS:
            raise ValueError(
                f"inputs_offsets: got {len(inputs_offsets)} inputs for one FPN node, expected 1 to"
                f" {_MAX_INPUTS}"
            )
        if weight_method not in _WEIGHT_METHODS:
            raise ValueError(
                f"weight_method: got {weight_method!r}, expected one of"
                f" {', '.join(_WEIGHT_METHODS)}"
            )
        self.inputs_offsets = list(inputs_offsets)
        self.weight_method = weight_method
        self.output_size = pair(output_size)
        self.resample = nn.ModuleDict()
        for offset in self.inputs_offsets:
            self.resample[str(offset)] = ResampleFeatureMap(
                feature_info[offset]["num_chs"],
                fpn_channels,
                input_size=feature_info[offset]["size"],
                output_size=output_size,
                pad_type=pad_type,
                downsample=downsample,
                upsample=upsample,
                norm_layer=norm_layer,
                apply_bn=apply_resample_bn,
                redundant_bias=redundant_bias,
            )
        if weight_method == "sum":
            self.edge_weights = None
        else:
            self.edge_weights = nn.Parameter(torch.ones(len(self.inputs_offsets)))

    def forward(
        self, x: list[Tensor], output_size: Size | None = None, act: str = "none"
    ) -> Tensor:
        """The running list of maps -> act(fused) [B, fpn_channels, *output_size]."""
        maps, how = self.fusion_inputs(x, output_size)
        return weighted_fusion(maps, act=act, weight=self.edge_weights, **how)

    def fusion_inputs(
        self, x: list[Tensor], output_size: Size | None = None
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """The maps for an op that fuses on load, and its other arguments but for the weight."""
        rules = cast("list[ResampleFeatureMap]", list(self.resample.values()))
        maps = [
            rule.project(x[offset]) for rule, offset in zip(rules, self.inputs_offsets, strict=True)
        ]
        maps, how = fusion_inputs(maps, rules, output_size or self.output_size)
        return maps, {**how, "method": self.weight_method}


class Fnode(nn.Module):
    """One node: `combine` the inputs, then `after_combine`, an activation and a convolution."""

    def __init__(self, combine: nn.Module, after_combine: nn.Module) -> None:
        super().__init__()
        self.combine = combine
        self.after_combine = after_combine

    def forward(self, x: list[Tensor], output_size: Size | None = None) -> Tensor:
        """The running list of maps -> this node's map."""
        if not isinstance(self.combine, FpnCombine):
            return self.after_combine(self.combine(x))
        steps = list(self.after_combine.children())
        name, _ = fused.op_activation(steps[0])
        if not isinstance(self.after_combine, nn.Sequential) or name == "none":
            return self.after_combine(self.combine(x, output_size))
        act, conv, *rest = steps
        plain = fused.is_plain(self.combine, FpnCombine) and fused.is_plain(conv, SeparableConv2d)
        if plain and cast(SeparableConv2d, conv).one_op:
            maps, how = self.combine.fusion_inputs(x, output_size)
            how["fusion_weight"] = self.combine.edge_weights
            y = cast(SeparableConv2d, conv).of_fused(maps, act, how)
        else:
            y = conv(self.combine(x, output_size, act=name))
        for step in rest:
            y = step(y)
        return y


class BiFpnLayer(nn.Module):
    """One cell: runs the nodes of `fpn_config` over the maps of all levels."""

    def __init__(
        self,
        feature_info: FeatureInfo,
        feat_sizes: Sequence[Size],
        fpn_config: DictConfig,
        fpn_channels: int,
        num_levels: int = 5,
        pad_type: str = "",
        downsample: str | None = None,
        upsample: str | None = None,
        norm_layer: Layer = nn.BatchNorm2d,
        act_layer: Layer = nn.SiLU,
        apply_resample_bn: bool = False,
        pre_act: bool = True,
        separable_conv: bool = True,
        redundant_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        info = list(feature_info)
        self._min_level = len(feat_sizes) - num_levels
        self.feat_levels: list[int] = []
        self.fnode = nn.ModuleList()
        conv_class = SeparableConv2d if separable_conv else ConvBnAct2d
        for node in fpn_config.nodes:
            size = pair(feat_sizes[node.feat_level])
            combine = FpnCombine(
                info,
                fpn_channels,
                tuple(node.inputs_offsets),
                size,
                pad_type=pad_type,
                downsample=downsample,
                upsample=upsample,
                norm_layer=norm_layer,
                apply_resample_bn=apply_resample_bn,
                redundant_bias=redundant_bias,
                weight_method=node.weight_method,
            )
            after = nn.Sequential()
            if pre_act:
                after.add_module("act", act_layer())
            conv = conv_class(
                fpn_channels,
                fpn_channels,
                kernel_size=3,
                padding=pad_type,
                bias=redundant_bias,
                norm_layer=norm_layer,
                act_layer=None if pre_act else act_layer,
            )
            after.add_module("conv", conv)
            self.fnode.append(Fnode(combine, after))
            self.feat_levels.append(node.feat_level)
            info.append({"num_chs": fpn_channels, "size": size})
        self.feature_info = info[-num_levels:]

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """`num_levels` maps, finest first -> `num_levels` maps of the same (H, W)."""
        sizes = [spatial_size(level) for level in x]
        maps = list(x)
        for level, node in zip(self.feat_levels, self.fnode, strict=True):
            maps.append(node(maps, sizes[level - self._min_level]))
        return maps[-self.num_levels :]


class BiFpn(nn.Module):
    """The whole pyramid: extra coarse levels, then `config.fpn_cell_repeats` cells."""

    def __init__(self, config: DictConfig, feature_info: FeatureInfo) -> None:
        super().__init__()
        self.num_levels = config.num_levels
        self.grad_checkpointing = False
        norm_layer = partial(config.norm_layer or nn.BatchNorm2d, **(config.norm_kwargs or {}))
        act_layer = fused.activation_class(config.act_type)
        fpn_config = config.fpn_config or get_fpn_config(
            config.fpn_name, min_level=config.min_level, max_level=config.max_level
        )
        feat_sizes = get_feat_sizes(config.image_size, max_level=config.max_level)
        shared: dict[str, Any] = {
            "pad_type": config.pad_type,
            "downsample": config.downsample_type,
            "upsample": config.upsample_type,
            "norm_layer": norm_layer,
            "redundant_bias": config.redundant_bias,
        }

        info: FeatureInfo = []
        self.resample = nn.ModuleDict()
        for index in range(config.num_levels):
            size = feat_sizes[config.min_level + index]
            if index < len(feature_info):
                info.append({"num_chs": feature_info[index]["num_chs"], "size": size})
                continue
            self.resample[str(index)] = ResampleFeatureMap(
                info[-1]["num_chs"],
                config.fpn_channels,
                input_size=info[-1]["size"],
                output_size=size,
                apply_bn=config.apply_resample_bn,
                **shared,
            )
            info.append({"num_chs": config.fpn_channels, "size": size})

        self.cell = SequentialList()
        for index in range(config.fpn_cell_repeats):
            cell = BiFpnLayer(
                info,
                feat_sizes,
                fpn_config,
                config.fpn_channels,
                num_levels=config.num_levels,
                act_layer=act_layer,
                apply_resample_bn=config.apply_resample_bn,
                pre_act=not config.conv_bn_relu_pattern,
                separable_conv=config.separable_conv,
                **shared,
            )
            self.cell.add_module(str(index), cell)
            info = cell.feature_info

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Backbone maps, finest first -> `num_levels` maps [B, fpn_channels, H_l, W_l]."""
        maps = list(x)
        for resample in self.resample.values():
            maps.append(resample(maps[-1], next_size(spatial_size(maps[-1]))))
        if not (self.grad_checkpointing and self.training):
            return self.cell(maps)
        for cell in self.cell:
            maps = recomputed(cell, maps)
        return maps
