"""``python -m bench gpu``: everything that is to be measured on a GPU, in parts that can be interrupted and resumed.

Parts: limits, compile, verify, sanitize, kernels, model, profile, counters, train, loss, detect, accuracy, peers; all
of them where none is named. Each part has ``--minutes`` of its own, then it is ended. DIR/<part>.log has what its
commands printed, DIR/<part>.jsonl its rows, DIR/verify.json the checks, DIR/accuracy the run that trained,
DIR/state.json what is done. The same command once more goes on where it was; parts that passed are not run again.
Statuses: passed; failed (a command failed, or something was wrong); out of time (run it again); did not run (with the
reason). Exit status 1 if a part failed or ran out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.parts import PARTS, ROOT, SANITIZER_ERRORS, DidNotRun, Plan, Step, reached
from bench.results import WRONG, load
from bench.setups import latest, name_of, plain, status_of, usable

PASSED, FAILED, OUT_OF_TIME, DID_NOT_RUN = "passed", "failed", "out of time", "did not run"
_START_NO_CASE_AFTER = 0.8  # of the time that is left: the case that runs then may end
_NOTHING_RAN = 2  # verify's exit status
_SHOWN = 5  # failures of a part in the summary; the log and the rows have all


@dataclasses.dataclass
class Part:
    """What is known of a part; kept in DIR/state.json."""

    of: str  # machine, commit and size of the run
    status: str = OUT_OF_TIME
    seconds: float = 0.0  # of all runs of it
    rows: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    reason: str = ""  # why it did not run
    result: str = ""  # of accuracy, in words
    done: list[str] = dataclasses.field(default_factory=list)  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    add("--out", type=Path, metavar="DIR", help="default: results/<GPU> beside the benchmarks")
    add("--minutes", type=float, default=9.0, help="for each part (default 9)")
    add("--list", action="store_true", help="only print the steps that would be considered")
    add("--again", action="store_true", help="from the start; what was there is kept as *.old")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --smoke, does it run?")
    add("--smoke", action="store_true", help="tiny sizes")
    add("--data", type=Path, metavar="DIR", help="folder in COCO format, for accuracy")
    add("--peer-python", type=Path, help="python with the peers' packages")
    add("--peer-path", type=Path, help="folder of packages for the peers' PYTHONPATH")


def run(args: argparse.Namespace) -> int:
    """Runs the parts and prints a summary; 1 if one failed or ran out of time.

    Raises:
        ValueError: no GPU, no such part, or DIR has results of another machine or commit.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU is visible to torch here")
    if unknown := set(args.parts) - set(PARTS):
        raise ValueError(f"PART: got {', '.join(sorted(unknown))}, takes {', '.join(PARTS)}")
    if not args.minutes > 0:
        raise ValueError(f"--minutes: got {args.minutes:g}, takes more than 0")
    if args.smoke and args.out is None:
        raise ValueError("--out: got none, --smoke takes a folder: its figures are no results")
    out = args.out or Path(__file__).parent / "results" / machine.slug(args.device)
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"--data: got {args.data}, takes a folder in COCO format")
    data = args.data and args.data.absolute()
    plan = Plan(out.resolve(), args.device, args.smoke, _peer_options(args), data)
    names = list(dict.fromkeys(args.parts)) or list(PARTS)
    if args.list:
        print(*(line for name in names for line in _listed(plan, name)), sep="\n")
        return 0
    plan.out.mkdir(parents=True, exist_ok=True)
    if args.again:
        _set_aside(plan, names)
    state = _known(plan, names)
    # Whoever ends this command ends the step that runs too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for name in names:
        if state[name].status == PASSED:
            print(f"{name}: passed before; --again runs it once more", flush=True)
        else:
            run_part(plan, name, state, args.minutes * 60)
    _print_summary({name: state[name] for name in names})
    return int(any(state[name].status in (FAILED, OUT_OF_TIME) for name in names))


def _listed(plan: Plan, name: str) -> Iterator[str]:
    """A line for each step of a part."""
    try:
        for step in PARTS[name](plan):
            program = (
                ["python", *step.command[1:]] if step.command[0] == sys.executable else step.command
            )
            yield f"{name}: {step.name}: {shlex.join(program)}"
    except DidNotRun as reason:
        yield f"{name}: does not run: {reason}"


def run_part(plan: Plan, name: str, state: dict[str, Part], seconds: float) -> None:
    """Runs the steps of a part that are not done, for so many seconds, and puts what came of it into ``state``."""
    part = state[name]
    start, before = time.monotonic(), part.seconds
    part.failures, part.reason, part.status = [], "", OUT_OF_TIME  # unless it comes to its end
    failed: list[str] = []
    _save(plan, state)
    try:
        for step in PARTS[name](plan):
            if step.name in part.done or not step.needed():
                continue
            left = seconds - (time.monotonic() - start)
            problem = _run_step(plan, name, step, left) if left > 0 else OUT_OF_TIME
            if problem == OUT_OF_TIME:
                break
            if problem:
                failed.append(f"{step.name}: {problem}")
            else:
                part.done.append(step.name)
            part.seconds = before + time.monotonic() - start
            _save(plan, state)
        else:
            part.status = PASSED
    except DidNotRun as reason:
        part.status, part.reason = DID_NOT_RUN, str(reason)
    part.seconds = before + time.monotonic() - start
    part.rows, wrong = _findings(plan, name)
    part.failures = wrong + failed
    part.result = reached(plan) if name == "accuracy" else ""
    if part.failures:
        part.status = FAILED
    _save(plan, state)


