"""How fast a launch can be, by what its tensors, its machine code and its grid say: a model, not a measurement.

A launch takes the longer of its memory time (its tensors once, at the copy bandwidth), its issue time (4 instructions
per clock and multiprocessor, one in eight of them an exponential or a reciprocal) and its matrix time; of the
instructions those outside of loops count once, those of loops as often as the launcher says. Beside it stands the time
of one program, all that counts where the GPU is mostly idle. It is fitted to the 104 launches of D0 at batch 1 on an
H200 (results/nvidia_h200/profile_d0_batch1.json): it and the time of the launch add up to what was measured, within a
fifth for 89 of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from bench.sass import Code
from effdet_kernels import _triton

# The GPU that predictions are for, an H200: measured copy bandwidth and bf16 product, the clock under load.
BANDWIDTH, MATRIX_FLOPS, CLOCK, MULTIPROCESSORS = 4.3e12, 788e12, 1.755e9, 132
_ISSUED = 4  # warp instructions per clock and multiprocessor
_SPECIAL = 0.5  # of these, MUFU
# Of MATRIX_FLOPS, what HMMA reaches on Hopper, whose own instruction is HGMMA (arXiv 2402.13499 and 2501.12084).
_HMMA = 0.62
# A program alone on a multiprocessor: the launch, and each instruction of a warp; more than 4 warps hold each other up.
_LAUNCH, _INSTRUCTION, _MORE_WARPS = 1.3e-6, 1.9e-9, 0.35


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one launch, on the GPU named above, in seconds."""

    memory: float
    issue: float
    special: float
    matrix: float
    program: float  # of one program, with its launch: the least that a launch takes

    @property
    def total(self) -> float:
        """Of all programs, on a GPU that is full of them."""
        return max(self.memory, self.issue, self.special, self.matrix)

    @property
    def alone(self) -> float:
        """Of the launch when nothing runs beside it: the longer of one program and all programs, and the launch."""
        return max(self.program, self.total + _LAUNCH)


def predicted(launch: _triton.Launch, code: Code) -> Prediction:
    tensors = {id(t): t for t in _tensors(launch.arguments)}
    moved = sum(t.numel() * t.element_size() for t in tensors.values())
    warps, issued = launch.programs * code.warps, code.issued(launch.trips)
    issue = warps * issued / (_ISSUED * CLOCK * MULTIPROCESSORS)
    special = warps * code.transcendental(launch.trips) / (_SPECIAL * CLOCK * MULTIPROCESSORS)
    crowd = 1 + _MORE_WARPS * max(0, code.warps / 4 - 1)
    program = _LAUNCH + issued * _INSTRUCTION * crowd
    rate = MATRIX_FLOPS * (_HMMA if code.matrix == "HMMA" else 1)
    return Prediction(moved / BANDWIDTH, issue, special, launch.flops / rate, program)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
