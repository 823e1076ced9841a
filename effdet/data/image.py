"""Reading any picture that people have into 8-bit RGB, or saying what is wrong with the file."""

from __future__ import annotations

import os
import struct
import zlib
from typing import IO

import numpy as np
from PIL import Image, ImageOps

_EXPECTED = "a complete image file in a format that Pillow reads (JPEG, PNG, BMP, TIFF, WebP, ...)"
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """A file that does not hold a usable image. The message names the file."""


def load_image(path: str | os.PathLike | IO[bytes], exif: bool = True) -> Image.Image:
    """Read one image as 8-bit RGB.

    Greyscale, palette and CMYK images are converted, alpha is dropped, 16-bit samples are scaled to
    8 bits (65535 becomes 255; nothing is clipped).

    Args:
        path: file name, or a binary file object.
        exif: turn the picture upright as its EXIF orientation tag says.

    Raises:
        ImageError: the content is empty, truncated, not an image, or has floating-point samples.
        OSError: the file itself cannot be opened (missing, a folder, no permission).
    """
    if isinstance(path, (str, os.PathLike)):
        with open(path, "rb") as file:
            return _decode(file, os.fspath(path), exif)
    return _decode(path, str(getattr(path, "name", "<file object>")), exif)


def _decode(file: IO[bytes], name: str, exif: bool) -> Image.Image:
    try:
        image = Image.open(file)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if exif else image)
    except _DECODE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name}: {reason}; expected {_EXPECTED}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, itself where it is so; see `load_image`.

    Raises:
        ValueError: its samples are floating-point, or integers of more than 16 bits.
    """
    if image.mode == "F":
        raise ValueError("the samples are floating-point numbers of unknown range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise ValueError(f"32-bit samples up to {samples.max()}, which is more than 16 bits")
        image = Image.fromarray((samples / 257.0).round().astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
