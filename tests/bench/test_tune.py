"""Configurations of launch.json: neighbours, what refuses them, how one is chosen, and how a table is written.

No GPU is needed: what runs on one is faked. The dry run compiles for real.
"""

from __future__ import annotations

import argparse
import contextvars
import dataclasses
import json
import types

import pytest
import torch

from bench import configs, kernels, launches, results, runner, sass, trials, tune
from effdet_kernels import _triton

ROWS = [row for op in configs.ops() for row in configs.rows(op)]


def row_of(op: str, kernel: str, number: int = 0) -> configs.TableRow:
    return next(row for row in ROWS if row.place == (op, kernel, number))


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(words)


# Tables and neighbours -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", configs.ops())
def test_an_unchanged_table_is_written_as_it_was(op, tmp_path, monkeypatch):
    before = (configs.OPS / op / "launch.json").read_bytes()
    table = configs.read(op)
    (tmp_path / op).mkdir()
    monkeypatch.setattr(configs, "OPS", tmp_path)
    configs.write(op, table)
    assert (tmp_path / op / "launch.json").read_bytes() == before
    assert [path.name for path in (tmp_path / op).iterdir()] == ["launch.json"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_neighbours_obey_the_limits(row):
    found = configs.neighbours(row)
    assert found and row.config not in found
    assert len({json.dumps(config) for config in found}) == len(found)
    for config in found:
        assert list(config) == list(row.config)
        changed = {name: value for name, value in config.items() if value != row.config[name]}
        assert 1 <= len(changed) <= 2 and "RESIDENT" not in changed
        for name, value in changed.items():
            least, most = configs.LEAST_AND_MOST[name]
            assert least <= value <= most
            assert name in ("num_stages", "STAGES") or value & (value - 1) == 0
        assert all(config.get(name, 16) >= 16 for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        if row.op == "separable_conv":
            pixels = config["PATCH_H"] * config["PATCH_W"]
            assert pixels <= 16 <= pixels * config["LANES"]


def test_what_is_no_choice_stays():
    for config in configs.neighbours(row_of("separable_conv", "bwd_dpw")):
        assert config["STEPS"] == 1
    for config in configs.neighbours(row_of("batch_norm_act", "fwd")):
        assert config["num_stages"] == 1
    for config in configs.neighbours(row_of("soft_nms", "pick")):
        assert config["enable_fp_fusion"] is False


# The override ----------------------------------------------------------------------------------------


def test_an_override_is_of_its_row_and_context():
    like = torch.empty(1, dtype=torch.bfloat16)
    row = row_of("pointwise_conv", "fwd")
    other = {**row.config, "BLOCK_M": 16}

    def taken(kernel: str = "fwd", like: torch.Tensor = like) -> dict:
        return _triton.config("pointwise_conv", kernel, like)

    few, wide = taken("fwd_few"), taken(like=torch.empty(1))
    with _triton.configured(*row.place, other):
        assert taken() == other and taken("fwd_few") == few and taken(like=torch.empty(1)) == wide
        with _triton.configured("pointwise_conv", "fwd_few", 0, {**few, "BLOCK_N": 64}):
            assert taken() == other and taken("fwd_few")["BLOCK_N"] == 64
        assert contextvars.Context().run(taken) == row.config  # what another thread sees
        taken()["BLOCK_M"] = 1
        assert taken() == other
    assert taken() == row.config and taken("fwd_few") == few


def test_an_override_that_does_not_fit_is_refused():
    with (
        pytest.raises(ValueError, match="no row 9 of 'fwd'"),
        _triton.configured("soft_nms", "fwd", 9, {}),
    ):
        pass
    with (
        pytest.raises(ValueError, match="got BLOCK, takes BLOCK, BLOCK_C, num_warps"),
        _triton.configured("soft_nms", "place", 0, {"BLOCK": 1}),
    ):
        pass


def test_rows_that_a_call_takes_are_noted():
    with _triton.noted_rows() as places:
        _triton.config("pointwise_conv", "fwd", torch.empty(1))
    _triton.config("pointwise_conv", "fwd_few", torch.empty(1))
    (place,) = places
    assert place[:2] == ("pointwise_conv", "fwd") and 4 in row_of(*place).fields["itemsize"]


# Compiling -------------------------------------------------------------------------------------------


def trial_of(row: configs.TableRow, case: str, dtype: str, direction: str, keep: int = 12):
    spec = next(spec for spec in trials.iter_specs() if spec.name == row.op)
    found = next(each for each in launches.real_cases(spec) if each.name.startswith(case))
    use = trials.Use(spec, found, dtype, direction)
    return trials.Trial(row, [use], 1, trials.Target(), keep)


@pytest.fixture
def compiles():
    pytest.importorskip("triton")
    if _triton.INTERPRET:
        pytest.skip("kernels are interpreted in this run")


@pytest.fixture
def one_op(monkeypatch):
    """Calls are looked for among those of squeeze_excite only: in seconds less."""
    spec = next(spec for spec in trials.iter_specs() if spec.name == "squeeze_excite")
    monkeypatch.setattr(trials, "iter_specs", lambda: [spec])
    trials.uses_of_rows.cache_clear()
    yield
    trials.uses_of_rows.cache_clear()


def test_dry_run(compiles, one_op, capsys):
    words = "--dry-run --op squeeze_excite --kernel bwd --dtype fp32 --case d0_first --keep 1"
    assert tune.run(arguments(*words.split())) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("squeeze_excite bwd, itemsize 4") and "KB: 1 calls, the first" in shown
    assert shown.count("squeeze_excite bwd,") == 1  # a case takes one row of a kernel
    timed = [line for line in shown.splitlines() if "to be timed" in line]
    assert len(timed) == 1 and timed[0].split()[0] == "x"
    assert "by predicted time, 1 are timed" in shown
    assert "launches what the present one does" in shown


def test_a_launcher_may_look_at_a_row_and_take_another(compiles):
    row = row_of("pointwise_conv", "fwd")
    spec = next(spec for spec in trials.iter_specs() if spec.name == row.op)
    small = trials.Use(spec, spec.cases[0], "bf16", "forward")
    with _triton.noted_rows() as places:
        small.launches(trials.Target())
    few = next(row_of(*place) for place in places if place[1] == "fwd_few")
    assert row.place in places and not trials.depends(small, row, trials.Target())
    assert trials.depends(small, few, trials.Target())


def test_what_a_candidate_may_not_do(compiles, monkeypatch):
    trial = trial_of(row_of("squeeze_excite", "bwd"), "d0_first", "fp32", "backward")
    use = trial.uses[0]
    present = trial.row.config
    other = {**present, "num_warps": 8}
    real = launches.compiled

    def faked(**changes):
        monkeypatch.setattr(
            launches, "compiled", lambda *args: dataclasses.replace(real(*args), **changes)
        )

    assert len(trials.compiled(trial, other, use)) == 2
    faked(local=16)
    with pytest.raises(trials.RefusedError, match="spills: 16 bytes a thread of squeeze_excite"):
        trials.compiled(trial, other, use)
    faked(shared=100 << 10)
    with pytest.raises(trials.RefusedError, match="takes 100 KB of shared memory"):
        trials.compiled(trial, other, use)
    trials.compiled(trial, present, use)
    monkeypatch.setattr(launches, "compiled", lambda *args: 1 / 0)
    with pytest.raises(trials.RefusedError, match="does not compile: ZeroDivisionError"):
        trials.compiled(trial, other, use)


def test_resident_follows_from_the_code():
    trial = trials.Trial(row_of("depthwise_conv", "fwd"), [], 0, trials.Target(), 1)
    kernel = types.SimpleNamespace(__name__="depthwise_conv_fwd_kernel")
    other = types.SimpleNamespace(__name__="another_kernel")
    calls = [
        [(types.SimpleNamespace(kernel=kernel), code(registers=64, warps=8))],
        [
            (types.SimpleNamespace(kernel=kernel), code(registers=80, warps=8)),
            (types.SimpleNamespace(kernel=other), code(registers=255, warps=8)),
        ],
    ]
    assert trial._with_resident(trial.row.config, calls)["RESIDENT"] == 3
    calls = [[(types.SimpleNamespace(kernel=kernel), code(registers=16, warps=8))]]
    assert trial._with_resident(trial.row.config, calls)["RESIDENT"] == 8  # of 64 warps


def test_resident_of_a_row_for_a_part_of_a_kernel():
    trial = trials.Trial(row_of("depthwise_conv", "bwd_dx"), [], 0, trials.Target(), 1)
    kernel = types.SimpleNamespace(__name__="depthwise_conv_bwd_kernel")
    calls = [[(types.SimpleNamespace(kernel=kernel), code(registers=128, warps=2))]]
    assert trial._with_resident(trial.row.config, calls)["RESIDENT"] == 8


def code(registers: int, warps: int) -> sass.Code:
    fields = {field.name: 0 for field in dataclasses.fields(sass.Code)}
    return sass.Code(**{**fields, "registers": registers, "warps": warps})


# Choosing, with times that are made up ---------------------------------------------------------------

WIDE = torch.empty(1, dtype=torch.float64)
with _triton.noted_rows() as places:
    _triton.config("pointwise_conv", "fwd", WIDE)
ROW = row_of(*places.pop())
# Values of BLOCK_M.
PRESENT, FASTER, FASTEST, SLIGHT, SPILLS = (ROW.config["BLOCK_M"] * 2**i for i in range(5))
SETUP = {"gpu": "A GPU", "commit": "abc1234", "triton": "3.6.0"}


def change(block: int) -> str:
    return f"BLOCK_M {PRESENT} > {block}"


class Bench:
    """In place of a GPU: a call gives its BLOCK_M, and takes the time that the test says."""

    def __init__(self, monkeypatch, seconds: dict[int, float], spread: float = 0.001):
        self.seconds, self.spread = seconds, spread
        self.wrong: set[int] = set()
        monkeypatch.setattr(kernels, "prepared", self._prepared)
        monkeypatch.setattr(kernels, "timer", lambda call, device: (call, False))
        monkeypatch.setattr(runner, "alternate", self._alternate)
        monkeypatch.setattr(tune, "compiled", self._compiled)
        spec = types.SimpleNamespace(name="pointwise_conv", inputs=lambda *args: {})
        cases = [types.SimpleNamespace(name=name) for name in ("one", "two")]
        uses = [trials.Use(spec, case, "fp64", "forward") for case in cases]
        self.trial = trials.Trial(ROW, uses, 2, trials.Target(), 12)
        others = [
            trials.Candidate({**ROW.config, "BLOCK_M": m}, 1.0) for m in seconds if m != PRESENT
        ]
        object.__setattr__(self.trial, "candidates", others)

    @staticmethod
    def _block() -> int:
        return _triton.config("pointwise_conv", "fwd", WIDE)["BLOCK_M"]

    def _prepared(self, *args):
        def check(dtype):
            return 3.0 if self._block() in self.wrong else 0.5

        return lambda: [torch.tensor([float(self._block())])], check

    def _alternate(self, subjects, effort):
        found = {}
        for name, call in subjects.items():
            median = self.seconds[int(call()[0])]
            found[name] = runner.Timing(median, median, self.spread, 25)
        return found

    def _compiled(self, trial, config, use):
        if config["BLOCK_M"] == SPILLS:
            raise trials.RefusedError("spills: 8 bytes a thread")

    def rows(self) -> list[results.Row]:
        rows = []
        for job in tune.jobs([self.trial]):
            made = list(job.run())
            key = dict(zip(results.KEY, job.key, strict=True))
            rows += [{**key, **row, "machine": SETUP} for row in made]
        return rows

    def decide(self, monkeypatch) -> tune.Decision:
        real = tune.measured
        monkeypatch.setattr(tune, "_measured_rows", lambda t, use: real(t, use, "cpu"))
        (decision,) = tune.decisions(self.rows())
        return decision


def test_the_fastest_beyond_the_noise_is_chosen(monkeypatch):
    bench = Bench(monkeypatch, {PRESENT: 1e-5, FASTER: 9e-6, FASTEST: 8e-6, SLIGHT: 9.9e-6})
    decision = bench.decide(monkeypatch)
    assert decision.config == {**ROW.config, "BLOCK_M": FASTEST}
    assert decision.provenance == "measured on A GPU, commit abc1234, triton 3.6.0"
    assert "20.0% less time" in decision.text and "(2 calls)" in decision.text


@pytest.mark.parametrize(("gain", "spread"), [(0.015, 0.001), (0.10, 0.12)])
def test_within_the_noise_the_present_one_is_kept(monkeypatch, gain, spread):
    bench = Bench(monkeypatch, {PRESENT: 1e-5, FASTER: 1e-5 * (1 - gain)}, spread)
    decision = bench.decide(monkeypatch)
    assert decision.config == ROW.config and decision.text.startswith("kept")
    assert decision.provenance.startswith("measured on A GPU")


def test_the_wrong_and_the_spilling_are_dropped_however_fast(monkeypatch):
    bench = Bench(monkeypatch, {PRESENT: 1e-5, FASTER: 9e-6, FASTEST: 1e-6, SPILLS: 1e-6})
    bench.wrong = {FASTEST}
    decision = bench.decide(monkeypatch)
    assert decision.config == {**ROW.config, "BLOCK_M": FASTER}
    assert f"WRONG: {change(FASTEST)}" in decision.text and not decision.wrong
    status = {(row["case"], row["engine"]): row for row in bench.rows()}
    wrong = status["pointwise_conv one", change(FASTEST)]
    assert wrong["status"] == results.WRONG and "error 3 of the bound" in wrong["reason"]
    spills = status["pointwise_conv one", change(SPILLS)]
    assert spills["status"] == results.SKIPPED and "spills" in spills["reason"]
    assert "median_s" not in wrong and "median_s" not in spills


def test_a_wrong_present_configuration_is_no_ground_for_anything(monkeypatch):
    bench = Bench(monkeypatch, {PRESENT: 1e-5, FASTER: 5e-6})
    bench.wrong = {PRESENT}
    decision = bench.decide(monkeypatch)
    assert decision.wrong and decision.config is None


def test_a_row_waits_for_all_of_its_calls(monkeypatch):
    bench = Bench(monkeypatch, {PRESENT: 1e-5, FASTER: 5e-6})
    bench.decide(monkeypatch)
    rows = [row for row in bench.rows() if "two" not in row["case"]]
    (decision,) = tune.decisions(rows)
    assert decision.config is None and "1 of 2 calls" in decision.text


def test_what_was_dropped_before_is_in_the_rows(monkeypatch):
    bench = Bench(monkeypatch, {PRESENT: 1e-5})
    dropped = trials.Candidate({**ROW.config, "BLOCK_M": FASTER}, 1.2, "no. 13")
    object.__setattr__(bench.trial, "candidates", [dropped])
    job = next(iter(tune.jobs([bench.trial])))
    (row,) = job.run()
    assert row["status"] == results.SKIPPED and row["reason"] == "no. 13"
    assert row["config"]["BLOCK_M"] == FASTER


# Writing and resuming --------------------------------------------------------------------------------


def test_measure_again_goes_on_and_writes_the_table(monkeypatch, tmp_path, capsys):
    bench = Bench(monkeypatch, {PRESENT: 1e-5, FASTER: 5e-6})
    real = tune.measured
    monkeypatch.setattr(tune, "_measured_rows", lambda t, use: real(t, use, "cpu"))
    out = tmp_path / "tune.jsonl"
    assert not results.Log(out, SETUP, resume=True).run(tune.jobs([bench.trial]), -1.0)
    log = results.Log(out, SETUP, resume=True)
    assert log.run(tune.jobs([bench.trial])) and len(log.rows) == 4
    again = results.Log(out, SETUP, resume=True)
    assert again.run(tune.jobs([bench.trial])) and not again.rows

    (tmp_path / "pointwise_conv").mkdir()
    table = tmp_path / "pointwise_conv" / "launch.json"
    before = configs.text(configs.read("pointwise_conv"))
    table.write_text(before)
    monkeypatch.setattr(configs, "OPS", tmp_path)
    words = ("--op", "pointwise_conv", "--from", str(out))
    assert tune.run(arguments(*words)) == 0 and table.read_text() == before
    assert tune.run(arguments(*words, "--kernel", "product", "--write")) == 0
    assert table.read_text() == before
    assert tune.run(arguments(*words, "--write")) == 0
    assert "rows of launch.json that changed: 1" in capsys.readouterr().out
    after = table.read_text().splitlines()
    changed = [pair for pair in zip(before.splitlines(), after, strict=True) if len({*pair}) > 1]
    ((old, new),) = changed
    assert f'"BLOCK_M": {PRESENT},' in old and f'"BLOCK_M": {FASTER},' in new
    assert '"provenance": "measured on A GPU, commit abc1234, triton 3.6.0"' in new
    assert tune.run(arguments(*words, "--write")) == 0  # the row is another one now
    assert table.read_text().splitlines() == after


def test_part_of_the_calls_is_said_in_the_provenance(monkeypatch):
    bench = Bench(monkeypatch, {PRESENT: 1e-5, FASTER: 5e-6})
    bench.trial = dataclasses.replace(bench.trial, all_uses=7)
    object.__setattr__(
        bench.trial, "candidates", [trials.Candidate({**ROW.config, "BLOCK_M": FASTER}, 0.9)]
    )
    assert bench.decide(monkeypatch).provenance.endswith("triton 3.6.0, 2 of 7 calls")


# Arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--op nope", "--op: got nope, takes batch_norm_act, .*weighted_fusion"),
        ("--op soft_nms --kernel fwd", "--kernel: got fwd, takes place"),
        ("--keep 0", "--keep: got 0"),
        ("--arch 86", "--arch: goes with --dry-run"),
        ("--from /nowhere/tune.jsonl", "no results at /nowhere"),
    ],
)
def test_errors_name_the_argument(words, message):
    if _triton.INTERPRET:
        pytest.skip("kernels are interpreted in this run")
    with pytest.raises(ValueError, match=message):
        tune.run(arguments(*words.split()))


def test_no_gpu_is_said(compiles, monkeypatch):
    monkeypatch.setattr(_triton, "REASON", "no CUDA device is visible to torch")
    with pytest.raises(ValueError, match=r"no CUDA device .*--dry-run"):
        tune.run(arguments("--op", "soft_nms"))


def test_no_case_is_said(compiles, one_op):
    with pytest.raises(ValueError, match=r"no bench case .*soft_nms place"):
        tune.run(
            arguments("--dry-run", "--op", "soft_nms", "--dtype", "fp32", "--case", "none_such")
        )
