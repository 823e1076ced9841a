"""The C++ kernels as compiled for each instruction set: a CPU that lacks one runs the next."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import effdet_kernels as ek
from effdet_kernels import _native, testing, use_backend
from effdet_kernels.spec import iter_specs

SPECS = [s for s in iter_specs() if "cpu" in testing.backends(s)]
CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in SPECS
    for case in spec.small_cases()
]


def available() -> list[str]:
    """The sets that this CPU has, but for the one in use."""
    names = _native.ISAS[: _native.module().isa()]
    assert "portable" in names or _native.module().isa() == 0
    return list(names)


@pytest.mark.parametrize("act", ["swish", "mish", "hard_swish", "leaky_relu"])
def test_a_nan_of_any_bits_stays_one(act):
    """Torch makes 0x7fffffff of one float16 NaN, 0x7fc00000 of many."""
    shift = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    for isa in [*available(), _native.ISAS[_native.module().isa()]]:
        with _native.use_isa(isa), use_backend("cpu"):
            y = ek.pointwise_conv(
                torch.ones(1, 2, 5, 5), torch.ones(3, 2, 1, 1), shift=shift, act=act
            )
        assert y.isnan().all(), isa


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_error_is_within_the_bound_on_every_instruction_set(spec, case):
    for isa in available():
        with _native.use_isa(isa):
            for dtype in {torch.float32, torch.bfloat16, torch.float64}.intersection(spec.dtypes):
                worst = testing.check_forward(spec, case, dtype, "cpu")
                assert worst <= 1, f"{isa} {dtype}: {worst:.3g} of the bound"


def test_an_unknown_set_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'neon'.*portable, avx2"), _native.use_isa("neon"):
        pass


def test_no_code_of_one_set_is_reached_from_another(tmp_path):
    """Every function of a set is in its namespace: the linker cannot merge one into the path of an older CPU."""
    nm = subprocess.run(
        ["nm", "-C", "--defined-only", _native.module().__file__],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if nm.returncode:
        pytest.skip("needs nm")
    weak = [line for line in nm.stdout.splitlines() if " W " in line or " V " in line]
    foreign = re.compile(r"(?<!effdet::)(avx|amx)")
    assert not [line for line in weak if foreign.search(line)]


def test_the_module_loads_with_every_set_forced(tmp_path):
    code = (
        "import sys, torch, effdet_kernels as ek\n"
        "from effdet_kernels import _native\n"
        "x, w = torch.randn(1, 40, 9, 7), torch.randn(50, 40, 1, 1)\n"
        "with _native.use_isa(sys.argv[1]): y = ek.pointwise_conv(x, w, act='swish')\n"
        "assert y.isfinite().all()\n"
    )
    for isa in [*available(), _native.ISAS[_native.module().isa()]]:
        subprocess.run([sys.executable, "-c", code, isa], check=True)
