"""The harness catches what it is there to catch."""

from __future__ import annotations

import dataclasses
import unittest.mock

import pytest
import torch
import torch.nn.functional as F

from effdet_kernels import _library, guards, suite, testing
from effdet_kernels._library import TensorSpec, nchw
from effdet_kernels.bound import differentiable, with_leaves
from effdet_kernels.spec import Case, OpSpec, iter_specs, ratio

SPEC = TensorSpec((2, 3), torch.float32, torch.device("cpu"))


def test_guards_see_a_write_before_and_after_the_output():
    for position in (-1, 6):
        with (
            pytest.raises(guards.CheckError, match="outside of its output"),
            guards.guarded_outputs(),
        ):
            out = SPEC.empty()
            out.as_strided((1,), (1,), out.storage_offset() + position).fill_(1.0)


def test_outputs_and_scratch_memory_start_as_nan():
    with guards.guarded_outputs():
        assert bool(SPEC.empty().isnan().all())
        assert bool(torch.empty(100).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_changed_input_is_caught():
    spec = next(s for s in iter_specs() if s.name == "pointwise_conv")
    careless = dataclasses.replace(spec, op=lambda **a: (a["x"].add_(1), spec.op(**a))[1])
    with pytest.raises(guards.CheckError, match="x: the kernel changed its input"):
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


@pytest.mark.parametrize("layout", guards.LAYOUTS)
def test_layouts_keep_the_values(layout):
    tensor = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    assert torch.equal(guards.LAYOUTS[layout](tensor), tensor)


def test_layouts_are_what_they_say():
    tensor = torch.rand(2, 3, 4, 5)
    layouts = {name: layout(tensor) for name, layout in guards.LAYOUTS.items()}
    dense = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    dense["unaligned"] = torch.channels_last
    del layouts["mixed"], layouts["mixed_again"]  # one of the others
    for name, view in layouts.items():
        formats = (torch.contiguous_format, torch.channels_last)
        found = [f for f in formats if view.is_contiguous(memory_format=f)]
        assert found == ([dense[name]] if name in dense else [])
        aligned = view.data_ptr() % 64 == 0
        assert aligned == (name in ("contiguous", "channels_last"))
    assert layouts["narrowed"].stride(1) == 1 and min(layouts["sliced"].stride()) == 2
    assert guards.expanded(tensor).stride() == (0, 0, 0, 0)


@pytest.mark.parametrize("layout", guards.LAYOUTS)
def test_around_every_layout_there_is_nan(layout):
    tensor = torch.rand(2, 3, 4, 5)
    view = guards.LAYOUTS[layout](tensor)
    whole = torch.tensor([], dtype=view.dtype).set_(view.untyped_storage())
    assert int((~whole.isnan()).sum()) == tensor.numel()
    first = view.storage_offset()
    last = first + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    assert whole[:first].numel() and whole[last + 1 :].numel()


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ([0.0], [-0.0], False),
        ([torch.inf], [1.0], False),
        ([torch.nan, 1.0], [torch.nan, 1.0], True),
        ([torch.nan], [1.0], False),
        ([1.0], [1.0 + 2**-23], False),
    ],
)
def test_same_bits(a, b, same):
    assert guards.same_bits(torch.tensor(a), torch.tensor(b)) == same


def test_the_guard_sees_nan_that_a_kernel_read_outside_of_its_input():
    x = guards.contiguous(torch.rand(2, 3))
    with (
        pytest.raises(guards.CheckError, match="outside of its output"),
        guards.guarded_outputs(),
    ):
        out = SPEC.empty()
        beyond = x.as_strided((1,), (1,), x.storage_offset() + 6) * 2 + 1
        out.as_strided((1,), (1,), out.storage_offset() + 6).copy_(beyond)


def with_backward(change):
    """The spec of pointwise_conv, and a context in which its backward's results go through ``change``."""
    op = _library.OPS["pointwise_conv"]
    right = op.backwards["reference"]

    def wrong(grads, *rest):
        return change(right(grads, *rest), grads, rest[-1])

    spec = next(s for s in iter_specs() if s.name == "pointwise_conv")
    return spec, unittest.mock.patch.dict(op.backwards, {"reference": wrong})


def gradient_failures(change):
    spec, changed = with_backward(change)
    with changed:
        subject = suite.Subject(spec, "reference", torch.float32, "cpu")
        return suite.run_check("gradient", subject).failures


def test_nan_is_put_into_every_map_of_a_list():
    seen = []
    spec = next(s for s in iter_specs() if s.name == "weighted_fusion")

    def watched(**inputs):
        seen.append([bool(t.isnan().any()) for t in inputs["x"]])
        return spec.op(**inputs)

    case = next(c for c in spec.cases if c.name == "three")
    watching = dataclasses.replace(spec, op=watched, nonfinite=("x",))
    assert testing.check_nonfinite(watching, case, torch.float32, "reference") <= 1
    assert seen == [[True, False, False], [False, True, False], [False, False, True]]


def test_the_right_backward_passes():
    assert gradient_failures(lambda found, grads, needs: found) == []


def test_a_backward_that_reads_the_gradient_in_the_layout_of_the_input_is_caught():
    op = _library.OPS["pointwise_conv"]
    right = op.backwards["reference"]

    def careless(grads, x, *rest):
        last = torch.channels_last
        alike = x.is_contiguous(memory_format=last) == grads[0].is_contiguous(memory_format=last)
        return [g if alike else g * 0 for g in right(grads, x, *rest)]

    spec = next(s for s in iter_specs() if s.name == "pointwise_conv")
    with unittest.mock.patch.dict(op.backwards, {"reference": careless}):
        subject = suite.Subject(spec, "reference", torch.float32, "cpu")
        failures = suite.run_check("gradient", subject).failures
    assert any("mixed" in failure for failure in failures)


def test_a_backward_that_mixes_up_which_gradients_are_wanted_is_caught():
    """Right when all are wanted."""
    failures = gradient_failures(lambda found, grads, needs: found if all(needs) else found[::-1])
    assert failures and all("of some inputs: " in failure for failure in failures)


def test_a_backward_that_needs_the_inputs_gradient_is_caught():
    """Wrong where the first layers are frozen: x wants no gradient, two or more weights do."""

    def careless(found, grads, needs):
        return found if needs[0] or sum(needs) < 2 else [g * 0 for g in found]

    failures = gradient_failures(careless)
    assert failures and all("of some inputs: " in failure for failure in failures)


def test_a_backward_that_takes_any_gradient_for_a_dense_one_is_caught():
    def careless(found, grads, needs):
        dense = grads[0].is_contiguous() or grads[0].is_contiguous(
            memory_format=torch.channels_last
        )
        return found if dense else [g * 0 for g in found]

    failures = gradient_failures(careless)
    assert {"expanded", "narrowed", "sliced"} <= {
        name
        for name in (*guards.LAYOUTS, "expanded")
        if any(f"{name} inputs" in f or f"{name} gradients" in f for f in failures)
    }


def test_conform_copies_an_alias_and_fixes_strides():
    x = torch.rand(2, 1, 4, 4)
    (out,) = _library._conform([nchw(x.shape, x)], [x], [x])
    assert out.data_ptr() != x.data_ptr() and torch.equal(out, x)
    assert out.stride() == torch.empty(x.shape, memory_format=torch.channels_last).stride()


def test_outputs_that_share_memory_are_taken_apart():
    buffer = torch.rand(2, 6)
    views = [buffer[:, :3], buffer[:, 3:]]
    first, second = _library._conform([SPEC, SPEC], views, [])
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert torch.equal(torch.cat([first, second], 1), buffer)


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
