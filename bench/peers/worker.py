"""Runs in a peer's process: reads a JSON request a line, answers a JSON line, ``{"result": …}`` or ``{"error": text}``.

Of this project it imports the stopwatch alone (``entrant.py`` and ``bench/runner.py``, which need nothing but torch):
all engines are timed by the same code.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def _import_entrant() -> Any:
    """The class, without leaving the checkout on the path: its ``effdet`` is not the peer."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("bench.peers.entrant").Entrant
    finally:
        sys.path.remove(str(ROOT))


Entrant = _import_entrant()


class Worker:
    """The methods are the requests; see ``Remote`` for what they mean."""

    def load(self, task: str, device: str, graph: bool, path: str) -> dict[str, Any]:
        name, _, function = task.partition(":")
        module = importlib.import_module(name)
        made = getattr(module, function)(device=device, **torch.load(path, weights_only=True))
        call, finish = made if isinstance(made, tuple) else (made, list)
        self._entrant = Entrant(call, device, graph, finish)
        versions = _versions(getattr(module, "PACKAGES", ()))
        return {"graph": self._entrant.graph, "versions": versions}

    def outputs(self, path: str, images: list[int] | None) -> None:
        torch.save(self._entrant.outputs(images), path)

    def time(self, repeats: int) -> float:
        return self._entrant.time(repeats)

    def peak_memory(self) -> int | None:
        return self._entrant.peak_memory()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"torch": torch.__version__}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(tasks: str, threads: str) -> None:
    answers = os.fdopen(os.dup(1), "w")  # what the libraries print must not mix with the answers
    os.dup2(2, 1)
    # An editable install of this project hooks the import of `effdet`; PYTHONPATH comes before it.
    sys.meta_path.sort(key=lambda finder: not isinstance(finder, type))
    sys.path[0] = tasks  # instead of this script's folder
    torch.set_num_threads(int(threads))
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
