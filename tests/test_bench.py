"""The benchmarks run on every op, and refuse to time a kernel that is wrong."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bench import kernels
from effdet_kernels.spec import iter_specs


def arguments(*words: str):
    import argparse

    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args([*words, "--device", "cpu"])


@pytest.mark.parametrize("spec", list(iter_specs()), ids=lambda spec: spec.name)
def test_smoke(spec):
    rows = list(kernels.measure(arguments("--smoke", "--op", spec.name)))
    assert rows[0]["op"] == spec.name
    assert all(row["median_s"] > 0 and row["error_of_bound"] <= 1 for row in rows)


def test_every_op_has_a_real_shape_to_time():
    assert [s.name for s in iter_specs() if not any("bench" in c.tags for c in s.cases)] == []


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    spec = next(s for s in iter_specs() if s.name == "soft_nms")
    wrong = dataclasses.replace(spec, op=spec.mutants["class-agnostic"])
    monkeypatch.setattr(kernels, "iter_specs", lambda: iter([wrong]))
    with pytest.raises(kernels.WrongKernelError, match="soft_nms/gaussian"):
        list(kernels.measure(arguments("--smoke")))


def test_command_line_writes_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        "-m",
        "bench",
        "kernels",
        "--smoke",
        "--op",
        "soft_nms",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(out.read_text().splitlines()[0])
    assert row["op"] == "soft_nms" and row["machine"]["torch"] == torch.__version__


def test_unknown_op_is_an_error():
    command = [sys.executable, "-m", "bench", "kernels", "--op", "softnms"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "softnms" in done.stderr
