"""The harness catches planted kernels: Triton's interpreter runs them in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "planted" / "run.py"


@pytest.fixture(scope="module")
def found():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_right_kernel_passes(found):
    assert found["none"] == []


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("writes past its end", "wrote outside of its output"),
        ("leaves elements unwritten", "error is inf of the bound"),
        ("reads memory that nothing wrote", "error is inf of the bound"),
        ("depends on program order", "of the bound"),
    ],
)
def test_each_bug_is_caught(found, bug, message):
    assert found[bug] and all(message in failure for failure in found[bug])


def test_a_plain_call_does_not_see_the_order(found):
    """One after another, the programs of the carried sum are right: the shuffled order is what catches it."""
    assert found["plain call is right"]
