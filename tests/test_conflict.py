"""What is said when PyPI's effdet is installed in the same environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from effdet import _conflict

PACKAGE = Path(_conflict.__file__).parent
FILES = {"effdet/__init__.py": "ours\n", "effdet/loss.py": "our loss\n"}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages folder with this package."""
    (tmp_path / "effdet").mkdir()
    (tmp_path / "effdet_kernels-0.1.0.dist-info").mkdir()
    rows = ["effdet_kernels-0.1.0.dist-info/RECORD,,", "effdet/assets/a.pth,sha256=x,9"]
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
        rows.append(f"{name},sha256=x,{len(content)}")
    (tmp_path / "effdet_kernels-0.1.0.dist-info" / "RECORD").write_text("\n".join(rows))
    return tmp_path


def test_alone_nothing_is_said(site):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _conflict.check(str(site / "effdet"))


def test_the_other_one_under_ours_is_warned_about(site):
    (site / "effdet-0.4.1.dist-info").mkdir()
    (site / "effdet" / "theirs.py").touch()
    with pytest.warns(UserWarning, match=r"and effdet-0\.4\.1 are both.*pip uninstall effdet"):
        _conflict.check(str(site / "effdet"))


@pytest.mark.parametrize("change", ["overwritten", "missing"])
def test_files_that_are_not_ours_stop_the_import(site, change):
    (site / "effdet-0.4.1.dist-info").mkdir()
    if change == "missing":
        (site / "effdet/loss.py").unlink()
    else:
        (site / "effdet/loss.py").write_text("their loss\n")
    with pytest.raises(
        ImportError, match=r"1 files are not ours \(effdet/loss\.py\); type: pip uninstall"
    ):
        _conflict.check(str(site / "effdet"))


def run_python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Without site-packages, in which there is no torch: it has to end before that is missed."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=site)


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_the_import_stops_first(site):
    shutil.rmtree(site / "effdet")
    (site / "effdet").symlink_to(PACKAGE)
    (site / "effdet-0.4.1.dist-info").mkdir()
    done = run_python(site, "import effdet")
    assert done.returncode == 1 and "2 files are not ours" in done.stderr


def test_the_command_stops_where_the_other_one_has_taken_the_package(site):
    (site / "effdet/cli").mkdir()
    for name in ("_conflict.py", "cli/__init__.py"):
        shutil.copy(PACKAGE / name, site / "effdet" / name)
    (site / "effdet/__init__.py").write_text("theirs = 1\n")
    (site / "effdet-0.4.1.dist-info").mkdir()
    done = run_python(site, "import effdet.cli")
    assert done.returncode == 1 and "1 files are not ours (effdet/__init__.py)" in done.stderr


def test_a_full_folder_takes_less_than_5_ms(site):
    for number in range(500):
        (site / f"package_{number}").mkdir()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _conflict.check(str(site / "effdet"))
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005
