"""`verify` of the kernels in CUDA, as it will run on a GPU: on the emulator."""

from __future__ import annotations

import json

import pytest

from effdet_kernels import testing, verify
from effdet_kernels.spec import iter_specs

SHORT_BACKWARD = ("separable_conv",)  # takes 16 bits alone
SPECS = [spec for spec in iter_specs() if "cuda" in testing.operator(spec).impls]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_two_calls_of_every_op_pass(spec, tmp_path, capsys):
    path = tmp_path / "verify.json"
    words = ["--device", "cpu", "--quick", "--backend", "cuda_emu", "--op", spec.name]
    words += ["--dtype", "bf16" if spec.name in SHORT_BACKWARD else "fp32"]
    words += ["--check", "forward", "--check", "gradient"]
    assert verify.main([*words, "--json", str(path)]) == 0, capsys.readouterr().out
    records = {record["check"]: record for record in json.loads(path.read_text())["records"]}
    assert (records["forward"]["status"], records["forward"]["calls"]) == ("passed", 2)
    has_one = "cuda" in testing.operator(spec).backwards
    assert records["gradient"]["status"] == ("passed" if has_one else "not run")


def test_refused_calls_are_counted_and_no_failures(capsys):
    words = ["--device", "cpu", "--backend", "cuda_emu", "--op", "pointwise_conv"]
    assert verify.main([*words, "--dtype", "fp32", "--dtype", "fp64", "--check", "forward"]) == 0
    out = capsys.readouterr().out
    assert "1 checks passed, 0 failed, 1 not run" in out and "calls refused by name" in out
    assert "x: is float64, takes float32, bfloat16 or float16" in out
