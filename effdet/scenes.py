"""Labelled scenes drawn from a seed: geometric shapes on textured backgrounds, in COCO format.

The scenes stand in for a data set wherever none may be downloaded: the demo, the tests and the
training of the small checkpoint that ships with the package. A scene is a pure function of
``(seed, split, index, size)``, so neither the number of scenes nor their order changes any of them.
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .files import replacing

CLASS_NAMES = ("circle", "square", "triangle", "star", "cross")
"""Names of the classes; category ids in the annotation file are 1, 2, … in this order."""

_SUPERSAMPLE = 4
_MIN_SIZE_FRACTION = 32 / 256
_MAX_SIZE_FRACTION = 128 / 256
_MIN_VISIBLE = 0.7  # of an object, whatever is placed above it
_MIN_CONTRAST = 70.0  # distance in RGB between an object and the background below it
_PLACEMENT_TRIES = 20
_SMALLEST_IMAGE = 64


def generate_scenes(
    out_dir: str | os.PathLike[str],
    count: int,
    seed: int,
    size: int = 256,
    split: str = "train",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``count`` scenes as PNG files and one COCO annotation file; return the latter's path.

    The files are ``out_dir/images/{split}_{index:06d}.png`` and ``out_dir/instances_{split}.json``.
    The annotation file is written last and in one step, so an interrupted run leaves none.

    Args:
        out_dir: folder to write to; created if missing. Several splits may share it.
        count: number of scenes, at least 1.
        seed: any non-negative integer. Splits of the same seed hold different scenes.
        size: side of the square images in pixels, at least 64. Object sizes follow it.
        split: name of the split: letters, digits, ``-`` and ``_``.
        progress: called with the number of scenes done so far, after each.

    Raises:
        ValueError: an argument is out of its range.
        OSError: the folder cannot be written.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, takes an integer >= 1")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, takes an integer >= 0")
    if size < _SMALLEST_IMAGE:
        raise ValueError(f"size: got {size}, takes an integer >= {_SMALLEST_IMAGE}")
    if not split.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"split: got {split!r}, takes letters, digits, '-' and '_'")
    out = Path(out_dir)
    (out / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in range(count):
        picture, objects = draw_scene(seed, index, size, split)
        name = f"{split}_{index:06d}.png"
        picture.save(out / "images" / name)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for category, box, area in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": category,
                    "bbox": box,
                    "area": area,
                    "iscrowd": 0,
                }
            )
        if progress is not None:
            progress(index + 1)
    document = {
        "info": {"description": f"effdet scenes, seed {seed}, split {split}, size {size}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)],
    }
    target = out / f"instances_{split}.json"
    with replacing(target) as partial:
        partial.write_text(json.dumps(document))
    return target


def draw_scene(
    seed: int, index: int, size: int = 256, split: str = "train"
) -> tuple[Image.Image, list[tuple[int, list[float], int]]]:
    """Draw one scene of 1 to 8 objects.

    Returns:
        The RGB picture and, per object, ``(category id, [x, y, width, height], area)``: the tight
        box and the number of the pixels that are visible (covered at least half, and by no object
        above it).
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    canvas = _background(rng, size)
    placed: list[tuple[int, np.ndarray, int]] = []  # class, visible mask, area when whole
    for _ in range(int(rng.integers(1, 9))):
        for _ in range(_PLACEMENT_TRIES):
            label, coverage = _random_shape(rng, size)
            mask = coverage >= 0.5
            if all((seen & ~mask).sum() >= _MIN_VISIBLE * whole for _, seen, whole in placed):
                break
        else:
            continue  # the scene is full
        colour = _contrasting_colour(rng, canvas[mask].mean(axis=0))
        shaded = colour * (1.0 + 0.12 * (_gradient(rng, size) - 0.5))[..., None]
        canvas += coverage[..., None] * (shaded - canvas)
        placed = [(kind, seen & ~mask, whole) for kind, seen, whole in placed]
        placed.append((label, mask, int(mask.sum())))
    canvas += rng.standard_normal(canvas.shape) * rng.uniform(0.0, 6.0)  # sensor noise
    picture = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    return picture, [(label + 1, _tight_box(seen), int(seen.sum())) for label, seen, _ in placed]


def _tight_box(mask: np.ndarray) -> list[float]:
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [float(v) for v in (xs[0], ys[0], xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1)]


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    """A linear ramp over ``[0, 1]`` in a random direction. [size, size]"""
    angle = rng.uniform(0.0, 2.0 * math.pi)
    axis = np.linspace(-0.5, 0.5, size)
    ramp = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A two-colour gradient under blotches or stripes. float64 [size, size, 3] in 0..255"""
    first, second = rng.uniform(20.0, 235.0, 3), rng.uniform(20.0, 235.0, 3)
    ramp = _gradient(rng, size)[..., None]
    canvas = first + ramp * (second - first)
    if rng.random() < 0.5:
        cells = int(rng.integers(3, 12))
        blotches = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        texture = np.asarray(blotches.resize((size, size), Image.Resampling.BICUBIC), np.float64)
        canvas += (texture - 127.5) * rng.uniform(0.05, 0.3)
    else:
        waves = rng.uniform(2.0, 16.0)
        stripes = np.sin(_gradient(rng, size) * 2.0 * math.pi * waves)
        canvas += stripes[..., None] * rng.uniform(4.0, 24.0, 3)
    return np.clip(canvas, 0.0, 255.0)


def _contrasting_colour(rng: np.random.Generator, below: np.ndarray) -> np.ndarray:
    best, best_distance = below, -1.0
    for _ in range(_PLACEMENT_TRIES):
        rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 1.0), rng.uniform(0.25, 1.0))
        colour = 255.0 * np.asarray(rgb)
        distance = float(np.linalg.norm(colour - below))
        if distance >= _MIN_CONTRAST:
            return colour
        if distance > best_distance:
            best, best_distance = colour, distance
    return best


def _random_shape(rng: np.random.Generator, size: int) -> tuple[int, np.ndarray]:
    """A random class at a random place, size and angle: (class index, coverage in 0..1)."""
    label = int(rng.integers(len(CLASS_NAMES)))
    low, high = math.log(_MIN_SIZE_FRACTION), math.log(_MAX_SIZE_FRACTION)
    radius = 0.5 * size * math.exp(rng.uniform(low, high))
    centre = rng.uniform(radius, size - radius, 2)
    points = _outline(CLASS_NAMES[label], rng.uniform(0.0, 2.0 * math.pi)) * radius + centre
    stencil = Image.new("L", (size * _SUPERSAMPLE, size * _SUPERSAMPLE), 0)
    ImageDraw.Draw(stencil).polygon([tuple(p) for p in points * _SUPERSAMPLE], fill=255)
    return label, np.asarray(stencil.reduce(_SUPERSAMPLE), np.float64) / 255.0


def _outline(name: str, angle: float) -> np.ndarray:
    """The corners of a shape inside the unit circle, turned by ``angle``. [corners, 2] as x, y"""
    if name == "cross":
        arm = 0.3
        quarter = [(arm, arm), (arm, 0.95), (-arm, 0.95)]
        turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]  # (cos, sin) of the four quarter turns
        corners = np.array([(x * c - y * s, x * s + y * c) for c, s in turns for x, y in quarter])
    else:
        count = {"circle": 72, "square": 4, "triangle": 3, "star": 10}[name]
        radii = np.ones(count)
        if name == "star":
            radii[1::2] = 0.42
        turn = 2.0 * math.pi * np.arange(count) / count
        corners = np.stack([np.cos(turn), np.sin(turn)], axis=1) * radii[:, None]
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return corners @ rotation
