"""What every OpSpec promises: real shapes, costs of real calls, independent images, bounds on gradients."""

from __future__ import annotations

import dataclasses
import re
import unittest.mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from effdet_kernels import testing, use_backend
from effdet_kernels.bound import (
    exact_inputs,
    flatten,
    map_tensors,
    tensors_of,
    with_leaves,
)
from effdet_kernels.ops._activations import ACTIVATIONS
from effdet_kernels.ops._cases import ACTS, nbytes
from effdet_kernels.spec import Case, OpSpec, iter_specs

SPECS = list(iter_specs())
MODELS = ("d0", "d4", "d7")
# One result of all images of a batch.
MIXED = {"batch_norm_act", "batch_norm_grad", "detection_loss"}
PRODUCTS = {
    "dense_conv",
    "depthwise_conv",
    "expand_depthwise",
    "mbconv",
    "pointwise_conv",
}  # FLOPs are those of convolutions
# Of equal logits another is picked: the same gradient, of another logit, where a case has ties. Statistics have none.
SAME_GRADIENT = {
    ("decode_topk", "higher index first on ties"),
    ("batch_norm_act", "given statistics ignored"),
    ("dense_conv", "statistics of the last image"),
    ("depthwise_conv", "statistics of the last image"),
    ("pointwise_conv", "statistics of the last image"),
    ("separable_conv", "statistics of the last image"),
}

each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
with_gradients = pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.diff_args], ids=lambda spec: spec.name
)


