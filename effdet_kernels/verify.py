"""``python -m effdet_kernels.verify``: checks every op on every backend that is here, on this machine.

Each case is compared with the float64 reference under the error bound of ``effdet_kernels.bound``; a ratio of at most
1 passes. The checks are those of ``effdet_kernels.testing``. Exit status: 0 when all that ran passed, 1 when something
failed, 2 when nothing ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _dispatch, guards, testing
from effdet_kernels.bound import flatten, map_tensors, tensors_of
from effdet_kernels.spec import Case, OpSpec, iter_specs

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
Call = Callable[[], "float | None"]
Check = Iterator[tuple[str, Call]]
_HALF = (torch.bfloat16, torch.float16)
_LARGE = 2**31  # elements that a 32-bit offset cannot address


@dataclasses.dataclass(frozen=True)
class Subject:
    """What one row of the table is about."""

    spec: OpSpec
    backend: str
    dtype: torch.dtype
    device: str
    quick: bool = False

    def cases(self) -> list[Case]:
        """The small cases; when quick the first of them, and the first that is larger than a kernel's blocks."""
        small = [case for case in self.spec.cases if "bench" not in case.tags]
        blocks = [case for case in small if "blocks" in case.tags]
        return small[:1] + blocks[:1] if self.quick else small

    def differentiable_cases(self) -> list[Case]:
        """Of these, those whose gradients are checked."""
        return [case for case in self.cases() if "not_differentiable_here" not in case.tags]

    def layouts(self) -> Sequence[tuple[str, Callable[[Tensor], Tensor]]]:
        """The memory layouts; when quick the first of them."""
        return list(guards.LAYOUTS.items())[: 1 if self.quick else None]

    def call(self, check: Callable[..., Any], case: Case, **options: Any) -> Call:
        """``check`` of ``effdet_kernels.testing`` on one case."""
        return functools.partial(
            check, self.spec, case, self.dtype, self.backend, self.device, **options
        )


@dataclasses.dataclass
class Outcome:
    """Of one check of one subject: how many calls, the worst error over the bound, what failed, why it did not run."""

    check: str
    calls: int = 0
    worst: float | None = None  # None: a check without a ratio
    failures: list[str] = dataclasses.field(default_factory=list)
    not_run: str | None = None
    seconds: float = 0.0

    def add(self, ratio: float | None) -> None:
        self.calls += 1
        if ratio is not None:
            self.worst = max(self.worst or 0.0, ratio)

    @property
    def status(self) -> str:
        return "failed" if self.failures else "not run" if self.calls == 0 else "passed"


# Checks: each yields (what, call); the call returns a ratio or None, or raises --------------------------


class NotRun(Exception):
    """A check does not apply, or this machine cannot run it; the message says why."""


def _forward(s: Subject) -> Check:
    for case in s.cases():
        for name, layout in s.layouts():
            yield f"{case.name}, {name} inputs", s.call(testing.check_forward, case, arrange=layout)


def _gradient(s: Subject) -> Check:
    _needs_a_backward(s)
    check = testing.check_gradient
    for case in s.differentiable_cases():
        for name, layout in s.layouts():
            yield (
                f"{case.name}, {name} inputs and gradients",
                s.call(check, case, arrange=layout, arrange_grads=layout),
            )
        yield f"{case.name}, expanded gradients", s.call(check, case, arrange_grads=guards.expanded)
        yield f"{case.name}, of some inputs at a time", s.call(check, case, parts=2)
        for k in testing.outputs_to_leave_out(s.spec, case):
            yield f"{case.name}, without a gradient of output {k}", s.call(check, case, without=k)
        if s.dtype == torch.float64:
            yield f"{case.name}, gradcheck", functools.partial(_gradcheck, s, case)


def _needs_a_backward(s: Subject) -> None:
    """Raises NotRun where a gradient would not be this backend's."""
    if not s.spec.diff_args:
        raise NotRun("the op has no gradient")
    serving = testing.backward_backend(s.spec, s.backend, s.device)
    if serving != s.backend:
        raise NotRun(
            f"{s.spec.name} has no {s.backend} backward: the gradient is that of {serving}"
        )


def _gradcheck(s: Subject, case: Case) -> None:
    """On random projections of the Jacobian; the test suite compares every entry."""
    testing.gradcheck(s.spec, case, s.backend, s.device, fast=True)


def _repeat(s: Subject) -> Check:
    for case in s.cases():
        yield case.name, s.call(testing.check_repeatable, case)


