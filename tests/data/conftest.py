"""Small COCO-format folders made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Noise, RGB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def annotation(image_id, box: list[float], category_id: int = 1, **fields) -> dict:
    """A COCO annotation without the fields that may be absent."""
    return {"image_id": image_id, "bbox": box, "category_id": category_id, **fields}


CATEGORIES = [{"id": 5, "name": "jar"}, {"id": 1, "name": "cup"}]


@pytest.fixture
def make_coco(tmp_path: Path) -> Callable[..., Path]:
    """make_coco(images, annotations, ...) writes a folder with pictures and one split."""

    def make(
        images: int | list[dict] = 3,
        annotations: list[dict] | None = None,
        split: str = "train",
        folder: str = "images",
        categories: list[dict] = CATEGORIES,
    ) -> Path:
        if isinstance(images, int):
            images = [
                {"id": n, "file_name": f"{n}.png", "width": 64, "height": 48}
                for n in range(1, images + 1)
            ]
        if annotations is None:
            annotations = [
                annotation(image["id"], [4 * n, 5, 20, 30], 1 if n % 2 else 5)
                for n, image in enumerate(images, start=1)
            ]
        (tmp_path / folder).mkdir(exist_ok=True)
        for n, image in enumerate(images):
            size = image.get("width", 64), image.get("height", 48)
            picture(*size, seed=n).save(tmp_path / folder / image["file_name"])
        data = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"instances_{split}.json").write_text(json.dumps(data))
        return tmp_path

    return make
