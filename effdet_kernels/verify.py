"""``python -m effdet_kernels.verify``: checks every op on every backend that is here, on this machine.

Each case is compared with the float64 reference under the error bound of ``effdet_kernels.bound``; a ratio of at most
1 passes. The checks are those of ``effdet_kernels.testing``. With ``--jobs`` each op, backend and dtype is checked in a
process of its own, several at a time: what crashes one, or leaves a GPU in error, fails it alone. Exit status: 0 when
all that ran passed, 1 when something failed, 2 when nothing ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from effdet_kernels import _dispatch, _library, testing
from effdet_kernels.spec import OpSpec, iter_specs
from effdet_kernels.suite import CHECKS, Outcome, Subject, run_checks

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
LARGE = "large"  # the check that takes tens of gigabytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 passed, 1 failed, 2 nothing ran."""
    parser = argparse.ArgumentParser(prog="python -m effdet_kernels.verify", description=__doc__)
    add = parser.add_argument
    add("--op", action="append", help="only this op (may be repeated)")
    add("--backend", action="append", choices=_dispatch.BACKENDS, help="only this backend")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", action="append", choices=DTYPES, help="only this dtype")
    add("--check", action="append", choices=CHECKS, help="only this check")
    add("--quick", action="store_true", help="two cases and one layout per op")
    add("--large", action="store_true", help="also on a CPU: calls with more than 2**31 elements")
    add("--json", type=Path, metavar="PATH", help="also write every outcome to this file")
    add("--jobs", type=int, metavar="N", help="processes at a time; default: all in this one")
    add("--emulator", type=Path, metavar="PATH", help="the module that `make emulator` builds")
    args = parser.parse_args(argv)
    if args.emulator:
        if not args.emulator.is_file():
            parser.exit(
                2, f"--emulator: got {args.emulator}, takes the module of `make emulator`\n"
            )
        _library.emulate(args.emulator.resolve())
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in the reference too
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "--device cuda: no CUDA device is visible to torch\n")
    specs = list(iter_specs())
    unknown = set(args.op or ()) - {spec.name for spec in specs}
    if unknown:
        names = ", ".join(spec.name for spec in specs)
        parser.exit(2, f"--op: got {', '.join(sorted(unknown))}, takes one of {names}\n")
    if args.jobs is not None and args.jobs < 1:
        parser.exit(2, f"--jobs: got {args.jobs}, takes at least 1\n")
    checks = args.check or [name for name in CHECKS if name != LARGE or device == "cuda"]
    if args.large and LARGE not in checks:
        checks.append(LARGE)
    print(_heading(device))
    backends = list(args.backend or _dispatch.BACKENDS)
    absent = {name: reason for name in backends if (reason := absence(name, device))}
    records: list[dict[str, Any]] = []
    for name, reason in absent.items():
        print(f"{'every op':<17}{name:<10}absent: {reason}")
        records.append({"op": None, "backend": name, "status": "absent", "reason": reason})
        backends.remove(name)
    tasks = []
    for spec in specs:
        if not args.op or spec.name in args.op:
            for backend in backends:
                if backend in testing.operator(spec).impls:
                    tasks += _tasks(spec, backend, device, args.dtype, checks, args.quick)
                else:
                    records.append(_absent(spec.name, backend))
    if args.json:
        _write(args.json, device, records)
    results = _in_processes(tasks, args.jobs, args.emulator) if args.jobs else _here(tasks)
    for task, outcomes in results:
        print(task.row(outcomes), flush=True)
        records += task.records(outcomes)
        if args.json:
            _write(args.json, device, records)  # a run that is ended leaves what it had
    return _summary(records)


def absence(backend: str, device: str) -> str | None:
    """Why no kernel of ``backend`` can run on tensors on ``device`` here, or None."""
    reason = _dispatch.unavailable_reason(backend)
    if reason is None and not _dispatch.serves(backend, device):
        return f"it does not take tensors on {device}"
    return reason


def _absent(op: str, backend: str) -> dict[str, Any]:
    """Prints that an op has no kernel on a backend; its record."""
    reason = f"{op} has no {backend} kernel"
    print(f"{op:<17}{backend:<10}absent: {reason}")
    return {"op": op, "backend": backend, "status": "absent", "reason": reason}


# Tasks -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The checks of one op on one backend in one dtype: a row of the table."""

    spec: OpSpec
    backend: str
    dtype: str  # of DTYPES
    device: str
    checks: tuple[str, ...]
    quick: bool

    @property
    def subject(self) -> Subject:
        """What the checks are run on."""
        return Subject(self.spec, self.backend, DTYPES[self.dtype], self.device, self.quick)

    def row(self, outcomes: Sequence[Outcome]) -> str:
        """Of the table, with a line for each failure."""
        cases = len(self.subject.cases())
        line = _line(self.spec.name, self.backend, self.dtype, cases, outcomes)
        failures = [f"    {o.check}: {failure}" for o in outcomes for failure in o.failures]
        return "\n".join([line, *failures])

    def records(self, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
        """A record per check."""
        return [
            {
                "op": self.spec.name,
                "backend": self.backend,
                "dtype": self.dtype,
                "device": self.device,
                "status": outcome.status,
                **dataclasses.asdict(outcome),
                "worst": _in_json(outcome.worst),
            }
            for outcome in outcomes
        ]


Results = Iterator[tuple[Task, list[Outcome]]]


def _tasks(
    spec: OpSpec,
    backend: str,
    device: str,
    dtypes: Sequence[str] | None,
    checks: Sequence[str],
    quick: bool,
) -> list[Task]:
    return [
        Task(spec, backend, label, device, tuple(checks), quick)
        for label, dtype in DTYPES.items()
        if dtype in spec.dtypes and (not dtypes or label in dtypes)
    ]


def _here(tasks: Sequence[Task]) -> Results:
    for task in tasks:
        yield task, run_checks(task.checks, task.subject)


def _in_processes(tasks: Sequence[Task], jobs: int, emulator: Path | None) -> Results:
    """Each in a process of its own, ``jobs`` at a time; then, one by one, the check that takes much memory."""
    small = [_with_checks(task, [name for name in task.checks if name != LARGE]) for task in tasks]
    sound = set(tasks)
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda task: _in_a_process(task, jobs, emulator), small)
        for task, alone, outcomes in zip(tasks, small, results, strict=True):
            if outcomes:
                yield alone, outcomes
                sound -= {task} if outcomes[0].failures else set()
    for task in tasks:
        if LARGE in task.checks and task in sound:
            alone = _with_checks(task, [LARGE])
            yield alone, _in_a_process(alone, 1, emulator)