def _gradient_repeat(s: Subject) -> Check:
    _needs_a_backward(s)
    if s.backend == "reference" and s.device == "cuda":
        raise NotRun("torch adds up some gradients of the reference in any order on a GPU")
    for case in s.differentiable_cases():
        yield case.name, s.call(testing.check_gradient_repeatable, case)


def _nonfinite(s: Subject) -> Check:
    if not s.spec.nonfinite:
        raise NotRun("the op defines what it does with NaN; its cases hold some")
    for case in s.cases():
        yield case.name, s.call(testing.check_nonfinite, case)


def _autocast(s: Subject) -> Check:
    if s.dtype not in _HALF:
        raise NotRun("only for bf16 and fp16")
    for case in s.cases():
        yield case.name, s.call(testing.check_autocast, case)


def _large(s: Subject) -> Check:
    """A real shape with its batch repeated until an argument or the output passes 2**31 elements."""
    if not s.spec.batched:
        raise NotRun("the images of a batch are not independent")
    case, needed = large_case(s.spec, s.dtype, s.backend)
    free = free_memory(s.device)
    if needed > free:
        raise NotRun(f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")
    yield f"{case.name} x {case.times}", s.call(testing.check_large, case)


def large_case(spec: OpSpec, dtype: torch.dtype, backend: str) -> tuple[Case, int]:
    """The real case that needs the fewest repeats to pass 2**31 elements, and the bytes that a call then takes."""
    case, largest, held = _largest_case(spec)
    times = _LARGE // largest + 1
    # The reference computes in float32 or wider, with some intermediates of the size of its input.
    extra = 16 if backend == "reference" else 0
    sizes = [
        t.numel() * (dtype.itemsize + extra if t.is_floating_point() else t.itemsize) for t in held
    ]
    return dataclasses.replace(case, times=times), times * sum(sizes)


@functools.cache
def _largest_case(spec: OpSpec) -> tuple[Case, int, list[Tensor]]:
    """The real case with the largest batched argument or output: its elements, and on "meta" all that grows with it."""
    found = []
    for case in spec.cases:
        if "bench" in case.tags and "gpu" not in case.tags:
            inputs = {
                name: map_tensors(value, lambda t: t.to("meta"))
                for name, value in spec.inputs(case, torch.float32).items()
            }
            held = [t for name in spec.batched for t in tensors_of(inputs[name])]
            held += flatten(spec.op(**inputs))
            found.append((case, max(t.numel() for t in held), held))
    return max(found, key=lambda item: item[1])


def free_memory(device: str) -> int:
    """Bytes that a call may take on ``device``."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


CHECKS: dict[str, Callable[[Subject], Check]] = {
    "forward": _forward,
    "gradient": _gradient,
    "repeat": _repeat,
    "gradient_repeat": _gradient_repeat,
    "nonfinite": _nonfinite,
    "autocast": _autocast,
    "large": _large,
}


def run_checks(names: Sequence[str], subject: Subject) -> list[Outcome]:
    """Checks in order; after a kernel failed the first, the others are not run: it may do any harm."""
    outcomes: list[Outcome] = []
    for name in names:
        if outcomes and outcomes[0].failures:
            outcomes.append(Outcome(name, not_run=f"{outcomes[0].check} failed"))
        else:
            outcomes.append(run_check(name, subject))
    return outcomes


def run_check(name: str, subject: Subject) -> Outcome:
    """One check, every failure of it caught and named."""
    outcome = Outcome(name)
    start = time.perf_counter()
    try:
        for what, call in CHECKS[name](subject):
            try:
                ratio = call()
            except Exception as error:  # a kernel may fail in any way; the others are still checked
                outcome.calls += 1
                first = str(error).strip().splitlines()
                outcome.failures.append(
                    f"{what}: {type(error).__name__}: {first[0] if first else ''}"
                )
                continue
            outcome.add(ratio)
            if ratio is not None and not ratio <= 1:
                outcome.failures.append(f"{what}: error is {ratio:.3g} of the bound")
    except NotRun as reason:
        outcome.not_run = str(reason)
    outcome.seconds = time.perf_counter() - start
    return outcome


# The table ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
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
    args = parser.parse_args(argv)
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
    reasons = {f"{r['check']}: {r['not_run']}" for r in records if r["status"] == "not run"}
    for reason in sorted(reasons):
        print(f"  not run: {reason}")
    if counts["failed"]:
        return 1
    return 0 if counts["passed"] else 2


if __name__ == "__main__":
    sys.exit(main())
