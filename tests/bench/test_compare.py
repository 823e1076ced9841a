"""``python -m bench compare``: what counts as slower, faster, lost, new and gone."""

from __future__ import annotations

import argparse
import json

import pytest

from bench import compare

MACHINE = {"cpu": "Some CPU", "threads": 2, "commit": "abc", "torch": "2.13.0"}


def row(case, median=1.0, spread=0.0, **fields):
    base = {
        "suite": "kernels",
        "name": "op",
        "case": case,
        "direction": "forward",
        "dtype": "fp32",
        "device": "cpu",
        "engine": "cpu",
        "status": "timed",
        "median_s": median,
        "spread": spread,
        "machine": MACHINE,
        "time": "2025-03-01T10:00:00+00:00",
    }
    return {**base, **fields}


def without_time(case, status, reason="why", **fields):
    return {k: v for k, v in row(case, **fields).items() if k != "median_s"} | {
        "status": status,
        "reason": reason,
    }


def compared(tmp_path, before, after, *words):
    paths = []
    for name, rows in (("a", before), ("b", after)):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"torn": ')
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args([*map(str, paths), *words]))


def lines_with(capsys, text):
    return [line for line in capsys.readouterr().out.splitlines() if text in line]


@pytest.mark.parametrize(
    ("median", "spreads", "threshold", "verdict"),
    [
        (1.04, (0, 0), 0.05, ""),
        (1.06, (0, 0), 0.05, "SLOWER"),
        (1.06, (0.04, 0.03), 0.05, ""),  # within the noise
        (1.08, (0.04, 0.03), 0.05, "SLOWER"),
        (1.06, (0, 0), 0.10, ""),
        (0.96, (0, 0), 0.05, ""),
        (0.94, (0, 0), 0.05, "faster"),
        (0.94, (0.04, 0.03), 0.05, ""),
        (1.04, (None, -1), 0.01, "SLOWER"),  # without a spread, the threshold alone
    ],
)
def test_a_change_is_beyond_the_threshold_and_the_noise(median, spreads, threshold, verdict):
    pair = compare.Pair((), row("x", spread=spreads[0]), row("x", median, spreads[1]))
    assert pair.verdict(threshold) == verdict


def test_a_regression_is_printed_and_exits_with_1(tmp_path, capsys):
    assert compared(tmp_path, [row("x"), row("y")], [row("x", 2.0), row("y")]) == 1
    out = capsys.readouterr().out
    slow = next(line for line in out.splitlines() if line.endswith("SLOWER"))
    assert "x" in slow and "1.00 s" in slow and "2.00 s" in slow and "2.000" in slow
    assert "2 pairs: 1 slower, 0 faster, 1 within 5% or the noise" in out


def test_gains_exit_with_0(tmp_path, capsys):
    assert compared(tmp_path, [row("x")], [row("x", 0.5)]) == 0
    assert "1 pairs: 0 slower, 1 faster" in capsys.readouterr().out


@pytest.mark.parametrize("status", ["wrong", "absent", "skipped"])
def test_what_was_timed_and_is_not_exits_with_1(tmp_path, capsys, status):
    after = [without_time("x", status, "no\nkernel"), row("y")]
    assert compared(tmp_path, [row("x"), row("y")], after) == 1
    (line,) = lines_with(capsys, "  kernels op x")
    assert line.endswith(f"{status}: no kernel")


def test_a_row_for_every_engine_counts_for_each(tmp_path, capsys):
    before = [row("x"), row("x", engine="eager"), row("y")]
    after = [without_time("x", "skipped", "out of memory", engine="every engine"), row("y")]
    assert compared(tmp_path, before, after) == 1
    assert len(lines_with(capsys, "skipped: out of memory")) == 2


def test_new_vanished_and_newly_wrong_rows_are_listed(tmp_path, capsys):
    before = [row("x"), row("gone"), without_time("w", "absent"), without_time("v", "wrong")]
    after = [
        row("x"),
        row("new"),
        without_time("w", "wrong", "off"),
        without_time("v", "wrong"),
        without_time("u", "wrong", "off too"),
    ]
    assert compared(tmp_path, before, after) == 0
    out = capsys.readouterr().out
    wrong = out[out.index("Newly wrong:") : out.index("Only in B:")].splitlines()[1:]
    assert [line.split(" cpu ")[0] for line in wrong] == [
        "  kernels op w forward fp32",
        "  kernels op u forward fp32",
    ]
    assert "kernels op new" in out[out.index("Only in B:") : out.index("Only in A:")]
    assert "kernels op gone" in out[out.index("Only in A:") :]


def test_the_latest_row_of_each_set_counts(tmp_path):
    late = row("x", 1.0, time="2025-03-02T00:00:00+00:00")
    assert compared(tmp_path, [row("x")], [late, row("x", 9.0)]) == 0


def test_other_machines_are_warned_about(tmp_path, capsys):
    other = {**MACHINE, "cpu": "Other CPU", "torch": "2.11.0"}
    before = [row("x"), row("y"), row("z", machine={"gpu": "only in A"})]
    assert compared(tmp_path, before, [row("x", machine=other), row("y")]) == 0
    warnings = lines_with(capsys, "warning")
    assert warnings == [
        "warning: B has rows of 2 machines or thread counts",
        "warning: the machines differ: A is of Some CPU, 2 threads, B of Other CPU, 2 threads and"
        " Some CPU, 2 threads",
        "warning: torch differs: A 2.13.0, B 2.11.0, 2.13.0",
    ]
    assert compared(tmp_path, [row("x")], [row("x", machine={**MACHINE, "commit": "def"})]) == 0
    assert lines_with(capsys, "warning") == []


@pytest.mark.parametrize(
    ("before", "after", "words", "message"),
    [
        ([row("x")], [row("x")], ["--threshold", "-1"], "--threshold: got -1.0"),
        ([], [row("x")], [], "no rows of results in .*a.jsonl"),
        ([row("x")], [row("y")], [], "no row of .*b.jsonl has the key"),
    ],
)
def test_bad_input_is_an_error(tmp_path, before, after, words, message):
    with pytest.raises(ValueError, match=message):
        compared(tmp_path, before, after, *words)