def _run_step(plan: Plan, part: str, step: Step, left: float) -> str:
    """Runs a command; returns what is wrong with how it ended, OUT_OF_TIME, or nothing.

    Raises:
        DidNotRun: it says that nothing ran.
    """
    command, soft = list(step.command), left * _START_NO_CASE_AFTER
    if step.rows is not None:
        command += ["--out", str(step.rows), "--resume", "--deadline", f"{soft:.3f}"]
    print(f"{part}: {step.name} …", flush=True)
    log, start = plan.out / f"{part}.log", time.monotonic()
    status = _execute(command, log, left, step.environment)
    if status is None:
        return OUT_OF_TIME
    if step.rows is None and status == _NOTHING_RAN:
        raise DidNotRun(f"{step.name}: {_last_line(log)}")
    if status == SANITIZER_ERRORS:
        return f"compute-sanitizer found errors: {_last_line(log)}"
    if status:
        return f"exit status {status}: {_last_line(log)}"
    # A suite that came to its deadline ends well, after it.
    late = step.rows is not None and time.monotonic() - start >= soft
    return OUT_OF_TIME if late else ""


def _execute(
    command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]
) -> int | None:
    """The exit status of a command, whose output goes to the end of ``log``; None if its time was over."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            file.write(f"\nended after {seconds:.0f} s\n")
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return text.splitlines()[-1].strip() if text else ""


def _findings(plan: Plan, part: str) -> tuple[int, list[str]]:
    """How many rows (checks) a part has, and which of them are wrong (failed)."""
    if part == "verify":
        return _merge_checks(plan)
    path = plan.rows(part)
    rows = latest(usable(load(path))[0]) if path.exists() else []
    wrong = [row for row in rows if status_of(row) == WRONG]
    return len(rows), [f"{' '.join(name_of(row))}: {plain(row.get('reason'))}" for row in wrong]


def _merge_checks(plan: Plan) -> tuple[int, list[str]]:
    """Puts the ops' files into verify.json; the number of checks, and those that failed."""
    found = [json.loads(path.read_text()) for path in sorted(plan.folder("verify").glob("*.json"))]
    records = [record for file in found for record in file["records"]]
    if found:
        merged = {"machine": found[-1]["machine"], "records": records}
        (plan.out / "verify.json").write_text(json.dumps(merged, indent=1))
    checks = [record for record in records if record["status"] in (PASSED, FAILED)]
    failed = [record for record in checks if record["status"] == FAILED]
    names = ("op", "backend", "dtype", "check")
    return len(checks), [
        f"{' '.join(str(record[name]) for name in names)}: {record['failures'][0]}"
        for record in failed
    ]


# State -------------------------------------------------------------------------------------------


def _known(plan: Plan, names: Sequence[str]) -> dict[str, Part]:
    """What state.json says of every part, and new ones for those to be run."""
    path, of = plan.out / "state.json", _identity(plan)
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    state = {name: Part(**fields) for name, fields in known.items()}
    for name in names:
        if name in state and state[name].of != of:
            raise ValueError(
                f"--out: {plan.out} has {name} of {state[name].of}, this is {of}: choose another"
                " folder, or pass --again"
            )
        state.setdefault(name, Part(of))
    return state


def _identity(plan: Plan) -> str:
    facts = machine.describe()
    where = facts["gpu"] if plan.device == "cuda" else facts["cpu"]
    return f"{where}, commit {facts['commit']}" + (", smoke" if plan.smoke else "")


def _save(plan: Plan, state: dict[str, Part]) -> None:
    path = plan.out / "state.json"
    written = path.with_suffix(".new")
    written.write_text(json.dumps({n: dataclasses.asdict(p) for n, p in state.items()}, indent=1))
    written.replace(path)


def _set_aside(plan: Plan, names: Sequence[str]) -> None:
    """Renames what the parts wrote to *.old, in place of what has that name; folders go. Forgets them."""
    for name in names:
        for path in (plan.rows(name), plan.out / f"{name}.log"):
            if path.exists():
                path.replace(path.with_name(f"{path.name}.old"))
        shutil.rmtree(plan.folder(name), ignore_errors=True)
    if "verify" in names:
        old = plan.out / "verify.json"
        if old.exists():
            old.replace(old.with_name("verify.json.old"))
    path = plan.out / "state.json"
    if path.exists():
        left = {n: fields for n, fields in json.loads(path.read_text()).items() if n not in names}
        path.write_text(json.dumps(left, indent=1))


def _peer_options(args: argparse.Namespace) -> tuple[str, ...]:
    """The peers' options with absolute paths: commands run in the checkout."""
    pairs = (("--peer-python", args.peer_python), ("--peer-path", args.peer_path))
    return tuple(word for option, p in pairs if p for word in (option, str(p.absolute())))


def _print_summary(parts: dict[str, Part]) -> None:
    print(f"\n{'part':<10}{'status':<13}{'seconds':>8}{'rows':>7}{'failures':>10}")
    for name, part in parts.items():
        print(
            f"{name:<10}{part.status:<13}{part.seconds:>8.0f}{part.rows:>7}{len(part.failures):>10}"
            + "".join(f"  {words}" for words in (part.reason, part.result) if words)
        )
    for name, part in parts.items():
        for failure in part.failures[:_SHOWN]:
            print(f"{name}: {failure}")
        if len(part.failures) > _SHOWN:
            print(f"{name}: and {len(part.failures) - _SHOWN} more, see {name}.log")
    if any(part.status == OUT_OF_TIME for part in parts.values()):
        print("Out of time: the same command goes on where it was.")
