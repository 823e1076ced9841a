"""``python -m effdet_kernels.verify``: checks every op on every backend that is here, on this machine.

Each case is compared with the float64 reference under the error bound of ``effdet_kernels.bound``; a ratio of at most
1 passes. The checks are those of ``effdet_kernels.testing``. Exit status: 0 when all that ran passed, 1 when something
failed, 2 when nothing ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
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
    checks = args.check or [name for name in CHECKS if name != "large" or device == "cuda"]
    if args.large and "large" not in checks:
        checks.append("large")
    print(_heading(device))
    backends = list(args.backend or _dispatch.BACKENDS)
    absent = {name: reason for name in backends if (reason := absence(name, device))}
    records: list[dict[str, Any]] = []
    for name, reason in absent.items():
        print(f"{'every op':<17}{name:<10}absent: {reason}")
        records.append({"op": None, "backend": name, "status": "absent", "reason": reason})
        backends.remove(name)
    for spec in specs:
        if not args.op or spec.name in args.op:
            records += verify_op(spec, device, backends, args.dtype, checks, args.quick)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"machine": _machine(device), "records": records}, indent=1, allow_nan=False)
        )
    return _summary(records)


def absence(backend: str, device: str) -> str | None:
    """Why no kernel of ``backend`` can run on tensors on ``device`` here, or None."""
    reason = _dispatch.unavailable_reason(backend)
    if reason is None and not _dispatch.serves(backend, device):
        return f"it does not take tensors on {device}"
    return reason


def verify_op(
    spec: OpSpec,
    device: str,
    backends: Sequence[str],
    dtypes: Sequence[str] | None,
    checks: Sequence[str],
    quick: bool,
) -> Iterator[dict[str, Any]]:
    """Prints a row per backend and dtype of one op; yields a record per check and per missing kernel."""
    implemented = testing.operator(spec).impls
    for backend in backends:
        if backend not in implemented:
            reason = f"{spec.name} has no {backend} kernel"
            print(f"{spec.name:<17}{backend:<10}absent: {reason}")
            yield {"op": spec.name, "backend": backend, "status": "absent", "reason": reason}
            continue
        for label, dtype in DTYPES.items():
            if dtype not in spec.dtypes or (dtypes and label not in dtypes):
                continue
            subject = Subject(spec, backend, dtype, device, quick)
            outcomes = run_checks(checks, subject)
            print(_line(spec.name, backend, label, len(subject.cases()), outcomes), flush=True)
            for outcome in outcomes:
                for failure in outcome.failures:
                    print(f"    {outcome.check}: {failure}")
                yield {
                    "op": spec.name,
                    "backend": backend,
                    "dtype": label,
                    "device": device,
                    "status": outcome.status,
                    **dataclasses.asdict(outcome),
                    "worst": _in_json(outcome.worst),
                }


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
