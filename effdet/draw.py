"""Draw detections on a picture: boxes and labels that stay readable at any image size."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]  # x_min, y_min, x_max, y_max
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
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
    font = _font(picture.size)
    line = max(2, round((picture.width * picture.height) ** 0.5 / 300))
    corners = [_ordered(box) for box in boxes]
    for box, label in reversed(list(zip(corners, labels, strict=True))):
        draw.rectangle(box, outline=class_colour(label), width=line)
    taken: list[Box] = []
    for i, (box, label) in enumerate(zip(corners, labels, strict=True)):
        known = class_names is not None and 1 <= label <= len(class_names)
        text = class_names[label - 1] if class_names is not None and known else str(label)
        if scores is not None:
            text = f"{text} {scores[i]:.2f}"
        width, height = _tag_size(draw, text, font)
        tag = _free_place(box, width, height, picture.size, taken)
        _tag(draw, text, tag, class_colour(label), font)
        taken.append(tag)
    return picture


def draw_text(image: Image.Image, text: str) -> Image.Image:
    """``image``, RGB, with a line of text written into its upper right corner."""
    draw = ImageDraw.Draw(image)
    font = _font(image.size)
    width, height = _tag_size(draw, text, font)
    _tag(draw, text, (image.width - width, 0, image.width, height), (0, 0, 0), font)
    return image


def _font(size: tuple[int, int]) -> Font:
    """Letters that can be read on a picture of this (width, height)."""
    return ImageFont.load_default(size=max(10, round((size[0] * size[1]) ** 0.5 / 40)))


def _ordered(box: Sequence[float]) -> Box:
    x0, y0, x1, y1 = (float(v) for v in box)
    return x0, y0, max(x0, x1), max(y0, y1)


def _tag_size(draw: ImageDraw.ImageDraw, text: str, font: Font) -> tuple[float, float]:
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    return right - left + 4, bottom - top + 4


def _free_place(
    box: Box, width: float, height: float, size: tuple[int, int], taken: Sequence[Box]
) -> Box:
    """Where a tag of this width and height goes: the first place at the box, inside the picture, that no tag has.

    Above it at the left, inside it, below it; then the same at its right side.
    """
    x0, y0, x1, y1 = box
    places = []
    for x in (x0, x1 - width):
        for y in (y0 - height, y0, y1):
            x_in = min(max(0.0, x), max(0.0, size[0] - width))
            y_in = min(max(0.0, y), max(0.0, size[1] - height))
            places.append((x_in, y_in, x_in + width, y_in + height))
    free = (place for place in places if not any(_overlap(place, other) for other in taken))
    return next(free, places[0])


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _tag(
    draw: ImageDraw.ImageDraw, text: str, place: Box, colour: tuple[int, int, int], font: Font
) -> None:
    """Text on a filled tag."""
    draw.rectangle(place, fill=colour)
    left, top, _, _ = draw.textbbox((0, 0), text, font=font)
    red, green, blue = colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    at = place[0] + 2 - left, place[1] + 2 - top
    draw.text(at, text, font=font, fill="white" if dark else "black")
