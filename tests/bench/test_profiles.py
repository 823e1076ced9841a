"""What `python -m bench profile` reads from a trace of torch.profiler."""

from __future__ import annotations

import argparse

import pytest

from bench import profiles


def event(name, ts, dur, cat="kernel", **args):
    return {"name": name, "ts": ts, "dur": dur, "cat": cat, "args": args}


def test_on_a_gpu_kernels_and_copies_count_also_where_they_overlap():
    trace = [
        event("aten::add", 0.0, 90.0, cat="cpu_op"),
        event("b", 5.0, 2.0),
        event("a", 1.0, 9.0),
        event("copy", 12.0, 1.0, cat="gpu_memcpy"),
        {"name": "process_name", "ph": "M"},
    ]
    found = profiles.kernels_of(trace, "cuda")
    assert [kernel["name"] for kernel in found] == ["a", "b", "copy"]


def test_on_a_cpu_an_op_that_another_calls_does_not_count():
    trace = [
        event("inner", 0.0, 5.0, cat="cpu_op"),
        event("outer", 0.0, 9.0, cat="cpu_op"),
        event("inner", 6.0, 2.0, cat="cpu_op"),
        event("next", 9.0, 1.0, cat="cpu_op"),
    ]
    found = profiles.kernels_of(trace, "cpu")
    assert [op["name"] for op in found] == ["outer", "next"]


def test_a_row_has_medians_of_the_replays_by_launch_and_by_name():
    grid = {"grid": [3, 1, 1], "block": [128, 1, 1], "registers per thread": 40, "shared memory": 8}
    replays = [
        [event("a", s, 2.0 + i, **grid), event("b", s + 4 + i, 1.0), event("a", s + 8.0, 6.0)]
        for i, s in enumerate((100.0, 200.0, 300.0))
    ]
    row = profiles.summary(replays)
    assert row["launches"][0] == {
        "kernel": "a",
        "start_us": 0.0,
        "us": 3.0,
        "grid": [3, 1, 1],
        "block": [128, 1, 1],
        "registers": 40,
        "shared_bytes": 8,
    }
    assert row["launches"][1] == {"kernel": "b", "start_us": 5.0, "us": 1.0}
    assert row["kernels"] == [
        {"kernel": "a", "count": 2, "median_us": 4.5, "sum_us": 9.0},
        {"kernel": "b", "count": 1, "median_us": 1.0, "sum_us": 1.0},
    ]
    assert (row["replays"], row["busy_us"]) == (3, 10.0)
    assert row["gaps_us"] == 4.0  # of each: 2 + (3, 2, 1)


@pytest.mark.parametrize("replays", [[[event("a", 0, 1)], []], [[], []]])
def test_replays_that_differ_are_an_error(replays):
    with pytest.raises(RuntimeError, match="the profiler saw"):
        profiles.summary(replays)


def test_bad_sizes_are_errors():
    options = {"model": None, "size": None, "batch": [0], "dtype": ["bf16"]}
    args = argparse.Namespace(**options, smoke=True, device="cpu")
    with pytest.raises(ValueError, match=r"got 64 and 0"):
        list(profiles.jobs(args))
