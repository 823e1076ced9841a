"""Lets torchvision be imported beside a torch that its compiled operators were not built for.

Importing torchvision registers fake kernels for operators that its compiled library declares; without that library the
registration fails. Here the operators are declared first. Only ``nms`` gets a body (plain, greedy): the one that the
oracle calls. Its results are right, its speed means nothing.
"""

from __future__ import annotations

import torch

_POOL = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SHAPE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_DEFORM = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h,"
    " SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask"
)
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align(Tensor input, Tensor rois, {_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, {_POOL}, {_SHAPE}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool(Tensor input, Tensor rois, {_POOL}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_POOL}, {_SHAPE}) -> Tensor",
    f"ps_roi_align(Tensor input, Tensor rois, {_POOL}, int sampling_ratio) -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping,"
    f" {_POOL}, int sampling_ratio, {_SHAPE}) -> Tensor",
    f"ps_roi_pool(Tensor input, Tensor rois, {_POOL}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_POOL}, {_SHAPE}) -> Tensor",
    f"deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_DEFORM}) -> Tensor",
    "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias,"
    f" {_DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "_cuda_version() -> int",
)


def _greedy_nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Kept indices, best score first, the lower index first among equals."""
    rank = scores.argsort(descending=True, stable=True)
    sizes = dets[:, 2:] - dets[:, :2]
    areas = sizes[:, 0] * sizes[:, 1]
    alive = torch.ones(len(scores), dtype=torch.bool)
    kept = []
    for i in rank.tolist():
        if not alive[i]:
            continue
        kept.append(i)
        low = torch.maximum(dets[:, :2], dets[i, :2])
        high = torch.minimum(dets[:, 2:], dets[i, 2:])
        overlap = (high - low).clamp(min=0).prod(1)
        alive &= ~(overlap / (areas + areas[i] - overlap) > iou_threshold)
    return torch.tensor(kept, dtype=torch.int64)


_library = torch.library.Library("torchvision", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)
_library.impl("nms", _greedy_nms, "CPU")

import torchvision.extension  # noqa: E402


def _has_ops() -> bool:  # not a lambda: torchvision compiles it with torch.jit
    return True


torchvision.extension._has_ops = _has_ops
