"""The two prediction heads: convolutions shared by the levels, a batch norm for each level."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from omegaconf import DictConfig
from torch import Tensor, nn

from . import fused, graph
from .layers import ConvBnAct2d, Layer, SeparableConv2d
from .padding import Padding
from .recompute import recomputed

Conv = SeparableConv2d | ConvBnAct2d
_ConvNormsAct = tuple[Conv, list[nn.Module | None], nn.Module | None]


class HeadNet(nn.Module):
    """Class or box head (arXiv:1911.09070, section 4: box/class prediction network).

    `num_outputs` values per anchor: the number of classes, or 4. The output has
    `num_outputs * len(aspect_ratios) * num_scales` channels, anchor-major.

    All levels go through one op, so the modules inside are not called one by one: hooks on them do
    not fire, those on the head do.

    `norm_kwargs` replaces `config.norm_kwargs` when given, for code written for old versions.
    """

    def __init__(
        self, config: DictConfig, num_outputs: int, norm_kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.num_levels = config.num_levels
        self.grad_checkpointing = False
        self.bn_level_first = config.head_bn_level_first
        norm_kwargs = norm_kwargs or config.norm_kwargs or {}
        norm_layer: Layer = partial(config.norm_layer or nn.BatchNorm2d, **norm_kwargs)
        conv_class = SeparableConv2d if config.separable_conv else ConvBnAct2d
        channels, repeats = config.fpn_channels, config.box_class_repeats

        def conv(out_channels: int, bias: bool) -> Conv:
            return conv_class(
                channels,
                out_channels,
                kernel_size=3,
                padding=config.pad_type,
                bias=bias,
                norm_layer=None,
                act_layer=None,
            )

        self.conv_rep = nn.ModuleList(conv(channels, config.redundant_bias) for _ in range(repeats))
        norms = [[norm_layer(channels) for _ in range(self.num_levels)] for _ in range(repeats)]
        self.bn_rep = self._arrange(norms)
        self.act = fused.activation_class(config.head_act_type or config.act_type)()
        num_anchors = len(config.aspect_ratios) * config.num_scales
        self.predict = conv(num_outputs * num_anchors, bias=True)

    def _arrange(self, norms: list[list[nn.Module]]) -> nn.ModuleList:
        """norms[repeat][level] as the containers that `bn_level_first` gives the keys of."""
        if self.bn_level_first:
            return nn.ModuleList(nn.ModuleList(level) for level in zip(*norms, strict=True))
        rows = [[_named_bn(norm) for norm in row] for row in norms]
        return nn.ModuleList(nn.ModuleList(row) for row in rows)

    def norms(self, repeat: int) -> list[nn.Module]:
        """The norms of one repeat, one per level."""
        if self.bn_level_first:
            return [cast(nn.ModuleList, level)[repeat] for level in self.bn_rep]
        return [cast(nn.Module, named.bn) for named in cast(nn.ModuleList, self.bn_rep[repeat])]

    def toggle_bn_level_first(self) -> None:
        """Swap the two key layouts, `bn_rep.<repeat>.<level>.bn.*` and `bn_rep.<level>.<repeat>.*`.

        The norms stay the same objects and so does every output.
        """
        norms = [self.norms(repeat) for repeat in range(len(self.conv_rep))]
        self.bn_level_first = not self.bn_level_first
        self.bn_rep = self._arrange(norms)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """One map [B, fpn_channels, H_l, W_l] per level -> as many [B, num_outputs * A, H_l, W_l].

        Raises:
            ValueError: `x` does not hold one map per level.
        """
        self._check(x)
        again = self.grad_checkpointing and self.training
        for layer in self.layers():
            x = recomputed(_conv_norm_act, x, *layer) if again else _conv_norm_act(x, *layer)
        return x

    def layers(self) -> list[_ConvNormsAct]:
        """What `forward` does one after the other: a convolution, a norm per level, an activation."""
        repeats = cast("list[Conv]", list(self.conv_rep))
        layers: list[_ConvNormsAct] = [
            (conv, [*self.norms(i)], self.act) for i, conv in enumerate(repeats)
        ]
        return [*layers, (self.predict, [None] * self.num_levels, None)]

    def _check(self, x: list[Tensor]) -> None:
        if len(x) != self.num_levels:
            raise ValueError(f"x: got {len(x)} maps, expected {self.num_levels}, one per level")


def both(first: HeadNet, second: HeadNet, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """`first(x), second(x)`; on a GPU in eval mode, where they are alike, one launch a layer serves both."""
    if not _go_together(first, second, x):
        return first(x), second(x)
    levels = len(x)
    for (conv, norms, act), (other, more_norms, _) in zip(
        first.layers(), second.layers(), strict=True
    ):
        convs = cast("list[SeparableConv2d]", [conv, other])
        nets = [(c.conv_dw, c.conv_pw) for c in convs]
        x = fused.separable(x, nets, [*norms, *more_norms], act)
    return x[:levels], x[levels:]


def _go_together(first: HeadNet, second: HeadNet, x: list[Tensor]) -> bool:
    """Whether one op can do a layer of both."""
    if not x or not graph.counts_launches(x[0]):
        return False
    if not (fused.is_plain(first, HeadNet) and fused.is_plain(second, HeadNet)):
        return False
    pairs = list(zip(first.layers(), second.layers(), strict=False))
    return (
        len(first.conv_rep) == len(second.conv_rep)
        and len(x) == first.num_levels == second.num_levels
        and fused.op_activation(first.act) == fused.op_activation(second.act)
        and all(isinstance(conv, SeparableConv2d) for pair in pairs for conv, _, _ in pair)
        and all(fused.is_folded(norm) for pair in pairs for _, norms, _ in pair for norm in norms)
    )


def _named_bn(norm: nn.Module) -> nn.Sequential:
    named = nn.Sequential()
    named.add_module("bn", norm)
    return named


def _conv_norm_act(
    x: list[Tensor], conv: Conv, norms: Sequence[nn.Module | None], act: nn.Module | None
) -> list[Tensor]:
    if isinstance(conv, SeparableConv2d):
        return fused.separable(x, [(conv.conv_dw, conv.conv_pw)], norms, act)
    vertical, horizontal = (k // 2 for k in conv.conv.kernel_size)
    padding: Padding = horizontal, horizontal, vertical, vertical
    return [
        fused.dense(level, conv.conv, norm, act, padding)
        for level, norm in zip(x, norms, strict=True)
    ]
