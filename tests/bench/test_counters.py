"""`python -m bench counters`, with a program in place of ncu: what that is asked, what is read from it."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch

from bench import counted, counters, machine, ncu
from bench.parts import DidNotRun
from effdet_kernels import _dispatch, _library
from effdet_kernels.spec import iter_specs

MARK = "at::cuda::<unnamed>::spin_kernel(long)"
KERNEL = "void effdet::pointwise_conv_fwd_kernel<__nv_bfloat16, (int)3, (bool)1>(effdet::Params)"
CAST = "void at::native::unrolled_elementwise_kernel<at::native::CopyFunctor>(int, T1)"
COLUMNS = (
    *("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream"),
    *("Block Size", "Grid Size", "Device", "CC"),
)
UNITS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "byte",
    "dram__bytes_write.sum": "byte",
    "launch__registers_per_thread": "register/thread",
    "launch__shared_mem_per_block": "byte/block",
    "launch__waves_per_multiprocessor": "",
    **{metric.name: "inst" for metric in ncu.STALLS.values()},
}
VALUES = {
    "gpu__time_duration.sum": "12,345",
    "dram__bytes_read.sum": "1,048,576",
    "dram__bytes_write.sum": "2,000,000",
    "launch__registers_per_thread": "40",
    "launch__shared_mem_per_block": "50,176",
    "launch__waves_per_multiprocessor": "0.25",
    "lts__t_sector_hit_rate.pct": "62.50",
    **{metric.name: "0.00" for metric in ncu.STALLS.values()},
    ncu.STALLS["gmma"].name: "0.50",
    ncu.STALLS["long_scoreboard"].name: "10.50",
    ncu.STALLS["barrier"].name: "3",
    ncu.STALLS["wait"].name: "9.25",
}
TIME = "gpu__time_duration.sum"


def table(*launches, names=ncu.NAMES, units=UNITS):
    """What ncu writes of launches: each is a kernel and what it has in place of ``VALUES``."""

    def line(*cells):
        quoted = (str(cell).replace('"', '""') for cell in cells)
        return ",".join(f'"{cell}"' for cell in quoted)

    lines = [
        "==PROF== Connected to process 4711 (/usr/bin/python3.12)",
        '==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 6 passes',
        "",
        line(*COLUMNS, *names),
        line(*("" for _ in COLUMNS), *(units.get(name, "%") for name in names)),
    ]
    for number, (kernel, values) in enumerate(launches):
        of = (number, 4711, "python3.12", "127.0.0.1", kernel, 1, 7, "(128, 2, 1)", "(33, 4, 1)")
        values = {**VALUES, **values}
        lines.append(line(*of, 0, "9.0", *(values.get(name, "10.00") for name in names)))
    return "\n".join([*lines, "==PROF== Disconnected from process 4711", ""])


def one(**changes):
    (launch,) = ncu.parsed(table((KERNEL, {}), **changes))
    return launch


class FakeNcu:
    """A program on PATH that notes how it is called and answers with one reply after the other, then with the last."""

    SCRIPT = """
import json, pathlib, sys
here, words = pathlib.Path(__file__).parent, sys.argv[1:]
noted = here / "noted.jsonl"
with noted.open("a") as file:
    file.write(json.dumps(words) + "\\n")
replies = json.loads((here / "replies.json").read_text())
reply = replies[min(len(noted.read_text().splitlines()), len(replies)) - 1]
pathlib.Path(words[words.index("--log-file") + 1]).write_text(reply["log"])
if reply["calls"] is not None:
    pathlib.Path(words[-1]).write_text("".join(json.dumps(call) + "\\n" for call in reply["calls"]))