@pytest.fixture(autouse=True)
def one_thread():
    """The calls here are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(spec: OpSpec, leave_out: str = "bench") -> list[Case]:
    return [case for case in spec.cases if not case.tags & {"bench", leave_out}]


def maps(spec: OpSpec, case: Case) -> list[torch.Tensor]:
    """The feature maps among the arguments."""
    inputs = spec.inputs(case)
    return [t for name in ("x", "cls_outputs") for t in tensors_of(inputs.get(name))]


# Cases ---------------------------------------------------------------------------------------------


@each_spec
def test_real_shapes_of_three_models(spec):
    real = {case.name for case in spec.cases if "bench" in case.tags}
    assert {model for model in MODELS if any(name.split("_")[0] == model for name in real)} == set(
        MODELS
    )
    # Named after their model, and no small case is.
    assert real == {case.name for case in spec.cases if re.match(r"d[0-7]x?(_|$)", case.name)}
    assert all("bench" in case.tags for case in spec.cases if "gpu" in case.tags)
    assert any("gpu" in case.tags for case in spec.cases)
    assert len({case.name for case in spec.cases}) == len(spec.cases)
    assert not any({"bench", "blocks"} <= case.tags for case in spec.cases)


@each_spec
def test_batches_are_repeated_only_where_images_are_independent(spec):
    repeated = [case for case in spec.cases if case.times > 1]
    assert bool(spec.batched) == (spec.name not in MIXED)
    assert all("gpu" in case.tags for case in repeated)
    assert bool(repeated) == bool(spec.batched)


@each_spec
def test_small_cases_have_one_pixel_no_image_and_several(spec):
    cases = small(spec)
    outputs = [flatten(spec.reference(**spec.inputs(case))) for case in cases]
    sizes = {len(maps(spec, case)[0]) if maps(spec, case) else len(out[0])
             for case, out in zip(cases, outputs, strict=True)}  # fmt: skip
    assert {1, 2} <= sizes
    assert 0 in sizes or spec.name == "batch_norm_act"
    if maps(spec, cases[0]):
        shapes = {m.shape[2:] for case in cases for m in maps(spec, case)}
        assert (1, 1) in shapes
        assert any(height % 2 and height > 1 for height, _ in shapes)
        assert any(width % 2 and width > 1 for _, width in shapes)


@each_spec
def test_every_activation_has_a_case_far_from_zero(spec):
    if "act" not in spec.inputs(spec.cases[0]):
        return
    if spec.name == "squeeze_excite":  # its result is a gate, between 0 and 1
        assert {f"far_{act}" for act in ACTS} <= {case.name for case in spec.cases}
        return
    far = {}
    for case in small(spec):
        inputs = spec.inputs(case)
        outputs = flatten(spec.reference(**{**inputs, "act": "none"}))
        if outputs[0].numel():
            reach = min(float(outputs[0].max()), -float(outputs[0].min()))
            far[inputs["act"]] = max(far.get(inputs["act"], 0.0), reach)
    assert all(far[act] > 6.5 for act in ACTS), far  # beyond every kink
    assert max(far.values()) > 40


@each_spec
def test_a_small_case_is_larger_than_the_blocks_of_a_kernel(spec):
    """More than 64 channels and 32 columns, neither a multiple of 8: whole blocks and what is left of one."""
    cases = [case for case in small(spec) if "blocks" in case.tags]
    assert cases
    without_maps = "soft_nms", "label_anchors", "decode_topk", "detection_loss", "squeeze_excite"
    if spec.name in without_maps:
        largest = [
            max(t.numel() for v in spec.inputs(c).values() for t in tensors_of(v)) for c in cases
        ]
        assert 2_000 < max(largest) < 200_000
        return
    shapes = [
        t.shape
        for case in cases
        for t in flatten(spec.reference(**spec.inputs(case)))
        if t.dim() == 4
    ]
    assert any(c > 64 and c % 8 for _, c, _, _ in shapes)
    assert any(h > 16 and w > 32 and h % 8 and w % 8 for _, _, h, w in shapes)


def test_batch_norm_act_refuses_the_batch_that_its_cases_lack():
    spec = next(spec for spec in SPECS if spec.name == "batch_norm_act")
    inputs = spec.inputs(spec.cases[0])
    with pytest.raises(ValueError, match=r"x: got .* takes a batch of at least 1"):
        spec.op(**{**inputs, "x": inputs["x"][:0]})


# Independence --------------------------------------------------------------------------------------


@each_spec
def test_batched_arguments_are_independent_images(spec):
    """The op on two batches at once gives what it gives on one after the other, to the rounding of float64.

    Not bit for bit: vectorised functions round the last few elements of a tensor differently.
    """
    if not spec.batched:
        assert spec.name in MIXED
        return
    for case in small(spec):
        first = spec.inputs(case)
        if first.get("statistics"):  # they are of the whole batch
            continue
        other = spec.inputs(dataclasses.replace(case, seed=case.seed + 1))
        second = {**first, **{name: other[name] for name in spec.batched}}
        both = {**first, **{name: _joined(first[name], other[name]) for name in spec.batched}}
        results = [flatten(spec.reference(**inputs)) for inputs in (first, second)]
        joined = [torch.cat(pair) for pair in zip(*results, strict=True)]
        assert spec.error_ratio(both, joined, torch.float64) <= 1, case.name


def _joined(a, b):
    if isinstance(a, torch.Tensor):
        return torch.cat([a, b])
    return None if a is None else [torch.cat(pair) for pair in zip(a, b, strict=True)]


@pytest.mark.parametrize(
    "spec",
    [
        s
        for s in SPECS
        if s.name in PRODUCTS | MIXED - {"detection_loss"} | {"separable_conv", "weighted_fusion"}
    ],
    ids=lambda spec: spec.name,
)
def test_the_bound_is_computed_where_the_inputs_are(spec):
    """No tensor of the CPU among those of a GPU: what is large is compared on the device it is on."""
    for case in small(spec):
        inputs = exact_inputs(spec, spec.inputs(case))
        on_meta = {
            name: map_tensors(value, lambda t: t.to("meta")) for name, value in inputs.items()
        }
        found = [*flatten(spec.reference(**on_meta)), *spec.magnitude(**on_meta)]
        found += spec.terms(on_meta, torch.bfloat16) if spec.terms else []
        assert all(t.device.type == "meta" for t in found), case.name


# Costs ---------------------------------------------------------------------------------------------


@each_spec
def test_costs_are_given(spec):
    assert spec.bytes is not None
    assert spec.flops is not None
    assert (spec.backward_bytes is not None) == bool(spec.diff_args)
    assert (spec.backward_flops is not None) == bool(spec.diff_args)


@each_spec
def test_bytes_are_those_of_all_inputs_and_outputs(spec):
    for case in small(spec):
        for dtype in spec.dtypes:
            inputs = spec.inputs(case, dtype)
            with use_backend("reference"):
                outputs = flatten(spec.op(**inputs))
            moved = nbytes(*inputs.values(), outputs)
            if spec.name == "decode_topk":  # reads the codes and anchors of its picks only
                unread = nbytes(inputs["box_outputs"], inputs["anchors"])
                assert moved - unread <= spec.bytes(**inputs)
            else:
                assert spec.bytes(**inputs) == moved, (case.name, dtype)


@with_gradients
def test_backward_bytes_are_gradients_and_inputs_at_most_once(spec):
    for case in small(spec, "not_differentiable_here"):
        for dtype in spec.dtypes:
            inputs = with_leaves(spec, spec.inputs(case, dtype))
            outputs = flatten(spec.reference(**inputs))
            given = [out for out in outputs if out.requires_grad]
            gradients = nbytes(given, *(inputs[name] for name in spec.diff_args))
            read = spec.backward_bytes(**inputs) - gradients
            # An anchor picked for several classes is one, but counts for each.
            picked = spec.bytes(**inputs) if spec.name == "decode_topk" else 0
            assert 0 <= read <= nbytes(*inputs.values()) + picked, (case.name, dtype)


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.name in PRODUCTS], ids=lambda spec: spec.name
)
def test_flops_are_those_of_the_convolutions(spec):
    """Compared with torch's own count. (Its count of the backward of a grouped convolution is that of a dense one.)"""
    for case in small(spec):
        inputs = spec.inputs(case)
        with FlopCounterMode(display=False) as counter:
            spec.reference(**inputs)
        assert spec.flops(**inputs) == counter.get_total_flops(), case.name


