"""Box regression codes relative to anchors (Faster R-CNN, arXiv:1506.01497, section 3.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .box_list import BoxList

EPS = 1e-7
FASTER_RCNN = "faster_rcnn"
KEYPOINT = "keypoint"
MEAN_STDDEV = "mean_stddev"
SQUARE = "square"


class FasterRcnnBoxCoder:
    """``ty = (y - ya) / ha``, ``tx = (x - xa) / wa``, ``th = log(h / ha)``, ``tw = log(w / wa)``.

    Args:
        scale_factors: four positive factors that multiply (ty, tx, th, tw); ``None`` for ones.
        eps: added to every height and width before encoding, so that empty boxes stay finite.

    Raises:
        ValueError: ``scale_factors`` are not four positive numbers.
    """

    def __init__(self, scale_factors: list[float] | None = None, eps: float = EPS) -> None:
        if scale_factors is not None and (
            len(scale_factors) != 4 or any(factor <= 0 for factor in scale_factors)
        ):
            raise ValueError(f"scale_factors must be four positive numbers, got {scale_factors}")
        self._scale_factors = scale_factors
        self.eps = eps

    def code_size(self) -> int:
        """Numbers per code: 4."""
        return 4

    def encode(self, boxes: BoxList, anchors: BoxList) -> Tensor:
        """Codes ``[N, 4]`` (ty, tx, th, tw) of N boxes relative to N anchors."""
        ya, xa, ha, wa = anchors.get_center_coordinates_and_sizes()
        y, x, h, w = boxes.get_center_coordinates_and_sizes()
        ha, wa, h, w = ha + self.eps, wa + self.eps, h + self.eps, w + self.eps
        codes = torch.stack([(y - ya) / ha, (x - xa) / wa, (h / ha).log(), (w / wa).log()], dim=1)
        return codes if self._scale_factors is None else codes * self._factors(codes)

    def decode(self, rel_codes: Tensor, anchors: BoxList) -> BoxList:
        """The boxes that codes ``[N, 4]`` stand for."""
        if self._scale_factors is not None:
            rel_codes = rel_codes / self._factors(rel_codes)
        ya, xa, ha, wa = anchors.get_center_coordinates_and_sizes()
        ty, tx, th, tw = rel_codes.unbind(dim=1)
        half_h, half_w = th.exp() * ha / 2, tw.exp() * wa / 2
        y, x = ty * ha + ya, tx * wa + xa
        return BoxList(torch.stack([y - half_h, x - half_w, y + half_h, x + half_w], dim=1))

    def _factors(self, like: Tensor) -> Tensor:
        return torch.tensor(self._scale_factors, dtype=like.dtype, device=like.device)


def batch_decode(encoded_boxes: Tensor, box_coder: FasterRcnnBoxCoder, anchors: BoxList) -> Tensor:
    """Decode codes ``[B, N, 4]`` of B images against the same N anchors into ``[B, N, 4]`` boxes.

    Raises:
        ValueError: ``encoded_boxes`` is not ``[B, N, 4]`` with one code per anchor.
    """
    if encoded_boxes.ndim != 3 or encoded_boxes.shape[1] != anchors.num_boxes():
        raise ValueError(
            f"encoded_boxes must be [B, {anchors.num_boxes()}, {box_coder.code_size()}] for "
            f"{anchors.num_boxes()} anchors, got {list(encoded_boxes.shape)}"
        )
    batch, count = encoded_boxes.shape[:2]
    repeated = BoxList(anchors.boxes().repeat(batch, 1))
    return box_coder.decode(encoded_boxes.flatten(0, 1), repeated).boxes().view(batch, count, 4)
