"""OpSpec: all that the harness and the benchmarks need to know of an op; found by discovery in ``ops/*/spec.py``.

The error bound, one formula for every op and dtype, is per element

    |y - ref| <= 2 u(out) |ref| + 2 sqrt(K) u(acc) M + terms

with u the unit roundoff, ``ref`` the reference in float64 on the rounded inputs, ``acc`` float32 (float64 for float64
inputs), K the longest reduction, M the sum of the magnitudes of what is added up, and ``terms`` the op's declared
extra errors (an intermediate that is rounded, an approximated function).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Comparison = Callable[[Inputs, Sequence[Tensor], torch.dtype], float]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: ``make(generator)`` draws all keyword arguments of the op, floating tensors in float64, on the CPU."""

    name: str
    make: Callable[[torch.Generator], Inputs]
    tags: frozenset[str] = (
        frozenset()
    )  # "bench": a real shape that benchmarks time and tests leave out
    seed: int = 0

    def inputs(self, dtype: torch.dtype, device: str = "cpu", keep: Sequence[str] = ()) -> Inputs:
        """The case's arguments, floating tensors rounded to ``dtype`` (those named in ``keep``: at least float32)."""
        drawn = self.make(torch.Generator().manual_seed(self.seed))
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32

        def rounded(name: str) -> Callable[[Tensor], Tensor]:
            target = wide if name in keep else dtype
            return lambda t: t.to(device, target) if t.is_floating_point() else t.to(device)

        return {name: map_tensors(value, rounded(name)) for name, value in drawn.items()}


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """What is known of one op. Functions take the op's keyword arguments, in float64, unless said otherwise."""

    name: str
    op: Callable[..., Any]  # the public function
    reference: Callable[..., Any]  # same keyword arguments and results, any float dtype
    cases: tuple[Case, ...]
    mutants: Mapping[
        str, Callable[..., Any]
    ]  # plausible wrong versions; the bound must reject each
    diff_args: tuple[str, ...] = ()  # arguments with gradients
    keep_wide: tuple[
        str, ...
    ] = ()  # arguments that stay float32 when the dtype under test is shorter
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    magnitude: Callable[..., Sequence[Tensor]] | None = None  # M, one tensor per floating output
    reduction: Callable[..., int] | None = None  # K
    terms: Callable[[Inputs, torch.dtype], Sequence[Tensor]] | None = None  # extra errors by output
    compare: Comparison | None = None  # replaces the bound (selection ops): error / allowed error
    bytes: Callable[..., int] | None = (
        None  # compulsory memory traffic in bytes, inputs in their real dtypes
    )
    flops: Callable[..., int] | None = None  # multiply-adds count 2

    def error_ratio(self, inputs: Inputs, outputs: Any, dtype: torch.dtype) -> float:
        """Worst error of ``outputs`` (of a call on ``inputs``, tensors of ``dtype``) as a share of what is allowed."""
        exact = {name: map_tensors(value, _widen) for name, value in inputs.items()}
        found = [t.detach().cpu() for t in flatten(outputs)]
        if self.compare is not None:
            return self.compare(exact, found, dtype)
        expected = flatten(self.reference(**exact))
        if len(found) != len(expected):
            raise ValueError(
                f"{self.name}: {len(found)} outputs, the reference has {len(expected)}"
            )
        magnitudes = iter(self.magnitude(**exact) if self.magnitude else ())
        terms = iter(self.terms(exact, dtype) if self.terms else ())
        spread = 2 * math.sqrt(self.reduction(**exact) if self.reduction else 1)
        worst = 0.0
        for got, want in zip(found, expected, strict=True):
            if got.shape != want.shape:
                raise ValueError(
                    f"{self.name}: output {list(got.shape)}, reference {list(want.shape)}"
                )
            if not want.is_floating_point():
                worst = max(worst, 0.0 if torch.equal(got, want) else math.inf)
                continue
            allowed = 2 * roundoff(got.dtype) * want.abs()
            allowed += spread * roundoff(accumulator(dtype)) * next(magnitudes)
            allowed += next(terms, torch.zeros(())) + torch.finfo(got.dtype).tiny
            worst = max(worst, ratio(got.double(), want, allowed))
        return worst


def ratio(got: Tensor, want: Tensor, allowed: Tensor) -> float:
    """max |got - want| / allowed; infinite where one is NaN or infinite and the other is not the same."""
    if got.numel() == 0:
        return 0.0
    same = (got == want) | (got.isnan() & want.isnan())
    both = got.isfinite() & want.isfinite()
    error = torch.where(both, (got - want).abs() / allowed, torch.inf).masked_fill(same, 0)
    return float(error.max())


def roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels accumulate in for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flatten(outputs: Any) -> list[Tensor]:
    """The outputs of an op as a flat list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` applied to it, or to the tensors of the list it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return [function(item) for item in value]
    return value


def iter_specs() -> Iterator[OpSpec]:
    """The specs of all ops, by name."""
    import effdet_kernels.ops as ops

    for module in sorted(pkgutil.iter_modules(ops.__path__), key=lambda m: m.name):
        if module.ispkg:
            yield importlib.import_module(f"effdet_kernels.ops.{module.name}.spec").SPEC


def _widen(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor
