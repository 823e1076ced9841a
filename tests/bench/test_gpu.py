"""``python -m bench gpu``: parts of fake commands, on any machine; what the real parts run."""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu, parts
from bench.parts import PARTS, DidNotRun, Plan, Step

DTYPES_BY_WORTH = ("bf16", "fp32", "fp16", "fp64")

# A suite: its words are how long it takes, its exit status, and the statuses of the rows that it adds.
SUITE = """
import json, sys, time
seconds, code, statuses, *rest = sys.argv[1:]
options = dict(zip(rest[::2], rest[1::2])) if "--resume" not in rest else {}
out = rest[rest.index("--out") + 1]
for place, status in enumerate(statuses.split(",") if statuses else []):
    row = dict(suite="model", name="m", case=f"64x64 b{place}", direction="forward", dtype="bf16")
    row |= dict(device="cpu", engine="effdet_kernels", status=status, median_s=1.0, reason="off")
    open(out, "a").write(json.dumps(row) + chr(10))
print("started with", *rest, flush=True)
time.sleep(float(seconds))
print("the last line")
sys.exit(int(code))
"""


def suite(plan, part, name, seconds=0, code=0, statuses="", **fields):
    command = [sys.executable, "-c", SUITE, str(seconds), str(code), statuses]
    return Step(name, command, plan.rows(part), **fields)


def script(name, code, **fields):
    return Step(name, [sys.executable, "-c", code], **fields)


def command(tmp_path, *words):
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    words = [*words, "--device", "cpu", "--smoke", "--out", str(tmp_path / "out")]
    return gpu.run(parser.parse_args(words))


def state(tmp_path, part):
    return json.loads((tmp_path / "out" / "state.json").read_text())[part]


