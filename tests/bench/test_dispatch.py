"""The order of backends on a GPU from rows of kernels, whose times are made up: nothing here has run on a GPU."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench import dispatch, kernels, machine
from bench.results import Row, same_setup
from effdet_kernels import _cuda, _dispatch, testing
from effdet_kernels.spec import iter_specs

GPU = {"gpu": "A GPU", "capability": "9.0", "commit": "abc1234", "triton": "3.6.0", "threads": 8}
MEASURED = "measured on A GPU, commit abc1234, triton 3.6.0"
PREDICTED = {"order": ["cuda", "triton"], "provenance": "predicted"}
CUDA, TRITON = ((None, "cuda"),), ((None, "triton"),)


def pair(
    elements: int,
    cuda: float | None,
    triton: float | None,
    *,
    op: str = "soft_nms",
    case: str = "",
    time: str = "2026-01-01T00:00:00",
    of: Row = GPU,
    **fields: Any,
) -> list[Row]:
    """Rows of one job: seconds by engine, None for one that refused the call."""
    common = {"suite": "kernels", "name": op, "case": case or f"of {elements}", "dtype": "fp32"}
    common |= {"direction": "forward", "device": "cuda", "elements": elements, "spread": 0.001}
    common |= {"machine": of, "time": time, **fields}
    return [
        {**common, "engine": engine, "status": "absent"}
        if seconds is None
        else {**common, "engine": engine, "status": "timed", "median_s": seconds}
        for engine, seconds in (("cuda", cuda), ("triton", triton))
    ]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A dispatch.json of one row."""
    path = tmp_path / "dispatch.json"
    path.write_text(dispatch.text({"soft_nms": [PREDICTED]}))
    monkeypatch.setattr(_dispatch, "_TABLE", path)
    _dispatch._rows.cache_clear()
    yield path
    _dispatch._rows.cache_clear()


@pytest.fixture
def command(tmp_path, table):
    """Runs on rows."""

    def run(rows: Sequence[Row], *words: str) -> int:
        path = tmp_path / "kernels.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        parser = argparse.ArgumentParser()
        dispatch.add_arguments(parser)
        return dispatch.run(parser.parse_args([str(path), *words]))

    return run


def cases(*rows: Sequence[Row]) -> list[dispatch.Case]:
    (found,) = dispatch.cases([row for pair in rows for row in pair]).values()
    return found


# Which rows count ------------------------------------------------------------------------------------


def test_a_case_needs_both_times_of_one_job():
    early, late = "2026-01-01T00:00:00", "2026-01-02T00:00:00"
    (case,) = cases(pair(10, 1.0, 2.0, time=early), pair(10, 3.0, None, time=late))
    assert case == dispatch.Case("of 10", 10, {"cuda": 1.0, "triton": 2.0}, 0.001)
    (case,) = cases(pair(10, 5.0, 6.0, time=late), pair(10, 1.0, 2.0, time=early))
    assert case.seconds == {"cuda": 5.0, "triton": 6.0}
    assert not dispatch.cases([pair(10, 1.0, 2.0, time=early)[0], pair(10, 1.0, 2.0, time=late)[1]])
    other = {**GPU, "load_1min": 3.0}  # another process wrote it in the same second
    assert not dispatch.cases([pair(10, 1.0, 2.0)[0], pair(10, 1.0, 2.0, of=other)[1]])
    assert not dispatch.cases(pair(10, None, 2.0))


def test_a_case_that_was_found_wrong_later_says_nothing():
    right = pair(10, 1.0, 2.0)
    wrong = {**right[0], "status": "wrong", "time": "2026-01-02T00:00:00"}
    assert not dispatch.cases([*right, wrong])
    assert dispatch.cases([*right, {**wrong, "time": "2025-01-01T00:00:00"}])


def test_ops_directions_and_dtypes_are_apart():
    rows = pair(9, 1.0, 2.0, op="depthwise_conv") + pair(9, 1.0, 2.0, op="depthwise_conv", case="b")
    rows += pair(9, 1.0, 2.0, op="depthwise_conv", direction="backward")
    rows += pair(9, 1.0, 2.0, op="depthwise_conv", dtype="bf16")
    assert {key: len(found) for key, found in dispatch.cases(rows).items()} == {
        ("depthwise_conv", "bf16"): 1,
        ("depthwise_conv", "fp32"): 2,
        ("depthwise_conv_backward", "fp32"): 1,
    }


