"""CUDA kernels on the emulator of CUDA, under AddressSanitizer: `make emulate` builds it and runs these tests.

``pytest tests/cuda --emulator=FOLDER`` with libasan preloaded. In any other run these tests are not collected.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from effdet_kernels import _library


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--emulator")
    if folder is not None:
        _library.emulate(module(folder, "_emulated"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--emulator") is None else None


def module(folder: Path, name: str) -> Path:
    """The compiled module of this name in the folder."""
    found = sorted(folder.glob(f"{name}.*"))
    if len(found) != 1:
        pytest.exit(f"--emulator: {folder} has {len(found)} modules {name}, takes one", 2)
    return found[0]


@pytest.fixture(scope="session")
def planted_path(request: pytest.FixtureRequest) -> Path:
    return module(request.config.getoption("--emulator"), "_planted").resolve()
