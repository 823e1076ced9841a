"""Boxes of one image with named per-box fields."""

from __future__ import annotations

import torch
from torch import Tensor


def _check_boxes(boxes: Tensor) -> Tensor:
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [N, 4], got {list(boxes.shape)}")
    if boxes.dtype != torch.float32:
        raise ValueError(f"boxes must be torch.float32, got {boxes.dtype}; call boxes.float()")
    return boxes


class BoxList:
    """``[N, 4]`` float32 boxes as (y_min, x_min, y_max, x_max), plus fields of length N.

    ``boxes()`` and ``device()`` are methods. The boxes themselves are the field ``"boxes"``.

    Raises:
        ValueError: the boxes are not ``[N, 4]`` float32, or a field asked for does not exist.
    """

    def __init__(self, boxes: Tensor) -> None:
        self.data: dict[str, Tensor] = {"boxes": _check_boxes(boxes)}

    def num_boxes(self) -> int:
        """N."""
        return self.boxes().shape[0]

    def get_all_fields(self) -> list[str]:
        """Names of all fields, ``"boxes"`` included."""
        return list(self.data)

    def get_extra_fields(self) -> list[str]:
        """Names of all fields but ``"boxes"``."""
        return [name for name in self.data if name != "boxes"]

    def add_field(self, field: str, field_data: Tensor) -> None:
        """Attach a field, or replace it where it exists."""
        self.data[field] = field_data

    def has_field(self, field: str) -> bool:
        """Whether there is a field of that name."""
        return field in self.data

    def boxes(self) -> Tensor:
        """The boxes, ``[N, 4]`` float32."""
        return self.data["boxes"]

    def set_boxes(self, boxes: Tensor) -> None:
        """Replace the boxes."""
        self.data["boxes"] = _check_boxes(boxes)

    def get_field(self, field: str) -> Tensor:
        """A field's tensor, of length N."""
        self._require(field)
        return self.data[field]

    def set_field(self, field: str, value: Tensor) -> None:
        """Replace a field that exists; ``add_field`` makes a new one."""
        self._require(field)
        self.data[field] = value

    def get_center_coordinates_and_sizes(self) -> list[Tensor]:
        """``[y_center, x_center, height, width]``, each ``[N]``."""
        y_min, x_min, y_max, x_max = self.boxes().unbind(dim=1)
        height = y_max - y_min
        width = x_max - x_min
        return [y_min + height / 2, x_min + width / 2, height, width]

    def transpose_coordinates(self) -> None:
        """Swap x and y in place."""
        self.data["boxes"] = self.boxes()[:, [1, 0, 3, 2]]

    def as_tensor_dict(self, fields: list[str] | None = None) -> dict[str, Tensor]:
        """The named fields (all of them by default) as a dictionary."""
        return {name: self.get_field(name) for name in (self.data if fields is None else fields)}

    def device(self) -> torch.device:
        """The device of the boxes."""
        return self.boxes().device

    def _require(self, field: str) -> None:
        if field not in self.data:
            raise ValueError(f"field {field!r} does not exist; this BoxList has {list(self.data)}")