def test_rows_that_cannot_decide_are_left_out_and_counted():
    good = pair(10, 1.0, 2.0)
    bare = {name: value for name, value in GPU.items() if name != "capability"}
    bad = [
        {name: value for name, value in good[0].items() if name != "elements"},
        {**good[0], "machine": bare},
        {**good[0], "machine": None},
        {**good[0], "name": "an_op_of_old"},
        {**good[0], "dtype": "int8"},
        {**good[0], "time": None},
    ]
    others = [{**good[0], "device": "cpu"}, {**good[0], "suite": "model"}]
    others.append({**good[0], "engine": "eager"})
    assert dispatch.selected([*good, *bad, *others]) == (good, len(bad))


def test_of_commits_the_latest_counts_and_gpus_are_not_mixed(command, capsys):
    newer = {**GPU, "commit": "def5678"}
    rows = pair(10, 2.0, 1.0, of=newer, time="2026-02-01T00:00:00")
    rows += pair(10, 1.0, 2.0) + pair(20, 1.0, 2.0)
    assert command(rows) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("A GPU, commit def5678, triton 3.6.0")
    assert " ".join(shown[2].split()) == "soft_nms float32 1 cuda triton 50.0% of 10 x 0.50"
    with pytest.raises(ValueError, match="PATH: has rows of A GPU, B GPU; takes those of one GPU"):
        command(rows + pair(10, 1.0, 2.0, of={**GPU, "gpu": "B GPU"}))


def test_errors_say_what_is_missing(command, capsys):
    with pytest.raises(ValueError, match="A GPU that timed cuda and triton"):
        command(pair(10, None, 2.0))
    with pytest.raises(ValueError, match="elements and capability"):
        command(pair(0, 1.0, 2.0))
    assert "without elements or capability: 2" in capsys.readouterr().out


# Choosing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [CUDA, TRITON])
def test_one_order_for_all(now):
    assert dispatch.proposed(cases(pair(10, 2.0, 1.0), pair(99, 2.0, 1.9)), now) == TRITON
    assert dispatch.proposed(cases(pair(10, 1.0, 2.0), pair(99, 1.9, 2.0)), now) == CUDA


@pytest.mark.parametrize("now", [CUDA, TRITON])
def test_a_threshold_is_between_its_neighbours(now):
    small, large = [pair(s, 2.0, 1.0) for s in (10, 20)], [pair(s, 1.0, 2.0) for s in (45, 1000)]
    found = cases(*large, *small)
    assert dispatch.proposed(found, now) == ((30, "triton"), (None, "cuda"))  # sqrt(20 * 45)
    assert dispatch.gain(found, dispatch.proposed(found, now), now) == pytest.approx(
        1 - math.sqrt(0.5)
    )
    found = cases(pair(7, 1.0, 3.0), pair(8, 3.0, 1.0))
    assert dispatch.proposed(found, now) == ((7, "cuda"), (None, "triton"))  # 7 itself is below


def test_there_is_one_threshold_and_sums_of_log_times_place_it():
    times = {10: (1.0, 2.0), 20: (2.0, 1.0), 30: (1.0, 8.0), 40: (1.0, 1.1), 50: (5.0, 1.0)}
    found = cases(*(pair(size, *both) for size, both in times.items()))
    assert dispatch.proposed(found, CUDA) == ((math.isqrt(40 * 50), "cuda"), (None, "triton"))
    # In seconds the last would outweigh the others.
    found = cases(pair(10, 1.0, 2.0), pair(10, 1.0, 2.0, case="b"), pair(10, 90.0, 60.0, case="c"))
    assert dispatch.proposed(found, TRITON) == CUDA


def test_cases_of_one_size_are_on_one_side():
    found = cases(pair(10, 1.0, 4.0), pair(10, 2.0, 1.0, case="b"), pair(20, 2.0, 1.0))
    assert dispatch.proposed(found, CUDA) == ((14, "cuda"), (None, "triton"))
    assert dispatch.proposed(cases(pair(10, 1.0, 2.0), pair(10, 2.0, 1.0, case="b")), CUDA) == CUDA