print(reply["says"])
sys.exit(reply["status"])
"""

    def __init__(self, folder):
        self._folder = folder
        tool = folder / "ncu"
        tool.write_text(f"#!{sys.executable}\n{self.SCRIPT}")
        tool.chmod(0o755)

    def replies(self, *replies):
        usual = {"log": "", "says": "warming up", "status": 0, "calls": None}
        content = json.dumps([{**usual, **reply} for reply in replies])
        (self._folder / "replies.json").write_text(content)

    @property
    def noted(self):
        return [json.loads(line) for line in (self._folder / "noted.jsonl").open()]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return FakeNcu(folder)


def arguments(*words):
    parser = argparse.ArgumentParser()
    counters.add_arguments(parser)
    return parser.parse_args(words)


# What ncu writes -------------------------------------------------------------------------------------


def test_a_launch_has_its_values_in_seconds_bytes_and_fractions_and_the_three_worst_stalls():
    mark, launch = ncu.parsed(table((MARK, {}), (KERNEL, {})))
    assert mark["kernel"] == MARK
    assert launch == {
        "kernel": KERNEL,
        "grid": [33, 4, 1],
        "block": [128, 2, 1],
        "median_s": pytest.approx(12.345e-6),
        "registers": 40,
        "shared_bytes": 50176,
        "waves": 0.25,
        "dram_read": 1048576,
        "dram_written": 2000000,
        "l2_hits": 0.625,
        **dict.fromkeys(("dram", "l2", "sm_active", "issue", "occupancy", "tensor"), 0.1),
        "stalls": {"long_scoreboard": 10.5, "wait": 9.25, "barrier": 3.0},
    }
    assert list(launch["stalls"]) == ["long_scoreboard", "wait", "barrier"]


@pytest.mark.parametrize(
    ("unit", "factor"), [("nsecond", 1e-9), ("us", 1e-6), ("msecond", 1e-3), ("second", 1.0)]
)
def test_times_may_come_in_any_unit(unit, factor):
    assert one(units={**UNITS, TIME: unit})["median_s"] == pytest.approx(12345 * factor)


@pytest.mark.parametrize(("unit", "factor"), [("byte", 1), ("Kbyte", 1e3), ("Mbyte", 1e6)])
def test_bytes_may_come_in_any_unit(unit, factor):
    per = {"dram__bytes_read.sum": unit, "launch__shared_mem_per_block": f"{unit}/block"}
    launch = one(units={**UNITS, **per})
    assert launch["dram_read"] == 1048576 * factor and launch["shared_bytes"] == 50176 * factor


@pytest.mark.parametrize("value", ["n/a", "(!) n/a", "", "nan", "inf"])
def test_what_is_no_number_is_left_out(value):
    absent = {"dram__bytes_read.sum": value, ncu.STALLS["wait"].name: value}
    (launch,) = ncu.parsed(table((KERNEL, absent)))
    assert "dram_read" not in launch and launch["dram_written"] == 2000000
    assert list(launch["stalls"]) == ["long_scoreboard", "barrier", "gmma"]


def test_a_value_of_another_unit_or_without_a_column_is_left_out():
    names = [name for name in ncu.NAMES if name != "lts__t_sector_hit_rate.pct"]
    launch = one(names=names, units={**UNITS, "dram__bytes_read.sum": "sector"})
    assert "l2_hits" not in launch and "dram_read" not in launch and "dram" in launch


def test_a_warp_that_waits_for_nothing_has_no_stalls():
    nothing = {metric.name: "0.00" for metric in ncu.STALLS.values()}
    (launch,) = ncu.parsed(table((KERNEL, nothing)))
    assert launch["stalls"] == {}


def test_a_launch_without_a_time_is_an_error():
    with pytest.raises(RuntimeError, match="no time for void effdet::pointwise"):
        list(ncu.parsed(table((KERNEL, {TIME: "n/a"}))))


def test_names_may_have_commas_and_quotes():
    name = 'f<"a, b">(int, long)'
    assert [launch["kernel"] for launch in ncu.parsed(table((name, {})))] == [name]


def test_without_a_table_there_is_no_launch():
    assert list(ncu.parsed("==WARNING== No kernels were profiled.\n")) == []


# ncu -------------------------------------------------------------------------------------------------


def test_ncu_is_told_what_to_count_and_to_leave_the_clocks_alone(fake):
    fake.replies({"log": table((KERNEL, {}))})
    (launch,) = ncu.launches(["prog", "--metrics", "x"], set())
    assert launch["kernel"] == KERNEL
    (words,) = fake.noted
    assert words[-3:] == ["prog", "--metrics", "x"] and words[0] == "--csv"
    options = dict(zip(words[1:-3:2], words[2:-3:2], strict=True))
    assert options.pop("--metrics").split(",") == list(ncu.NAMES)
    assert options.pop("--log-file")
    assert options == {
        "--target-processes": "application-only",
        "--profile-from-start": "off",
        "--clock-control": "none",
        "--cache-control": "all",
        "--page": "raw",
        "--print-units": "base",
    }


def test_metrics_that_ncu_does_not_know_are_left_out_and_named(fake):
    wait, gmma = ncu.STALLS["wait"].name, ncu.STALLS["gmma"].name
    regular = wait.replace(".", r"\.")
    stem = "dram__bytes_read"
    fake.replies(
        {"log": f"==ERROR== Failed to find metric regex:^{regular}$\n", "status": 1},
        {"log": rf"==ERROR== Failed to find metric regex:^{stem}\.(sum|avg)$", "status": 1},
        {"says": f"==ERROR== Failed to find metric {gmma}", "status": 1},
        {"log": table((KERNEL, {}))},
    )
    unknown = {"sm__cycles_active.avg.pct_of_peak_sustained_elapsed"}
    assert len(ncu.launches(["prog"], unknown)) == 1
    left_out = {wait, gmma, "dram__bytes_read.sum"}
    assert unknown == {*left_out, "sm__cycles_active.avg.pct_of_peak_sustained_elapsed"}
    asked = [words[words.index("--metrics") + 1].split(",") for words in fake.noted]
    assert [len(ncu.NAMES) - len(names) for names in asked] == [1, 2, 3, 4]
    assert set(ncu.NAMES) - set(asked[-1]) == unknown


def test_a_metric_is_known_by_its_name_without_suffixes():
    stems = {name.partition(".")[0] for name in ncu.NAMES}
    assert len(stems) == len(ncu.METRICS) + len(ncu.STALLS)


@pytest.mark.parametrize(
    "error",
    [
        "ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters",
        "Failed to initialize the profiler: LibraryNotLoaded",
        "Failed to find metric regex:^nobody__asked_for.this$",
    ],
)
@pytest.mark.parametrize(("where", "status"), [("log", 1), ("says", 0)])
def test_without_leave_to_count_nothing_ran(fake, error, where, status):
    text = f"==PROF== Connected to process 1\n==ERROR== {error}\n==PROF== Disconnected\n"
    fake.replies({where: text, "status": status})
    with pytest.raises(DidNotRun) as reason:
        ncu.launches(["prog"], set())
    assert str(reason.value) == f"ncu: {error}"
    shut_down = "==ERROR== The application returned an error code (9).\n"
    fake.replies({where: shut_down + text, "status": 9})
    with pytest.raises(DidNotRun, match=r"ncu: [EF]"):
        ncu.launches(["prog"], set())


def test_a_program_that_fails_is_an_error_that_says_why(fake):
    log = "==ERROR== The application returned an error code (1).\n==WARNING== No kernels were profiled.\n"
    fake.replies({"log": log, "says": "Traceback\nValueError: no such thing", "status": 1})
    with pytest.raises(RuntimeError, match="exit status 1: ValueError: no such thing"):
        ncu.launches(["prog"], set())
    fake.replies({"log": table((KERNEL, {})), "says": "killed", "status": 9})
    with pytest.raises(RuntimeError, match="exit status 9: killed"):
        ncu.launches(["prog"], set())


def test_ncu_that_fails_on_the_way_is_an_error(fake):
    failed = '==ERROR== Failed to profile "f" in process 7508\n'
    fake.replies({"log": table((KERNEL, {})) + failed, "status": 0})
    with pytest.raises(RuntimeError, match='status 0: Failed to profile "f"'):
        ncu.launches(["prog"], set())


# Launches and calls ------------------------------------------------------------------------------------


def launch(kernel, seconds=0.0):
    return {"kernel": kernel, "median_s": seconds}


def call(op="pointwise_conv", case="real", **more):
    return {"name": "d0", "case": case, "direction": "forward", "dtype": "bf16", "op": op, **more}


def test_launches_of_a_call_share_its_floor_by_their_time():
    found = [launch(MARK), launch("a", 3e-6), launch("b", 1e-6), launch(MARK), launch(MARK)]
    found += [launch("c", 5e-6), launch(MARK), launch("d", 7e-6)]
    calls = [call(bytes=2_000), call(bytes=9), call("torch"), call(case="other", bytes=0)]
    a, b, c, d = counters.attributed(found, calls, bandwidth=1e9)
    assert [row["kernel"] for row in (a, b, c, d)] == ["a", "b", "c", "d"]
    assert (a["floor_s"], b["floor_s"]) == (pytest.approx(1.5e-6), pytest.approx(0.5e-6))
    assert (a["above_s"], b["above_s"]) == (pytest.approx(1.5e-6), pytest.approx(0.5e-6))
    assert c["above_s"] == 5e-6 and d["above_s"] == 7e-6
    assert "floor_s" not in c and "floor_s" not in d
    assert [row["call"] for row in (a, b, c, d)] == [0, 0, 2, 3]
    assert [row["engine"] for row in (a, b, c)] == ["launch 1", "launch 2", "launch 3"]
    assert d["engine"] == "launch 1" and d["case"] == "other" and c["op"] == "torch"
    assert {row["status"] for row in (a, b, c, d)} == {"timed"}


def test_calls_that_were_not_made_have_a_row_and_no_launches():
    calls = [call(status="absent", reason="refused"), call(case="other", bytes=1)]
    absent, made = counters.attributed([launch(MARK), launch("a", 1e-6)], calls, 1e9)
    assert (absent["status"], absent["reason"]) == ("absent", "refused") and absent["engine"]
    assert (made["status"], made["case"]) == ("timed", "other")


@pytest.mark.parametrize("marks", [0, 1, 3])
def test_marks_that_do_not_fit_are_an_error(marks):
    with pytest.raises(RuntimeError, match=f"ncu saw {marks} calls, the program made 2"):
        counters.attributed([launch(MARK)] * marks, [call(), call()], 1e9)


def test_names_are_short_for_a_reader():
    assert counters.short(KERNEL) == "pointwise_conv_fwd_kernel<__nv_bfloat16, 3, 1>"
    assert counters.short(CAST) == "unrolled_elementwise_kernel<CopyFunctor>"
    assert counters.short("soft_nms_pick_kernel") == "soft_nms_pick_kernel"
    assert counters.short("void (anonymous namespace)::f<(unsigned int)8, (int)-1>()") == "f<8, -1>"


def test_the_launch_with_most_time_above_its_floor_is_at_the_top(capsys):
    def row(kernel, time, floor):
        return {**call(), **one(), "kernel": kernel, "status": "timed", "median_s": time} | (
            {"floor_s": floor, "above_s": time - floor} if floor else {"above_s": time}
        )

    short = {**row("k4", 1e-6, None), "grid": [], "block": [], "stalls": {}}
    for field in ("registers", "dram_read", "dram_written", "tensor"):
        del short[field]
    absent = {**call(case="large"), "status": "absent", "reason": "refused"}
    rows = [absent, row("k1", 90e-6, 85e-6), row("k2", 20e-6, 5e-6), row("k3", 8e-6, None), short]
    counters.print_rows(rows)
    head, *lines = capsys.readouterr().out.splitlines()
    order = ["k2 of pointwise_conv", "k3 of", "k1 of", "k4 of", "all 4 launches", "d0 large"]
    assert [name in line for name, line in zip(order, lines, strict=True)] == [True] * 6
    cells = ["15.0", "20.0", "5.0", "132", "0.25", "256", "40", "49", "3.05"]
    cells += ["10%", "10%", "62%", "10%", "10%", "10%", "10%"]
    assert lines[0].split("  k2")[0].split() == cells
    assert lines[0].endswith("(d0 real forward bf16): long_scoreboard 10.5, wait 9.2, barrier 3.0")
    assert lines[1].split()[:3] == ["8.0", "8.0", "132"]
    assert lines[4].split()[:3] == ["29.0", "119.0", "90.0"]
    assert lines[5] == "d0 large forward bf16: absent: refused"
    assert len({line.index("  k") for line in (head, *lines[:4])}) == 1


# Command -----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """What the command asks of a GPU, of which there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "bandwidth", lambda device, nbytes: 1e12)
    monkeypatch.setattr(machine, "describe", lambda: {"gpu": "one", "commit": "c"})


