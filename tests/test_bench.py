"""The kernel benchmarks run on every op, refuse to time a kernel that is wrong, and lose nothing when killed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bench import kernels, machine, runner
from bench.results import Job, Log, key_of, load
from bench.table import print_rows
from effdet_kernels import _library
from effdet_kernels.spec import iter_specs


def arguments(*words: str, dtype: str = "fp32") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    known = parser.parse_args([*words])
    return argparse.Namespace(**vars(known), device="cpu", dtype=[dtype], smoke=True)


def measure(args: argparse.Namespace) -> list[dict]:
    log = Log(None, {})
    assert log.run(kernels.jobs(args))
    return log.rows


@pytest.mark.parametrize("spec", list(iter_specs()), ids=lambda spec: spec.name)
def test_smoke(spec, capsys):
    for dtype in ("fp32", "bf16") if torch.bfloat16 in spec.dtypes else ("fp32",):
        rows = measure(arguments("--op", spec.name, "--no-compile", dtype=dtype))
        assert {row["direction"] for row in rows} >= {"forward"} | {"backward"} & {*spec.diff_args}
        timed = [row for row in rows if row["status"] == "timed"]
        assert {row["engine"] for row in timed} >= {"eager", "reference"}
        assert all(row["status"] != "wrong" for row in rows)
        for row in timed:
            assert row["median_s"] > 0 and row["floor_s"] > 0 and row["bytes"] > 0
            assert row["vs_eager"] <= 1 or not row["engine"].startswith("eager")
    print_rows(rows)
    assert spec.name in capsys.readouterr().out


def test_torch_compile_is_timed_beside():
    rows = measure(arguments("--op", "pointwise_conv", "--direction", "forward"))
    by_engine = {row["engine"]: row for row in rows}
    assert by_engine["compile"]["status"] == "timed" and by_engine["compile"]["vs_compile"] == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_kernel_is_not_timed(monkeypatch, direction):
    spec = next(s for s in iter_specs() if s.name == "separable_conv")
    wrong = dataclasses.replace(spec, op=spec.mutants["kernel flipped"])
    monkeypatch.setattr(kernels, "iter_specs", lambda: iter([wrong]))
    rows = measure(arguments("--no-compile", "--direction", direction))
    by_engine = {row["engine"]: row for row in rows}
    assert by_engine["reference"]["status"] == "wrong"
    assert "median_s" not in by_engine["reference"] and by_engine["reference"]["error"] > 1
    assert by_engine["eager"]["status"] == "timed"


def test_a_wrong_peer_is_not_timed(monkeypatch):
    spec = next(s for s in iter_specs() if s.name == "separable_conv")
    mutant = spec.mutants["border repeated instead of zero"]
    monkeypatch.setattr(
        kernels, "iter_specs", lambda: iter([dataclasses.replace(spec, peers={"ours": mutant})])
    )
    rows = measure(arguments("--no-compile", "--direction", "forward"))
    assert next(row for row in rows if row["engine"] == "ours")["status"] == "wrong"


def test_cases_for_a_gpu_are_left_to_a_gpu():
    args = argparse.Namespace(
        op=["separable_conv"], case=None, smoke=False, device="cpu", dtype=["fp32"], direction=None
    )
    names = {job.case for job in kernels.jobs(args)}
    assert "d0_heads" in names and "d0_heads_batch128" not in names
    args.device = "cuda"
    assert "d0_heads_batch128" in {job.case for job in kernels.jobs(args)}


def test_subjects_take_turns():
    order = []

    class Subject:
        def __init__(self, name):
            self.name = name

        def time(self, repeats):
            order.append(self.name)
            return 1.0

    effort = runner.Effort(rounds=2, seconds=0, settle_s=0)
    timings = runner.alternate({"a": Subject("a"), "b": Subject("b")}, effort)
    assert order[-20:] == (["a"] * 5 + ["b"] * 5) * 2
    assert timings["a"] == runner.Timing(1.0, 1.0, 0.0, 10)


def test_the_median_of_the_best_of_five_is_reported():
    times = iter([9.0, 9.0, 5.0, 3.0, 5, 5, 5, 4.0, 6, 6, 6, 6, 8.0, 9, 9, 9, 9])

    class Subject:
        def time(self, repeats):
            return next(times)

    timing = runner.alternate({"a": Subject()}, runner.Effort(rounds=3, seconds=0, settle_s=0))["a"]
    assert (timing.median_s, timing.min_s) == (4.0, 3.0)


def test_peak_memory_sees_what_a_call_holds():
    held = runner.peak_memory(lambda: torch.ones(50_000_000).sum(), "cpu")
    assert held is None or 150e6 < held < 400e6


def test_the_copy_is_as_large_as_what_is_compared_with_it():
    assert machine.bandwidth("cpu", 1 << 16) > 0
    limit = machine.floor("cpu", torch.float32, 10**6, 10**9)
    assert limit["floor_s"] == max(10**6 / limit["bandwidth"], 10**9 / limit["matrix_rate"])


def job(case, rows=1):
    return Job(
        "kernels",
        "op",
        case,
        "forward",
        "fp32",
        "cpu",
        lambda: [{"engine": str(i)} for i in range(rows)],
    )


def test_rows_are_written_as_they_come_and_a_resumed_run_leaves_them_out(tmp_path):
    path = tmp_path / "results" / "rows.jsonl"

    def killed():
        raise KeyboardInterrupt

    bad = dataclasses.replace(job("b"), run=killed)
    with pytest.raises(KeyboardInterrupt):
        Log(path, {"cpu": "x"}).run([job("a", 2), bad, job("c")])
    assert [row["case"] for row in load(path)] == ["a", "a"]
    with path.open("a") as file:
        file.write('{"suite": "kernels", "na')  # a line torn by the kill
    log = Log(path, {"cpu": "x"}, resume=True)
    assert log.run([job("a", 2), job("b"), job("c")])
    assert [row["case"] for row in log.rows] == ["b", "c"]
    assert [key_of(row)[2] for row in load(tmp_path)] == ["a", "a", "b", "c"]


def test_rows_of_another_commit_or_machine_do_not_count_as_done(tmp_path):
    path = tmp_path / "rows.jsonl"
    machine = {"cpu": "x", "commit": "1"}
    assert Log(path, machine).run([job("a")])
    for other in ({**machine, "commit": "2"}, {**machine, "cpu": "y"}, {**machine, "threads": 1}):
        log = Log(path, other, resume=True)
        assert log.run([job("a")]) and len(log.rows) == 1
    log = Log(path, machine, resume=True)
    assert log.run([job("a")]) and log.rows == []


def test_rows_are_json_even_where_an_error_is_infinite(tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = dataclasses.replace(job("a"), run=lambda: [{"engine": "e", "error": float("inf")}])
    assert Log(path, {}).run([bad])
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["error"] == "inf"


def test_a_job_that_needs_too_much_memory_is_skipped_and_the_next_runs(tmp_path):
    def too_much():
        raise torch.OutOfMemoryError("tried to allocate 2 TB\nof 1")

    path = tmp_path / "rows.jsonl"
    assert Log(path, {}).run([dataclasses.replace(job("a"), run=too_much), job("b")])
    first, second = load(path)
    assert (first["engine"], first["status"], first["case"]) == ("every engine", "skipped", "a")
    assert first["reason"] == "OutOfMemoryError: tried to allocate 2 TB" and second["case"] == "b"


def test_a_job_that_breaks_ends_the_run_and_a_resumed_one_goes_on_behind_it(tmp_path):
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    path = tmp_path / "rows.jsonl"
    every = [dataclasses.replace(job("a"), run=broken), job("b")]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Log(path, {}).run(every)
    assert Log(path, {}, resume=True).run(every)
    assert [(row["case"], row.get("status")) for row in load(path)] == [("a", "wrong"), ("b", None)]


def test_half_precision_is_not_slower_than_what_it_can_be_widened_to():
    rates = [machine.matrix_rate("cpu", dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert rates[0] >= rates[1] > 0


def test_an_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "bench", "kernels", "--smoke", "--device", "cpu"]
    command += ["--op", "soft_nms", "--no-compile", "--out", str(tmp_path / "file" / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("python -m bench kernels: ")


def test_a_backward_is_not_timed_under_the_name_of_another_backend(monkeypatch):
    op = _library.OPS["pointwise_conv"]
    monkeypatch.delitem(op.backwards, "cpu")  # a kernel for the forward only
    words = ("--op", "pointwise_conv", "--no-compile")
    rows = {(r["direction"], r["engine"]): r for r in measure(arguments(*words))}
    assert rows["forward", "cpu"]["status"] == "timed"
    assert rows["backward", "cpu"]["status"] == "absent"
    assert rows["backward", "cpu"]["reason"] == "its backward is that of reference"


def test_after_the_deadline_no_job_starts(tmp_path):
    log = Log(tmp_path / "rows.jsonl", {})
    assert not log.run([job("a"), job("b")], deadline_s=-1)
    assert log.rows == []


def test_command_line_writes_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "bench", "kernels", "--smoke", "--no-compile"]
    command += ["--device", "cpu", "--op", "soft_nms", "--out", str(out), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(out.read_text().splitlines()[0])
    assert row["name"] == "soft_nms" and row["machine"]["threads"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "softnms"], "--op: got softnms, takes batch_norm_act"),
        (["--case", "d99"], "no case for"),
        (["--threads", "0"], "--threads: got 0"),
    ],
)
def test_bad_arguments_are_errors(words, message):
    command = [sys.executable, "-m", "bench", "kernels", "--device", "cpu", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr
