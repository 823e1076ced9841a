"""What a detector found on one picture, and the forms that people want it in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .draw import draw_detections
from .pictures import read_picture


class Detection(NamedTuple):
    """One object: box (x_min, y_min, x_max, y_max) in pixels, score in (0, 1], 1-based label, name of its class."""

    box: tuple[float, float, float, float]
    score: float
    label: int
    name: str


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """Objects found on one picture, best first. Iterating gives a `Detection` each; a mask or a slice selects.

    Attributes:
        boxes: [n, 4] float32, x_min, y_min, x_max, y_max in pixels of the picture.
        scores: [n] float32 in (0, 1].
        labels: [n] int64, 1-based.
        class_names: name of label 1, 2, …
        category_ids: id of label 1, 2, … in the annotations that the model was trained on.
        size: (width, height) of the picture.
        source: the picture as it was given, or its path.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: Sequence[str]
    category_ids: Sequence[int]
    size: tuple[int, int]
    source: Path | Image.Image | None = None

    @property
    def names(self) -> list[str]:
        """The name of each object's class."""
        return [self.class_names[label - 1] for label in self.labels.tolist()]

    def __repr__(self) -> str:
        counts = Counter(self.names).most_common()
        found = ", ".join(f"{count} {name}" for name, count in counts)
        return f"Detections({self.size[0]}x{self.size[1]}: {found or 'nothing'})"

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        columns = (self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names)
        for box, score, label, name in zip(*columns, strict=True):
            yield Detection(tuple(box), score, label, name)

    def __getitem__(self, which: slice | Tensor | Sequence[int]) -> Detections:
        """Those of a slice, a mask [n] or positions, e.g. ``found[found.scores > 0.5]``.

        Raises:
            TypeError: `which` is none of these. IndexError: it does not fit.
        """
        positions = np.arange(len(self))[which]
        if positions.ndim != 1:
            raise TypeError(f"index: got {which!r}, takes a slice, a mask or a list of positions")
        at = torch.from_numpy(positions.copy())
        return replace(self, boxes=self.boxes[at], scores=self.scores[at], labels=self.labels[at])

    def draw(self, image: Any = None) -> Image.Image:
        """A copy of the picture, or of another one of its size, with a labelled box around each object.

        Args:
            image: what to draw on, in any form that a detector takes; None: the picture as it was given, read again
                where it was a path.

        Raises:
            TypeError, ValueError: this is no picture or has another size, or none was kept and none is given.
            OSError: the file is gone.
        """
        if image is None:
            if self.source is None:
                raise ValueError("image: got None, takes a picture: this result came without one")
            image = self.source
        image = read_picture(image)
        if image.size != self.size:
            raise ValueError(f"image: got {image.size} pixels, takes {self.size} (width, height)")
        columns = self.boxes.tolist(), self.labels.tolist(), self.scores.tolist()
        return draw_detections(image, *columns, list(self.class_names))

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """Entries of COCO's result format: image_id, category_id, bbox (x, y, width, height) and score."""
        return [
            {
                "image_id": image_id,
                "category_id": self.category_ids[found.label - 1],
                "bbox": [round(v, 2) for v in _x_y_width_height(found.box)],
                "score": round(found.score, 5),
            }
            for found in self
        ]

    def to_supervision(self) -> Any:
        """A `supervision.Detections`: class_id is label - 1, names are its data["class_name"].

        Raises:
            ImportError: the package supervision is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError as error:
            raise ImportError(
                "to_supervision takes the supervision package: pip install supervision"
            ) from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy() - 1,
            data={"class_name": np.array(self.names, dtype=object)},
        )


def _x_y_width_height(box: tuple[float, float, float, float]) -> tuple[float, ...]:
    x_min, y_min, x_max, y_max = box
    return x_min, y_min, x_max - x_min, y_max - y_min
