"""Fusion models: which steps share a launch, and what a launch then has to move.

- a: every step alone.
- a1: norm, activation and residual in the epilogue of the convolution, the activation in that of a node's sum; the
  products of squeeze-excite in one launch.
- b: a depthwise and the pointwise convolution after it in one launch, over all levels that share the weights; the
  squeeze in the depthwise epilogue, the gate and its products in the load of the projection; a node's resamplings in
  its sum; the pointwise convolutions of one map in one launch.
- c: b, and a node's sum in the load of its depthwise convolution.
- c2: c, and the expansion of MBConv in the load of its depthwise convolution.

A launch reads what it does not make itself, weights too, once, and writes what others read of what it makes.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

from bench.floors.trace import CONVOLUTIONS, Step, Value

Rules = Mapping[str, tuple[str, ...]]  # kind of step -> makers of a map that it can join


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel. ``elements``: read plus written; ``matrix`` and ``vector``: multiply-adds, as of a step."""

    kinds: tuple[str, ...]
    elements: int
    matrix: int
    vector: int


_EPILOGUE = ("norm", "act", "residual", "pool")  # leave the maker of a map as it is
_A1: Rules = {
    "norm": CONVOLUTIONS,
    "act": (*CONVOLUTIONS, "sum"),
    "residual": CONVOLUTIONS,
    "fc": ("fc",),
}
_B: Rules = {
    **_A1,
    "pool": ("depthwise",),
    "gate": ("fc",),
    "pointwise": ("depthwise", "gate"),
    "sum": ("resample",),
}
_C: Rules = {**_B, "depthwise": ("sum",)}
_C2: Rules = {**_B, "depthwise": ("sum", "expand")}
_RULES: dict[str, Rules] = {"a": {}, "a1": _A1, "b": _B, "c": _C, "c2": _C2}
_SEPARATE = ("a", "a1")  # one launch for each level and each convolution
FUSIONS = tuple(_RULES)


def launches(steps: Sequence[Step], fusion: str) -> tuple[Launch, ...]:
    """The launches of ``steps`` under the fusion model of that name, in order."""
    readers = _readers(steps)
    groups: dict[Step, list[Step]] = {}
    twins: dict[tuple[str, Value], Step] = {}
    for step in steps:
        groups[step] = [step]
        for partner in _makers(step, _RULES[fusion], readers):
            _merge(groups, partner, step)
        if fusion not in _SEPARATE and (shared := _shared(step)):
            _merge(groups, twins.setdefault((step.kind, shared), step), step)
    unique = {id(group): group for group in groups.values()}
    return tuple(_launch(group, readers) for group in unique.values())


def _readers(steps: Sequence[Step]) -> dict[Value, list[Step]]:
    readers = defaultdict(list)
    for step in steps:
        for operand in step.reads:
            readers[operand.value].append(step)
    return readers


def _makers(step: Step, rules: Rules, readers: dict[Value, list[Step]]) -> list[Step]:
    """The steps whose results ``step`` takes without a trip through memory; all but a pool are their only reader."""
    return [
        o.value.step
        for o in step.reads
        if o.value.step is not None
        and _maker(o.value.step) in rules.get(step.kind, ())
        and (step.kind == "pool" or len(readers[o.value]) == 1)
    ]


def _maker(step: Step) -> str:
    """The kind that makes the map that ``step`` writes: an epilogue's is that of its convolution or sum."""
    before = step.reads[0].value.step
    return _maker(before) if step.kind in _EPILOGUE and before is not None else step.kind


def _shared(step: Step) -> Value | None:
    """What joins steps of a kind: the levels of a separable convolution their weight, pointwise ones their map."""
    if step.kind == "depthwise":
        return step.weight
    return step.reads[0].value if step.kind == "pointwise" else None


def _merge(groups: dict[Step, list[Step]], one: Step, other: Step) -> None:
    kept, gone = groups[one], groups[other]
    if kept is gone:
        return
    kept.extend(gone)
    for step in gone:
        groups[step] = kept


def _launch(group: list[Step], readers: dict[Value, list[Step]]) -> Launch:
    members = set(group)
    reads = {
        operand for step in group for operand in step.reads if operand.value.step not in members
    }
    made = _made(group, readers)
    return Launch(
        kinds=tuple(step.kind for step in group),
        elements=sum(o.elements for o in reads) + sum(value.elements for value in made),
        matrix=sum(step.matrix for step in group),
        vector=sum(step.vector for step in group),
    )
