"""`python -m bench limits` on a CPU, its slopes, and what it says of the constants of predictions."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from bench import limits, limits_loops, predict
from bench.limits_loops import Loop
from bench.runner import Timing
from effdet_kernels import _triton


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small calls on a busy machine wait for threads, not for work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(*words: str, device: str = "cpu", dtype: tuple[str, ...] = ("fp32",)):
    parser = argparse.ArgumentParser()
    limits.add_arguments(parser)
    args = parser.parse_args(words)
    args.device, args.dtype, args.smoke = device, list(dtype), device == "cpu"
    return args


# Runs --------------------------------------------------------------------------------------------


@pytest.mark.skipif(_triton.INTERPRET, reason="there they are not absent")
def test_on_a_cpu_what_torch_does_is_measured_and_kernels_are_absent():
    jobs = list(limits.jobs(arguments()))
    assert len({job.key for job in jobs}) == len(jobs)
    rows = {(job.name, row["engine"]): row for job in jobs for row in job.run()}
    here = {("copy", "torch"): "bytes/s", ("product", "torch"): "FLOP/s"}
    for name, row in rows.items():
        if name in here:
            assert row["status"] == "timed", row
            assert row["unit"] == here[name] and row["value"] > 0 and row["median_s"] > 0
        else:
            assert row["status"] == "absent" and row["reason"] == "measured on a CUDA device only"
    names = {name for name, _ in rows}
    assert names == {"copy", "read", *limits_loops.KINDS, "hgmma", "hmma", "product", "graph node"}


def test_figures_are_of_one_more():
    (row,) = [row for row in next(limits.jobs(arguments())).run() if row["engine"] == "torch"]
    assert row["bytes"] == 1 << 20
    assert row["value"] == row["bytes"] / row["median_s"] == pytest.approx(row["gb_s"] * 1e9)


def test_a_gpu_has_working_sets_within_and_beyond_its_cache(monkeypatch):
    monkeypatch.setattr(limits_loops, "multiprocessors", lambda device: 132)
    jobs = list(limits.jobs(arguments(device="cuda")))
    assert len({job.key for job in jobs}) == len(jobs) == 36  # a minute: bench/limits.py
    copies = [job.case for job in jobs if job.name == "copy"]
    assert (copies[0], copies[-1]) == ("1 MB", "2048 MB")
    assert [job.case for job in jobs if job.name == "graph node"] == ["1 program", "132 programs"]
    assert jobs[-1].name == "graph node"


@pytest.mark.parametrize(("threads", "programs"), [(2048, 132 * 8), (1536, 132 * 6)])
def test_programs_fill_a_gpu_once(threads, programs, monkeypatch):
    facts = argparse.Namespace(multi_processor_count=132, max_threads_per_multi_processor=threads)
    monkeypatch.setattr(limits_loops, "_properties", lambda: facts)
    kernels = argparse.Namespace(WARPS=8)
    assert limits_loops._filling(arguments(device="cuda"), kernels) == programs
    assert limits_loops._filling(arguments(), kernels) == 2


def test_groups_may_be_chosen():
    names = {job.name for job in limits.jobs(arguments("--only", "rates", "--only", "graph"))}
    assert names == {*limits_loops.KINDS, "graph node"}


def test_a_dtype_is_an_error():
    with pytest.raises(ValueError, match=r"--dtype: got bf16; limits takes none"):
        list(limits.jobs(arguments(dtype=("bf16",))))


def loop(engine: str, wrong: str = "", counted: list | None = None, call=None) -> Loop:
    def work(n: int) -> None:
        if counted is not None:
            counted.append(n)
        torch.arange(n * 20000).sum()

    calls = {n: call or (lambda n=n: work(n)) for n in (1, 50)}
    return Loop(engine, calls, lambda: None, lambda n: wrong, lambda s: {"value": s, "unit": "s"})


def test_what_is_wrong_or_fails_is_not_timed_and_the_others_are():
    def fail():
        raise RuntimeError("no\nmore")

    counted: list[int] = []
    loops = [loop("bad", "it is off", counted), loop("broken", call=fail), loop("good")]
    rows = {row["engine"]: row for row in limits._measure(arguments(), lambda: loops)}
    assert rows["bad"] == {"engine": "bad", "status": "wrong", "reason": "1 times: it is off"}
    assert counted == [1]
    assert rows["broken"]["status"] == "wrong" and rows["broken"]["reason"] == "RuntimeError: no"
    assert rows["good"]["status"] == "timed" and rows["good"]["value"] == rows["good"]["median_s"]


def test_results_are_spoiled_before_every_check():
    seen: list[object] = []
    spied = Loop(
        "spied",
        {n: lambda n=n: seen.append(n) for n in (1, 2)},
        lambda: seen.append("reset"),
        lambda n: seen.append(f"check {n}") or "",
        lambda seconds: {},
    )
    limits._checked(spied, "cpu")
    assert seen == ["reset", 1, "check 1", "reset", 2, "check 2"]


def test_too_little_memory_is_for_the_log():
    def fail():
        raise torch.OutOfMemoryError("2 GB")

    with pytest.raises(torch.OutOfMemoryError):
        list(limits._measure(arguments(), lambda: [loop("large", call=fail)]))


# Slopes ------------------------------------------------------------------------------------------


def timing(median: float, spread: float = 0.0, least: float | None = None) -> Timing:
    return Timing(median, median if least is None else least, spread, 10)


def test_what_surrounds_a_loop_cancels():
    points = {n: timing(7.0 + 2.0 * n, least=6.0 + 1.5 * n) for n in (512, 1, 32, 128)}
    found = limits.slope(points)
    assert found.median_s == pytest.approx(2.0) and found.min_s == pytest.approx(1.5)
    assert (found.spread, found.calls) == (0.0, 40)


def test_the_spread_is_that_of_both_ends_over_their_difference():
    found = limits.slope({1: timing(10.0, 0.1), 11: timing(30.0, 0.2)})
    assert found.spread == pytest.approx((10.0 * 0.1 + 30.0 * 0.2) / 20.0)


@pytest.mark.parametrize("last", [1.0, 0.5])
def test_no_rise_is_noise(last):
    slope = limits.slope({1: timing(1.0), 2: timing(last)})
    row = limits._row(loop("torch"), slope)
    assert row["status"] == "skipped" and "noise" in row["reason"] and "value" not in row


def test_half_precision_pairs_are_what_torch_rounds():
    x, y = torch.rand(2, 1000) * 2
    found = limits_loops.expected("to_bf16", torch.stack([x, y, y]), 1).view(torch.int16)
    halves = found.view(-1, 2).view(torch.bfloat16)
    assert torch.equal(halves[:, 1], x.bfloat16()) and torch.equal(halves[:, 0], y.bfloat16())


# Beside assumptions ------------------------------------------------------------------------------


def row(name: str, case: str = "in registers", engine: str = "triton", **fields) -> dict:
    key = {"suite": "limits", "name": name, "case": case, "direction": "loop", "dtype": "fp32"}
    times = {"status": "timed", "median_s": 1.0, "time": "2026-01-02"}
    return {**key, "device": "cuda", "engine": engine, **times, **fields}


MADE_UP = [
    row("copy", "1 MB", value=9e12, bytes=1 << 20),
    row("copy", "2048 MB", value=2.15e12, bytes=2 << 30),
    row("copy", "2048 MB", "torch", value=4.3e12, bytes=2 << 30),
    row("ffma", clock_hz=1.755e9, multiprocessors=66, per_clock=64.0, value=1.0),
    row("ex2", per_clock=32.0),
    row("swish", per_clock=1.0),
    row("hmma", value=788e12 * 0.31),
    row("product", "8192x8192x8192", "torch", value=394e12),
    row("graph node", "1 program", value=2.6e-6),
    row("graph node", "132 programs", value=9.0),
]


def test_measurements_are_put_beside_what_predictions_assume():
    found = predict.compared(MADE_UP)
    ratios = {(each.constant, each.by.split()[-1]): each.ratio for each in found}
    assert ratios == pytest.approx(
        {
            ("BANDWIDTH", "triton"): 0.5,
            ("BANDWIDTH", "torch"): 1.0,
            ("MATRIX_FLOPS", "torch"): 0.5,
            ("HMMA", "triton"): 0.5,
            ("CLOCK", "triton"): 1.0,
            ("MULTIPROCESSORS", "triton"): 0.5,
            ("ISSUED", "triton"): 0.5,
            ("SPECIAL", "triton"): 2.0,
            ("LAUNCH", "triton"): 2.0,
        }
    )
    assert len(found) == 9
    special = next(each for each in found if each.constant == "SPECIAL")
    assert (special.assumed, special.measured) == (0.5, 1.0)


def test_the_latest_row_counts_and_rows_of_others_do_not():
    later = {**row("ex2", per_clock=16.0), "time": "2026-01-03"}
    others = [
        {**row("ex2", per_clock=9.0), "device": "cpu"},
        {**row("ex2", per_clock=9.0), "suite": "kernels"},
        {**row("rcp", per_clock=9.0), "status": "wrong"},
        row("tanh"),  # without a clock
    ]
    (found,) = predict.compared([later, row("ex2", per_clock=1.0), *others])
    assert found.measured == 0.5


def test_compare_prints_and_measures_nothing(tmp_path, capsys):
    path = tmp_path / "limits.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in MADE_UP))
    with pytest.raises(SystemExit) as ended:
        arguments("--compare", str(path))
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    (launch,) = [line for line in lines if line.startswith("LAUNCH")]
    assert launch.split() == [
        "LAUNCH",
        "1.3e-06",
        "2.6e-06",
        "2.00",
        "graph",
        "node",
        "1",
        "program,",
        "triton",
        "[s]",
    ]


@pytest.mark.parametrize("made", [[], [{**MADE_UP[1], "device": "cpu"}], None])
def test_a_file_that_says_nothing_is_an_error(made, tmp_path, capsys):
    path = tmp_path / "limits.jsonl"
    if made is not None:
        path.write_text("".join(json.dumps(each) + "\n" for each in made))
    with pytest.raises(SystemExit) as ended:
        arguments("--compare", str(path))
    assert ended.value.code == 2
    reason = "no results at" if made is None else "no rows of `bench limits`"
    assert f"argument --compare: {reason}" in capsys.readouterr().err
