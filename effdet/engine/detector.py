"""Detection on single pictures of any size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from effdet.bench import DetBenchPredict
from effdet.data import transforms as T

from .data import input_geometry


@dataclass(frozen=True)
class Detections:
    """Objects found on one picture, best first.

    Attributes:
        boxes: [n, 4] float32, x_min, y_min, x_max, y_max in pixels of the picture.
        scores: [n] float32 in (0, 1].
        labels: [n] int64, 1-based.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


class Detector:
    """A model ready to look at pictures: letterbox, normalise, run, keep what scores enough.

    Args:
        model: bare EfficientDet (`effdet.engine.weights.load_model`).
        device: where to run.
        score: lowest score to keep, in [0, 1].
        max_det: most objects per picture.
        soft_nms: suppress overlaps with gaussian soft-NMS instead of hard NMS.
        iou_threshold, sigma, class_agnostic, max_per_class: see `effdet.postprocess.Suppression`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        score: float = 0.3,
        max_det: int = 100,
        soft_nms: bool = False,
        *,
        iou_threshold: float | None = None,
        sigma: float | None = None,
        class_agnostic: bool = False,
        max_per_class: int | None = None,
    ) -> None:
        if not 0.0 <= score <= 1.0:
            raise ValueError(f"score: got {score}, takes a number in [0, 1]")
        if max_det < 1:
            raise ValueError(f"max_det: got {max_det}, takes an integer >= 1")
        self.device = device
        self.score = score
        self.size, mean, std, fill = input_geometry(model.config)
        self._resize = T.ResizePad(target_size=self.size, fill_color=fill)
        self._mean = torch.tensor(mean).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std).view(1, 3, 1, 1) * 255
        self.bench = DetBenchPredict(model).to(device).eval()
        self.bench.max_det_per_image = max_det
        self.bench.soft_nms = soft_nms
        self.bench.iou_threshold = iou_threshold
        self.bench.sigma = sigma
        self.bench.class_agnostic = class_agnostic
        self.bench.max_per_class = max_per_class
        # What is found stays the same: picks come in the order of their scores, so those below
        # `score` suppress none that are kept. The bench's scores are above its threshold.
        below = float(np.nextafter(np.float32(score), np.float32(0)))
        self.bench.score_threshold = max(below, self.bench.suppression().least_score)

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Detections:
        """Detect on one RGB picture."""
        resized, target = self._resize(image, {"img_size": image.size})
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]
        x = ((pixels - self._mean) / self._std).to(self.device)
        info = {
            "img_scale": torch.tensor([target["img_scale"]], device=self.device),
            "img_size": torch.tensor([image.size], device=self.device),
        }
        rows = self.bench(x.contiguous(memory_format=torch.channels_last), info)[0].cpu()
        rows = rows[(rows[:, 5] > 0) & (rows[:, 4] >= self.score)]
        return Detections(rows[:, :4], rows[:, 4], rows[:, 5].long())
