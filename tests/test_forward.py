"""Every op, case, dtype, memory layout and backend: within the error bound, outputs poisoned and guarded."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from effdet_kernels import testing, use_backend
from effdet_kernels.spec import OpSpec, flatten, iter_specs

SPECS = list(iter_specs())
HALF = (torch.bfloat16, torch.float16)


def cases(tag_out: str = "bench"):
    """All (spec, case) pairs small enough for a test."""
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}")
        for spec in SPECS
        for case in spec.cases
        if tag_out not in case.tags
    ]


def runnable(spec: OpSpec) -> list[str]:
    """The backends that run CPU tensors here; the native one must be there, or the build is broken."""
    found = [
        name for name, reason in testing.backends(spec).items() if name in ("reference", "cpu")
    ]
    assert all(testing.backends(spec)[name] is None for name in found)
    return found


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(("spec", "case"), cases())
def test_error_is_within_the_bound(spec, case, layout):
    for backend in runnable(spec):
        # The reference rounds every step in half precision; there it is the definition only in float32 and float64.
        dtypes = [d for d in spec.dtypes if backend != "reference" or d not in HALF]
        for dtype in dtypes:
            worst = testing.check_forward(
                spec, case, dtype, backend, arrange=testing.LAYOUTS[layout]
            )
            assert worst <= 1, f"{backend} {dtype}: {worst:.3g} of the bound"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 201))
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_error_is_within_the_bound_of_other_draws(spec, seed):
    for case in spec.cases:
        if "bench" not in case.tags:
            drawn = dataclasses.replace(case, seed=seed)
            for backend in runnable(spec):
                for dtype in (torch.float32, torch.float64):
                    worst = testing.check_forward(spec, drawn, dtype, backend)
                    assert worst <= 1, f"{case.name} {backend} {dtype}: {worst:.3g} of the bound"


@pytest.mark.parametrize(("spec", "case"), cases())
def test_half_precision_keeps_dtype_and_layout(spec, case):
    """In half precision every backend returns what the out_spec says (checked at registration), without NaN."""
    for dtype in (d for d in spec.dtypes if d in HALF):
        inputs = spec.inputs(case, dtype)
        expected = flatten(spec.reference(**spec.inputs(case, torch.float64)))
        for got, want in zip(flatten(spec.op(**inputs)), expected, strict=True):
            assert got.shape == want.shape
            if got.is_floating_point():
                assert torch.equal(got.isfinite(), want.isfinite())


@pytest.mark.parametrize(("spec", "case"), cases())
def test_two_runs_are_bitwise_equal(spec, case):
    inputs = spec.inputs(case, torch.float32)
    for backend in runnable(spec):
        with use_backend(backend):
            first, second = flatten(spec.op(**inputs)), flatten(spec.op(**inputs))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize(("spec", "case"), cases())
def test_inputs_stay_as_they_were(spec, case):
    inputs = spec.inputs(case, torch.float32)
    untouched = spec.inputs(case, torch.float32)
    for backend in runnable(spec):
        with use_backend(backend):
            spec.op(**inputs)
    for name, value in inputs.items():
        for a, b in zip(_tensors(value), _tensors(untouched[name]), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [v for v in value if isinstance(v, torch.Tensor)]
        if isinstance(value, (list, tuple))
        else []
    )
