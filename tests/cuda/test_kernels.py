"""Every CUDA kernel through the harness on the emulator, forward and backward: blocks, warps and threads visited in
several orders, shared memory that starts as NaN, AddressSanitizer and UndefinedBehaviorSanitizer watching.

Calls that a kernel does not take are left out here: test_refusals.py says how many it takes.
"""

from __future__ import annotations

import functools

import pytest
import torch

from effdet_kernels import _dispatch, testing
from effdet_kernels.spec import iter_specs

SPECS = [spec for spec in iter_specs() if "cuda" in testing.operator(spec).impls]
WITH_BACKWARD = [spec for spec in SPECS if "cuda" in testing.operator(spec).backwards]
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


taken = functools.cache(testing.takes)


def calls(specs, *, blocks=False, dtypes=DTYPES, gradient=False):
    """A parameter set per small case and dtype that is taken; ``blocks``: those larger than a kernel's blocks."""
    return [
        pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{str(dtype)[6:]}")
        for spec in specs
        for case in spec.small_cases(vectors=True)
        for dtype in dtypes
        if ("blocks" in case.tags) == blocks
        and dtype in spec.dtypes
        and not (gradient and "not_differentiable_here" in case.tags)
        and taken(spec, case, dtype, "cuda_emu", gradient=gradient)
    ]


@pytest.fixture
def _no_other_backward():
    """A backward that the CUDA kernel refuses is an error here, not served by another backend."""
    with _dispatch.strictly():
        yield


@pytest.mark.parametrize(("spec", "case", "dtype"), calls(SPECS))
def test_error_is_within_the_bound_and_runs_are_bitwise_equal(spec, case, dtype):
    assert testing.check_forward(spec, case, dtype, "cuda_emu") <= 1
    testing.check_repeatable(spec, case, dtype, "cuda_emu")


@pytest.mark.parametrize(("spec", "case", "dtype"), calls(SPECS, blocks=True))
def test_error_of_whole_blocks_is_within_the_bound(spec, case, dtype):
    assert testing.check_forward(spec, case, dtype, "cuda_emu") <= 1


@pytest.mark.parametrize(
    ("spec", "case", "dtype"), calls([spec for spec in SPECS if spec.nonfinite])
)
def test_nonfinite_inputs_give_nonfinite_outputs_where_the_reference_has_them(spec, case, dtype):
    assert testing.check_nonfinite(spec, case, dtype, "cuda_emu") <= 1


@pytest.mark.parametrize(("spec", "case", "dtype"), calls(SPECS, dtypes=HALF))
def test_autocast_follows_the_ops_rule(spec, case, dtype):
    testing.check_autocast(spec, case, dtype, "cuda_emu")


@pytest.mark.usefixtures("_no_other_backward")
@pytest.mark.parametrize(("spec", "case", "dtype"), calls(WITH_BACKWARD, gradient=True))
def test_gradients_are_within_the_bound_and_runs_are_bitwise_equal(spec, case, dtype):
    assert testing.check_gradient(spec, case, dtype, "cuda_emu") <= 1
    testing.check_gradient_repeatable(spec, case, dtype, "cuda_emu")


@pytest.mark.usefixtures("_no_other_backward")
@pytest.mark.parametrize("parts", testing.PARTS)
@pytest.mark.parametrize(
    ("spec", "case", "dtype"), calls(WITH_BACKWARD, dtypes=(torch.bfloat16,), gradient=True)
)
def test_gradients_of_some_inputs(spec, case, dtype, parts):
    parts = testing.PARTS[parts]
    assert testing.check_gradient(spec, case, dtype, "cuda_emu", parts=parts) <= 1


@pytest.mark.usefixtures("_no_other_backward")
@pytest.mark.parametrize(
    ("spec", "case", "dtype"),
    calls(WITH_BACKWARD, blocks=True, dtypes=(torch.float32, torch.bfloat16), gradient=True),
)
def test_gradients_of_whole_blocks_are_within_the_bound(spec, case, dtype):
    assert testing.check_gradient(spec, case, dtype, "cuda_emu") <= 1
