"""What a model computes, read off one forward pass on the meta device: steps, and the values they read and write.

A step is one layer in the plain sense: a convolution, a batch norm, an activation, a resampling. One call of an op of
`effdet_kernels` is several steps. No numbers are computed and no memory is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Kinds of steps. "expand" is the pointwise convolution in front of a depthwise one, "pool" the mean over a map,
# "fc" a matrix product of vectors, "gate" a map times a vector, "sum" that of a BiFPN node, "other" what is not known.
CONVOLUTIONS = ("dense", "expand", "pointwise", "depthwise")
KINDS = (*CONVOLUTIONS, "norm", "act", "residual", "pool", "fc", "gate", "resample", "sum", "other")


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor: made by ``step``, or a weight or the image (None)."""

    elements: int
    step: Step | None = None


@dataclasses.dataclass(frozen=True)
class Operand:
    """What a step reads of a value: all of it, or the part that a view shows."""

    value: Value
    offset: int
    elements: int


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One layer on one map. ``matrix`` and ``vector`` count multiply-adds, those of depthwise convolutions apart."""

    kind: str
    reads: tuple[Operand, ...]  # maps first, then weights
    weight: Value | None = None
    matrix: int = 0
    vector: int = 0


class Tape(TorchDispatchMode):
    """Records the steps of all that is called under it on tensors that depend on ``image``.

    What depends on weights alone, such as the folding of a batch norm, is not recorded. ``rules`` turns the call of
    one op, given this tape, its arguments by name and its outputs, into steps; it gets the calls that make new
    tensors or change one.
    """

    def __init__(self, image: Tensor, model: nn.Module, rules: Callable[..., None]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._values = {_storage(image): Value(image.numel())}
        self._weights: dict[int, Value] = {}
        self._parameters = {_storage(p) for p in model.parameters()}
        self._rules = rules
        self._alive: list[Any] = [image]  # a freed storage's address may be used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        inputs, outputs = tensors(list(arguments.values())), tensors([result])
        self._alive.append((inputs, outputs))
        held = {_storage(t) for t in inputs}
        new = any(_storage(t) not in held for t in outputs) or func._schema.is_mutable
        if new and any(map(self.depends, inputs)):
            self._rules(self, func, arguments, outputs)
        return result

    def depends(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` depends on the image."""
        return _storage(tensor) in self._values

    def is_parameter(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._parameters

    def operand(self, tensor: Tensor) -> Operand:
        """``tensor`` as something to read. A padded or a broadcast map counts as what it was made from."""
        key = _storage(tensor)
        value = self._values.get(key) or self._weights.setdefault(key, Value(tensor.numel()))
        return Operand(value, tensor.storage_offset(), min(tensor.numel(), value.elements))

    def step(
        self, kind: str, reads: Sequence[Operand], elements: int, weight: Tensor | None = None
    ) -> Operand:
        """Adds a step that writes ``elements``; with ``weight`` [O, I, ...], of I * ... multiply-adds each."""
        macs = 0 if weight is None else elements * weight[0].numel()
        used = None if weight is None else self.operand(weight)
        made = Step(
            kind,
            (*reads, used) if used else tuple(reads),
            used.value if used else None,
            matrix=0 if kind == "depthwise" else macs,
            vector=macs if kind == "depthwise" else 0,
        )
        self.steps.append(made)
        return Operand(Value(elements, made), 0, elements)

    def name(self, tensor: Tensor, result: Operand) -> None:
        """From now on ``tensor`` is what ``result`` says."""
        self._values[_storage(tensor)] = result.value


def tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among ``values`` and in the lists among them, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(tensors(value))
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
