"""Launcher of the CUDA kernels of ``decode_topk``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_kernels import _cuda
from effdet_kernels.ops.decode_topk import op

# csrc/decode_topk has the same
_LEVELS = 16
_PICKS = 8192
_ROOM = 0  # candidates that a block collects before it drops the worst; 0: what there is memory for
_RUN = 32  # logits
_VECTORS = 32  # of 16 bytes, of logits: a group
_LOGITS = 2**31 - 2**16  # of an image


def refusal(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    num_classes: int,
    k: int,
    limits: Tensor | None,
    strides: Tensor | None,
) -> str | None:
    """Why the kernels do not take a call, or None."""
    first = cls_outputs[0]
    if first.dtype not in _cuda.DTYPE_CODES:
        return (
            f"cls_outputs: are {_cuda.dtype_name(first.dtype)}, takes float32, bfloat16 or float16"
        )
    if len(cls_outputs) > _LEVELS:
        return f"cls_outputs: are {len(cls_outputs)} levels, takes {_LEVELS}"
    logits = sum(level.shape[1:].numel() for level in cls_outputs)
    if logits > _LOGITS:
        return f"cls_outputs: an image has {logits} logits, takes {_LOGITS}"
    if min(k, logits) > _PICKS:
        return f"k: got {k}, takes {_PICKS}"
    return None


def run(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    num_classes: int,
    k: int,
    limits: Tensor | None,
    strides: Tensor | None,
) -> list[Tensor]:
    """Boxes [B, K, 4], logits, anchor indices and classes [B, K], best first."""
    specs = op._out_spec(cls_outputs, box_outputs, anchors, num_classes, k, limits, strides)
    boxes, logits, anchor_index, classes = outputs = [spec.empty() for spec in specs]
    batch, kept = logits.shape
    if batch == 0 or kept == 0:
        return outputs
    maps, codes = (
        [x.contiguous(memory_format=torch.channels_last) for x in xs]
        for xs in (cls_outputs, box_outputs)
    )
    lengths = [x.shape[1:].numel() for x in maps]
    size = logits.element_size()
    unit = 16 // size
    groups = sum(-(-(length + unit - 1) // (_VECTORS * unit)) for length in lengths)
    groups = -(-groups // unit) * unit
    chosen = kept + kept // 8
    of_image = groups * (16 + size) + len(maps) * 2 * _RUN * size + chosen * (16 + 4)
    scratch = torch.empty(batch * of_image, dtype=torch.uint8, device=logits.device)
    _cuda.launch(
        "decode_topk",
        logits,
        dtype=_cuda.DTYPE_CODES[logits.dtype],
        batch=batch,
        classes=num_classes,
        kept=kept,
        room=_ROOM,
        per_location=maps[0].shape[1] // num_classes,
        levels=list(zip(maps, codes, lengths, [x.shape[3] for x in maps], strict=True)),
        anchors=_cuda.aligned(anchors.to(torch.float32)),
        strides=_floats(strides),
        limits=_floats(limits),
        scratch=scratch,
        scratch_bytes=scratch.numel(),
        boxes=boxes,
        logits=logits,
        anchor_index=anchor_index,
        classes_of=classes,
    )
    return outputs


def _floats(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(torch.float32).contiguous()
