"""Whether an exported file computes what the model does: both run on the same pictures, and outputs are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effdet.bench import DetBenchPredict

from .pictures import Batch
from .program import ExportedDetector, ExportOptions

BOX, SCORE = 0.05, 1e-4  # largest differences, in pixels and in scores
_FAR = 5000.0  # pixels; of coordinates beyond, 1e-5 of them counts as 0.05
_EDGE = 0.1  # share of the detections that may be gone because their scores are the last ones kept

Run = Callable[[tuple[Tensor, ...]], list[np.ndarray]]


class ExportError(RuntimeError):
    """A file does not compute what the model does, or cannot be loaded."""


@dataclass
class Check:
    """What was compared, and how much it differed.

    Attributes:
        runtime: what ran the file.
        shapes: (batch, height, width) of each call.
        compared: detections, or with raw outputs boxes.
        box: largest difference of a coordinate, pixels; beyond 5,000 px a share of it.
        score: largest difference of a score.
        at_edge: detections of the model that the file lacks, their scores being the last ones that are kept.
    """

    runtime: str
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    compared: int = 0
    box: float = 0.0
    score: float = 0.0
    at_edge: int = 0

    def __str__(self) -> str:
        shapes = ", ".join(f"{b} of {h}x{w}" for b, h, w in self.shapes)
        edge = f", {self.at_edge} more at the edge of what is kept" if self.at_edge else ""
        return (
            f"checked with {self.runtime} (pictures: {shapes}): {self.compared:,} boxes equal to"
            f" {self.box:.1g} px, their scores to {self.score:.1g}{edge}"
        )


def compare(
    run: Run, runtime: str, bench: DetBenchPredict, options: ExportOptions, batches: list[Batch]
) -> Check:
    """Run a file and the bench, with its kernels, on each batch.

    Args:
        run: the file.
        runtime: what runs it.
        bench: what it was made of.
        options: what it takes and returns.
        batches: its inputs.

    Raises:
        ExportError: an output differs, or there was nothing to compare.
    """
    check = Check(runtime)
    model = ExportedDetector(bench, options)
    least = bench.suppression().least_score
    for inputs in batches:
        with torch.no_grad():
            expected = model(*inputs)
        want = [np.asarray(x.float().cpu()) for x in _as_list(expected)]
        try:
            got = run(inputs)
        except Exception as error:  # a runtime's own kinds
            raise ExportError(f"the file cannot be run: {error}") from error
        shapes = [x.shape for x in got], [x.shape for x in want]
        if shapes[0] != shapes[1]:
            raise ExportError(f"outputs have shapes {shapes[0]}, the model's {shapes[1]}")
        batch, _, height, width = inputs[0].shape
        check.shapes.append((batch, height, width))
        for i in range(batch):
            place = f"picture {i + 1} of {batch} of {height}x{width}"
            if options.outputs == "raw":
                _compare_raw(check, [x[i] for x in got], [x[i] for x in want], place)
            else:
                _compare_rows(check, got[0][i], want[0][i], least, place)
    if not check.compared:
        raise ExportError(
            "there was nothing to compare: the model detects nothing on the pictures; give others"
            " (images), lower its score_threshold, or check=False"
        )
    if check.at_edge > 1 + _EDGE * check.compared:
        raise ExportError(
            f"{check.at_edge} of {check.at_edge + check.compared} detections could not be compared:"
            f" their scores lie within {SCORE:g} of the last one kept; use weights that tell"
            " objects apart, or check=False"
        )
    return check


def _compare_raw(check: Check, got: list[np.ndarray], want: list[np.ndarray], place: str) -> None:
    for name, of, most, a, b in zip(
        ("box", "score"), (_pixels, _difference), (BOX, SCORE), got, want, strict=True
    ):
        off = of(a, b)
        worst = np.unravel_index(off.argmax(), off.shape)[0]
        if off.max() > most:
            raise ExportError(
                f"{place}: {name} of anchor {worst} differs by {off.max():.3g}, at most {most:g}:"
                f" the file has {_numbers(a[worst])}, the model {_numbers(b[worst])}"
            )
        setattr(check, name, max(getattr(check, name), float(off.max())))
    check.compared += len(want[0])


def _compare_rows(
    check: Check, got: np.ndarray, want: np.ndarray, least: float, place: str
) -> None:
    """Rows [max_det, 6] of one picture; such as have the same score, within `SCORE`, come in any order."""
    full = len(want) > 0 and want[-1, 5] > 0
    edge = SCORE + (float(want[-1, 4]) if full else least)
    free = got[:, 5] > 0
    for i, row in enumerate(want[want[:, 5] > 0]):
        fits = free & (got[:, 5] == row[5]) & (np.abs(got[:, 4] - row[4]) <= SCORE)
        off = np.where(fits, _pixels(got[:, :4], row[:4]).max(1), np.inf)
        best = int(off.argmin())
        if off[best] <= BOX:
            free[best] = False
            check.compared += 1
            check.box = max(check.box, float(off[best]))
            check.score = max(check.score, float(abs(got[best, 4] - row[4])))
        elif row[4] <= edge:
            check.at_edge += 1
        else:
            raise ExportError(
                f"{place}: detection {i + 1} of the model is not in the file's, boxes to {BOX} px,"
                f" scores to {SCORE:g}: the model has {_numbers(row)}, the file {_numbers(got[i])}"
            )
    extra = np.flatnonzero(free & ~(got[:, 4] <= edge))
    if len(extra):
        i = extra[0]
        raise ExportError(
            f"{place}: detection {i + 1} of the file is not one of the model's: {_numbers(got[i])}"
        )


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|: 0 of infinities and NaN that are the same, infinity of others."""
    with np.errstate(invalid="ignore"):
        off = np.abs(a - b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0.0, np.where(np.isnan(off), np.inf, off))


def _pixels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Differences of coordinates in pixels; those beyond `_FAR` shrunk by as much as they lie farther."""
    far = np.where(np.isfinite(b), np.abs(b), 0.0) / _FAR
    return _difference(a, b) / np.maximum(1.0, far)


def _as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _numbers(row: np.ndarray) -> str:
    return f"({', '.join(f'{x:.6g}' for x in row[:8])}{', ...' if len(row) > 8 else ''})"
