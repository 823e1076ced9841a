"""The pictures that an exported file is checked on: drawn ones, or the user's, letterboxed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from effdet.bench import DetBenchPredict
from effdet.data.image import load_image
from effdet.data.transforms import ResizePad
from effdet.engine.data import input_geometry
from effdet.padding import Size
from effdet.scenes import draw_scene

from .program import ExportOptions, image_size

Batch = tuple[Tensor, ...]  # images [B, 3, H, W], and with img_info img_scale [B], img_size [B, 2]
_DRAWN, _TOGETHER = 4, 3  # pictures; images per call where any number may be


def batches(
    bench: DetBenchPredict,
    options: ExportOptions,
    images: Sequence[str | os.PathLike[str]] | None = None,
) -> list[Batch]:
    """Arguments of a program of `options`: every picture at every size, in batches of more than one size.

    Args:
        bench: the model.
        options: what the program takes.
        images: picture files; None: scenes are drawn.

    Raises:
        ValueError: `images` is empty, or a file holds no picture.
        OSError: a file cannot be read.
    """
    if images is not None and not len(images):
        raise ValueError("images: got none, takes files of pictures, or None for drawn ones")
    pictures = (
        [draw_scene(0, i, split="val")[0] for i in range(_DRAWN)]
        if images is None
        else [load_image(path) for path in images]
    )
    return [
        _batch(bench, options, part, size)
        for size in _sizes(bench, options)
        for part in _parts(pictures, options.batch)
    ]


def _sizes(bench: DetBenchPredict, options: ExportOptions) -> list[Size]:
    height, width = image_size(bench, options)
    if not options.any_size:
        return [(height, width)]
    unit = 2**bench.config.max_level
    return list(
        dict.fromkeys([(height, width), (2 * unit, 2 * unit), (height + unit, width + 2 * unit)])
    )


def _parts(pictures: list[Image.Image], batch: int | None) -> list[list[Image.Image]]:
    """The pictures in batches of `batch`, or one alone and the others in threes; the first ones again fill the last."""
    together = batch or _TOGETHER
    alone = 0 if batch else 1
    calls = max(1, -(-(len(pictures) - alone) // together))
    endless = itertools.cycle(pictures)
    counts = [1] * alone + [together] * calls
    return [list(itertools.islice(endless, count)) for count in counts]


def _batch(
    bench: DetBenchPredict, options: ExportOptions, pictures: list[Image.Image], size: Size
) -> Batch:
    _, *moments, fill = input_geometry(bench.config)
    mean, std = (torch.tensor(value).view(3, 1, 1) * 255 for value in moments)
    resize = ResizePad(size, fill_color=fill)
    images, scales = [], []
    for picture in pictures:
        resized, target = resize(picture, {})
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
        images.append(pixels if options.normalise else (pixels - mean) / std)
        scales.append(target["img_scale"])
    like = next(bench.parameters())
    batch = torch.stack(images).to(like)
    if not options.img_info:
        return (batch,)
    limits = torch.tensor([picture.size for picture in pictures])
    return batch, torch.tensor(scales).to(like), limits.to(like)
