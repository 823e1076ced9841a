"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from effdet.scenes import generate_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 8 training scenes of 64 pixels."""
    folder = tmp_path_factory.mktemp("scenes")
    generate_scenes(folder, 8, seed=0, size=64)
    return folder