def test_a_row_per_launch_of_every_program(fake, gpu, tmp_path, capsys):
    made = {"direction": "forward", "dtype": "bf16"}
    fake.replies(
        {"log": f"==ERROR== Failed to find metric {ncu.STALLS['gmma'].name}\n", "status": 1},
        {
            "log": table((MARK, {}), (KERNEL, {}), (KERNEL, {TIME: "55"})),
            "calls": [{**made, "name": "soft_nms", "case": "big", "op": "soft_nms", "bytes": 7}],
        },
        {
            "log": table((MARK, {}), (CAST, {})),
            "calls": [
                {**made, "name": "tf_efficientdet_d0", "case": "64x64 b2", "op": "torch"},
                {**made, "name": "x", "case": "y", "status": "absent", "reason": "refused"},
            ],
        },
    )
    out = tmp_path / "rows" / "counters.jsonl"
    words = ["--op", "soft_nms", "--model", "tf_efficientdet_d0", "--batch", "2", "--size", "64"]
    words += ["--dtype", "fp32", "--dtype", "bf16", "--backend", "cuda", "--direction", "forward"]
    assert counters.run(arguments(*words, "--out", str(out))) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kernel"] for row in rows if "kernel" in row] == [KERNEL, KERNEL, CAST]
    assert [row["name"] for row in rows] == ["soft_nms", "soft_nms", "x", "tf_efficientdet_d0"]
    assert {(row["suite"], row["device"], row["machine"]["gpu"]) for row in rows} == {
        ("counters", "cuda", "one")
    }
    assert rows[0]["case"] == "big" and rows[0]["registers"] == 40 and rows[0]["floor_s"] < 7e-12
    first, again, second = fake.noted
    program = [sys.executable, "-m", "bench", "counters"]
    rest = ["--direction", "forward", "--batch", "2", "--size", "64"]
    rest += ["--dtype", "fp32", "--dtype", "bf16", "--backend", "cuda", "--child"]
    start = first.index(sys.executable)
    assert first[start:-1] == [*program, "--op", "soft_nms", *rest] == again[start:-1]
    assert second[start:-1] == [*program, "--model", "tf_efficientdet_d0", *rest]
    named = [words[words.index("--metrics") + 1] for words in (again, second)]
    assert all(ncu.STALLS["gmma"].name not in names for names in named)
    printed = capsys.readouterr().out
    assert f"does not know them here: {ncu.STALLS['gmma'].name}\n" in printed
    assert printed.index("pointwise_conv_fwd_kernel") < printed.index("all 3 launches")


