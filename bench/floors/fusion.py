"""Fusion models: which steps share a launch, and what a launch then has to move.

- a: every step alone.
- a1: norm, activation and residual in the epilogue of the convolution, the activation in that of a node's sum; the
  products of squeeze-excite in one launch.
- b: a depthwise and the pointwise convolution after it in one launch, over all levels that share the weights, unless
  squeeze-excite stands between them: then the squeeze is in the depthwise epilogue, the gate and its products in the
  load of the projection; a node's resamplings in its sum; the pointwise convolutions of one map in one launch.
- c: b, and a node's sum in the load of its depthwise convolution.
- c2: c, and the expansion of MBConv in the load of its depthwise convolution.

A launch reads what it does not make itself, weights too, once, and writes what others read of what it makes.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from bench.floors.trace import CONVOLUTIONS, Step

Rules = Mapping[
    str, tuple[str, ...]
]  # kind of step -> makers whose map it takes without memory between
Readers = Mapping[Step, Sequence[Step]]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel. ``elements``: read plus written; ``matrix`` and ``vector``: multiply-adds, as of a step."""

    kinds: tuple[str, ...]
    elements: int
    matrix: int
    vector: int


_EPILOGUE = ("norm", "act", "residual")
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
_RULES: dict[str, Rules] = {
    "a": {},
    "a1": _A1,
    "b": _B,
    "c": {**_B, "depthwise": ("sum",)},
    "c2": {**_B, "depthwise": ("sum", "expand")},
}
_UNSHARED = ("a", "a1")  # one launch for each level, and for each pointwise convolution
FUSIONS = tuple(_RULES)


def launches(steps: Sequence[Step], fusion: str) -> tuple[Launch, ...]:
    """The launches of ``steps`` under the fusion model of that name, one of ``FUSIONS``, in order."""
    readers = _readers(steps)
    groups = _Groups(steps)
    first: dict[tuple[str, Step], Step] = {}
    for step in steps:
        for maker in _joined(step, _RULES[fusion], readers):
            groups.merge(maker, step)
        shared = None if fusion in _UNSHARED else _shared(step)
        if shared is not None:
            groups.merge(first.setdefault((step.kind, shared), step), step)
    return tuple(_launch(group, readers) for group in groups)


def _readers(steps: Sequence[Step]) -> Readers:
    readers = defaultdict(list)
    for step in steps:
        for operand in step.reads:
            readers[operand.maker].append(step)
    return readers


def _joined(step: Step, rules: Rules, readers: Readers) -> list[Step]:
    """The makers that ``step`` joins. Only a pool leaves something for others to read."""
    return [
        operand.maker
        for operand in step.reads
        if _origin(operand.maker) in rules.get(step.kind, ())
        and (step.kind == "pool" or len(readers[operand.maker]) == 1)
    ]


def _origin(step: Step) -> str:
    """The kind of ``step``; of an epilogue, that of the step that it belongs to."""
    return _origin(step.reads[0].maker) if step.kind in _EPILOGUE else step.kind


def _shared(step: Step) -> Step | None:
    """What brings steps of a kind together: the weight of depthwise ones, the map of pointwise ones."""
    if step.kind == "depthwise":
        return step.reads[-1].maker
    return step.reads[0].maker if step.kind == "pointwise" else None


class _Groups:
    """Disjoint sets of steps, at first one for each."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._of = {step: [step] for step in steps}

    def merge(self, one: Step, other: Step) -> None:
        kept, gone = self._of[one], self._of[other]
        if kept is not gone:
            kept.extend(gone)
            self._of.update(dict.fromkeys(gone, kept))

    def __iter__(self) -> Iterator[list[Step]]:
        return iter({id(group): group for group in self._of.values()}.values())


def _launch(group: Sequence[Step], readers: Readers) -> Launch:
    members = set(group)
    reads = {o for step in group for o in step.reads if o.maker not in members}
    # What no step reads is an output of the model.
    written = [
        step for step in group if not readers.get(step) or not members.issuperset(readers[step])
    ]
    return Launch(
        kinds=tuple(step.kind for step in group),
        elements=sum(o.elements for o in reads) + sum(step.elements for step in written),
        matrix=sum(step.matrix for step in group),
        vector=sum(step.vector for step in group),
    )
