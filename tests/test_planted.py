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


OUTSIDE = "wrote outside of its output"
UNWRITTEN = "error is inf of the bound"
WRONG = "of the bound"
BUGS = {  # what a check must say of it
    "writes past its end": OUTSIDE,
    "reads and writes past its end": OUTSIDE,
    "leaves elements unwritten": UNWRITTEN,
    "reads memory that nothing wrote": UNWRITTEN,
    "depends on program order": WRONG,
}


def test_right_kernels_pass(found):
    assert not any(found["failures"]["none"].values())


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_of_a_forward_is_caught(found, bug):
    failures = found["failures"][f"forward {bug}"]["forward"]
    assert failures and all(BUGS[bug] in failure for failure in failures)


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_of_a_backward_is_caught(found, bug):
    failures = found["failures"][f"backward {bug}"]
    assert failures["forward"] == failures["repeat"] == []
    assert failures["gradient"] and all(BUGS[bug] in failure for failure in failures["gradient"])


def test_sums_in_another_order_are_caught_by_repetition_alone(found):
    """Each run is as right as another, but no two need be the same."""
    forward = found["failures"]["forward adds up in any order"]
    assert forward["forward"] == [] and "output 0: two runs differ" in forward["repeat"][0]
    backward = found["failures"]["backward adds up in any order"]
    assert backward["forward"] == backward["repeat"] == backward["gradient"] == []
    assert "gradient 0: two runs differ" in backward["gradient_repeat"][0]


def test_a_backward_that_changes_what_it_reads_is_caught(found):
    failures = found["failures"]["backward changes what it reads"]["gradient"]
    assert any("gradient of an output: the kernel changed its input" in f for f in failures)


def test_a_plain_call_does_not_see_the_order(found):
    """One after another, the programs of the carried sum are right: the shuffled order is what catches it."""
    assert found["plain call is right"]
