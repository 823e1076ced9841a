"""Peers: other implementations, each in a process of its own, so that no package or thread pool meets ours.

``Remote`` is one such process. It is loaded with one task (a function in ``tasks/``, by the name ``module:function``),
gives its outputs so that they can be checked, and is timed by the same code as ours (``bench/runner.py``).
Requests and answers are JSON lines over stdin and stdout; tensors travel in files of a temporary folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TASKS = HERE / "tasks"
_DEFAULT_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
_LAST_LINES = 5  # of what a dead process printed


class PeerError(RuntimeError):
    """A peer cannot do what it was asked: a package is missing, a call failed, its process died."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """Where peers run."""

    python: Path
    path: Path | None = None  # a folder of packages, first on the worker's PYTHONPATH
    tasks: Path = TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say whether and where peers run."""
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="time peers too"
    )
    parser.add_argument(
        "--peer-python",
        type=Path,
        help="python with the peers' packages (default: .venv-peers/bin/python, else this one)",
    )
    parser.add_argument(
        "--peer-path", type=Path, help="folder of packages for the peers' PYTHONPATH"
    )


def chosen(args: argparse.Namespace) -> Peers | None:
    """What the options ask for; ``None`` for ``--no-peers``.

    Raises:
        ValueError: ``--peer-python`` or ``--peer-path`` does not exist.
    """
    if not args.peers:
        return None
    for option, path in (("--peer-python", args.peer_python), ("--peer-path", args.peer_path)):
        if path is not None and not path.exists():
            raise ValueError(f"{option}: got {path}, which does not exist")
    default = _DEFAULT_PYTHON if _DEFAULT_PYTHON.exists() else Path(sys.executable)
    return Peers(args.peer_python or default, args.peer_path)


class Remote:
    """One peer process; a ``runner.Subject``. Close it, or use it as a context manager.

    Args:
        peers: where it runs.
        threads: of its thread pool; as many as here by default.
    """

    def __init__(self, peers: Peers, threads: int | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="effdet_peer_")
        self._printed = Path(self._folder.name) / "printed.txt"
        threads = threads or torch.get_num_threads()
        with self._printed.open("w") as printed:
            self._process = subprocess.Popen(
                [
                    str(peers.python.absolute()),  # absolute, not resolved: it may be a venv's link
                    str(HERE / "worker.py"),
                    str(peers.tasks.resolve()),
                    str(threads),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                cwd=self._folder.name,  # not the checkout, whose own effdet would shadow PyPI's
                env=_environment(peers, threads),
            )
        self.graph = False
        self.versions: dict[str, str] = {}

    def load(self, task: str, *, device: str = "cpu", graph: bool = False, **inputs: Any) -> None:
        """Sets up the call that the other methods make.

        Args:
            task: "module:function" in the folder of tasks; the function gets ``device`` and ``inputs`` and returns
                the call, a function without arguments that returns tensors, or (call, finish) as of ``Entrant``.
            device: "cpu" or "cuda".
            graph: replay the call as one CUDA graph if it can be captured; ``self.graph`` says whether it was.
            inputs: tensors, numbers, strings, and lists and dictionaries of them.

        ``self.versions`` then has the versions of the packages that the task names.
        """
        path = Path(self._folder.name) / "inputs.pt"
        torch.save(inputs, path)
        answer = self._ask("load", task=task, device=device, graph=graph, path=str(path))
        path.unlink()
        self.graph, self.versions = answer["graph"], answer["versions"]

    def outputs(self, images: Sequence[int] | None = None) -> list[Tensor]:
        """Runs the call once and returns its outputs; ``images``: only these along the first dimension."""
        path = Path(self._folder.name) / "outputs.pt"
        self._ask("outputs", path=str(path), images=None if images is None else list(images))
        found = torch.load(path, weights_only=True)
        path.unlink()
        return found

    def time(self, repeats: int) -> float:
        """Mean seconds per call of ``repeats`` calls."""
        return self._ask("time", repeats=repeats)

    def peak_memory(self) -> int | None:
        """As ``runner.peak_memory``, of one call in the peer's process."""
        return self._ask("peak_memory")

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()  # its loop over requests ends
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": request, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(self._death(request))
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["result"]

    def _death(self, request: str) -> str:
        status = self._process.wait()
        printed = self._printed.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return f"the peer's process died with status {status} at {request!r}; it printed: " + (
            " | ".join(printed) or "nothing"
        )


def _environment(peers: Peers, threads: int) -> dict[str, str]:
    """The worker's environment: without the checkout on PYTHONPATH, with the peers' folder first."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [p for p in inherited if p and not (Path(p) / "effdet_kernels").exists()]
    path = [str(peers.path.resolve())] if peers.path else []
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path + kept),
        "OMP_NUM_THREADS": str(threads),
    }
