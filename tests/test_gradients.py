"""torch.autograd.gradcheck in float64 for every differentiable op, on every backend that runs here."""

from __future__ import annotations

import pytest

from effdet_kernels import testing
from effdet_kernels.spec import iter_specs

CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in iter_specs()
    if spec.diff_args
    for case in spec.cases
    if not case.tags & {"bench", "not_differentiable_here"}
]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_gradcheck(spec, case):
    for backend, reason in testing.backends(spec).items():
        if backend in ("reference", "cpu"):
            assert reason is None
            assert testing.check_gradient(spec, case, backend)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_gradcheck_of_the_reference_under_autograd(spec, case):
    """What the public function does in eager mode where no kernel is better than the reference."""
    assert testing.check_gradient(spec, case, "reference", fast=True, registered=False)


def test_ops_with_gradients_are_the_expected_ones():
    assert {spec.name for spec in iter_specs() if spec.diff_args} == {
        "batch_norm_act",
        "decode_topk",
        "depthwise_conv",
        "detection_loss",
        "expand_depthwise",
        "pointwise_conv",
        "separable_conv",
        "weighted_fusion",
    }
