"""The harness catches what it is there to catch."""

from __future__ import annotations

import pytest
import torch

from effdet_kernels import testing
from effdet_kernels._library import TensorSpec, nchw
from effdet_kernels.spec import Case, OpSpec, ratio

SPEC = TensorSpec((2, 3), torch.float32, torch.device("cpu"))


def test_guards_see_a_write_before_and_after_the_output():
    for position in (-1, 6):
        with (
            pytest.raises(AssertionError, match="outside of its output"),
            testing.guarded_outputs(),
        ):
            out = SPEC.empty()
            out.as_strided((1,), (1,), out.storage_offset() + position).fill_(1.0)


def test_outputs_start_as_nan():
    with testing.guarded_outputs():
        assert bool(SPEC.empty().isnan().all())


def test_unwritten_output_fails_the_bound():
    nan = torch.full((3,), torch.nan, dtype=torch.float64)
    assert ratio(nan, torch.ones(3, dtype=torch.float64), torch.ones(3)) == torch.inf


def test_same_nan_and_infinity_are_no_error():
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], dtype=torch.float64)
    assert ratio(values, values.clone(), torch.zeros(4)) == 0
    assert ratio(-values, values, torch.ones(4)) == torch.inf


def test_bound_tells_float32_from_bfloat16_accumulation():
    """A sum of 1024 terms: float32 accumulation passes, bfloat16 accumulation fails."""
    spec = OpSpec(
        name="sum",
        op=lambda x: x.sum(0),
        reference=lambda x: x.sum(0),
        cases=(
            Case("long", lambda g: {"x": torch.rand(1024, 8, generator=g, dtype=torch.float64)}),
        ),
        mutants={},
        magnitude=lambda x: [x.abs().sum(0)],
        reduction=lambda x: len(x),
    )
    inputs = spec.inputs(spec.cases[0], torch.float32)
    assert spec.error_ratio(inputs, spec.op(**inputs), torch.float32) <= 1
    total = torch.zeros(8, dtype=torch.bfloat16)
    for row in inputs["x"].bfloat16():
        total += row
    assert spec.error_ratio(inputs, total.float(), torch.float32) > 10


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_keep_the_values(layout):
    tensor = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    assert torch.equal(testing.LAYOUTS[layout](tensor), tensor)


def test_sliced_is_neither_dense_nor_aligned():
    view = testing.sliced(torch.rand(2, 3, 4, 5))
    assert not view.is_contiguous() and view.storage_offset() % 4


def test_conform_copies_an_alias_and_fixes_strides():
    x = torch.rand(2, 1, 4, 4)
    out = nchw(x.shape, x).conform(x, [x])
    assert out.data_ptr() != x.data_ptr() and torch.equal(out, x)
    assert out.stride() == torch.empty(x.shape, memory_format=torch.channels_last).stride()


def test_case_is_deterministic_and_rounds():
    case = Case("c", lambda g: {"x": torch.rand(5, generator=g, dtype=torch.float64), "n": 3})
    assert torch.equal(
        spec.inputs(case, torch.float64)["x"].bfloat16(), case.inputs(torch.bfloat16)["x"]
    )
    assert case.inputs(torch.bfloat16, keep=("x",))["x"].dtype == torch.float32
