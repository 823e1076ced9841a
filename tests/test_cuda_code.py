"""The machine code of the CUDA kernels in the installed module: as recorded, and without local memory.

The table is per release of nvcc; ``python -m bench cuda --record tests/aot/cuda-<release>.json`` writes it anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")  # which brings cuobjdump

from bench import cuda_code

RELEASE = cuda_code.release()
TABLE = Path(__file__).parent / "aot" / f"cuda-{RELEASE}.json"
CSRC = Path(__file__).parents[1] / "csrc"
pytestmark = pytest.mark.skipif(RELEASE is None, reason="the module was built without CUDA")


def test_no_kernel_has_local_memory():
    assert cuda_code.faults() == []


@pytest.mark.parametrize("architecture", cuda_code.ARCHITECTURES)
def test_every_kernel_of_the_sources_is_in_the_module(architecture):
    sources = [path.read_text() for path in CSRC.glob("*/*.cu")]
    defined = {
        name for text in sources for name in re.findall(r"\b(\w+_kernel)\(const \w+ ?&? ?p", text)
    }
    compiled = {name.partition("<")[0] for name in cuda_code.kernels(architecture)}
    assert defined and defined == compiled


def test_machine_code_is_as_recorded():
    if not TABLE.exists():
        pytest.skip(f"no table of machine code is recorded for CUDA {RELEASE}")
    assert cuda_code.table() == json.loads(TABLE.read_text())