@with_gradients
def test_a_backward_multiplies_twice_or_three_times_as_much(spec):
    """One product per factor, and where act' asks for it the forward's once more."""
    for case in small(spec, "not_differentiable_here"):
        inputs = spec.inputs(case)
        forward, backward = spec.flops(**inputs), spec.backward_flops(**inputs)
        if spec.name in PRODUCTS | {"separable_conv"}:
            assert 2 * forward <= backward <= 3 * forward, case.name
        else:
            assert (backward > 0) == (forward > 0), case.name


# Gradients -----------------------------------------------------------------------------------------


def _ratios(spec: OpSpec, function, change=lambda gradient: gradient) -> dict[str, float]:
    """Error over the bound, case by case, of gradients of ``function`` in place of the reference."""
    ratios = {}
    for case in small(spec, "not_differentiable_here"):
        inputs = spec.inputs(case, torch.float32)
        changed = with_leaves(spec, exact_inputs(spec, inputs))
        outputs = flatten(function(**changed))
        grads = testing.random_gradients(outputs)
        found = [change(g) for g in testing.gradients(spec, changed, outputs, grads)]
        ratios[case.name] = spec.gradient_ratio(inputs, grads, found, torch.float32)
    return ratios


@with_gradients
def test_gradients_of_the_float32_reference_meet_the_bound(spec):
    ratios = [
        testing.check_gradient(spec, case, torch.float32, "reference")
        for case in small(spec, "not_differentiable_here")
    ]
    assert 1e-3 < max(ratios) <= 1


@pytest.mark.parametrize(
    ("spec", "mutant"),
    [
        pytest.param(spec, mutant, id=f"{spec.name}-{name}")
        for spec in SPECS
        if spec.diff_args
        for name, mutant in spec.mutants.items()
        if (spec.name, name) not in SAME_GRADIENT
    ],
)
def test_bound_rejects_gradients_of_mutants(spec, mutant):
    ratios = _ratios(spec, mutant)
    assert max(ratios.values()) > 1, ratios


@with_gradients
def test_bound_rejects_gradients_rounded_to_bfloat16(spec):
    ratios = _ratios(spec, spec.reference, lambda gradient: gradient.bfloat16().double())
    assert max(ratios.values()) > 1, ratios


@with_gradients
def test_bound_rejects_a_forgotten_activation_derivative(spec):
    def straight(act):
        return lambda x: act(x).detach() + (x - x.detach())

    def without(**inputs):
        with unittest.mock.patch.dict(
            ACTIVATIONS, {name: straight(act) for name, act in ACTIVATIONS.items()}
        ):
            return spec.reference(**inputs)

    if "act" not in spec.inputs(spec.cases[0]):
        assert spec.name in ("decode_topk", "detection_loss")
        return
    ratios = _ratios(spec, without)
    assert max(ratios.values()) > 1, ratios
