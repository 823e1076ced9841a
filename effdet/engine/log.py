"""The training log: one JSON object a line, first the configuration, then steps and epochs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class JsonLog:
    """Appends records to a JSON-lines file and flushes each, so that a killed run keeps them."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, kind: str, **fields: Any) -> None:
        """Append ``{"kind": kind, **fields}``."""
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete records of a log; a last line cut off by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def plot_curves(log: str | os.PathLike[str], out: str | os.PathLike[str]) -> bool:
    """Draw loss over steps and COCO AP over epochs; returns False when matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    records = read_log(log)
    steps = {r["step"]: r for r in records if r["kind"] == "step"}  # a resumed run rewrites some
    epochs = {r["epoch"]: r for r in records if r["kind"] == "epoch" and "AP" in r}
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for field in ("loss", "class_loss", "box_loss"):
        left.plot(list(steps), [r[field] for r in steps.values()], label=field, linewidth=1)
    left.set(xlabel="step", ylabel="loss", yscale="log", title="training loss")
    for field in ("AP", "AP50", "AP75"):
        right.plot(list(epochs), [r[field] for r in epochs.values()], label=field, marker=".")
    right.set(xlabel="epoch", ylabel="COCO AP", ylim=(0, 1), title="validation, averaged weights")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    partial = Path(str(out) + ".part")
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, out)
    return True
