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
    sources = [path.read_text() for kind in ("cu", "h") for path in CSRC.glob(f"*/*.{kind}")]
    kernel = r"__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\("
    defined = {name for text in sources for name in re.findall(kernel, text)}
    compiled = {name.partition("<")[0] for name in cuda_code.kernels(architecture)}
    assert defined and defined == compiled


def test_machine_code_is_as_recorded():
    if not TABLE.exists():
        pytest.skip(f"no table of machine code is recorded for CUDA {RELEASE}")
    assert cuda_code.table() == json.loads(TABLE.read_text())


def test_instructions_an_element_are_told_of_kernels_that_walk_down_maps():
    """What the table is for: a wide detour in a main loop shows. Bounds by hand, with room for another nvcc."""
    for architecture in cuda_code.ARCHITECTURES:
        found = cuda_code.kernels(architecture)
        assert set(cuda_code._MADE) == {n.partition("<")[0] for n, k in found.items() if k.made}
        swish = found["depthwise_conv_fwd_matrix_kernel<BFloat16, 3, 1, 1>"]
        assert 20 < swish.largest_loop / swish.made < 40
        fusion = found["weighted_fusion_fwd_pooled_kernel<BFloat16, 2>"]
        assert 20 < fusion.largest_loop / fusion.made < 60
