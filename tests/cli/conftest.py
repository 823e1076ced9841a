"""A small data set, an untrained model's weights, and ways to call the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from effdet.cli import main
from effdet.factory import create_model
from effdet.scenes import CLASS_NAMES, generate_scenes


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``effdet ARGS`` in this process."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(a) for a in args])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def cli_process() -> Callable[..., subprocess.Popen[str]]:
    """Start ``python -m effdet ARGS`` as a user would, with one thread."""

    def start(*args: object) -> subprocess.Popen[str]:
        root = Path(__file__).resolve().parents[2]
        paths = [str(root), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "effdet", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    return start


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 training and 4 validation scenes of 64 pixels."""
    folder = tmp_path_factory.mktemp("scenes")
    generate_scenes(folder, 12, seed=0, size=64)
    generate_scenes(folder, 4, seed=0, size=64, split="val")
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an untrained model for the classes of the scenes, at 64 pixels."""
    torch.manual_seed(0)
    model = create_model("efficientdet_nano", num_classes=5, pretrained_backbone=False)
    path = tmp_path_factory.mktemp("weights") / "untrained.pth"
    content = {
        "model": "efficientdet_nano",
        "image_size": [64, 64],
        "class_names": list(CLASS_NAMES),
        "category_ids": [1, 2, 3, 4, 5],
        "state_dict": model.state_dict(),
    }
    torch.save(content, path)
    return path
