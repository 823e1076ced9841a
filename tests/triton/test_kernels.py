"""Every Triton kernel through the harness, forward and backward, at its real block sizes.

The interpreter computes a bfloat16 product wrongly, so float16 stands for both; real shapes would take it hours.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from effdet_kernels import guards, suite, testing
from effdet_kernels.bound import tensors_of
from effdet_kernels.spec import iter_specs

SPECS = [spec for spec in iter_specs() if "triton" in testing.operator(spec).impls]
WITH_BACKWARD = [spec for spec in SPECS if "triton" in testing.operator(spec).backwards]
DTYPES = (torch.float32, torch.float16, torch.float64)
HALF_AND_FULL = (torch.float32, torch.float16)  # whose kernels may differ in more than a dtype
LAYOUTS = ("channels_last", "narrowed", "sliced")


@pytest.fixture(autouse=True)
def _quiet():
    """Masked lanes hold NaN, of which numpy warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def named(specs, blocks):
    """Small cases of ``specs``; with ``blocks`` those that are larger than a kernel's blocks instead."""
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}")
        for spec in specs
        for case in spec.small_cases()
        if ("blocks" in case.tags) == blocks
    ]


def differentiable(parameters):
    return [p for p in parameters if "not_differentiable_here" not in p.values[1].tags]


def smallest(spec):
    """The case of least elements, of those without empty tensors."""
    cases = [p.values[1] for p in named([spec], blocks=False)]
    if spec in WITH_BACKWARD:
        cases = [p.values[1] for p in differentiable(named([spec], blocks=False))]
    sizes = {case: sizes_of(spec, case) for case in cases}
    return min((case for case in cases if all(sizes[case])), key=lambda case: sum(sizes[case]))


def sizes_of(spec, case):
    return [
        t.numel() for value in spec.inputs(case, torch.float32).values() for t in tensors_of(value)
    ]


@pytest.mark.quick
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_smallest_case(spec):
    """Of what the other tests check, as much as a minute allows."""
    case, arrange = smallest(spec), guards.LAYOUTS["narrowed"]
    for dtype in (d for d in HALF_AND_FULL if d in spec.dtypes):
        assert testing.check_forward(spec, case, dtype, "triton", arrange=arrange) <= 1
        if spec in WITH_BACKWARD:
            assert testing.check_gradient(spec, case, dtype, "triton", arrange=arrange) <= 1
    testing.check_repeatable(spec, case, torch.float32, "triton")
    if spec in WITH_BACKWARD:
        assert testing.gradcheck(spec, case, "triton", fast=True)


@pytest.mark.parametrize(("spec", "case"), named(SPECS, blocks=False))
def test_forward(spec, case):
    for dtype in (d for d in DTYPES if d in spec.dtypes):
        for layout in LAYOUTS:
            arrange = guards.LAYOUTS[layout]
            worst = testing.check_forward(spec, case, dtype, "triton", arrange=arrange)
            assert worst <= 1, f"{dtype} {layout}: {worst:.3g} of the bound"


@pytest.mark.parametrize(("spec", "case"), named(SPECS, blocks=True))
def test_forward_across_blocks(spec, case):
    for dtype in (d for d in HALF_AND_FULL if d in spec.dtypes):
        arrange = guards.channels_last
        assert testing.check_forward(spec, case, dtype, "triton", arrange=arrange) <= 1


@pytest.mark.parametrize(("spec", "case"), differentiable(named(WITH_BACKWARD, blocks=False)))
def test_gradient(spec, case):
    for dtype in (d for d in DTYPES if d in spec.dtypes):
        for layout in LAYOUTS:
            arrange = guards.LAYOUTS[layout]
            worst = testing.check_gradient(
                spec, case, dtype, "triton", arrange=arrange, arrange_grads=arrange
            )
            assert worst <= 1, f"{dtype} {layout}: {worst:.3g} of the bound"


@pytest.mark.parametrize(("spec", "case"), differentiable(named(WITH_BACKWARD, blocks=False)))
def test_gradient_of_some(spec, case):
    """Of some inputs only, of one output only, and for gradients with strides of 0."""
    check, dtype = testing.check_gradient, torch.float32
    for parts in testing.PARTS.values():
        for each in (d for d in HALF_AND_FULL if d in spec.dtypes):
            assert check(spec, case, each, "triton", parts=parts) <= 1
    for output in testing.outputs_to_take_alone(spec, case):
        assert check(spec, case, dtype, "triton", only=output) <= 1
    assert check(spec, case, dtype, "triton", arrange_grads=guards.expanded) <= 1


@pytest.mark.parametrize(("spec", "case"), differentiable(named(WITH_BACKWARD, blocks=True)))
def test_gradient_across_blocks(spec, case):
    arrange = guards.channels_last
    check = testing.check_gradient
    for dtype in (d for d in HALF_AND_FULL if d in spec.dtypes):
        assert check(spec, case, dtype, "triton", arrange=arrange, arrange_grads=arrange) <= 1


@pytest.mark.parametrize(("spec", "case"), differentiable(named(WITH_BACKWARD, blocks=False)))
def test_gradcheck(spec, case):
    assert testing.gradcheck(spec, case, "triton", fast=True)


@pytest.mark.parametrize(("spec", "case"), named(SPECS, blocks=False))
def test_programs_in_any_order_give_the_same_bits(spec, case):
    testing.check_repeatable(spec, case, torch.float32, "triton")
    if spec in WITH_BACKWARD and "not_differentiable_here" not in case.tags:
        testing.check_gradient_repeatable(spec, case, torch.float32, "triton")


@pytest.mark.parametrize(("spec", "case"), named(SPECS, blocks=False))
def test_nonfinite_inputs_give_nonfinite_outputs_where_the_reference_has_them(spec, case):
    for dtype in (d for d in HALF_AND_FULL if spec.nonfinite and d in spec.dtypes):
        assert testing.check_nonfinite(spec, case, dtype, "triton") <= 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_all_that_verify_checks(spec, dtype):
    """Every case in every layout."""
    if dtype in spec.dtypes:
        subject = suite.Subject(spec, "triton", dtype, "cpu")
        for outcome in suite.run_checks([c for c in suite.CHECKS if c != "large"], subject):
            assert not outcome.failures
