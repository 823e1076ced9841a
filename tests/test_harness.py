"""The harness catches what it is there to catch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from effdet_kernels import testing
from effdet_kernels._library import TensorSpec, nchw
from effdet_kernels.bound import differentiable, with_leaves
from effdet_kernels.spec import Case, OpSpec, iter_specs, ratio

SPEC = TensorSpec((2, 3), torch.float32, torch.device("cpu"))


def test_guards_see_a_write_before_and_after_the_output():
    for position in (-1, 6):
        with (
            pytest.raises(testing.CheckError, match="outside of its output"),
            testing.guarded_outputs(),
        ):
            out = SPEC.empty()
            out.as_strided((1,), (1,), out.storage_offset() + position).fill_(1.0)


def test_outputs_and_scratch_memory_start_as_nan():
    with testing.guarded_outputs():
        assert bool(SPEC.empty().isnan().all())
        assert bool(torch.empty(100).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_changed_input_is_caught():
    spec = next(s for s in iter_specs() if s.name == "pointwise_conv")
    careless = dataclasses.replace(spec, op=lambda **a: (a["x"].add_(1), spec.op(**a))[1])
    with pytest.raises(testing.CheckError, match="x: the kernel changed its input"):
        testing.check_forward(careless, spec.cases[0], torch.float32, "reference")


def test_unwritten_output_fails_the_bound():
    nan = torch.full((3,), torch.nan, dtype=torch.float64)
    assert ratio(nan, torch.ones(3, dtype=torch.float64), torch.ones(3)) == torch.inf


def test_finite_where_the_reference_is_not_is_an_error_and_the_reverse():
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], dtype=torch.float64)
    assert ratio(values, values.clone(), torch.zeros(4)) == 0
    for position in range(3):
        finite = values.clone()
        finite[position] = 0
        assert ratio(finite, values, torch.ones(4)) == torch.inf
        assert ratio(values, finite, torch.ones(4)) == torch.inf


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


def test_inputs_are_the_same_every_time_rounded_and_repeated():
    spec = OpSpec(
        name="sum",
        op=torch.sum,
        reference=torch.sum,
        cases=(),
        mutants={},
        keep_wide=("w",),
        batched=("x",),
    )
    case = Case("c", lambda g: {"x": torch.rand(2, 5, generator=g, dtype=torch.float64), "n": 3})
    wide, short = (spec.inputs(case, dtype)["x"] for dtype in (torch.float64, torch.bfloat16))
    assert torch.equal(wide.bfloat16(), short)
    vector = Case("c", lambda g: {"w": torch.rand(5, generator=g, dtype=torch.float64)})
    assert spec.inputs(vector, torch.bfloat16)["w"].dtype == torch.float32
    repeated = spec.inputs(dataclasses.replace(case, times=3), torch.float64)["x"]
    assert torch.equal(repeated, torch.cat([wide] * 3))


def separable_in_bfloat16(accumulator: torch.dtype):
    """Depthwise, then pointwise: the depthwise result in bfloat16, products added up in ``accumulator``."""

    def kernel(x, dw_weight, pw_weight, scale, shift, act, **_):
        outputs = []
        for level, factor, term in zip(x, scale, shift, strict=True):
            (dw,), (pw,) = dw_weight, pw_weight
            middle = F.conv2d(level.float(), dw.float(), padding=1, groups=len(dw)).bfloat16()
            total = torch.zeros(len(level), len(pw), *level.shape[2:], dtype=accumulator)
            for channel in range(level.shape[1]):
                product = middle[:, channel, None].float() * pw[:, channel].float()
                total = (total.float() + product).to(accumulator)
            y = total.float() * factor[:, None, None] + term[:, None, None]
            outputs.append((F.silu(y) if act == "swish" else y).bfloat16())
        return outputs

    return kernel


def test_a_right_bfloat16_kernel_that_rounds_its_intermediate_is_accepted():
    spec = next(s for s in iter_specs() if s.name == "separable_conv")
    draw = next(c for c in spec.cases if c.name == "levels").make

    def wider(generator):
        """Enough channels for the accumulation to matter."""
        inputs = draw(generator)
        normal = {"generator": generator, "dtype": torch.float64}
        inputs["x"] = [torch.randn(1, 256, *x.shape[2:], **normal) for x in inputs["x"]]
        inputs["dw_weight"] = [torch.randn(256, 1, 3, 3, **normal) / 3]
        inputs["pw_weight"] = [torch.randn(6, 256, 1, 1, **normal) / 16]
        return inputs

    inputs = spec.inputs(Case("wide", wider), torch.bfloat16)
    right, wrong = (
        spec.error_ratio(inputs, separable_in_bfloat16(dtype)(**inputs), torch.bfloat16)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0.1 < right <= 1 < wrong


def test_a_gradient_that_forgets_a_repeat_of_the_batch_is_rejected():
    """Gradients of weights add up over the repeats; those of maps do not."""
    spec = next(s for s in iter_specs() if s.name == "separable_conv")
    case = dataclasses.replace(spec.cases[0], times=3)
    assert testing.check_gradient(spec, case, torch.float32, "reference") <= 1
    inputs = with_leaves(spec, spec.inputs(case, torch.float32))
    outputs = spec.op(**inputs)
    grads = testing.random_gradients(outputs, times=3)
    found = testing.gradients(spec, inputs, outputs, grads)
    assert spec.gradient_ratio(inputs, grads, found, torch.float32, times=3) <= 1
    names = [name for name, _ in differentiable(spec, inputs)]
    for name in ("x", "pw_weight"):
        wrong = list(found)
        wrong[names.index(name)] = found[names.index(name)] * (2 / 3)
        assert spec.gradient_ratio(inputs, grads, wrong, torch.float32, times=3) > 1
