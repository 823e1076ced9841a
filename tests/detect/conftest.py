"""The bundled model, pictures for it, and where the objects on them are."""

from __future__ import annotations

from pathlib import Path

import pytest

from effdet import Detector
from effdet.scenes import generate_scenes


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six drawn scenes of 256 pixels, in one folder."""
    folder = tmp_path_factory.mktemp("pictures")
    generate_scenes(folder, 6, seed=2024, size=256, split="val")
    return sorted((folder / "images").iterdir())


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(device="cpu")
