"""What the files around the code say of it: versions, supported Pythons, CI."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import effdet
import effdet_kernels
from effdet.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def pythons() -> list[str]:
    """3.10, 3.11, … of the classifiers."""
    found = (
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", c)
        for c in PROJECT["classifiers"]
    )
    return [match[1] for match in found if match]


def test_one_version():
    changelog = re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert changelog and changelog[1] == __version__
    assert citation and citation[1] == __version__


def test_pythons_agree():
    least = PROJECT["requires-python"].removeprefix(">=")
    assert pythons()[0] == least
    assert pythons() == [f"3.{minor}" for minor in range(10, 10 + len(pythons()))]
    wheels = [build.removesuffix("-*") for build in PYPROJECT["tool"]["cibuildwheel"]["build"]]
    assert wheels == [f"cp{version.replace('.', '')}" for version in pythons()]
    assert f"Python {pythons()[0]}–{pythons()[-1]}" in (ROOT / "README.md").read_text()
    assert PYPROJECT["tool"]["mypy"]["python_version"] == least
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{least.replace('.', '')}"


def test_types_are_shipped():
    assert "Typing :: Typed" in PROJECT["classifiers"]
    for package in (effdet, effdet_kernels):
        assert (Path(str(package.__file__)).parent / "py.typed").is_file()


def test_workflows_run_what_the_repository_has():
    workflows = ROOT / ".github" / "workflows"
    assert (
        "run: bash .ci/run" in (workflows / "ci.yml").read_text() and (ROOT / ".ci/run").is_file()
    )
    assert "cibuildwheel" in (workflows / "wheels.yml").read_text()


def test_extras_that_messages_name_exist():
    sources = [
        p for package in ("effdet", "effdet_kernels") for p in (ROOT / package).rglob("*.py")
    ]
    named = {
        extra
        for path in sources
        for extra in re.findall(r"effdet-kernels\[(\w+)\]", path.read_text())
    }
    assert named and named <= set(PROJECT["optional-dependencies"])
