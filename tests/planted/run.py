"""Runs in a process with TRITON_INTERPRET=1: prints what the harness says of each planted kernel, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernels import SPECS

from effdet_kernels import suite, use_backend


def plain_call_is_right(spec) -> bool:
    """Without the harness's precautions: programs run in order."""
    inputs = spec.inputs(spec.cases[0], torch.float32)
    with use_backend("triton"):
        return spec.error_ratio(inputs, spec.op(**inputs), torch.float32) <= 1


def main() -> None:
    found = {}
    for bug, spec in SPECS.items():
        subject = suite.Subject(spec, "triton", torch.float32, "cpu")
        checks = ("forward", "repeat", "gradient", "gradient_repeat")
        outcomes = [suite.run_check(check, subject) for check in checks]
        found[bug] = {outcome.check: outcome.failures for outcome in outcomes}
    order = SPECS["forward depends on program order"]
    print(json.dumps({"failures": found, "plain call is right": plain_call_is_right(order)}))


if __name__ == "__main__":
    main()
