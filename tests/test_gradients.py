"""Gradients of every differentiable op on every backend: gradcheck in float64, and the error bound in every dtype."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from effdet_kernels import _dispatch, suite, testing
from effdet_kernels.bound import flatten, with_leaves
from effdet_kernels.spec import OpSpec, iter_specs

SPECS = [spec for spec in iter_specs() if spec.diff_args]
CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in SPECS
    for case in spec.small_cases()
    if "not_differentiable_here" not in case.tags
]


def runnable(spec: OpSpec) -> list[str]:
    return [name for name in testing.backends(spec) if _dispatch.serves(name, "cpu")]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_gradcheck(spec, case):
    fast = "blocks" in case.tags or case.name == "pyramid"  # in a random direction: minutes else
    for backend in runnable(spec):
        assert testing.gradcheck(spec, case, backend, fast=fast)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_gradcheck_of_the_reference_under_autograd(spec, case):
    """What the public function does in eager mode where no kernel is better than the reference."""
    assert testing.gradcheck(spec, case, "reference", fast=True, registered=False)


@pytest.mark.parametrize("check", ["gradient", "gradient_repeat"])
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        pytest.param(
            spec,
            dtype,
            id=f"{spec.name}-{str(dtype).removeprefix('torch.')}",
            # test_verify.py has two cases of each in every run, gradcheck all in float64.
            marks=[pytest.mark.slow] if dtype in (torch.float16, torch.float64) else [],
        )
        for spec in SPECS
        for dtype in spec.dtypes
    ],
)
def test_gradients_pass_what_verify_checks(spec, dtype, check):
    """The bound in every layout of inputs and of the outputs' gradients, some of them missing; the same bits again."""
    for backend in runnable(spec):
        if testing.backward_backend(spec, backend) == backend:
            outcome = suite.run_check(check, suite.Subject(spec, backend, dtype, "cpu"))
            assert not outcome.failures
            assert outcome.calls >= len(spec.small_cases()) / 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 51))
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_error_is_within_the_bound_of_other_draws(spec, seed):
    for case in spec.cases:
        if not case.tags & {"bench", "not_differentiable_here"}:
            drawn = dataclasses.replace(case, seed=seed)
            for dtype in (torch.float32, torch.bfloat16):
                if dtype not in spec.dtypes:
                    continue
                if dtype == torch.bfloat16 and across_a_kink(spec, drawn):
                    continue
                for backend in runnable(spec):
                    worst = testing.check_gradient(spec, drawn, dtype, backend)
                    assert worst <= 1, f"{case.name} {backend} {dtype}: {worst:.3g}"


def across_a_kink(spec, case) -> bool:
    """Whether bfloat16 rounds a value across a kink, which the bound leaves out: then the reference itself is off."""
    inputs = spec.inputs(case, torch.float64)
    kinked = {inputs.get("act"), inputs.get("pre_act")} & {
        "relu",
        "relu6",
        "hard_swish",
        "leaky_relu",
    }
    return bool(kinked) and testing.check_gradient(spec, case, torch.bfloat16, "reference") > 1


def wrong_gradients(spec, case, mutant) -> float:
    """The ratio of the gradients of ``mutant`` in place of the op; 0 where it has none."""
    inputs = with_leaves(spec, spec.inputs(case, torch.float64))
    outputs = flatten(mutant(**inputs))
    grads = testing.random_gradients(outputs)
    if all(g is None for g in grads):
        return 0.0
    found = testing.gradients(spec, inputs, outputs, grads)
    return spec.gradient_ratio(inputs, grads, [g.float() for g in found], torch.float32)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_bound_rejects_the_gradients_of_wrong_versions(spec):
    """At least three mutants of each op are told from it by their gradients alone."""
    cases = [c for c in spec.small_cases() if "not_differentiable_here" not in c.tags]
    rejected = [
        name
        for name, mutant in spec.mutants.items()
        if any(wrong_gradients(spec, case, mutant) > 1 for case in cases)
    ]
    assert len(rejected) >= 3, rejected


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_bound_rejects_gradients_rounded_to_bfloat16(spec):
    case = spec.cases[0]
    inputs = with_leaves(spec, spec.inputs(case, torch.float32))
    outputs = flatten(spec.op(**inputs))
    grads = testing.random_gradients(outputs)
    found = testing.gradients(spec, inputs, outputs, grads)
    assert spec.gradient_ratio(inputs, grads, found, torch.float32) <= 1
    short = [g.bfloat16().float() for g in found]
    assert spec.gradient_ratio(inputs, grads, short, torch.float32) > 10


def test_ops_with_gradients_are_the_expected_ones():
    assert {spec.name for spec in SPECS} == {
        "batch_norm_act",
        "decode_topk",
        "dense_conv",
        "depthwise_conv",
        "detection_loss",
        "expand_depthwise",
        "pointwise_conv",
        "separable_conv",
        "squeeze_excite",
        "weighted_fusion",
    }