@pytest.fixture
def steps(monkeypatch):
    """Replaces the steps of the parts model and train."""

    def replace(model, train=lambda plan: iter(())):
        monkeypatch.setattr(gpu, "PARTS", {"model": model, "train": train})

    return replace


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    with pytest.raises(ValueError, match=r"^no CUDA GPU is visible to torch here$"):
        gpu.run(parser.parse_args(["--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_a_part_that_passed_is_not_run_again(steps, tmp_path, capsys):
    steps(lambda plan: iter([suite(plan, "model", "one", statuses="timed,timed")]))
    assert command(tmp_path, "model") == 0
    found = state(tmp_path, "model")
    assert (found["status"], found["rows"], found["done"]) == ("passed", 2, ["one"])
    log = (tmp_path / "out" / "model.log").read_text()
    out = tmp_path / "out" / "model.jsonl"
    assert f"started with --out {out} --resume --deadline" in log and "the last line" in log
    assert command(tmp_path, "model") == 0
    assert "passed before" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.log").read_text() == log
    assert command(tmp_path, "model", "--again") == 0
    assert len(out.read_text().splitlines()) == 2
    assert len((tmp_path / "out" / "model.jsonl.old").read_text().splitlines()) == 2


def test_a_failing_command_fails_its_part_and_the_others_run(steps, tmp_path, capsys):
    steps(
        lambda plan: iter([suite(plan, "model", "bad", code=3), suite(plan, "model", "good")]),
        lambda plan: iter([suite(plan, "train", "fine", statuses="timed")]),
    )
    assert command(tmp_path) == 1
    found = state(tmp_path, "model")
    assert found["status"] == "failed" and found["done"] == ["good"]
    assert found["failures"] == ["bad: exit status 3: the last line"]
    assert state(tmp_path, "train")["status"] == "passed"
    lines = capsys.readouterr().out.splitlines()
    assert next(x for x in lines if x.startswith("model ")).split()[1] == "failed"
    assert "model: bad: exit status 3: the last line" in lines


def test_a_wrong_row_fails_the_part_also_when_nothing_is_left_to_run(steps, tmp_path):
    steps(lambda plan: iter([suite(plan, "model", "one", code=1, statuses="timed,wrong")]))
    assert command(tmp_path) == 1
    steps(lambda plan: iter([suite(plan, "model", "one")]))
    assert command(tmp_path) == 1
    found = state(tmp_path, "model")
    assert found["failures"] == ["model m 64x64 b1 forward bf16 cpu effdet_kernels: off"]
    assert found["status"] == "failed" and found["done"] == ["one"]


def test_a_part_out_of_time_is_ended_with_its_processes_and_goes_on_later(steps, tmp_path):
    marker = tmp_path / "survived"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    steps(lambda plan: iter([suite(plan, "model", "quick"), script("slow", code)]))
    start = time.monotonic()
    assert command(tmp_path, "model", "--minutes", "0.02") == 1
    assert time.monotonic() - start < 3
    found = state(tmp_path, "model")
    assert (found["status"], found["done"]) == ("out of time", ["quick"])
    assert "ended after 1 s" in (tmp_path / "out" / "model.log").read_text()
    steps(lambda plan: iter([suite(plan, "model", "quick", code=9), script("slow", "")]))
    assert command(tmp_path, "model") == 0
    assert state(tmp_path, "model")["done"] == ["quick", "slow"]
    time.sleep(max(0, 3.5 - (time.monotonic() - start)))
    assert not marker.exists()


def test_a_suite_that_met_its_deadline_is_not_done(steps, tmp_path):
    steps(lambda plan: iter([suite(plan, "model", "one", seconds=1.7, statuses="timed")]))
    assert command(tmp_path, "model", "--minutes", str(2 / 60)) == 1
    found = state(tmp_path, "model")
    assert (found["status"], found["done"], found["rows"]) == ("out of time", [], 1)


def test_what_did_not_run_is_never_passed(steps, tmp_path, capsys):
    def cannot(plan):
        raise DidNotRun("the tool is not here")
        yield

    steps(cannot, lambda plan: iter([script("none", "print('nothing to check'); exit(2)")]))
    assert command(tmp_path) == 0
    assert state(tmp_path, "model")["status"] == "did not run"
    assert state(tmp_path, "train")["reason"] == "none: nothing to check"
    assert "the tool is not here" in capsys.readouterr().out


def test_smaller_batches_run_only_where_larger_ones_do_not_fit(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_suite", fake_suite)

    def model(plan):
        return parts._batches(plan, "model", "model", "m", (128, 32, 8))

    steps(model)
    assert command(tmp_path) == 0
    assert state(tmp_path, "model")["done"] == ["model m b128", "model m b32"]


def fake_suite(plan, part, name, suite_name, *words, needed):
    """Writes a row: absent at batch 128, timed else."""
    batch = words[words.index("--batch") + 1]
    row = {"suite": "model", "name": "m", "case": f"64x64 b{batch}", "direction": "forward"}
    row |= {"dtype": "bf16", "device": "cpu", "engine": "effdet_kernels", "median_s": 1.0}
    row["status"] = "absent" if batch == "128" else "timed"
    code = f"open({str(plan.rows(part))!r}, 'a').write({json.dumps(row) + chr(10)!r})"
    return Step(name, [sys.executable, "-c", code], plan.rows(part), needed)


def test_results_of_another_commit_are_not_mixed_in(steps, tmp_path, monkeypatch):
    steps(lambda plan: iter([suite(plan, "model", "one")]))
    assert command(tmp_path, "model") == 0
    facts = {**gpu.machine.describe(), "commit": "other"}
    monkeypatch.setattr(gpu.machine, "describe", lambda: facts)
    with pytest.raises(ValueError, match=r"has model of .*, this is .*other.*--again"):
        command(tmp_path, "model")
    assert command(tmp_path, "train") == 0  # parts of their own
    assert command(tmp_path, "model", "--again") == 0


def test_verify_really_runs_and_its_checks_are_counted(tmp_path):
    assert command(tmp_path, "verify", "sanitize") == 0
    found = state(tmp_path, "verify")
    assert found["status"] == "passed" and found["rows"] > 0
    records = json.loads((tmp_path / "out" / "verify.json").read_text())["records"]
    assert sum(record["status"] == "passed" for record in records) == found["rows"]
    assert state(tmp_path, "sanitize")["reason"] == "compute-sanitizer is for CUDA devices"


def test_profile_really_runs_and_names_what_took_the_time(tmp_path):
    assert command(tmp_path, "profile") == 0
    found = state(tmp_path, "profile")
    assert (found["status"], found["rows"]) == ("passed", 1)
    row = json.loads((tmp_path / "out" / "profile.jsonl").read_text())
    assert row["name"] == "tf_efficientdet_d0" and row["replays"] == 3 and row["median_s"] > 0
    assert {"commit", "torch", "cpu"} <= set(row["machine"])
    counts = {kernel["kernel"]: kernel["count"] for kernel in row["kernels"]}
    assert counts["effdet_kernels::separable_conv"] == 32
    assert sum(counts.values()) == len(row["launches"])
    total = sum(kernel["sum_us"] for kernel in row["kernels"])
    assert total == pytest.approx(row["busy_us"]) and row["gaps_us"] > 0
    assert "between them" in (tmp_path / "out" / "profile.log").read_text()


def test_a_failed_check_is_named(tmp_path):
    plan = Plan(tmp_path)
    (tmp_path / "verify").mkdir()
    record = {"op": "soft_nms", "backend": "cuda", "dtype": "fp32", "check": "forward"}
    records = [
        {**record, "status": "failed", "failures": ["d0: error is 3 of the bound", "d4"]},
        {**record, "status": "passed", "failures": []},
        {**record, "status": "not run", "failures": []},
        {"op": None, "backend": "triton", "status": "absent", "reason": "x"},
    ]
    file = {"machine": {}, "records": records}
    (tmp_path / "verify" / "soft_nms.json").write_text(json.dumps(file))
    assert gpu._findings(plan, "verify") == (
        2,
        ["soft_nms cuda fp32 forward: d0: error is 3 of the bound"],
    )


@pytest.mark.parametrize(
    ("tool", "reason"),
    [(None, "not on PATH"), ("echo device not supported; exit 1", "here: device not supported")],
)
def test_sanitize_needs_a_tool_that_works(tmp_path, monkeypatch, tool, reason):
    monkeypatch.setenv("PATH", str(tmp_path))
    if tool:
        fake_tool(tmp_path, tool)
    with pytest.raises(DidNotRun, match=reason):
        list(parts.sanitize(Plan(tmp_path)))


def test_errors_of_the_sanitizer_fail_the_part(tmp_path, monkeypatch):
    fake_tool(tmp_path, 'case "$*" in *verify*) echo ERROR SUMMARY: 1; exit 97;; esac')
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "PARTS", {"sanitize": lambda plan: parts.sanitize(Plan(plan.out))})
    monkeypatch.setattr(parts, "ops_with_gpu_kernels", lambda: ["soft_nms"])
    assert command(tmp_path) == 1
    failures = state(tmp_path, "sanitize")["failures"]
    names = ["memcheck soft_nms", "racecheck soft_nms"]
    assert [failure.partition(":")[0] for failure in failures] == names
    assert "compute-sanitizer found errors: ERROR SUMMARY: 1" in failures[0]


def test_without_kernels_for_a_gpu_the_sanitizer_does_not_run(tmp_path, monkeypatch):
    fake_tool(tmp_path, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(parts, "ops_with_gpu_kernels", list)
    with pytest.raises(DidNotRun, match="no op has a Triton or CUDA kernel"):
        list(parts.sanitize(Plan(tmp_path)))


def test_a_command_that_is_ended_leaves_the_part_unfinished_and_no_process_behind(tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "bench", "gpu", "verify", "--device", "cpu", "--smoke"]
    process = subprocess.Popen([*words, "--out", str(out)], stdout=subprocess.PIPE, cwd=parts.ROOT)
    deadline = time.monotonic() + 60
    log = out / "verify.log"
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert state(tmp_path, "verify")["status"] == "out of time"
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(out) not in running.stdout


def fake_tool(folder, text):
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{text}\n")
    os.chmod(path, path.stat().st_mode | stat.S_IXUSR)


def test_the_parts_run_what_they_should(tmp_path, monkeypatch):
    fake_tool(tmp_path, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(parts, "ops_with_gpu_kernels", lambda: ["soft_nms"])
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: name)
    plan = Plan(tmp_path, peers=("--peer-path", "packages"), data=tmp_path)
    steps = {name: list(part(plan)) for name, part in PARTS.items()}
    words = {name: [" ".join(s.command[1:]) for s in found] for name, found in steps.items()}
    for name, found in steps.items():
        assert len({step.name for step in found}) == len(found) > 0, name
        assert not any("smoke" in text for text in words[name])
        if name not in ("compile", "counters"):  # for GPUs only
            assert all("--device cuda" in text for text in words[name]), name
    assert "--peer-path packages" in words["peers"][0]
    assert not any("--peer-path" in text for text in words["model"] + words["kernels"])
    tuned = [text for text in words["peers"] if "--max-autotune" in text]
    assert [text.split("--model ")[1].split(" --dtype")[0] for text in tuned] == [
        f"tf_efficientdet_d0 --batch {batch}" for batch in (1, 128, 32, 8, 2)
    ]
    assert [" loss " in text for text in words["loss"]] == [True]
    assert sum(" loss " in text for text in words["peers"]) == 1
    assert all("triton" in text and "--check large" not in text for text in words["sanitize"])
    goals, half, single = words["kernels"]
    assert "--case batch --dtype bf16" in goals and all(
        "--no-compile" in w for w in words["kernels"]
    )
    assert "--op soft_nms" in single and "--dtype fp32" in single and "bf16" in half
    assert [text.split("--dtype ")[1][:4] for text in words["verify"]] == [*DTYPES_BY_WORTH]
    assert all(
        f"--jobs {os.cpu_count()}" in text and "--quick" not in text for text in words["verify"]
    )
    assert [text.partition("--of ")[2] for text in words["compile"]] == [
        "verify --dtype bf16",
        "kernels --dtype bf16",
        "model --dtype bf16",
        *(f"verify --dtype {label}" for label in DTYPES_BY_WORTH[1:]),
    ]
    trained = [text.split("--model ")[1][:19] for text in words["train"]]
    assert list(dict.fromkeys(trained)) == ["tf_efficientdet_d0 ", "tf_efficientdet_d2 "]
    assert (
        str(tmp_path / "accuracy") in words["accuracy"][0] and "--restart" in words["accuracy"][0]
    )
    assert all("bench counters --out" in text for text in words["counters"])


def test_compile_really_runs_without_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert command(tmp_path, "compile") == 0
    assert state(tmp_path, "compile")["done"] == ["kernels"]
    assert list((tmp_path / "cache").rglob("squeeze_excite_fwd_kernel.cubin"))


@pytest.mark.parametrize(
    ("part", "missing", "reason"),
    [
        ("accuracy", "", "--data names no folder in COCO format"),
        ("accuracy", "pycocotools", "pycocotools is not installed"),
        ("compile", "triton", "triton is not installed"),
        ("counters", "", "ncu is for CUDA devices"),
    ],
)
def test_a_part_says_what_it_misses(tmp_path, monkeypatch, part, missing, reason):
    find = parts.importlib.util.find_spec
    monkeypatch.setattr(
        parts.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    words = ["--data", str(tmp_path)] if missing == "pycocotools" else []
    assert command(tmp_path, part, *words) == 0
    found = state(tmp_path, part)
    assert found["status"] == "did not run" and reason in found["reason"]


def test_steps_are_listed_and_not_run(tmp_path, capsys):
    assert command(tmp_path, "verify", "sanitize", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("verify: fp32: python -m effdet_kernels.verify --device cpu")
    assert lines[1:] == ["sanitize: does not run: compute-sanitizer is for CUDA devices"]
    assert not (tmp_path / "out").exists()


def test_what_trained_goes_on_and_starts_anew_when_asked(tmp_path, monkeypatch):
    """The run has a folder of its own, which ``--again`` removes: a finished run would have nothing to do."""
    made = "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(); print('made')"

    def accuracy(plan):
        yield Step("train", [sys.executable, "-c", made, str(plan.folder("accuracy"))])

    monkeypatch.setattr(gpu, "PARTS", {"accuracy": accuracy})
    assert command(tmp_path, "accuracy") == command(tmp_path, "accuracy") == 0
    assert command(tmp_path, "accuracy", "--again") == 0  # mkdir fails where there is one


def test_the_summary_says_what_training_reached(tmp_path, monkeypatch, capsys):
    log = tmp_path / "out" / "accuracy" / "log.jsonl"
    records = [{"kind": "step", "AP50": 0.9}, {"kind": "epoch", "epoch": 1, "AP50": 0.25}]
    records += [{"kind": "epoch", "epoch": 2, "AP50": 0.5}, {"kind": "epoch", "epoch": 3}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    written = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(); p.write_text(sys.argv[2])"

    def accuracy(plan):
        yield Step("train", [sys.executable, "-c", written, str(log), lines])

    monkeypatch.setattr(gpu, "PARTS", {"accuracy": accuracy, "model": lambda plan: iter(())})
    assert command(tmp_path, "model", "accuracy") == 0
    said = "AP50 0.500 after 2 epochs"
    assert (state(tmp_path, "accuracy")["result"], state(tmp_path, "model")["result"]) == (said, "")
    assert [said in line for line in capsys.readouterr().out.splitlines()][-2:] == [False, True]
    log.unlink()
    assert parts.reached(Plan(tmp_path / "out")) == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verfy"], "PART: got verfy, takes limits, compile, verify, sanitize"),
        (["--data", "no/such"], "--data: got no/such, takes a folder in COCO format"),
        (["--minutes", "0"], "--minutes: got 0, takes more than 0"),
        (["--minutes", "nan"], "--minutes: got nan"),
    ],
)
def test_bad_arguments_are_errors(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        command(tmp_path, *words)


def test_figures_of_a_smoke_run_need_a_folder():
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    with pytest.raises(ValueError, match="--out: got none"):
        gpu.run(parser.parse_args(["--smoke", "--device", "cpu"]))