def test_without_ncu_gpu_or_leave_nothing_ran(fake, gpu, tmp_path, monkeypatch, capsys):
    words = arguments("--op", "soft_nms", "--out", str(tmp_path / "rows.jsonl"))
    fake.replies({"log": "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n"})
    assert counters.run(words) == 2
    assert capsys.readouterr().out.startswith("ncu: ERR_NVGPUCTRPERM - The user does not")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert counters.run(words) == 2
    assert capsys.readouterr().out == "no CUDA GPU is visible to torch here\n"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert counters.run(words) == 2
    assert capsys.readouterr().out == "ncu (NVIDIA Nsight Compute) is not on PATH\n"
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "got neither, takes one"),
        (("--op", "convolve"), "got convolve, takes .*soft_nms"),
        (("--model", "d99"), "--model: .*d99"),
        (("--model", "tf_efficientdet_d0", "--batch", "0"), r"got None and \[0\], take at least 1"),
        (("--op", "soft_nms", "--case", "none such"), "no case of soft_nms fits"),
        (("--op", "soft_nms", "--direction", "backward"), "no case of soft_nms fits"),
        (("--op", "soft_nms", "--dtype", "bf16"), "no case of soft_nms fits"),
    ],
)
def test_bad_arguments_are_errors(words, message):
    with pytest.raises(ValueError, match=message):
        counters.run(arguments(*words))


