"""Transforms of one (PIL image, target) sample.

A target is a dict; its `bbox` is a float32 array [n, 4] of (y1, x1, y2, x2) in pixels and its `cls`
an int64 array [n]. Sizes given by a user are (height, width). Random transforms draw from Python's
`random` module only, so seeding it (see `effdet.data.seeding`) fixes a sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from copy import deepcopy

import numpy as np
import torch
from PIL import Image

from .constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)

__all__ = [
    "IMAGENET_DEFAULT_MEAN",
    "IMAGENET_DEFAULT_STD",
    "IMAGENET_INCEPTION_MEAN",
    "IMAGENET_INCEPTION_STD",
    "Compose",
    "Image",
    "ImageToNumpy",
    "ImageToTensor",
    "Normalize",
    "RandomFlip",
    "RandomResizePad",
    "ResizePad",
    "clip_boxes",
    "clip_boxes_",
    "deepcopy",
    "math",
    "np",
    "random",
    "resolve_fill_color",
    "torch",
    "transforms_coco_eval",
    "transforms_coco_train",
]

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "hamming": Image.Resampling.HAMMING,
    "box": Image.Resampling.BOX,
}
_RANDOM_INTERPOLATION = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def _pil_interp(method: str) -> Image.Resampling:
    try:
        return _INTERPOLATIONS[method]
    except KeyError:
        known = ", ".join([*_INTERPOLATIONS, "random"])
        raise ValueError(f"interpolation: got {method!r}; takes one of {known}") from None


def _size_tuple(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one number or a pair."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"image size: got {size!r}; takes a positive number or (height, width)")
    return pair


def clip_boxes_(boxes: np.ndarray, img_size: Sequence[int]) -> None:
    """Clip yxyx boxes [n, 4] in place to an image of (height, width)."""
    height, width = _size_tuple(img_size)
    np.clip(boxes, 0, np.array([height, width, height, width], dtype=boxes.dtype), out=boxes)


def clip_boxes(boxes: np.ndarray, img_size: Sequence[int]) -> np.ndarray:
    """Copy of yxyx boxes [n, 4] clipped to an image of (height, width)."""
    clipped = boxes.copy()
    clip_boxes_(clipped, img_size)
    return clipped


class ImageToNumpy:
    """PIL image to a uint8 array [C, H, W]."""

    def __call__(self, img: Image.Image, target: dict) -> tuple[np.ndarray, dict]:
        """The image as an array; a grey one gets a channel axis. The target as it is."""
        pixels = np.array(img, dtype=np.uint8)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), target


class ImageToTensor:
    """PIL image to a tensor [C, H, W] of `dtype`, values 0..255."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype

    def __call__(self, img: Image.Image, target: dict) -> tuple[torch.Tensor, dict]:
        """The image as a tensor, the target as it is."""
        pixels, target = ImageToNumpy()(img, target)
        return torch.from_numpy(pixels).to(self.dtype), target


