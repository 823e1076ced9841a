"""The training log as scalars for TensorBoard, where the package ``tensorboard`` is installed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

INSTALL = 'pip install "effdet-kernels[tensorboard]"'
_PLACES = ("step", "epoch")  # where a value is drawn, not values


class TensorBoardLog:
    """Writes the numbers of step and epoch records as scalars; the calls are those of `JsonLog`.

    Step records become ``train/<field>`` over steps, epoch records ``val/<figure>`` and, per class,
    ``val AP/<class>`` and ``val AP50/<class>`` over epochs.

    Args:
        folder: where the event files go; a resumed run adds one.

    Raises:
        ImportError: tensorboard is not installed; the message says how to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._writer = _writer(folder)

    def write(self, kind: str, **fields: Any) -> None:
        """Write the numbers of ``{"kind": kind, **fields}``; of kinds besides step and epoch, nothing.

        None and values that are not finite are left out, as is -1 of an epoch: there were no such objects.
        """
        if kind == "step":
            for name, value in _numbers(fields):
                self._writer.add_scalar(f"train/{name}", value, fields["step"])
        elif kind == "epoch":
            for name, value in _figures(fields):
                self._writer.add_scalar(f"val{name}", value, fields["epoch"])
            self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the files."""
        self._writer.close()


def _writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"a log for TensorBoard takes the package tensorboard: {INSTALL}"
        ) from error
    return SummaryWriter(os.fspath(folder))


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and name not in _PLACES and math.isfinite(value):
            yield name, float(value)


def _figures(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    yield from ((f"/{name}", value) for name, value in _numbers(fields) if value >= 0)
    for of_class, figures in fields.get("per_class", {}).items():
        for name, value in _numbers(figures):
            yield f" {name}/{of_class}", value
