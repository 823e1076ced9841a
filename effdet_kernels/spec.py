"""OpSpec: all that the harness and the benchmarks need to know of an op; found by discovery in ``ops/*/spec.py``."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import bound
from effdet_kernels.bound import accumulator, envelope, flatten, map_tensors, ratio, roundoff

__all__ = [
    "Case",
    "Inputs",
    "OpSpec",
    "accumulator",
    "envelope",
    "flatten",
    "iter_specs",
    "map_tensors",
    "ratio",
    "roundoff",
]

Inputs = dict[str, Any]
Grads = Sequence[Tensor | None]
Comparison = Callable[[Inputs, Sequence[Tensor], torch.dtype], float]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: ``make(generator)`` draws all keyword arguments of the op, floating tensors in float64, on the CPU.

    Tags: "bench", a real shape, timed by benchmarks and left out by tests; "gpu", of these one that only a GPU has
    the memory or the speed for; "blocks", more channels and pixels than a kernel takes at once, too many to compare
    every entry of a Jacobian; "vectors", channels that CUDA kernels take; "not_differentiable_here", gradients are not
    checked.
    """

    name: str
    make: Callable[[torch.Generator], Inputs]
    tags: frozenset[str] = frozenset()
    seed: int = 0
    times: int = 1  # the drawn batch is repeated so often: a batch of 128 need not be drawn whole


@dataclasses.dataclass(frozen=True, eq=False)
class OpSpec:
    """What is known of one op. Functions take the op's keyword arguments, in float64, unless said otherwise."""

    name: str
    op: Callable[..., Any]  # the public function
    reference: Callable[..., Any]  # same keyword arguments and results, any float dtype
    cases: tuple[Case, ...]
    mutants: Mapping[str, Callable[..., Any]]  # plausible wrong versions; the bound rejects each
    diff_args: tuple[str, ...] = ()  # arguments with gradients
    keep_wide: tuple[str, ...] = ()  # stay float32 when the dtype under test is shorter
    batched: tuple[str, ...] = ()  # arguments with a batch dimension, images being independent
    nonfinite: tuple[str, ...] = ()  # arguments whose NaN and Inf pass through as arithmetic has it
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    peers: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    # ^ other ways to the same result, for benchmarks only
    derived: Callable[[Inputs], Inputs] | None = None
    # ^ arguments that the op takes for known functions of others, computed from those: `gradcheck` moves both
    uncompilable: str | None = None  # why benchmarks do not run torch.compile on the reference

    # The error bound (see effdet_kernels.bound).
    magnitude: Callable[..., Sequence[Tensor]] | None = None  # M, one tensor per floating output
    reduction: Callable[..., int] | None = None  # K
    terms: Callable[[Inputs, torch.dtype], Sequence[Tensor]] | None = None  # extra, per output
    compare: Comparison | None = None  # replaces the bound (selection ops): error / allowed error
    gradient_magnitude: Callable[[Inputs, Grads], Sequence[Tensor]] | None = None
    # ^ M of each gradient, from the outputs' gradients; None: the derivative of `magnitude`
    gradient_reduction: Callable[..., int] | None = None  # K of the gradients; None: from shapes
    gradient_roundings: int = 0  # intermediates that a backward may round to the input's dtype

    # Costs, of inputs in their real dtypes. Multiply-adds count 2.
    bytes: Callable[..., int] | None = None  # compulsory traffic: inputs and outputs once
    flops: Callable[..., int] | None = None
    backward_bytes: Callable[..., int] | None = None
    backward_flops: Callable[..., int] | None = None

    def small_cases(self, vectors: bool = False) -> list[Case]:
        """The cases for tests; with ``vectors`` also those that only kernels in CUDA, which read vectors, need."""
        left_out = {"bench"} if vectors else {"bench", "vectors"}
        return [case for case in self.cases if not case.tags & left_out]

    def inputs(self, case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Inputs:
        """The case's arguments, floating tensors rounded to ``dtype`` (``keep_wide``: at least float32)."""
        drawn = case.make(torch.Generator().manual_seed(case.seed))
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32

        def placed(name: str) -> Callable[[Tensor], Tensor]:
            target = wide if name in self.keep_wide else dtype
            repeats = case.times if name in self.batched else 1

            def place(t: Tensor) -> Tensor:
                # A copy: a case may hand out the same tensor at every draw.
                t = t.to(device, target if t.is_floating_point() else t.dtype, copy=True)
                return t.repeat(repeats, *[1] * (t.dim() - 1)) if repeats > 1 else t

            return place

        return {name: map_tensors(value, placed(name)) for name, value in drawn.items()}

    def error_ratio(
        self, inputs: Inputs, outputs: Any, dtype: torch.dtype, times: int = 1
    ) -> float:
        """Worst error of ``outputs`` (of a call on ``inputs``, tensors of ``dtype``) as a share of what is allowed."""
        return bound.forward_ratio(self, inputs, outputs, dtype, times)

    def gradient_ratio(
        self,
        inputs: Inputs,
        grads: Grads,
        found: Sequence[Tensor],
        dtype: torch.dtype,
        times: int = 1,
    ) -> float:
        """The same of gradients ``found`` for the tensors among ``diff_args``, given the outputs' ``grads``."""
        return bound.gradient_ratio(self, inputs, grads, found, dtype, times)


def iter_specs() -> Iterator[OpSpec]:
    """The specs of all ops, by name."""
    import effdet_kernels.ops as ops

    for module in sorted(pkgutil.iter_modules(ops.__path__), key=lambda m: m.name):
        if module.ispkg:
            yield importlib.import_module(f"effdet_kernels.ops.{module.name}.spec").SPEC
