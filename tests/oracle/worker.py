"""Runs inside the oracle's environment: reads `task, input file, output file` lines, answers `ok` or the error."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what the libraries print must not mix with the answers
    os.dup2(2, 1)
    torch.set_num_threads(2)
    sys.path.insert(0, str(HERE))
    import tasks
    import torchvision_stub  # noqa: F401  before effdet

    for module in pkgutil.iter_modules(tasks.__path__):
        importlib.import_module(f"tasks.{module.name}")
    for line in sys.stdin:
        name, source, target = line.rstrip("\n").split("\t")
        try:
            inputs = torch.load(source, weights_only=False)
            torch.save(tasks.TASKS[name](**inputs), target)
            answer = "ok"
        except Exception as error:
            traceback.print_exc()
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        answers.write(answer + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
