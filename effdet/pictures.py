"""Pictures as people have them: files in folders, arrays, tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .data.image import load_image, to_rgb

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures in a folder, not hidden ones nor those in folders below it, in the order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(
        p
        for p in Path(folder).iterdir()
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and not p.is_dir()
    )
    if not found:
        raise FileNotFoundError(f"{folder}: the folder holds no pictures ({' '.join(SUFFIXES)})")
    return found


def read_picture(image: Any) -> Image.Image:
    """An 8-bit RGB picture from a path (turned upright, as its EXIF tag says), or from what `to_picture` takes.

    Raises:
        ImageError, TypeError, ValueError: this is no picture. OSError: a file cannot be opened.
    """
    return load_image(image) if isinstance(image, (str, os.PathLike)) else to_picture(image)


def to_picture(image: Any) -> Image.Image:
    """An 8-bit RGB picture from a PIL image, a uint8 array [H, W, 3] or [H, W], or a tensor [3, H, W].

    Args:
        image: arrays and tensors are RGB; a floating tensor is in [0, 1].

    Raises:
        TypeError: it is none of these. ValueError: its shape or its values are others.
    """
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except (SyntaxError, ValueError) as error:  # the first is Pillow's, of a file read late
            raise ValueError(f"image: got one of mode {image.mode}: {error}") from error
    if isinstance(image, torch.Tensor):
        image = _channels_last(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"image: got {type(image).__name__}, takes a path, PIL image, uint8 array [H, W, 3] or"
            " [H, W], or tensor [3, H, W]"
        )
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if image.dtype != np.uint8 or not fits or not image.size:
        raise ValueError(
            f"image: got an array of {image.dtype} {list(image.shape)},"
            " takes uint8 [H, W, 3] or [H, W]"
        )
    return to_rgb(Image.fromarray(image))


def _channels_last(image: torch.Tensor) -> np.ndarray:
    """A tensor [3, H, W] as a uint8 array [H, W, 3]."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: got a tensor {list(image.shape)}, takes [3, H, W]")
    image = image.detach().cpu()
    if image.is_floating_point():
        low, high = (float(image.min()), float(image.max())) if image.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"image: got a {image.dtype} tensor with values from {low:.8g} to {high:.8g},"
                " takes [0, 1], or uint8"
            )
        image = (image.float() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"image: got a tensor of {image.dtype}, takes uint8 or floating")
    return image.permute(1, 2, 0).contiguous().numpy()
