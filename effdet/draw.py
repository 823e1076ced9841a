"""Draw detections on a picture: boxes and labels that stay readable at any image size."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GOLDEN_RATIO = 0.618033988749895


def class_colour(label: int) -> tuple[int, int, int]:
    """A fixed RGB colour for a label; neighbouring labels differ in hue, labels 8 apart in tone."""
    hue = (label * _GOLDEN_RATIO) % 1.0
    value = 1.0 if label // 8 % 2 == 0 else 0.65
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    scores: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
) -> Image.Image:
    """Return an RGB copy of ``image`` with one labelled rectangle per box.

    Args:
        image: any PIL image.
        boxes: ``[x_min, y_min, x_max, y_max]`` in pixels each, best first (drawn on top).
        labels: 1-based label per box; chooses the colour and the name.
        scores: score in [0, 1] per box, written behind the name.
        class_names: name of label 1, 2, …; without it the number is written.

    Raises:
        ValueError: the lengths of boxes, labels and scores differ.
    """
    if len(labels) != len(boxes) or (scores is not None and len(scores) != len(boxes)):
        raise ValueError(
            f"boxes, labels, scores: got {len(boxes)}, {len(labels)} and"
            f" {'none' if scores is None else len(scores)}, takes equally many"
        )
    picture = image.convert("RGB")
    if picture is image:
        picture = image.copy()
    draw = ImageDraw.Draw(picture)
    side = (picture.width * picture.height) ** 0.5
    font = _font(picture.size)
    line = max(1, round(side / 300))
    for i in reversed(range(len(boxes))):
        x0, y0, x1, y1 = (float(v) for v in boxes[i])
        colour = class_colour(labels[i])
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=line)
        known = class_names is not None and 1 <= labels[i] <= len(class_names)
        text = class_names[labels[i] - 1] if class_names is not None and known else str(labels[i])
        if scores is not None:
            text = f"{text} {scores[i]:.2f}"
        _tag(draw, text, x0, y0, colour, font, picture.size)
    return picture


def draw_text(image: Image.Image, text: str) -> Image.Image:
    """``image``, RGB, with a line of text written into its upper right corner."""
    draw = ImageDraw.Draw(image)
    font = _font(image.size)
    left, _, right, _ = draw.textbbox((0, 0), text, font=font)
    _tag(draw, text, image.width - (right - left), 0, (0, 0, 0), font, image.size)
    return image


def _font(size: tuple[int, int]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Letters that can be read on a picture of this (width, height)."""
    return ImageFont.load_default(size=max(10, round((size[0] * size[1]) ** 0.5 / 40)))


def _tag(
    draw: ImageDraw.ImageDraw,
    text: str,
    x: float,
    y: float,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """Text on a filled tag above (x, y), moved inside the picture where it would stick out."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0.0, x), max(0.0, size[0] - width))
    y = y - height if y >= height else max(0.0, y)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    red, green, blue = colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    draw.text((x + 2 - left, y + 2 - top), text, font=font, fill="white" if dark else "black")
