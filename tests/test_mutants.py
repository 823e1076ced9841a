"""The error bound itself is tested: it must reject every plausible wrong version that a spec lists."""

from __future__ import annotations

import pytest
import torch

from effdet_kernels.spec import iter_specs

MUTANTS = [
    pytest.param(spec, mutant, id=f"{spec.name}-{name}")
    for spec in iter_specs()
    for name, mutant in spec.mutants.items()
]


@pytest.mark.parametrize(("spec", "mutant"), MUTANTS)
def test_bound_rejects(spec, mutant):
    ratios = {}
    for case in spec.cases:
        if "bench" in case.tags:
            continue
        inputs = spec.inputs(case, torch.float32)
        ratios[case.name] = spec.error_ratio(inputs, mutant(**inputs), torch.float32)
    assert max(ratios.values()) > 1, f"no case tells the mutant from the op: {ratios}"


def test_every_op_has_at_least_three_mutants():
    assert {spec.name: len(spec.mutants) for spec in iter_specs() if len(spec.mutants) < 3} == {}
