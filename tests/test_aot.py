"""Triton kernels compiled for real GPUs without one: what the machine code takes and uses, as recorded.

The table is per release of triton; ``python -m bench aot --record tests/aot/triton-<release>.json`` writes it anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this run", allow_module_level=True)

from bench import aot  # noqa: E402
from effdet_kernels import _triton  # noqa: E402
from effdet_kernels.spec import iter_specs  # noqa: E402

pytestmark = pytest.mark.slow  # some 5 minutes of compiling; `make triton` runs it
RELEASE = ".".join(triton.__version__.split(".")[:2])
TABLE = Path(__file__).parent / "aot" / f"triton-{RELEASE}.json"
CALLS = aot.plan(list(iter_specs()))


@pytest.fixture(scope="module")
def made():
    """(call, launch, code) of every launch."""
    return [(call, launch, code) for call in CALLS for launch, code in aot.measured(*call)]


def test_every_kernel_of_the_library_is_compiled(made):
    compiled = {launch.kernel.__name__ for _, launch, _ in made}
    files = Path(_triton.__file__).parent.glob("ops/*/triton_*.py")
    defined = {
        line.split("(")[0].removeprefix("def ")
        for file in files
        for line in file.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert defined and defined == compiled


def test_nothing_spills_and_everything_fits(made):
    for call, launch, code in made:
        _, _, _, arch, _ = call
        name = launch.kernel.__name__, call[2:]
        assert code.local == 0, name
        assert code.shared <= aot.ARCHITECTURES[arch] * 1024, name
        assert code.resident_warps(arch) >= 8, name


def test_matrix_units_are_used_where_the_design_counts_on_them(made):
    for (_, case, label, arch, _), launch, code in made:
        if launch.flops and label in ("bf16", "fp16"):
            rows = launch.options.get("BLOCK_M", 0)
            want = "HGMMA" if arch == 90 and rows >= 64 else "MMA"
            assert want in code.matrix, (launch.kernel.__name__, case.name, arch)


def test_half_precision_maps_are_loaded_in_vectors(made):
    for (_, case, label, arch, _), launch, code in made:
        if (
            label in ("bf16", "fp16")
            and "IN_UNIT" in launch.options
            and launch.options["IN_UNIT"] >= 8
        ):
            assert code.vector_loads > 0, (launch.kernel.__name__, case.name, arch)


def test_the_table_is_the_recorded_one(made):
    if not TABLE.exists():
        pytest.skip(f"no table is recorded for triton {RELEASE}")
    assert aot.table(made) == json.loads(TABLE.read_text())