@pytest.mark.parametrize(("gained", "spread"), [(0.015, 0.001), (0.10, 0.12)])
def test_within_the_noise_the_present_order_stays(gained, spread):
    slow = pair(10, 1.0, 1 - gained, spread=spread)
    slow[0]["spread"] = 0.0  # the larger of the two counts
    assert dispatch.proposed(cases(slow), CUDA) == CUDA
    now = ((5, "triton"), (None, "cuda"))
    assert dispatch.proposed(cases(slow), now) == now
    clear = pair(10, 1.0, 1 - gained - spread - 0.02, spread=spread)
    assert dispatch.proposed(cases(clear), CUDA) == TRITON


def test_a_threshold_must_gain_over_the_best_order_without_one():
    found = cases(pair(10, 1.0, 1.03), pair(20, 2.0, 1.0))
    assert dispatch.proposed(found, CUDA) == TRITON  # cuda up to 14 would gain 1.5 % more
    found = cases(pair(10, 1.0, 1.06), pair(20, 2.0, 1.0))
    assert dispatch.proposed(found, CUDA) == ((14, "cuda"), (None, "triton"))


# The table -------------------------------------------------------------------------------------------


def test_an_unchanged_table_is_written_as_it_was():
    written = _dispatch._TABLE.read_text()
    assert dispatch.text(json.loads(written)) == written


def test_the_present_order_is_that_of_the_rows_that_fit(table):
    rows = [
        {"order": ["triton", "cuda"], "architectures": [90], "up_to": 9},
        {"order": ["triton", "cuda"], "dtypes": ["float32"], "up_to": 64},
        {"order": ["cuda", "triton"], "up_to": 90},
        {"order": ["cuda", "triton"]},
        {"order": ["triton", "cuda"]},  # none reaches it
    ]
    table.write_text(json.dumps({"soft_nms": rows}))
    assert dispatch.present("soft_nms", torch.float32, 90) == ((64, "triton"), (None, "cuda"))
    assert dispatch.present("soft_nms", torch.float16, 90) == ((9, "triton"), (None, "cuda"))
    assert dispatch.present("soft_nms", torch.float16, 80) == CUDA
    assert dispatch.present("decode_topk", torch.float32, 90) == CUDA


def test_what_is_written_is_looked_up_again_and_stays(command, table, capsys):
    rows = [*pair(10, 2.0, 1.0), *pair(1000, 1.0, 1.5), *pair(9, None, 1.0)]
    rows += pair(9, 2.0, 1.0, op="decode_topk", dtype="bf16")
    before = table.read_text()
    assert command(rows) == 0 and table.read_text() == before
    assert "dispatch.json" not in capsys.readouterr().out
    assert command(rows, "--write") == 0
    shown = capsys.readouterr().out
    assert (
        "soft_nms     float32   2      cuda     triton up to 100, cuda  29.3%  of 1000 x 0.67"
        in shown
    )
    assert "decode_topk  bfloat16  1      cuda     triton                  50.0%  of 9" in shown
    assert shown.endswith("dispatch.json: written\n")
    after = table.read_text()
    assert after.splitlines()[4:8] == [
        ' "soft_nms": [',
        '  {"order": ["triton", "cuda"], "architectures": [90], "dtypes": ["float32"], "up_to": 100,'
        f' "provenance": "{MEASURED}, 2 cases"}},',
        '  {"order": ["cuda", "triton"], "architectures": [90], "dtypes": ["float32"],'
        f' "provenance": "{MEASURED}, 2 cases"}},',
        f"  {json.dumps(PREDICTED)}",
    ]

    def order(op, dtype, size, architecture):
        row = _dispatch.table_row(op, dtype, size, architecture)
        return row and row["order"][0]

    assert order("soft_nms", torch.float32, 100, 90) == "triton"
    assert order("soft_nms", torch.float32, 101, 90) == "cuda"
    assert _dispatch.table_row("soft_nms", torch.float32, 100, 80) == PREDICTED
    assert _dispatch.table_row("soft_nms", torch.float64, 100, 90) == PREDICTED
    assert order("decode_topk", torch.bfloat16, 1, 90) == "triton"
    assert order("decode_topk", torch.float32, 1, 90) is None
    assert command(rows, "--write") == 0 and table.read_text() == after
    shown = capsys.readouterr().out
    assert "triton up to 100, cuda  triton up to 100, cuda  0.0%" in shown
    assert shown.endswith("dispatch.json: is so already\n")


