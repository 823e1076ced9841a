"""The oracle: PyPI effdet 0.4.1 in a process and an environment of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent


class Oracle:
    """A worker process; each call sends tensors and plain values through files and waits for its answer."""

    def __init__(self, python: Path, folder: Path, checkout: Path | None = None) -> None:
        """With `checkout` its `effdet` takes the place of the oracle's, in the oracle's environment."""
        self._folder = folder
        self._calls = 0
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        if checkout:
            environment["PYTHONPATH"] = str(checkout)
        # Its threads must not spin while this process works: on few cores that slows both manifold.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        self._process = subprocess.Popen(
            [str(python.absolute()), str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,  # not the checkout, whose own effdet would shadow the oracle's
            env=environment,
        )

    def call(self, task: str, **inputs: Any) -> dict[str, Any]:
        """Runs ``task`` (see tasks/) on ``inputs`` there and returns its result."""
        self._calls += 1
        source = self._folder / f"{self._calls}.in.pt"
        target = self._folder / f"{self._calls}.out.pt"
        torch.save(inputs, source)
        self._process.stdin.write(f"{task}\t{source}\t{target}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if answer != "ok":
            raise RuntimeError(f"oracle task {task} failed: {answer or 'the process died'}")
        result = torch.load(target, weights_only=False)
        source.unlink()
        target.unlink()
        return result

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def ours_with_timm(oracle: Oracle, request: pytest.FixtureRequest) -> Iterator[Oracle]:
    """A worker with this checkout's effdet and the oracle's timm."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Oracle(request.config.getoption("--oracle"), Path(folder), HERE.parents[1])
        yield worker
        worker.close()


@pytest.fixture(scope="session")
def oracle(request: pytest.FixtureRequest) -> Iterator[Oracle]:
    python = request.config.getoption("--oracle")
    if python is None:
        pytest.skip(
            "needs PyPI effdet 0.4.1: pass --oracle=PYTHON (make parity builds its environment)"
        )
    with tempfile.TemporaryDirectory() as folder:
        worker = Oracle(python, Path(folder))
        yield worker
        worker.close()