# Under ncu, on the CPU ---------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch):
    """What the profiler and the marks did, in order, and every call of an op on a backend."""
    noted: list[str] = []
    served = _library.Op._served

    def op(self, backend, args):
        noted.append(f"{self.name} {backend}")
        return served(self, backend, args)

    monkeypatch.setattr(_library.Op, "_served", op)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: noted.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: noted.append("mark"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: noted.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: noted.append("stop"))
    return noted


@pytest.fixture
def small_cases(monkeypatch):
    def cases(spec, prefixes):
        return [c for c in spec.small_cases() if not prefixes or c.name.startswith(tuple(prefixes))]

    monkeypatch.setattr(counted.launches, "real_cases", cases)


def calls_of(tmp_path, *words):
    path = tmp_path / "calls.jsonl"
    counted.run(arguments(*words, "--child", str(path)), "cpu")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_call_of_a_case_is_profiled_after_two(events, small_cases, tmp_path):
    spec = next(s for s in iter_specs() if s.name == "pointwise_conv")
    case = spec.small_cases()[0]
    words = ("--op", spec.name, "--case", case.name, "--dtype", "fp32", "--direction", "forward")
    made = calls_of(tmp_path, *words, "--backend", "reference")
    names = [c.name for c in spec.small_cases() if c.name.startswith(case.name)]
    assert [call["case"] for call in made] == names
    served = f"{spec.name} reference"
    profiled = ["wait", "start", "mark", served, "wait", "stop"]
    assert events == [served, served, *profiled] * len(names)
    inputs = spec.inputs(case, torch.float32)
    assert made[0] == {
        "name": spec.name,
        "case": case.name,
        "direction": "forward",
        "dtype": "fp32",
        "op": spec.name,
        "bytes": spec.bytes(**inputs),
        "shape": "x".join(map(str, inputs["x"].shape)),
    }


