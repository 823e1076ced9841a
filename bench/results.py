"""Rows of results: one JSON object a line, written as they come, so that a run that is killed loses one job at most."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Row = dict[str, Any]
KEY = ("suite", "name", "case", "direction", "dtype", "device")  # what one job measures
HARDWARE = ("gpu", "cpu", "cpu_model", "threads")  # of a row's machine
SOFTWARE = ("commit", "effdet_kernels", "torch", "triton", "cuda", "python")
EVERY_ENGINE = "every engine"  # the engine of a row that stands for all of a job
TIMED, WRONG, ABSENT, SKIPPED = "timed", "wrong", "absent", "skipped"  # values of "status"


@dataclasses.dataclass(frozen=True)
class Job:
    """All engines of one case, timed against each other; ``run`` yields a row for each."""

    suite: str  # kernels, model, train, loss, detect
    name: str  # op or model
    case: str
    direction: str  # forward, backward, train, labels, loss, predict, postprocess, nms
    dtype: str  # fp32, bf16, fp16
    device: str  # cpu, cuda
    run: Callable[[], Iterable[Row]]

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(getattr(self, name) for name in KEY)


class Log:
    """A file of rows; with ``resume`` jobs that it has of this machine, commit and versions are not run again."""

    def __init__(self, path: Path | None, machine: Row, resume: bool = False) -> None:
        self.rows: list[Row] = []
        self._path, self._machine = path, machine
        self._done: set[tuple[Any, ...]] = set()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.exists():
                mine = [row for row in load(path) if same_setup(row.get("machine"), machine)]
                self._done = {key for row in mine if None not in (key := key_of(row))}
            if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                with path.open("a") as file:
                    file.write("\n")  # after a line that a kill tore

    def run(self, jobs: Iterable[Job], deadline_s: float | None = None) -> bool:
        """Runs the jobs; False if the deadline came before the last (the rest is for a resumed run)."""
        start = time.monotonic()
        left = [job for job in jobs if job.key not in self._done]
        with tqdm(left, unit="case", disable=None) as progress:
            for job in progress:
                if deadline_s is not None and time.monotonic() - start > deadline_s:
                    return False
                progress.set_description(f"{job.name} {job.case} {job.direction} {job.dtype}")
                try:
                    rows = list(job.run())
                except torch.OutOfMemoryError as error:
                    rows = [_of_all_engines(SKIPPED, error)]
                except RuntimeError as error:  # so that a resumed run does not come to it again
                    self._write(job, [_of_all_engines(WRONG, error)])
                    raise
                self._write(job, rows)
        return True

    def _write(self, job: Job, rows: list[Row]) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        common = {"machine": self._machine, "time": now}
        rows = [{**dict(zip(KEY, job.key, strict=True)), **_in_json(row), **common} for row in rows]
        self.rows.extend(rows)
        if self._path is not None:
            with self._path.open("a") as file:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _of_all_engines(status: str, error: Exception) -> Row:
    first = (str(error).strip().splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {first}"
    return {"engine": EVERY_ENGINE, "status": status, "reason": reason}


def _in_json(row: Row) -> Row:
    """JSON has no infinity and no NaN: an error may be one."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def same_setup(a: Any, b: Row) -> bool:
    return isinstance(a, dict) and all(a.get(name) == b.get(name) for name in HARDWARE + SOFTWARE)


def key_of(row: Row) -> tuple[Any, ...]:
    """What of ``KEY`` the row has."""
    return tuple(row.get(name) for name in KEY)


def load(*paths: Path) -> list[Row]:
    """The rows of files and of all ``*.jsonl`` files in folders; what is no row, a torn last line say, is left out."""
    return [row for path in paths for file in _files(path) for row in _lines(file)]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.rglob("*.jsonl"))
    if not path.exists():
        raise ValueError(f"no results at {path}")
    return [path]


def _lines(file: Path) -> Iterator[Row]:
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row
