"""Triton kernels compiled for real GPUs without one: what the machine code takes and uses, as recorded.

The table is per release of triton; ``python -m bench aot --record tests/aot/triton-<release>.json`` writes it anew. A
test per call, so that one that fails names itself and processes share them out; ``-m quick`` are those of .ci/run.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this run", allow_module_level=True)

from bench import golden, launches  # noqa: E402
from bench.sass import ARCHITECTURES  # noqa: E402
from effdet_kernels import _triton  # noqa: E402
from effdet_kernels.verify import DTYPES  # noqa: E402

RELEASE = triton.__version__.partition("+")[0]
TABLE = Path(__file__).parent / "aot" / f"triton-{RELEASE}.json"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
CALLS = golden.plan()


def table() -> golden.Table:
    if not TABLE.exists():
        pinned = re.search(r"^triton==([\w.]+)", CONSTRAINTS.read_text(), re.MULTILINE)
        if pinned and pinned[1] == RELEASE:
            pytest.fail(f"no table of machine code: python -m bench aot --record {TABLE}")
        pytest.skip(f"no table of machine code is recorded for triton {RELEASE}")
    return json.loads(TABLE.read_text())


def test_the_table_has_the_planned_calls_and_no_others():
    names = [call.name for call in CALLS]
    assert len(set(names)) == len(names)
    assert sorted(table()) == sorted(names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_plan_has_every_kernel_of_the_library(architecture):
    files = Path(_triton.__file__).parent.glob("ops/*/triton_*.py")
    defined = {
        name for f in files for name in re.findall(r"^def (\w+_kernel)\(", f.read_text(), re.M)
    }
    calls = [call for call in CALLS if call.architecture == architecture]
    shared_kb = ARCHITECTURES[architecture]
    launched = {
        launch.kernel.__name__
        for call in calls
        for launch in launches.of_call(
            call.spec, call.case, DTYPES[call.dtype], shared_kb, call.direction == "backward"
        )
    }
    assert defined and defined == launched


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, id=call.name, marks=[pytest.mark.quick] if call.quick else [])
        for call in CALLS
    ],
)
def test_machine_code(call):
    made = call.measured()
    assert made
    assert golden.faults(call, made) == []
    recorded = table().get(call.name)
    assert recorded is not None, "not in the table"
    assert golden.lines(made) == recorded
