"""``python -m bench tune``: writes the ops' launch.json from measurements on a GPU. The library itself tunes nothing.

For each row of a table, neighbours of its configuration (``bench.configs``) are compiled for some of the bench cases
that take the row. One that spills, takes more shared memory than the row may, or launches nothing else than the present
one is dropped; the best by predicted time (``bench.predict``) are timed. On the GPU each must compute every case within
the error bound first; then all of them and the present one take turns, as whole calls of the op. A score is
the geometric mean, over the cases, of its time over the present one's. The best replaces the present one if it is
faster by more than the noise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import configs, kernels, machine, runner, sass
from bench.configs import Config, TableRow
from bench.results import SKIPPED, TIMED, WRONG, Job, Log, Row, load, same_setup
from bench.setups import latest, usable
from bench.table import duration
from bench.trials import (
    RefusedError,
    Target,
    Trial,
    Use,
    compiled,
    depends,
    first_line,
    predicted_time,
    uses_of_rows,
)
from effdet_kernels import _triton
from effdet_kernels.guards import same_bits
from effdet_kernels.spec import Inputs
from effdet_kernels.verify import DTYPES

PRESENT = "present"  # the engine of the configuration that the table has
CANDIDATES = "candidates"  # the case of rows that are of no case: what was dropped before timing
LEAST_GAIN = 0.02  # less is noise, whatever the rounds' spread
_EFFORT = runner.Effort(rounds=5, seconds=0.05, settle_s=0.0)
_RESULTS = Path(__file__).parent / "results"


class WrongError(Exception):
    """Outputs are outside of the error bound."""


# Timing --------------------------------------------------------------------------------------------


def jobs(trials: Iterable[Trial]) -> Iterator[Job]:
    """Per row one for what is not timed, and one per call."""
    for trial in trials:
        # Another configuration in the table makes another job.
        name = f"{trial.row.name}: {' '.join(map(str, trial.row.config.values()))}"
        run = functools.partial(_refused_rows, trial)
        yield Job("tune", name, CANDIDATES, "any", "any", "cuda", run)
        for use in trial.uses:
            case = f"{use.spec.name} {use.case.name}"
            measure = functools.partial(_measured_rows, trial, use)
            yield Job("tune", name, case, use.direction, use.dtype, "cuda", measure)


def _common(trial: Trial, config: Config) -> Row:
    row = trial.row
    return {
        "engine": trial.change(config) or PRESENT,
        "op": row.op,
        "kernel": row.kernel,
        "selectors": configs.selectors(row.fields),
        "present": row.config,
        "config": config,
        "cases": len(trial.uses),
        "all_cases": trial.all_uses,
    }


def _refused_rows(trial: Trial) -> Iterator[Row]:
    for candidate in trial.candidates:
        if candidate.reason:
            row = _common(trial, candidate.config)
            yield {**row, "status": SKIPPED, "reason": candidate.reason}


def _measured_rows(trial: Trial, use: Use) -> list[Row]:
    with runner.on_stream("cuda"):
        return measured(trial, use, "cuda")


def measured(trial: Trial, use: Use, device: str) -> list[Row]:
    """A row per configuration of a trial: its time in a call, or why it was not timed."""
    inputs = use.spec.inputs(use.case, DTYPES[use.dtype], device)
    inputs = kernels.arranged(inputs, torch.channels_last)
    right: list[list[Tensor]] = []
    rows: dict[str, Row] = {}
    subjects: dict[str, runner.Subject] = {}
    for config in (trial.row.config, *(c.config for c in trial.candidates if not c.reason)):
        row = _common(trial, config)
        rows[row["engine"]] = row
        try:
            compiled(trial, config, use)
            with _applied(trial.row, config):
                call = _checked(use, inputs, right)
                subject, row["cuda_graph"] = kernels.timer(_under(trial.row, config, call), device)
        except torch.OutOfMemoryError:
            raise
        except RefusedError as error:
            row.update(status=SKIPPED, reason=str(error))
        except Exception as error:  # wrong results, or a launch fails in one of many ways
            row.update(status=WRONG, reason=first_line(error))
        else:
            row.update(status=SKIPPED, reason="the present configuration was not timed")
            subjects[row["engine"]] = subject
    right.clear()  # their memory
    if PRESENT in subjects:
        for name, timing in runner.alternate(subjects, _EFFORT).items():
            rows[name].update(status=TIMED, reason="", **timing.row())
    return list(rows.values())


def _checked(use: Use, inputs: Inputs, right: list[list[Tensor]]) -> kernels.Call:
    """The call to time. ``right`` are outputs (gradients) within the error bound; new ones are added.

    Raises:
        WrongError: its outputs are outside of it.
    """
    function = kernels.on_backend(use.spec, "triton")
    call, check = kernels.prepared(use.spec, use.case, inputs, function, use.direction)
    outputs = call()
    if not any(all(map(same_bits, outputs, known)) for known in right):
        error = check(DTYPES[use.dtype])
        if not error <= 1:
            raise WrongError(f"error {error:.3g} of the bound")
        right.append(outputs)
    return call


@contextlib.contextmanager
def _applied(row: TableRow, config: Config) -> Iterator[None]:
    """Inside, calls have the configuration; backwards, too, as autograd keeps to this thread."""
    with _triton.configured(*row.place, config), torch.autograd.set_multithreading_enabled(False):
        yield


def _under(row: TableRow, config: Config, call: kernels.Call) -> kernels.Call:
    def applied() -> list[Tensor]:
        with _applied(row, config):
            return call()

    return applied


# Choosing ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Decision:
    """What measurements say of a row of a table."""

    name: str
    op: str
    kernel: str
    selectors: Mapping[str, Any]
    present: Config
    config: Config | None  # the row's from now on; None: there is no telling
    text: str  # for a reader
    provenance: str = ""
    wrong: bool = False  # the present configuration is


def decisions(rows: Iterable[Row]) -> list[Decision]:
    """Of rows of one machine, commit and versions."""
    found: dict[str, list[Row]] = {}
    for row in latest(rows):
        found.setdefault(row["name"], []).append(row)
    # A row of a call that did not fit into memory says nothing but that.
    return [_decided(group) for group in found.values() if any("op" in row for row in group)]


def _decided(rows: Sequence[Row]) -> Decision:
    calls: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["case"] != CANDIDATES:
            key = row["case"], row["direction"], row["dtype"]
            calls.setdefault(key, {})[row["engine"]] = row
    of = next(row for row in rows if "op" in row)
    undecided = functools.partial(
        Decision, of["name"], of["op"], of["kernel"], of["selectors"], of["present"], None
    )
    cases = max(row.get("cases", 0) for row in rows)
    for call, engines in calls.items():
        if engines.get(PRESENT, {}).get("status") == WRONG:
            reason = engines[PRESENT].get("reason")
            return undecided(f"WRONG as it is, {' '.join(call)}: {reason}", wrong=True)
    if len(calls) < cases:
        return undecided(f"{len(calls)} of {cases} calls were measured")
    timed = [engines for engines in calls.values() if _is_timed(engines.get(PRESENT))]
    if not timed:
        return undecided("no call was timed")
    names = [n for n in timed[0] if n != PRESENT and all(_is_timed(c.get(n)) for c in timed)]
    scores = {name: _score(timed, name) for name in names}
    faster = [name for name in names if scores[name] < 1 - _noise(timed, name)]
    best = min(faster, key=scores.__getitem__, default=PRESENT)
    text = f"kept: of {len(names)} others, none is faster by more than the noise"
    if best != PRESENT:
        text = f"{best}: {1 - scores[best]:.1%} less time, noise {_noise(timed, best):.1%}"
    wrong = {n for c in calls.values() for n, row in c.items() if row.get("status") == WRONG}
    text += f" ({len(timed)} calls)" + (f"; WRONG: {'; '.join(sorted(wrong))}" if wrong else "")
    return dataclasses.replace(
        undecided(text),
        config=timed[0][best]["config"],
        provenance=_provenance(timed[0][best], len(timed)),
    )


def _is_timed(row: Row | None) -> bool:
    return row is not None and row.get("status") == TIMED


def _score(calls: Sequence[Mapping[str, Row]], name: str) -> float:
    return statistics.geometric_mean(c[name]["median_s"] / c[PRESENT]["median_s"] for c in calls)


def _noise(calls: Sequence[Mapping[str, Row]], name: str) -> float:
    """What a gain must be more than: the median, over calls, of the larger spread of the two, and ``LEAST_GAIN``."""
    spreads = [max(c[name]["spread"], c[PRESENT]["spread"]) for c in calls]
    return max(LEAST_GAIN, statistics.median(spreads))


def _provenance(row: Row, calls: int) -> str:
    of = row["machine"]
    part = "" if calls == row["all_cases"] else f", {calls} of {row['all_cases']} calls"
    return (
        f"measured on {of.get('gpu')}, commit {of.get('commit')}, triton {of.get('triton')}{part}"
    )


def apply(found: Iterable[Decision]) -> int:
    """Writes decisions into the tables, where rows are still as they were measured; how many rows changed."""
    by_op: dict[str, list[Decision]] = {}
    for decision in found:
        if decision.config is not None:
            by_op.setdefault(decision.op, []).append(decision)
    changed = 0
    for op, its in by_op.items():
        table = configs.read(op)
        for decision in its:
            for row in table.get(decision.kernel, ()):
                same = configs.selectors(row) == decision.selectors
                if same and row["config"] == decision.present:
                    row.update(config=decision.config, provenance=decision.provenance)
                    changed += 1
        configs.write(op, table)
    return changed


# Command -------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", action="append", help="only this op's table (may be repeated)")
    add("--kernel", action="append", metavar="ROW", help="only rows of this kernel, e.g. fwd_few")
    add("--dtype", action="append", choices=DTYPES, help="default: bf16 and fp32")
    add("--case", action="append", metavar="PREFIX", help="only cases whose name begins so")
    add("--keep", type=int, default=12, help="as many candidates of a row are timed; default: 12")
    add("--minutes", type=float, help="start nothing after this time; the same command goes on")
    add("--dry-run", action="store_true", help="candidates and predicted times; needs no GPU")
    add("--arch", type=int, choices=sass.ARCHITECTURES, help="of --dry-run; default: 90")
    add("--out", type=Path, help="of measurements; default: results/<machine>/tune.jsonl")
    add("--from", dest="source", type=Path, metavar="FILE", help="measure nothing: take these")
    add("--write", action="store_true", help="put what is decided into launch.json")


def run(args: argparse.Namespace) -> int:
    """
    Raises:
        ValueError: an argument is none of those that are possible, or there is no GPU and neither --dry-run nor --from.
    """
    if args.keep < 1:
        raise ValueError(f"--keep: got {args.keep}, takes at least 1")
    if _triton.INTERPRET:
        raise ValueError("TRITON_INTERPRET is set: kernels are not compiled then")
    if args.arch and not args.dry_run:
        raise ValueError("--arch: goes with --dry-run; else kernels are compiled for the GPU")
    rows = configs.chosen_rows(args.op, args.kernel)
    conclude = functools.partial(_conclude, {(row.op, row.kernel) for row in rows}, args.write)
    if args.source:
        return conclude(args.source, None)
    if importlib.util.find_spec("triton") is None:
        raise ValueError(_triton.REASON)
    if args.dry_run:
        arch = args.arch or 90
        _show(trials(rows, args, Target(arch, sass.ARCHITECTURES[arch])), args.minutes)
        return 0
    if _triton.REASON:
        raise ValueError(f"{_triton.REASON}; --dry-run shows the candidates without a GPU")
    out = args.out or _RESULTS / machine.slug("cuda") / "tune.jsonl"
    here = machine.describe()
    start = time.monotonic()
    tried = trials(rows, args, _this_gpu())
    seconds = None if args.minutes is None else args.minutes * 60 - (time.monotonic() - start)
    if not Log(out, here, resume=True).run(jobs(tried), seconds):
        print("the time is over: the same command goes on")
    return conclude(out, here)


def _this_gpu() -> Target:
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    if arch not in sass.ARCHITECTURES:
        known = ", ".join(f"sm_{a}" for a in sass.ARCHITECTURES)
        raise ValueError(f"this GPU is sm_{arch}; launches are predicted for {known}")
    return Target(arch, _triton._device_shared_kb(torch.cuda.current_device()))


def trials(rows: Sequence[TableRow], args: argparse.Namespace, target: Target) -> list[Trial]:
    """The rows that bench cases take on that GPU, in the tables' order.

    Raises:
        ValueError: no case takes any.
    """
    found = uses_of_rows(tuple(args.dtype or ("bf16", "fp32")), target)
    prefixes = tuple(args.case or ("",))
    tried = []
    for row in rows:
        every = [use for use in found.get(row.place, []) if depends(use, row, target)]
        chosen = [use for use in every if use.case.name.startswith(prefixes)]
        if chosen:
            tried.append(Trial(row, chosen, len(every), target, args.keep))
    if not tried:
        names = "; ".join(row.name for row in rows[:3])
        raise ValueError(f"no bench case that fits --case and --dtype takes {names}")
    return tried


def _show(tried: Sequence[Trial], minutes: float | None) -> None:
    """Prints the candidates of each row."""
    start = time.monotonic()
    for trial in tried:
        if minutes is not None and time.monotonic() - start > minutes * 60:
            print("the time is over")
            return
        use = trial.uses[0]
        first = f"{use.spec.name} {use.case.name} {use.dtype} {use.direction}"
        present = duration(predicted_time(compiled(trial, trial.row.config, use)))
        print(f"{trial.row.name}: {len(trial.uses)} calls, the first {first}: {present}")
        print(f"    {json.dumps(trial.row.config)}", flush=True)
        for candidate in trial.candidates:
            factor = "" if candidate.predicted is None else f"x {candidate.predicted:.3f}"
            change, what = trial.change(candidate.config), candidate.reason or "to be timed"
            print(f"    {factor:>8}  {change:<42} {what}", flush=True)


def _conclude(chosen: set[tuple[str, str]], write: bool, path: Path, setup: Row | None) -> int:
    """Decides on kernels' rows by a file's rows of ``setup`` (None: of its last row); 1 if a present one is wrong."""
    rows = [row for row in usable(load(path))[0] if row["suite"] == "tune"]
    if not rows:
        raise ValueError(f"{path} has no rows of bench tune")
    setup = setup or rows[-1]["machine"]
    found = decisions(row for row in rows if same_setup(row.get("machine"), setup))
    found = [decision for decision in found if (decision.op, decision.kernel) in chosen]
    for decision in found:
        print(f"{decision.name}: {decision.text}")
    if write:
        print(f"rows of launch.json that changed: {apply(found)}")
    return 1 if any(decision.wrong for decision in found) else 0
