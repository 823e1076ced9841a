"""Inputs of the suite ``detect``: candidates as of a detector, of real photos, and head outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effdet.anchors import get_feat_sizes

GRID = 1 / 16  # pixels
_OBJECTS = 12


def synthetic(batch: int, count: int, classes: int) -> dict[str, Tensor]:
    """Boxes jittered around an eighth as many objects, as a detector's are, in an image of 512 pixels.

    None is empty: of such, which overlap nothing, OpenVINO's scores become infinite, and OpenCV drops them.

    ``boxes`` ``[batch, count, 4]`` (x_min, y_min, x_max, y_max), ``scores`` ``[batch, count]``, all different,
    ``classes`` ``[batch, count]``.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    objects = max(1, count // 8)
    owner = torch.randint(objects, (batch, count), generator=generator)
    rows = torch.arange(batch)[:, None]
    center = (uniform(batch, objects, 2) * 500)[rows, owner] + uniform(batch, count, 2) * 12
    size = (uniform(batch, objects, 2) * 120 + 8)[rows, owner]
    half = size * (0.4 + 0.2 * uniform(batch, count, 2))
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(batch)])
    return {
        "boxes": _on_grid(torch.cat([center - half, center + half], -1).clamp(0, 512)),
        "scores": 0.01 + 0.98 * (order + 1) / (count + 1),
        "classes": torch.randint(classes, (batch, count), generator=generator),
    }


def of_photos(file: Path, batch: int) -> dict[str, Tensor]:
    """The same of the ``batch`` photos with the most candidates in ``raw_candidates.npz``; scores 0 fill up rows.

    Raises:
        ValueError: there is no such file, or fewer photos in it.
    """
    if not file.exists():
        raise ValueError(f"--data: there is no {file}")
    stored = np.load(file)
    photo, counts = np.unique(stored["image_id"], return_counts=True)
    if batch > len(photo):
        raise ValueError(f"--batch: got {batch}, {file} has {len(photo)} photos")
    chosen = photo[np.argsort(-counts, kind="stable")[:batch]]
    width = int(counts.max())
    boxes = torch.zeros(batch, width, 4)
    scores, classes = torch.zeros(batch, width), torch.zeros(batch, width, dtype=torch.int64)
    for row, image in enumerate(chosen):
        mine = stored["image_id"] == image
        kept = int(mine.sum())
        boxes[row, :kept] = torch.from_numpy(stored["boxes_xyxy"][mine])
        scores[row, :kept] = torch.from_numpy(stored["scores"][mine])
        classes[row, :kept] = torch.from_numpy(stored["category_id"][mine].astype(np.int64)) - 1
    return {"boxes": _on_grid(boxes), "scores": scores, "classes": classes}


def head_maps(config, batch: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Class and box maps of a trained head: logits high around some objects, all different in an image."""
    generator = torch.Generator().manual_seed(0)
    sizes = get_feat_sizes((size, size), config.max_level)[config.min_level :]
    anchors = config.num_scales * len(config.aspect_ratios)
    images = [_logits(generator, sizes, anchors, config.num_classes) for _ in range(batch)]
    classes = [torch.stack(level) for level in zip(*images, strict=True)]
    boxes = [0.2 * torch.randn(batch, anchors * 4, h, w, generator=generator) for h, w in sizes]
    return classes, boxes


def _logits(
    generator: torch.Generator, sizes: list[tuple[int, int]], anchors: int, classes: int
) -> list[Tensor]:
    """Noise with a bump per object in one level and class, replaced by equally spaced logits of the same order."""
    maps = [torch.randn(anchors, classes, h, w, generator=generator) for h, w in sizes]
    for _ in range(_OBJECTS):
        level, label = (
            int(torch.randint(n, (), generator=generator)) for n in (len(maps), classes)
        )
        height, width = sizes[level]
        y, x = (torch.rand(2, generator=generator) * torch.tensor([height, width])).tolist()
        far = (torch.arange(height) - y)[:, None] ** 2 + (torch.arange(width) - x) ** 2
        maps[level][:, label] += 8 * torch.exp(-far / 8)
    values = torch.cat([m.flatten() for m in maps])
    spread = torch.empty_like(values)
    spread[values.argsort()] = torch.linspace(-9, 3, len(values))
    parts = spread.split([m.numel() for m in maps])
    return [part.reshape(-1, h, w) for part, (h, w) in zip(parts, sizes, strict=True)]


def _on_grid(boxes: Tensor) -> Tensor:
    return (boxes / GRID).round() * GRID