class Normalize:
    """(x - 255 mean) / (255 std) of a tensor [3, H, W] with values 0..255."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean = torch.tensor(mean).view(3, 1, 1) * 255
        self.std = torch.tensor(std).view(3, 1, 1) * 255

    def __call__(self, img: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
        """The image in float32, normalised; the target as it is."""
        return (img.float() - self.mean) / self.std, target


class ResizePad:
    """Letterbox: scale to fit, put in the upper left corner, fill the rest.

    Adds `img_scale` = original size / resized size to the target.
    """

    def __init__(
        self,
        target_size: int | Sequence[int],
        interpolation: str = "bilinear",
        fill_color: tuple[int, ...] = (0, 0, 0),
    ):
        self.target_size = _size_tuple(target_size)
        self.interpolation = interpolation
        self.fill_color = fill_color
        _pil_interp(interpolation)

    def __call__(self, img: Image.Image, target: dict) -> tuple[Image.Image, dict]:
        """The letterboxed image; boxes scaled and clipped in place, `img_scale` added."""
        scale = min(self.target_size[0] / img.height, self.target_size[1] / img.width)
        size = _scaled_size(img, scale)
        canvas = Image.new("RGB", self.target_size[::-1], color=self.fill_color)
        canvas.paste(img.resize(size[::-1], _pil_interp(self.interpolation)))

        if "bbox" in target:
            boxes = target["bbox"]
            boxes[:, :4] *= scale
            clip_boxes_(boxes, size)
        target["img_scale"] = 1.0 / scale
        return canvas, target


class RandomResizePad:
    """Scale jitter: resize by a random factor of the letterbox scale, crop at random, pad.

    Boxes that fall outside the crop are dropped together with their `cls`.
    """

    def __init__(
        self,
        target_size: int | Sequence[int],
        scale: tuple[float, float] = (0.1, 2.0),
        interpolation: str = "random",
        fill_color: tuple[int, ...] = (0, 0, 0),
    ):
        self.target_size = _size_tuple(target_size)
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale: got {scale!r}; takes (low, high) with 0 < low <= high")
        self.scale = scale
        self.interpolation = (
            _RANDOM_INTERPOLATION if interpolation == "random" else _pil_interp(interpolation)
        )
        self.fill_color = fill_color

    def _get_params(self, img: Image.Image) -> tuple[int, int, int, int, float]:
        """Draw (scaled height, scaled width, y offset, x offset, scale)."""
        factor = random.uniform(*self.scale)
        height, width = (factor * side for side in self.target_size)
        scale = min(height / img.height, width / img.width)
        scaled_h, scaled_w = _scaled_size(img, scale)
        offset_y = int(max(0, scaled_h - self.target_size[0]) * random.uniform(0, 1))
        offset_x = int(max(0, scaled_w - self.target_size[1]) * random.uniform(0, 1))
        return scaled_h, scaled_w, offset_y, offset_x, scale

    def __call__(self, img: Image.Image, target: dict) -> tuple[Image.Image, dict]:
        """The resized crop; boxes moved and clipped, those outside dropped, `img_scale` added."""
        scaled_h, scaled_w, offset_y, offset_x, scale = self._get_params(img)
        if isinstance(self.interpolation, tuple):
            interpolation = random.choice(self.interpolation)
        else:
            interpolation = self.interpolation
        target_h, target_w = self.target_size
        right, lower = min(scaled_w, offset_x + target_w), min(scaled_h, offset_y + target_h)
        img = img.resize((scaled_w, scaled_h), interpolation)
        canvas = Image.new("RGB", (target_w, target_h), color=self.fill_color)
        canvas.paste(img.crop((offset_x, offset_y, right, lower)))

        if "bbox" in target:
            boxes = target["bbox"]
            boxes[:, :4] *= scale
            boxes[:, :4] -= np.array([offset_y, offset_x] * 2, dtype=boxes.dtype)
            clip_boxes_(boxes, (min(scaled_h, target_h), min(scaled_w, target_w)))
            inside = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
            target["bbox"] = boxes[inside]
            if "cls" in target:
                target["cls"] = target["cls"][inside]
        target["img_scale"] = 1.0 / scale
        return canvas, target


class RandomFlip:
    """Mirror left-right and/or upside down, each with probability `prob`."""

    def __init__(self, horizontal: bool = True, vertical: bool = False, prob: float = 0.5):
        self.horizontal = horizontal
        self.vertical = vertical
        self.prob = prob

    def _get_params(self) -> tuple[bool, bool]:
        horizontal = random.random() < self.prob if self.horizontal else False
        vertical = random.random() < self.prob if self.vertical else False
        return horizontal, vertical

    def __call__(self, img: Image.Image, target: dict) -> tuple[Image.Image, dict]:
        """The image, mirrored or not, and the boxes with it."""
        horizontal, vertical = self._get_params()
        if horizontal:
            img = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            _mirror(target, 1, img.width)
        if vertical:
            img = img.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            _mirror(target, 0, img.height)
        return img, target


class Compose:
    """Apply transforms one after the other."""

    def __init__(self, transforms: list[Callable]):
        self.transforms = transforms

    def __call__(self, img, target: dict):
        """(img, target) after every transform."""
        for transform in self.transforms:
            img, target = transform(img, target)
        return img, target


def resolve_fill_color(
    fill_color: str | int | Sequence[int], img_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
) -> tuple[int, ...]:
    """Padding colour (R, G, B) 0..255 from "mean" (of `img_mean`), one level, or three levels."""
    if isinstance(fill_color, str):
        if fill_color == "mean":
            return tuple(round(255 * value) for value in img_mean)
        raise ValueError(f'fill_color: got {fill_color!r}; takes "mean", a number or (R, G, B)')
    color = (fill_color,) * 3 if isinstance(fill_color, int) else tuple(fill_color)
    if len(color) != 3:
        raise ValueError(f'fill_color: got {fill_color!r}; takes "mean", a number or (R, G, B)')
    return color


def transforms_coco_eval(
    img_size: int | Sequence[int] = 224,
    interpolation: str = "bilinear",
    use_prefetcher: bool = False,
    fill_color: str | int | Sequence[int] = "mean",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Compose:
    """Letterbox to `img_size`.

    With `use_prefetcher` the result is a uint8 array that `PrefetchLoader` normalises; without, a
    normalised float32 tensor.
    """
    fill = resolve_fill_color(fill_color, mean)
    resize = ResizePad(img_size, interpolation=interpolation, fill_color=fill)
    return Compose([resize, *_to_array(use_prefetcher, mean, std)])


def transforms_coco_train(
    img_size: int | Sequence[int] = 224,
    interpolation: str = "random",
    use_prefetcher: bool = False,
    fill_color: str | int | Sequence[int] = "mean",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    scale: tuple[float, float] = (0.1, 2.0),
) -> Compose:
    """Horizontal flip and scale jitter to `img_size` (EfficientDet, arXiv:1911.09070, section 5.1).

    `scale` bounds the jitter relative to the letterbox scale; the rest as `transforms_coco_eval`.
    """
    fill = resolve_fill_color(fill_color, mean)
    resize = RandomResizePad(img_size, scale=scale, interpolation=interpolation, fill_color=fill)
    return Compose([RandomFlip(horizontal=True), resize, *_to_array(use_prefetcher, mean, std)])


def _to_array(use_prefetcher: bool, mean: Sequence[float], std: Sequence[float]) -> list[Callable]:
    return [ImageToNumpy()] if use_prefetcher else [ImageToTensor(), Normalize(mean, std)]


def _scaled_size(img: Image.Image, scale: float) -> tuple[int, int]:
    """(height, width) after scaling; a very long image keeps at least one pixel."""
    return max(1, int(img.height * scale)), max(1, int(img.width * scale))


def _mirror(target: dict, axis: int, extent: int) -> None:
    """Mirror the yxyx boxes of a target along y (axis 0) or x (axis 1) within `extent` pixels."""
    if "bbox" in target:
        boxes = target["bbox"]
        boxes[:, [axis, axis + 2]] = extent - boxes[:, [axis + 2, axis]]