def _with_checks(task: Task, checks: Sequence[str]) -> Task:
    return dataclasses.replace(task, checks=tuple(checks))


def _in_a_process(task: Task, jobs: int, emulator: Path | None) -> list[Outcome]:
    """What this command finds; the checks of a process that dies have failed."""
    if not task.checks:
        return []
    words = [sys.executable, "-m", "effdet_kernels.verify", "--device", task.device]
    words += ["--op", task.spec.name, "--backend", task.backend, "--dtype", task.dtype]
    words += [word for name in task.checks for word in ("--check", name)]
    words += ["--quick"] * task.quick + (["--emulator", str(emulator)] if emulator else [])
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "records.json")
        done = subprocess.run(
            [*words, "--json", str(path)],
            env={"OMP_NUM_THREADS": threads, **os.environ},
            capture_output=True,
            text=True,
        )
        records = json.loads(path.read_text())["records"] if path.exists() else []
    found = [_outcome(record) for record in records if "check" in record]
    if len(found) == len(task.checks):
        return found
    last = (done.stderr.strip().splitlines() or ["it printed no error"])[-1]
    died = f"its process ended with status {done.returncode}: {last}"
    return [Outcome(name, calls=1, failures=[died]) for name in task.checks]


def _outcome(record: dict[str, Any]) -> Outcome:
    """Back from a record."""
    values = {field.name: record[field.name] for field in dataclasses.fields(Outcome)}
    worst = values.pop("worst")
    return Outcome(**values, worst=None if worst is None else float(worst))


# Output ------------------------------------------------------------------------------------------


def _write(path: Path, device: str, records: Sequence[dict[str, Any]]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.new")
    text = {"machine": _machine(device), "records": list(records)}
    written.write_text(json.dumps(text, indent=1, allow_nan=False))
    written.replace(path)


def _in_json(number: float | None) -> float | str | None:
    """JSON has no infinity."""
    return number if number is None or math.isfinite(number) else str(number)


def _machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {"device": name or platform.machine(), "torch": torch.__version__}


def _heading(device: str) -> str:
    machine = _machine(device)
    return (
        f"{machine['device']}, torch {machine['torch']}; worst error over the bound (1 passes)\n"
        f"{'op':<17}{'backend':<10}{'dtype':<6}{'cases':>5}{'forward':>9}{'gradient':>9}"
        f"{'NaN/Inf':>9}  {'repeat fwd/bwd':<16}{'autocast':<9}{'2^31':<9}{'time':>8}"
    )


def _line(op: str, backend: str, dtype: str, cases: int, outcomes: Sequence[Outcome]) -> str:
    by_name = {outcome.check: outcome for outcome in outcomes}
    cells = {name: _cell(by_name.get(name)) for name in CHECKS}
    seconds = sum(outcome.seconds for outcome in outcomes)
    repeat = f"{cells['repeat']}/{cells['gradient_repeat']}"
    return (
        f"{op:<17}{backend:<10}{dtype:<6}{cases:>5}{cells['forward']:>9}{cells['gradient']:>9}"
        f"{cells['nonfinite']:>9}  {repeat:<16}{cells['autocast']:<9}{cells['large']:<9}"
        f"{seconds:>7.1f}s"
    )


def _cell(outcome: Outcome | None) -> str:
    if outcome is None or outcome.status == "not run":
        return "-"
    if outcome.worst is None or math.isinf(outcome.worst):
        return "FAILED" if outcome.failures else "passed"
    return f"{outcome.worst:.2g}" + ("!" if outcome.failures else "")


def _summary(records: Sequence[dict[str, Any]]) -> int:
    counts = {
        status: sum(record["status"] == status for record in records)
        for status in ("passed", "failed", "not run", "absent")
    }
    print(
        f"{counts['passed']} checks passed, {counts['failed']} failed, {counts['not run']} not run,"
        f" {counts['absent']} absent"
    )
    refused = sum(record.get("refused", 0) for record in records)
    if refused:
        print(
            f"{refused} calls refused by name, as documented: those kernels take other layouts, channels or options"
        )
    reasons = {f"{r['check']}: {r['not_run']}" for r in records if r["status"] == "not run"}
    for reason in sorted(reasons):
        print(f"  not run: {reason}")
    if counts["failed"]:
        return 1
    return 0 if counts["passed"] else 2


if __name__ == "__main__":
    sys.exit(main())
