"""Random erasing of normalised batches (arXiv:1708.04896)."""

from __future__ import annotations

import math
import random

import torch

_ATTEMPTS = 10


def _get_pixels(
    per_pixel: bool,
    rand_color: bool,
    patch_size: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
) -> torch.Tensor:
    """Fill for a patch [C, h, w]: noise per pixel, one random colour [C, 1, 1], or zero."""
    if per_pixel:
        return torch.empty(patch_size, dtype=dtype, device=device).normal_()
    shape = (patch_size[0], 1, 1)
    if rand_color:
        return torch.empty(shape, dtype=dtype, device=device).normal_()
    return torch.zeros(shape, dtype=dtype, device=device)


class RandomErasing:
    """Erase rectangles of each image with probability `probability`, in place.

    Only the picture is erased, never the padding around it (known from the target's `img_size` and
    `img_scale`, where given). Boxes are left as they are.

    Args:
        min_area, max_area: area of one erased rectangle relative to the picture.
        min_aspect, max_aspect: its aspect ratio; `max_aspect` defaults to 1 / min_aspect.
        mode: "const" (the mean colour), "rand" (one random colour), "pixel" (noise).
        min_count, max_count: rectangles per image; they share the area.
        num_splits: with n > 1 the first 1/n of the batch is left clean.
        device: where the batches are.
    """

    def __init__(
        self,
        probability: float = 0.5,
        min_area: float = 0.02,
        max_area: float = 1 / 4,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
        mode: str = "const",
        min_count: int = 1,
        max_count: int | None = None,
        num_splits: int = 0,
        device: torch.device | str = "cuda",
    ):
        if mode not in ("const", "rand", "pixel"):
            raise ValueError(f'mode: got {mode!r}; takes "const", "rand" or "pixel"')
        self.probability = probability
        self.min_area = min_area
        self.max_area = max_area
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))
        self.min_count = min_count
        self.max_count = max_count or min_count
        self.num_splits = num_splits
        self.rand_color = mode == "rand"
        self.per_pixel = mode == "pixel"
        self.device = device

    def __call__(self, input: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
        """Erase in a batch [B, C, H, W] (or one image [C, H, W]); returns it and the target."""
        batch = input if input.dim() == 4 else input[None]
        first = len(batch) // self.num_splits if self.num_splits > 1 else 0
        heights, widths = _picture_sizes(batch, target)
        for index in range(first, len(batch)):
            height, width = heights[index], widths[index]
            self._erase(batch[index], batch.shape[1], height, width, batch.dtype)
        return input, target

    def _erase(
        self, img: torch.Tensor, chan: int, img_h: int, img_w: int, dtype: torch.dtype
    ) -> None:
        if random.random() > self.probability:
            return
        count = random.randint(self.min_count, self.max_count)
        for _ in range(count):
            for _ in range(_ATTEMPTS):
                area = random.uniform(self.min_area, self.max_area) * img_h * img_w / count
                aspect = math.exp(random.uniform(*self.log_aspect_ratio))
                height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if 0 < height < img_h and 0 < width < img_w:
                    top = random.randint(0, img_h - height)
                    left = random.randint(0, img_w - width)
                    img[:, top : top + height, left : left + width] = _get_pixels(
                        self.per_pixel, self.rand_color, (chan, height, width), dtype, self.device
                    )
                    break


def _picture_sizes(batch: torch.Tensor, target: dict) -> tuple[list[int], list[int]]:
    """Height and width of the picture within each padded image."""
    count, _, height, width = batch.shape
    if "img_size" not in target or "img_scale" not in target:
        return [height] * count, [width] * count
    original = torch.as_tensor(target["img_size"]).reshape(-1, 2)
    scale = torch.as_tensor(target["img_scale"]).reshape(-1, 1)
    sides = (original / scale).long().tolist()
    return [min(height, side[1]) for side in sides], [min(width, side[0]) for side in sides]
