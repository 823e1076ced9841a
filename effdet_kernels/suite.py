"""What is checked of one op on one backend in one dtype: a list of calls per check, run with every failure named."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _dispatch, guards, testing
from effdet_kernels.bound import flatten, map_tensors, tensors_of
from effdet_kernels.spec import Case, OpSpec

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
        """The small cases; when quick the first of them that the backend takes, and the first of those that are larger
        than a kernel's blocks."""
        return self._chosen(self._small())

    def differentiable_cases(self) -> list[Case]:
        """The same of those whose gradients are checked."""
        cases = [case for case in self._small() if "not_differentiable_here" not in case.tags]
        return self._chosen(cases, gradient=True)

    def _small(self) -> list[Case]:
        return self.spec.small_cases(vectors=testing.usual_layout(self.backend) is not None)

    def _chosen(self, cases: list[Case], gradient: bool = False) -> list[Case]:
        if not self.quick:
            return cases
        blocks = [case for case in cases if "blocks" in case.tags]
        return self._first_taken(cases, gradient) + self._first_taken(blocks, gradient)

    def _first_taken(self, cases: list[Case], gradient: bool) -> list[Case]:
        how = self.dtype, self.backend, self.device, gradient
        taken = (case for case in cases if testing.takes(self.spec, case, *how))
        return list(itertools.islice(taken, 1)) or cases[:1]

    def layouts(self) -> Sequence[tuple[str, Callable[[Tensor], Tensor]]]:
        """The memory layouts; when quick the first of them, or the only one that the backend takes."""
        if not self.quick:
            return list(guards.LAYOUTS.items())
        usual = testing.usual_layout(self.backend)
        return [("contiguous", guards.contiguous) if usual is None else ("channels_last", usual)]

    def call(self, check: Callable[..., Any], case: Case, **options: Any) -> Call:
        """``check`` of ``effdet_kernels.testing`` on one case."""
        return functools.partial(
            check, self.spec, case, self.dtype, self.backend, self.device, **options
        )


@dataclasses.dataclass
class Outcome:
    """Of one check of one subject: how many calls, the worst error over the bound, what failed, why it did not run.

    A call that the kernel refuses by name is none of these: ``refused`` counts them.
    """

    check: str
    calls: int = 0
    worst: float | None = None  # None: a check without a ratio
    failures: list[str] = dataclasses.field(default_factory=list)
    not_run: str | None = None
    seconds: float = 0.0
    refused: int = 0

    def add(self, ratio: float | None) -> None:
        """Count a call that passed, and its error over the bound, if the check has one."""
        self.calls += 1
        if ratio is not None:
            self.worst = max(self.worst or 0.0, ratio)

    @property
    def status(self) -> str:
        """One of "failed", "not run" and "passed"."""
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
        for name, parts in testing.PARTS.items():
            yield f"{case.name}, of some inputs: {name}", s.call(check, case, parts=parts)
        for k in testing.outputs_to_take_alone(s.spec, case):
            yield f"{case.name}, of output {k} alone", s.call(check, case, only=k)
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
    reason = ""
    try:
        for what, call in CHECKS[name](subject):
            try:
                with _dispatch.strictly():
                    ratio = call()
            except _dispatch.BackendError as error:
                outcome.refused += 1
                reason = str(error)
                continue
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
    except NotRun as error:
        reason = str(error)
    if outcome.calls == 0:
        all_refused = f"all {outcome.refused} calls are refused: {reason}"
        outcome.not_run = all_refused if outcome.refused else reason or None
    outcome.seconds = time.perf_counter() - start
    return outcome
