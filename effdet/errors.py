"""Errors that several modules raise."""

from __future__ import annotations

import math


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not belong to the model."""


def check_number(
    name: str, value: float, takes: str, kind: type, low: float, high: float = math.inf
) -> None:
    """Raises TypeError or ValueError unless ``value`` is a number of this kind in [low, high]; NaN is not."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}: got {value!r}, takes {takes}")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value!r}, takes {takes}")
