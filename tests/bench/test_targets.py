"""``python -m bench targets``: goals that rows meet, miss or say nothing of; whether `bench gpu` makes these rows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex

import pytest
import torch

import bench.__main__ as main
from bench import goals, targets
from bench.goals import GOALS, Goal
from bench.parts import PARTS, Plan
from bench.results import KEY
from bench.targets import INCOMPLETE, MET, MISSED, NOT_MEASURED, STRETCH
from effdet_kernels.ops.expand_depthwise.spec import SPEC as EXPAND
from effdet_kernels.ops.separable_conv.spec import SPEC as SEPARABLE_CONV

MACHINE = {"gpu": "NVIDIA H200", "cpu": "Some CPU", "threads": 16, "commit": "abc", "torch": "2.11"}
TIME = "2026-12-01T10:00:00+00:00"
LATER = "2026-12-01T11:00:00+00:00"


def named(*what: str) -> list[Goal]:
    return [goal for goal in GOALS if all(text in goal.what for text in what)]


SEPARABLE = named("separable_conv")[0]
BATCH_1 = named("D0 network, batch 1")[0]
OVER_EFFDET = named("D0 network, batch 128, over PyPI effdet")[0]
D7_LARGEST = named("D7 network, largest batch")[0]
SOFT_NMS = named("soft_nms, 128")[0]


def row(goal, case, engine, **fields):
    key = dict(
        zip(KEY, (goal.suite, goal.name, case, goal.direction, goal.dtype, "cuda"), strict=True)
    )
    figures = {"status": "timed", "median_s": 1e-3, "cuda_graph": True, "machine": MACHINE}
    return {**key, "engine": engine, "time": TIME, **figures, **fields}


def run_of(goal, value, case=None, engine=None, **fields):
    """The rows of one run that say ``value`` of a case."""
    case, engine = case or goal.cases[0], engine or goal.engines[0]
    measure, peers = goal.measure, []
    if measure is goals.SHARE:
        own = {"gb_s": 4000 * value, "bandwidth": 4e12}
    elif measure in (goals.TIME, goals.KERNEL_TIME):
        own = {"median_s": value}
    elif measure is goals.RATE:
        own = {"median_s": int(re.search(r"b(\d+)", case)[1]) / value}
    elif measure is goals.VS_SEPARATE:
        own = {"median_s": 1e-3}
        peers = [row(goal, case, "separate", median_s=1e-3 * value)]
    elif measure is goals.MEMORY:
        own = {"peak_bytes": 1e9 * value}
        peers = [row(goal, case, "effdet nchw", peak_bytes=2e9)]
        peers += [row(goal, case, "effdet channels_last", peak_bytes=1e9)]
    else:
        own = {"vs_eager" if measure is goals.VS_EAGER else "vs_compile": value}
        own["compile_mode"] = "max-autotune"
    ours = row(goal, case, engine, **own)
    return [{**each, **fields} for each in [ours, *peers]]


def runs_of(goal, value):
    """Of each case a run that says ``value``; where the first counts alone, of that."""
    cases = goal.cases[:1] if goal.first else goal.cases
    return [each for case in cases for each in run_of(goal, value, case)]


def said(goal, rows):
    return targets.verdict(goal, targets.measured(goal, rows))


def printed(tmp_path, capsys, rows, *words):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"torn": ')
    parser = argparse.ArgumentParser()
    targets.add_arguments(parser)
    assert targets.run(parser.parse_args([str(path), *words])) == 0
    return capsys.readouterr().out.splitlines()


def line_of(lines, goal):
    (line,) = (line for line in lines if re.match(rf"\W*{re.escape(goal.what)}\s*(  |\|)", line))
    return line


# Verdicts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.what)
def test_every_goal_can_be_met_missed_and_not_measured(goal):
    better = 1.001 if goal.measure.more else 1 / 1.001
    assert said(goal, []) == NOT_MEASURED
    assert said(goal, run_of(goal, goal.goal / better)) == MISSED
    assert said(goal, runs_of(goal, goal.goal * better)) == MET
    if goal.stretch is not None:
        assert said(goal, runs_of(goal, goal.stretch / better)) == MET
        assert said(goal, runs_of(goal, goal.stretch * better)) == STRETCH


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.what)
def test_rows_of_anything_else_say_nothing(goal):
    rows = run_of(goal, goal.goal)
    assert said(goal, rows) != NOT_MEASURED
    for field in KEY:
        assert said(goal, [{**each, field: "other"} for each in rows]) == NOT_MEASURED, field
    assert said(goal, [{**each, "engine": "eager"} for each in rows]) == NOT_MEASURED
    for status in ("wrong", "absent", "skipped"):
        assert said(goal, [{**each, "status": status} for each in rows]) == NOT_MEASURED


def test_a_goal_that_is_reached_exactly_is_met():
    assert said(BATCH_1, run_of(BATCH_1, BATCH_1.goal)) == MET
    assert said(OVER_EFFDET, run_of(OVER_EFFDET, OVER_EFFDET.goal)) == MET


def test_of_several_cases_there_is_a_mean_and_the_worst_decides(tmp_path, capsys):
    first, second, *_ = SEPARABLE.cases
    every = len(SEPARABLE.cases)
    rows = [*run_of(SEPARABLE, 0.9, first), *run_of(SEPARABLE, 0.4, second, "triton")]
    line = line_of(printed(tmp_path, capsys, rows), SEPARABLE)
    assert f"60.0 %, worst 40.0 % ({second}, triton), 2 of {every} cases" in line
    assert line.endswith(MISSED)
    rows = [r for case in SEPARABLE.cases for r in run_of(SEPARABLE, 0.9, case)]
    line = line_of(printed(tmp_path, capsys, rows), SEPARABLE)
    assert f"{every} of {every} cases" in line and line.endswith(STRETCH)


def test_a_goal_is_not_met_before_all_of_its_cases_are_measured(tmp_path, capsys):
    for what in (SEPARABLE.goal, SEPARABLE.stretch):
        rows = [r for case in SEPARABLE.cases[1:] for r in run_of(SEPARABLE, what, case)]
        assert line_of(printed(tmp_path, capsys, rows), SEPARABLE).endswith("incomplete")
    assert said(D7_LARGEST, run_of(D7_LARGEST, D7_LARGEST.goal, D7_LARGEST.cases[1])) == MET


def test_the_fastest_kernel_of_a_run_counts():
    rows = [*run_of(SOFT_NMS, 50e-6, engine="triton"), *run_of(SOFT_NMS, 70e-6, engine="cuda")]
    rows += run_of(SOFT_NMS, 1e-6, engine="reference") + run_of(SOFT_NMS, 1e-6, engine="eager")
    (found,) = targets.measured(SOFT_NMS, rows)
    assert (found.engine, found.value) == ("triton", 50e-6)


def test_the_latest_run_with_the_figure_counts():
    old, new = run_of(OVER_EFFDET, 3.5), run_of(OVER_EFFDET, 2.0, time=LATER)
    assert said(OVER_EFFDET, [*new, *old]) == MISSED
    alone = [{**new[0], "vs_eager": None}]  # without peers
    assert said(OVER_EFFDET, [*alone, *old]) == MET
    assert said(OVER_EFFDET, [*run_of(OVER_EFFDET, 2.0, time=LATER, status="absent"), *old]) == MET
    assert said(OVER_EFFDET, [{**new[0], "status": "wrong"}, *old]) == NOT_MEASURED


def test_ratios_are_of_one_run():
    (expand,) = named("expand_depthwise")
    ours, separate = run_of(expand, 2.0)
    assert said(expand, [ours, separate]) == INCOMPLETE
    assert said(expand, [ours, {**separate, "time": LATER}]) == NOT_MEASURED
    assert said(expand, [ours, {**separate, "status": "wrong"}]) == NOT_MEASURED
    (memory,) = named("memory")
    ours, nchw, channels_last = run_of(memory, 0.4)
    assert said(memory, [ours, nchw, channels_last]) == MET
    assert said(memory, [ours, nchw, {**channels_last, "peak_bytes": 0.5e9}]) == MISSED
    absent = {**channels_last, "peak_bytes": 0.5e9, "status": "absent"}
    assert said(memory, [ours, nchw, absent]) == MET
    assert said(memory, [ours]) == NOT_MEASURED


def test_another_mode_of_torch_compile_is_not_max_autotune():
    (tuned,) = named("max-autotune")
    (ours,) = run_of(tuned, 3.0)
    assert said(tuned, [ours]) == STRETCH
    for mode in ("default", "", None):
        assert said(tuned, [{**ours, "compile_mode": mode}]) == NOT_MEASURED


def test_the_largest_batch_that_was_measured_counts(tmp_path, capsys):
    small, large = (
        run_of(D7_LARGEST, value, f"1536x1536 b{b}") for value, b in ((400, 2), (300, 32))
    )
    (found,) = targets.measured(D7_LARGEST, [*small, *large])
    assert found.case == "1536x1536 b32" and found.value == pytest.approx(300)
    one = run_of(D7_LARGEST, 500, "1536x1536 b1")
    assert said(D7_LARGEST, one) == NOT_MEASURED
    line = line_of(printed(tmp_path, capsys, [*small, *large]), D7_LARGEST)
    assert "300 img/s (1536x1536 b32, effdet_kernels)  met" in line


def test_at_batch_1_only_a_graph_counts():
    assert said(BATCH_1, run_of(BATCH_1, 1e-4, cuda_graph=False)) == NOT_MEASURED


# Setups and forms ------------------------------------------------------------------------------------


def test_the_machine_and_the_commit_are_named(tmp_path, capsys):
    lines = printed(tmp_path, capsys, run_of(BATCH_1, 3e-4))
    assert lines[0] == "NVIDIA H200, commit abc, torch 2.11, 2026-12-01"
    assert line_of(lines, BATCH_1).endswith("300.0 µs (512x512 b1, effdet_kernels)  met")
    assert line_of(lines, SEPARABLE).endswith(NOT_MEASURED)


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", ""])
def test_another_gpu_is_shown_without_a_verdict(tmp_path, capsys, gpu):
    machine = {**MACHINE, "gpu": gpu}
    lines = printed(tmp_path, capsys, run_of(BATCH_1, 3e-4, machine=machine))
    assert lines[0].endswith("no verdict")
    assert line_of(lines, BATCH_1).endswith("300.0 µs (512x512 b1, effdet_kernels)")
    assert line_of(lines, SEPARABLE).endswith(NOT_MEASURED)


def test_the_latest_setup_of_an_h200_has_the_table_and_all_have_one_each(tmp_path, capsys):
    later = {"time": LATER, "machine": {**MACHINE, "commit": "def"}}
    latest = {"time": "2026-12-02", "machine": {**MACHINE, "gpu": "NVIDIA H100"}}
    cpu = {"time": "2026-12-03", "device": "cpu", "machine": {"cpu": "Some CPU"}}
    rows = [
        *run_of(BATCH_1, 5e-4),
        *run_of(SOFT_NMS, 5e-5, **later),
        *run_of(SOFT_NMS, 1, **latest),
    ]
    rows += run_of(BATCH_1, 1e-4, **cpu)
    lines = printed(tmp_path, capsys, rows)
    assert "commit def" in lines[0] and sum("commit" in line for line in lines) == 1
    assert line_of(lines, BATCH_1).endswith(NOT_MEASURED)  # the other commit's is not mixed in
    assert line_of(lines, SOFT_NMS).endswith(MET)
    lines = printed(tmp_path, capsys, rows, "--all")
    assert sum("commit" in line for line in lines) == 3
    left = printed(tmp_path, capsys, rows, "--all", "--unmeasured")
    assert not any(line.startswith((BATCH_1.what + ":", SOFT_NMS.what)) for line in left)


def test_without_rows_of_a_gpu_all_is_unmeasured(tmp_path, capsys):
    rows = run_of(BATCH_1, 1e-4, device="cpu")
    assert printed(tmp_path, capsys, rows) == ["No row is of a GPU."]
    assert len(printed(tmp_path, capsys, rows, "--unmeasured")) >= len(GOALS)
    with pytest.raises(ValueError, match=r"no rows of results in .*rows\.jsonl"):
        printed(tmp_path, capsys, [])


def test_a_case_that_was_measured_is_not_listed_as_unmeasured(tmp_path, capsys):
    before = printed(tmp_path, capsys, run_of(BATCH_1, 1e-4), "--unmeasured")
    rows = [*run_of(BATCH_1, 1e-4), *run_of(SEPARABLE, 0.5, SEPARABLE.cases[1])]
    rows += run_of(D7_LARGEST, 1, "1536x1536 b8")
    after = printed(tmp_path, capsys, rows, "--unmeasured")
    gone = [line for line in before if line not in after]
    assert [line.partition(": python -m bench")[0] for line in gone] == [
        f"{SEPARABLE.what} ({SEPARABLE.cases[1]})",
        D7_LARGEST.what,
    ]
    for goal in GOALS:  # all cases
        rows += [r for case in goal.cases for r in run_of(goal, goal.goal, case, time=goal.what)]
    assert printed(tmp_path, capsys, rows, "--unmeasured") == []


def test_what_is_wrong_or_was_skipped_says_why(tmp_path, capsys):
    rows = run_of(BATCH_1, 1e-4, status="wrong", reason="error above 1 | <b>")
    rows += run_of(SOFT_NMS, 1, engine="every engine", status="skipped", reason="out of\nmemory")
    rows += run_of(SOFT_NMS, 1, "d0", status="wrong", reason="another case", time=LATER)
    lines = printed(tmp_path, capsys, rows)
    assert re.search(
        r"effdet_kernels wrong: error above 1 \| <b> +not measured$", line_of(lines, BATCH_1)
    )
    assert "every engine skipped: out of memory" in line_of(lines, SOFT_NMS)
    lines = printed(tmp_path, capsys, rows, "--markdown")
    assert "error above 1 \\| &lt;b>" in line_of(lines, BATCH_1)


def test_markdown_has_a_cell_for_everything(tmp_path, capsys):
    rows = [*run_of(BATCH_1, 3e-4), *run_of(OVER_EFFDET, 5)]
    lines = [x for x in printed(tmp_path, capsys, rows, "--markdown") if x.startswith("|")]
    assert len(lines) == len(GOALS) + 2
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(line) for line in cells} == {5}
    found = {line[0]: line[1:] for line in cells}
    assert found[BATCH_1.what] == [
        "400.0 µs",
        "250.0 µs",
        "300.0 µs (512x512 b1, effdet_kernels)",
        MET,
    ]
    assert found[OVER_EFFDET.what][-1] == STRETCH


def test_malformed_rows_do_no_harm(tmp_path, capsys):
    alone = {(goal.suite, goal.name, goal.cases, goal.direction): goal for goal in GOALS[::-1]}
    good = []
    for goal in alone.values():
        good += runs_of(goal, goal.goal * (1.001 if goal.measure.more else 0.999))
    expected = printed(tmp_path, capsys, good)
    assert sum(line.endswith(MET) for line in expected) == len(alone)
    junk = [None, [], 3, "row", {}, {"suite": "model"}, {**good[0], "engine": None}]
    odd = (None, "fast", float("nan"), float("inf"), -1.0, 0, True, [], {})
    numbers = (
        "median_s",
        "gb_s",
        "bandwidth",
        "vs_eager",
        "vs_compile",
        "peak_bytes",
        "cuda_graph",
        "compile_mode",
    )
    for each in good:
        for value in odd:
            broken = {**each, **dict.fromkeys(numbers, value), "time": LATER}
            junk += [
                broken,
                {**each, "case": value},
                {**each, "name": [value]},
                {**broken, "status": value},
            ]
    for place, each in enumerate(junk):
        if isinstance(each, dict):
            junk[place] = {**each, "reason": [1], "error": {}}
    found = printed(tmp_path, capsys, [*junk, *good, *junk])
    assert [line.split()[-1] for line in found if line] == [
        line.split()[-1] for line in expected if line
    ]
    for value in odd:
        for goal, field in (
            (SEPARABLE, "gb_s"),
            (SEPARABLE, "bandwidth"),
            (OVER_EFFDET, "vs_eager"),
        ):
            assert said(goal, run_of(goal, 1, **{field: value})) == NOT_MEASURED
    for machine in (None, "an H200", ["H200"], {"gpu": ["H200"]}, {"gpu": 200}):
        odd_rows = run_of(BATCH_1, 1e-4, machine=machine, time=[1])
        assert printed(tmp_path, capsys, [*good, *odd_rows]) and printed(
            tmp_path, capsys, odd_rows, "--all"
        )


# The rows are made -----------------------------------------------------------------------------------


def jobs_of(words):
    """The jobs of a command, and its arguments, as the suite has them."""
    parser = argparse.ArgumentParser()
    main._add_common(parser)
    suite = main.SUITES[words[0]][0]
    suite.add_arguments(parser)
    args = parser.parse_args(words[1:])
    args.dtype = args.dtype or ["fp32"]
    return [(dict(zip(KEY, job.key, strict=True)), args) for job in suite.jobs(args)]


@pytest.fixture(scope="module")
def gpu_jobs(tmp_path_factory):
    """All jobs that `bench gpu` has on a GPU."""
    plan = Plan(tmp_path_factory.mktemp("gpu"))
    others = (
        "limits",
        "sanitize",
        "accuracy",
    )  # of no goal, and what their steps are depends on the machine
    steps = [step for name, part in PARTS.items() if name not in others for step in part(plan)]
    suites = [step.command[3:] for step in steps if step.command[1:3] == ["-m", "bench"]]
    return [job for words in suites if words[0] in main.SUITES for job in jobs_of(words)]


def missing(goal, jobs):
    """The goal's cases of which no job would make a row with its figure."""

    def measures(args):
        if goal.measure in (goals.VS_EAGER, goals.MEMORY):
            return args.peers
        if goal.measure is goals.VS_AUTOTUNED:
            return args.peers and args.max_autotune
        if goal.measure is goals.VS_COMPILE:
            return args.peers and args.compile
        return goal.measure is not goals.VS_SEPARATE or "separate" in EXPAND.peers

    made = {key["case"] for key, args in jobs if goal.selects(key) and measures(args)}
    return [case for case in goal.cases if case not in made]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.what)
