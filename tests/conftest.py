"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported: threads that wait give their core away. By default they spin, and where there are more
# threads than free cores, as with two test processes on two, a small parallel call then takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data", type=Path, help="folder with bccd/, photos/ and detections/ (optional real data)"
    )
    parser.addoption(
        "--emulator",
        type=Path,
        help="folder of the emulator of CUDA (make emulator), for tests/cuda",
    )
    parser.addoption("--oracle", type=Path, help="python of an environment with PyPI effdet 0.4.1")


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder given by --data; tests that need it are skipped without."""
    path = request.config.getoption("--data")
    if path is None:
        pytest.skip("needs real data: pass --data=PATH")
    if not path.is_dir():
        pytest.fail(f"--data: {path} is not a folder")
    return path.resolve()
