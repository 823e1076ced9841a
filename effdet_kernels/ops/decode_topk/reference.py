"""The definition of right for ``decode_topk``: plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_kernels.ops._activations import widen


def rows(maps: Sequence[Tensor], width: int) -> Tensor:
    """[B, A * width, H, W] per level to [B, N, width]: level, row, column, anchor."""
    levels = [
        m.permute(0, 2, 3, 1).flatten(1).unflatten(1, (math.prod(m.shape[1:]) // width, width))
        for m in maps
    ]
    return torch.cat(levels, 1)


def _top(values: Tensor, k: int) -> Tensor:
    """Indices [k] of the largest ``values``, descending; ties: lower index first; NaN is +inf."""
    if k == 0:
        return torch.zeros(0, dtype=torch.long, device=values.device)
    key = values.masked_fill(values.isnan(), torch.inf)
    least = key.topk(k).values[-1]
    above = (key > least).nonzero()[:, 0]
    tied = (key == least).nonzero()[: k - above.numel(), 0]
    chosen = torch.cat([above, tied])
    return chosen[key[chosen].argsort(descending=True, stable=True)]


def grid(anchors: Tensor, strides: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """All anchors [N, 4] of levels that have the sizes of ``maps``, from the first ones [L, A, 4]."""
    levels = []
    for level, first, stride in zip(maps, anchors, strides, strict=True):
        x, y = (
            stride[side] * torch.arange(level.shape[3 - side], device=stride.device)
            for side in range(2)
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        levels.append((torch.stack([x, y, x, y], -1)[:, :, None] + first).flatten(0, 2))
    return torch.cat(levels)


def decode_topk(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    num_classes: int,
    k: int,
    limits: Tensor | None,
    strides: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k best (anchor, class) logits of each image, and their boxes from (ty, tx, th, tw)."""
    logits = rows(cls_outputs, num_classes).flatten(1)
    k = min(k, logits.shape[1])
    picks = [_top(row.detach(), k) for row in logits]
    flat = torch.stack(picks) if picks else logits.new_zeros((0, k), dtype=torch.long)
    anchor_index = flat // num_classes
    boxes = decode(cls_outputs, box_outputs, anchors, anchor_index, limits, strides)
    return boxes, logits.gather(1, flat), anchor_index, flat % num_classes


def decode(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    anchor_index: Tensor,
    limits: Tensor | None,
    strides: Tensor | None,
) -> Tensor:
    """The boxes [B, k, 4] of anchors [B, k]; one may be picked for several classes."""
    codes = widen(rows(box_outputs, 4))
    code = codes.gather(1, anchor_index[:, :, None].expand(-1, -1, 4))
    if strides is not None:
        wide = torch.promote_types(anchors.dtype, code.dtype)
        anchors = grid(anchors.to(wide), strides.to(wide), cls_outputs)
    corners = anchors.to(code.dtype)[anchor_index]
    size = corners[..., 2:] - corners[..., :2]
    centre = (corners[..., :2] + corners[..., 2:]) / 2
    centre = code[..., :2].flip(-1) * size + centre
    half = code[..., 2:].flip(-1).exp() * size / 2
    boxes = torch.cat([centre - half, centre + half], -1)
    if limits is not None:
        boxes = boxes.clamp(min=0).minimum(limits.to(code.dtype).repeat(1, 2)[:, None])
    return boxes
