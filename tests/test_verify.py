"""``python -m effdet_kernels.verify``: what it prints, writes and returns."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from effdet_kernels import _library, suite, verify
from effdet_kernels.bound import flatten, map_tensors, tensors_of
from effdet_kernels.spec import iter_specs


def test_every_op_passes_quickly(capsys, tmp_path):
    path = tmp_path / "out" / "verify.json"
    assert verify.main(["--device", "cpu", "--quick", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    written = json.loads(path.read_text())
    ops = {spec.name for spec in iter_specs()}
    assert {r["op"] for r in written["records"] if r["status"] == "passed"} == ops
    assert written["machine"]["torch"] == torch.__version__
    assert all(name in out for name in ops)


def test_absent_backends_are_listed_with_their_reason(capsys):
    assert verify.main(["--device", "cpu", "--quick", "--op", "pointwise_conv"]) == 0
    out = capsys.readouterr().out
    assert "triton    absent: no CUDA device is visible" in out or torch.cuda.is_available()
    assert "cuda      absent: " in out
    assert "cuda_emu  absent: the emulator of CUDA is not loaded" in out


def test_a_backend_that_is_absent_is_no_success(capsys):
    arguments = ["--device", "cpu", "--quick", "--op", "soft_nms", "--backend", "cuda"]
    assert verify.main(arguments) == 2
    assert "0 checks passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "mutant", ["kernel flipped", "border repeated instead of zero", "pre-activation forgotten"]
)
def test_a_wrong_kernel_fails_and_is_named(monkeypatch, capsys, mutant):
    spec = next(s for s in iter_specs() if s.name == "separable_conv")
    wrong = dataclasses.replace(spec, op=spec.mutants[mutant])
    monkeypatch.setattr(verify, "iter_specs", lambda: iter([wrong]))
    arguments = ["--device", "cpu", "--dtype", "fp32", "--backend", "reference"]
    assert verify.main([*arguments, "--check", "forward", "--check", "repeat"]) == 1
    out = capsys.readouterr().out
    assert "of the bound" in out and "forward: node" in out
    assert "repeat: forward failed" in out  # a kernel that is wrong is not called again


def test_the_gradient_of_another_backend_is_not_passed_off_as_this_ones(monkeypatch, capsys):
    op = _library.OPS["pointwise_conv"]
    monkeypatch.delitem(op.backwards, "cpu")  # a kernel for the forward only
    arguments = ["--device", "cpu", "--quick", "--op", "pointwise_conv", "--backend", "cpu"]
    assert verify.main([*arguments, "--check", "forward", "--check", "gradient"]) == 0
    out = capsys.readouterr().out
    assert "gradient: pointwise_conv has no cpu backward: the gradient is that of reference" in out


def test_the_json_of_an_infinite_error_is_json(monkeypatch, tmp_path):
    spec = next(s for s in iter_specs() if s.name == "pointwise_conv")

    def unwritten(**inputs):
        return spec.op(**inputs) * torch.nan

    wrong = dataclasses.replace(spec, op=unwritten)
    monkeypatch.setattr(verify, "iter_specs", lambda: iter([wrong]))
    path = tmp_path / "verify.json"
    assert verify.main(["--device", "cpu", "--quick", "--dtype", "fp32", "--json", str(path)]) == 1
    records = json.loads(path.read_text(), parse_constant=pytest.fail)["records"]
    assert next(r for r in records if r.get("check") == "forward")["worst"] == "inf"


@pytest.mark.parametrize("check", [name for name in suite.CHECKS if name != "large"])
def test_a_kernel_that_raises_fails_with_its_message(monkeypatch, capsys, check):
    def broken(**_):
        raise RuntimeError("out of registers")

    spec = dataclasses.replace(next(iter_specs()), op=broken)
    monkeypatch.setattr(verify, "iter_specs", lambda: iter([spec]))
    dtype = "bf16" if check == "autocast" else "fp32"
    assert verify.main(["--device", "cpu", "--quick", "--dtype", dtype, "--check", check]) == 1
    assert "RuntimeError: out of registers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softnms"], "softnms, takes one of batch_norm_act"),
        (["--dtype", "int8"], "--dtype"),
        (["--jobs", "0"], "--jobs: got 0, takes at least 1"),
        (["--backend", "tpu"], "--backend"),
        (["--emulator", "no/such.so"], "no/such.so, takes the module of `make emulator`"),
    ],
)
def test_bad_arguments_exit_with_what_they_take(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        verify.main([*arguments, "--device", "cpu"])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_large_cases_pass_two_to_the_31_and_state_their_memory():
    for spec in (s for s in iter_specs() if s.batched):
        half = torch.bfloat16 in spec.dtypes
        dtype = torch.bfloat16 if half else torch.float32
        case, needed = suite.large_case(spec, dtype, "cpu")
        once = spec.inputs(dataclasses.replace(case, times=1))
        drawn = {name: map_tensors(value, lambda t: t.to("meta")) for name, value in once.items()}
        sizes = [t.numel() for name in spec.batched for t in tensors_of(drawn[name])]
        sizes += [t.numel() for t in flatten(spec.op(**drawn))]
        assert max(sizes) * case.times > 2**31 >= max(sizes) * (case.times - 1), spec.name
        assert needed > 2**31 * dtype.itemsize, spec.name
        assert suite.large_case(spec, dtype, "reference")[1] > needed


def test_without_the_memory_the_large_check_says_so(monkeypatch, capsys):
    monkeypatch.setattr(suite, "free_memory", lambda device: 10**9)
    arguments = ["--device", "cpu", "--op", "pointwise_conv", "--dtype", "fp32", "--large"]
    assert verify.main([*arguments, "--quick"]) == 0
    assert "large: needs about" in capsys.readouterr().out


def test_the_large_check_runs_where_there_is_memory(monkeypatch):
    """The same path at a size that a test can afford."""
    monkeypatch.setattr(suite, "_LARGE", 10_000)
    spec = next(s for s in iter_specs() if s.name == "soft_nms")
    small = tuple(dataclasses.replace(c, tags=frozenset({"bench"})) for c in spec.cases[:1])
    subject = suite.Subject(
        dataclasses.replace(spec, cases=small), "reference", torch.float32, "cpu"
    )
    outcome = suite.run_check("large", subject)
    assert outcome.calls == 1 and outcome.worst <= 1 and not outcome.failures


def found(path):
    """The records of a run without their times."""
    return [
        {name: value for name, value in record.items() if name != "seconds"}
        for record in json.loads(path.read_text())["records"]
    ]


def test_processes_find_what_one_process_finds(tmp_path, capsys):
    words = ["--device", "cpu", "--quick", "--op", "soft_nms", "--op", "squeeze_excite"]
    words += ["--backend", "cpu", "--dtype", "fp32", "--dtype", "bf16"]
    assert verify.main([*words, "--json", str(tmp_path / "one.json")]) == 0
    one = capsys.readouterr().out
    assert verify.main([*words, "--jobs", "2", "--json", str(tmp_path / "two.json")]) == 0
    two = capsys.readouterr().out
    assert found(tmp_path / "one.json") == found(tmp_path / "two.json")
    without_times = [[line[:85] for line in text.splitlines()] for text in (one, two)]
    assert without_times[0] == without_times[1]
    assert any(line.startswith("squeeze_excite") for line in without_times[0])


def test_a_process_that_dies_fails_its_own_checks_alone(tmp_path, capsys, monkeypatch):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *bf16*) echo lost >&2; kill -SEGV $$;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    words = ["--device", "cpu", "--quick", "--op", "squeeze_excite", "--backend", "cpu"]
    words += ["--dtype", "fp32", "--dtype", "bf16", "--check", "forward", "--check", "repeat"]
    path = tmp_path / "verify.json"
    assert verify.main([*words, "--jobs", "2", "--json", str(path)]) == 1
    assert "forward: its process ended with status -11: lost" in capsys.readouterr().out
    statuses = {(r["dtype"], r["check"]): r["status"] for r in found(path)}
    assert statuses == {
        ("fp32", "forward"): "passed",
        ("fp32", "repeat"): "passed",
        ("bf16", "forward"): "failed",
        ("bf16", "repeat"): "failed",
    }


def test_what_takes_much_memory_runs_alone_and_not_after_a_failure(monkeypatch):
    spec = next(s for s in iter_specs() if s.name == "squeeze_excite")
    checks = ["forward", "large"]
    tasks = verify._tasks(spec, "cpu", "cpu", ["fp32", "bf16"], checks, quick=True)
    begun = []

    def fake(task, jobs, emulator):
        begun.append((task.dtype, task.checks, jobs))
        wrong = ["off"] if task.dtype == "fp32" else []
        return [suite.Outcome(name, calls=1, failures=wrong) for name in task.checks]

    monkeypatch.setattr(verify, "_in_a_process", fake)
    rows = [(task.dtype, task.checks) for task, _ in verify._in_processes(tasks, 2, None)]
    assert rows == [("fp32", ("forward",)), ("bf16", ("forward",)), ("bf16", ("large",))]
    assert begun[-1] == ("bf16", ("large",), 1) and len(begun) == 3


def test_a_run_that_is_ended_leaves_what_it_had(tmp_path, monkeypatch):
    spec = next(s for s in iter_specs() if s.name == "squeeze_excite")
    run_checks = suite.run_checks

    def ended(checks, subject):
        if subject.dtype == torch.bfloat16:
            raise KeyboardInterrupt
        return run_checks(checks, subject)

    monkeypatch.setattr(verify, "iter_specs", lambda: iter([spec]))
    monkeypatch.setattr(verify, "run_checks", ended)
    path = tmp_path / "verify.json"
    words = ["--device", "cpu", "--quick", "--backend", "cpu", "--check", "forward"]
    with pytest.raises(KeyboardInterrupt):
        verify.main([*words, "--json", str(path)])
    assert [r["dtype"] for r in found(path)] == ["fp32"]
