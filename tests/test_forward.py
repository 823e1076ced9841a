"""Every op, case, dtype, memory layout and backend: within the error bound, outputs, inputs and scratch memory guarded.

What ``python -m effdet_kernels.verify`` checks on a user's machine is checked here by the same functions.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from effdet_kernels import _dispatch, guards, testing
from effdet_kernels.spec import OpSpec, iter_specs

SPECS = list(iter_specs())
HALF = (torch.bfloat16, torch.float16)
CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in SPECS
    for case in spec.small_cases()
]


def runnable(spec: OpSpec) -> list[str]:
    """The backends that take CPU tensors; the native one must be there, or the build is broken."""
    found = [name for name in testing.backends(spec) if _dispatch.serves(name, "cpu")]
    assert all(testing.backends(spec)[name] is None for name in found)
    return found


@pytest.mark.parametrize("layout", guards.LAYOUTS)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_error_is_within_the_bound(spec, case, layout):
    for backend in runnable(spec):
        for dtype in spec.dtypes:
            worst = testing.check_forward(
                spec, case, dtype, backend, arrange=guards.LAYOUTS[layout]
            )
            assert worst <= 1, f"{backend} {dtype}: {worst:.3g} of the bound"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 201))
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_error_is_within_the_bound_of_other_draws(spec, seed):
    for case in spec.small_cases(vectors=True):
        drawn = dataclasses.replace(case, seed=seed)
        for backend in runnable(spec):
            for dtype in (torch.float32, torch.float64):
                worst = testing.check_forward(spec, drawn, dtype, backend)
                assert worst <= 1, f"{case.name} {backend} {dtype}: {worst:.3g} of the bound"


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_nonfinite_inputs_give_nonfinite_outputs_where_the_reference_has_them(spec, case):
    for backend in runnable(spec):
        for dtype in spec.dtypes:
            assert testing.check_nonfinite(spec, case, dtype, backend) <= 1


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_runs_are_bitwise_equal(spec, case):
    for backend in runnable(spec):
        for dtype in spec.dtypes:
            testing.check_repeatable(spec, case, dtype, backend)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_autocast_follows_the_ops_rule(spec, case):
    for backend in runnable(spec):
        for dtype in (d for d in spec.dtypes if d in HALF):
            testing.check_autocast(spec, case, dtype, backend)
