"""``python -m bench compile`` notes what verify launches: as they run here, launches are among those it finds."""

from __future__ import annotations

import pytest
import torch

from bench import ahead
from bench.ahead import Source
from effdet_kernels import _triton
from effdet_kernels.spec import iter_specs
from effdet_kernels.suite import Subject, run_check


@pytest.mark.parametrize("check", ["forward", "gradient", "autocast"])
@pytest.mark.parametrize(
    "op", [pytest.param("squeeze_excite", marks=pytest.mark.quick), "weighted_fusion"]
)
def test_what_runs_was_noted(monkeypatch, op, check):
    made, launch = [], _triton.launch

    def noting(kernel, programs, *arguments, trips=(), flops=0, **options):
        made.append(ahead.variant(_triton.Launch(kernel, programs, arguments, options, (), 0)))
        return launch(kernel, programs, *arguments, trips=trips, flops=flops, **options)

    monkeypatch.setattr(_triton, "launch", noting)
    spec = next(spec for spec in iter_specs() if spec.name == op)
    outcome = run_check(check, Subject(spec, "triton", torch.float16, "cpu", quick=True))
    assert outcome.status == "passed" and made
    noted = Source("verify", op, "fp16", check).variants(227)
    assert {variant.kernel for variant in made if variant.key not in noted} == set()