def test_of_a_backward_only_the_backward_is_profiled(events, small_cases, tmp_path):
    spec = next(s for s in iter_specs() if s.name == "weighted_fusion")
    case = spec.small_cases()[0]
    words = ("--op", spec.name, "--case", case.name, "--dtype", "fp32", "--backend", "reference")
    made = calls_of(tmp_path, *words)
    assert [call["direction"] for call in made[:2]] == ["forward", "backward"]
    assert made[1]["bytes"] == spec.backward_bytes(**spec.inputs(case, torch.float32))
    assert made[1]["bytes"] != made[0]["bytes"]
    second = events[events.index("stop") + 1 :]
    assert second[:6] == [f"{spec.name} reference", "wait", "start", "mark", "wait", "stop"]


def test_calls_that_a_backend_refuses_and_those_without_memory_are_told(
    events, small_cases, tmp_path, monkeypatch
):
    spec = next(s for s in iter_specs() if s.name == "soft_nms")
    (first, *others) = calls_of(tmp_path, "--op", spec.name, "--backend", "cuda")
    assert first["status"] == "absent" and "cuda" in first["reason"] and "start" not in events
    assert len(others) == len(spec.small_cases()) - 1

    def full(*args):
        raise torch.OutOfMemoryError("no memory\nmore of it")

    monkeypatch.setattr(counted.kernels, "prepared", full)
    assert calls_of(tmp_path, "--op", spec.name)[0]["status"] == "skipped"
    assert calls_of(tmp_path, "--op", spec.name)[0]["reason"] == "no memory"


def test_the_profiler_stops_when_a_call_fails(events):
    with pytest.raises(_dispatch.BackendError), counted._profiled():
        raise _dispatch.BackendError("refused")
    assert events[-1] == "stop"


def test_every_op_of_a_forward_is_a_call_with_its_bytes(events, tmp_path, monkeypatch):
    monkeypatch.setattr(counted, "weights", lambda name: None)
    monkeypatch.setattr(counted, "build", lambda name, size, state: Network())
    words = ("--model", "tf_efficientdet_d0", "--size", "4", "--batch", "3", "--dtype", "fp32")
    made = calls_of(tmp_path, *words, "--backend", "reference")
    image, weight, out = 3 * 3 * 4 * 4, 2 * 3, 3 * 2 * 4 * 4
    first, second = 4 * (image + weight + out), 4 * (out + 2 * 2 + out)
    assert [(call["op"], call.get("bytes")) for call in made] == [
        ("torch", None),
        ("pointwise_conv", first),
        ("torch", None),
        ("pointwise_conv", second),
        ("torch", None),
    ]
    op = "pointwise_conv reference"
    profiled = ["wait", "start", "mark", "mark", op, "mark", "mark", op, "mark", "wait", "stop"]
    assert events == [op] * 4 + profiled
    assert {(c["name"], c["case"], c["direction"], c["dtype"]) for c in made} == {
        ("tf_efficientdet_d0", "4x4 b3", "forward", "fp32")
    }


class Network(torch.nn.Module):
    """Two products, and something else between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.ones(2, 3, 1, 1), torch.ones(2, 2, 1, 1)

    def forward(self, x):
        from effdet_kernels import pointwise_conv

        return pointwise_conv(pointwise_conv(x, self.first) + 1, self.second)
