"""The training log: one JSON object a line, first the configuration, then steps and epochs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class JsonLog:
    """Appends records to a JSON-lines file and flushes each, so that a killed run keeps them.

    A line that a crash or a full disk cut off is taken away first.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        _drop_cut_off_line(Path(path))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, kind: str, **fields: Any) -> None:
        """Append ``{"kind": kind, **fields}``."""
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _drop_cut_off_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete records of a log; a last line cut off by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def plot_curves(log: str | os.PathLike[str], out: str | os.PathLike[str]) -> bool:
    """Draw a training log as a page of plots (`effdet.engine.plots.training_page`), a PNG file.

    Precision-recall curves are those of the file ``precision_recall.json`` beside the log, where
    there is one. Returns False when matplotlib is missing.
    """
    from . import plots

    page = plots.training_page(read_log(log), plots.read_curves(Path(log)))
    return page is not None and plots.save(page, out)