def test_the_gpu_run_has_a_job_for_every_goal(goal, gpu_jobs):
    assert missing(goal, gpu_jobs) == []


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.what)
def test_a_goal_for_which_there_is_no_job_is_seen(goal, gpu_jobs):
    changes = {
        "suite": "loss",
        "name": "other",
        "cases": ("other",),
        "direction": "labels",
        "dtype": "fp16",
    }
    for field, value in changes.items():
        mutant = dataclasses.replace(goal, **{field: value})
        assert missing(mutant, gpu_jobs) == list(mutant.cases), field


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.what)
def test_the_command_for_what_is_unmeasured_measures_it(goal):
    alone = [goal.cases] if goal.first else [(case,) for case in goal.cases]
    for cases in alone:
        jobs = jobs_of(targets.command(goal, cases))
        assert [key["case"] for key, _ in jobs] == list(cases)
        assert missing(dataclasses.replace(goal, cases=cases), jobs) == []


def test_the_printed_command_is_that_one(tmp_path, capsys):
    lines = printed(tmp_path, capsys, run_of(BATCH_1, 1e-4), "--unmeasured")
    words = [shlex.split(line.partition(": python -m bench ")[2]) for line in lines]
    for goal in GOALS:
        if goal is not BATCH_1:
            cases = goal.cases if goal.first else goal.cases[:1]
            assert targets.command(goal, cases) in words


def test_peers_that_the_goals_do_not_name_are_in_the_run_too(gpu_jobs):
    """The merged dense convolution beside separable_conv, torchvision's NMS beside soft_nms."""
    assert "merged dense" in SEPARABLE_CONV.peers
    hard = [
        args for key, args in gpu_jobs if key["direction"] == "nms" and key["case"].endswith("hard")
    ]
    assert any(args.peers for args in hard)


# The form of separate kernels ------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXPAND.small_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_separate_kernels_compute_the_same(case, dtype):
    inputs = EXPAND.inputs(case, dtype)
    with torch.no_grad():
        assert EXPAND.error_ratio(inputs, EXPAND.peers["separate"](**inputs), dtype) <= 1


def test_separate_kernels_are_timed_beside_the_op():
    words = ["kernels", "--op", "expand_depthwise", "--smoke", "--no-compile", "--device", "cpu"]
    parser = argparse.ArgumentParser()
    main._add_common(parser)
    main.kernels.add_arguments(parser)
    args = parser.parse_args(words[1:])
    args.dtype = ["bf16"]
    for job in main.kernels.jobs(args):
        rows = {found["engine"]: found for found in job.run()}
        assert rows["separate"]["status"] == "timed" and rows["separate"]["error"] < 2e-2
