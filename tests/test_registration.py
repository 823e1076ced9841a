"""Every op is a well-behaved torch op: schema, fake kernel, autograd registration, compile."""

from __future__ import annotations

import pytest
import torch

from effdet_kernels import testing
from effdet_kernels.bound import tensors_of
from effdet_kernels.spec import flatten, iter_specs, map_tensors

CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in iter_specs()
    for case in spec.small_cases()
]
FIRST = [pytest.param(spec, spec.cases[0], id=spec.name) for spec in iter_specs()]


def schema_arguments(spec, inputs):
    """The positional arguments that the public function hands to the registered op on ``inputs``."""
    seen = []
    op = testing.operator(spec)
    overload = op.overload

    def record(*args):
        seen.append(args)
        return overload(*args)

    op.overload = record
    try:
        with testing.through_registration(op):
            spec.op(**inputs)
    finally:
        op.overload = overload
    return seen[0]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_opcheck(spec, case):
    inputs = spec.inputs(case, torch.float64)
    for name in spec.diff_args:
        map_tensors(inputs[name], lambda t: t.requires_grad_())
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    everything = [t for value in inputs.values() for t in tensors_of(value)]
    # The last one compares outputs, and takes no NaN for equal to another.
    if all(t.numel() and not t.isnan().any() for t in everything):
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(
        testing.operator(spec).overload, schema_arguments(spec, inputs), test_utils=tests
    )


@pytest.mark.parametrize(("spec", "case"), FIRST)
def test_compiles_without_graph_breaks(spec, case):
    torch._dynamo.reset()  # each op is a recompilation of the same lambda, and those are limited
    inputs = spec.inputs(case, torch.float32)
    compiled = torch.compile(lambda kw: spec.op(**kw), fullgraph=True, backend="aot_eager")
    for got, want in zip(flatten(compiled(inputs)), flatten(spec.op(**inputs)), strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