def test_what_was_measured_before_is_replaced_for_its_dtype_and_architecture_alone(command, table):
    both = pair(10, 2.0, 1.0) + pair(1000, 1.0, 2.0)
    older = {**GPU, "capability": "8.6", "commit": "old"}
    command([{**row, "machine": older} for row in both], "--write")
    command([*both, *({**row, "dtype": "bf16"} for row in both)], "--write")
    newer = {**GPU, "commit": "new"}
    command(pair(10, 1.0, 2.0, of=newer) + pair(1000, 1.0, 2.0, of=newer), "--write")
    found = json.loads(table.read_text())["soft_nms"]
    assert [
        (
            row.get("architectures"),
            row.get("dtypes"),
            row.get("up_to"),
            row["order"][0],
            row["provenance"].split(",")[1:2],
        )
        for row in found
    ] == [
        ([90], ["float32"], None, "cuda", [" commit new"]),
        ([90], ["bfloat16"], 100, "triton", [" commit abc1234"]),
        ([90], ["bfloat16"], None, "cuda", [" commit abc1234"]),
        ([86], ["float32"], 100, "triton", [" commit old"]),
        ([86], ["float32"], None, "cuda", [" commit old"]),
        (None, None, None, "cuda", []),
    ]


def test_an_order_that_was_measured_and_kept_says_so_before_what_is_predicted(command, table):
    same = {**PREDICTED, "architectures": [90], "dtypes": ["float32"]}
    table.write_text(dispatch.text({"soft_nms": [same, PREDICTED]}))
    command(pair(10, 1.0, 1.001), "--write")
    first, *rest = json.loads(table.read_text())["soft_nms"]
    assert (first["order"], first["provenance"]) == (["cuda", "triton"], f"{MEASURED}, 1 case")
    assert rest == [same, PREDICTED]


# The two facts in rows -------------------------------------------------------------------------------

BOTH, FORWARD = ("forward", "backward"), ("forward",)
CALLS = [(spec, d) for spec in iter_specs() for d in (BOTH if spec.diff_args else FORWARD)]


@pytest.mark.parametrize(("spec", "direction"), CALLS, ids=lambda of: getattr(of, "name", of))
def test_rows_know_the_size_that_the_order_goes_by(spec, direction, monkeypatch):
    """And in ops with a choice the tensor has the dtype that the row says."""
    op = testing.operator(spec)
    choices = []
    choose = _dispatch.choose

    def noted(name, impls, device, args=None, **options):
        if args is not None:
            choices.append((name, _cuda.first_tensor(args), impls))
        return choose(name, impls, device, args, **options)

    monkeypatch.setattr(_dispatch, "choose", noted)
    name = f"{op.name}_backward" if direction == "backward" else op.name
    dtype = torch.bfloat16 if torch.bfloat16 in spec.dtypes else torch.float32
    for case in spec.small_cases()[:3]:
        inputs = spec.inputs(case, dtype)
        with testing.through_registration(op):
            call, _ = kernels.prepared(
                spec, case, inputs, kernels.on_backend(spec, "reference"), direction
            )
            choices.clear()
            call()
        found = [(first, impls) for chosen, first, impls in choices if chosen == name]
        assert found
        for first, impls in found:
            assert first.numel() == kernels.first_elements(spec, inputs, direction)
            assert first.dtype == dtype or not {*dispatch.BACKENDS} <= impls.keys()


def test_rows_of_kernels_hold_elements():
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    args = parser.parse_args(["--op", "weighted_fusion", "--no-compile"])
    args.device, args.dtype, args.smoke = "cpu", ["fp32"], True
    for job in kernels.jobs(args):
        rows = list(job.run())
        assert {"timed", "absent"} >= {row["status"] for row in rows} and rows
        assert {row["elements"] for row in rows} == {180}  # 2 x 3 x 5 x 6, as is the output


def test_a_gpus_capability_makes_no_other_setup(monkeypatch):
    before = machine.describe()
    assert "capability" not in before or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 1))
    here = machine.describe()
    assert here["capability"] == "12.1"
    assert same_setup({k: v for k, v in here.items() if k != "capability"}, here)
