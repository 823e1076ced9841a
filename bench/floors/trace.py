"""What a model computes, read off one forward pass on the meta device: its steps and what they read and write.

A step is one layer in the plain sense: a convolution, a batch norm, an activation, a resampling. One call of an op of
`effdet_kernels` is several steps. No numbers are computed and no memory is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CONVOLUTIONS = ("dense", "expand", "pointwise", "depthwise")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One layer on one map, and the tensor that it makes.

    ``kind``: one of ``CONVOLUTIONS`` ("expand" is the pointwise one in front of MBConv's depthwise one), "norm",
    "act", "residual", "pool" (mean over a map), "fc" (matrix product of vectors), "gate" (map times vector),
    "resample", "sum" (of a BiFPN node), "source" (a weight or the image: nothing is done), or "other".
    """

    kind: str
    elements: int  # written
    reads: tuple[Operand, ...] = ()  # maps first, then the weight
    matrix: int = 0  # multiply-adds, but for depthwise ones
    vector: int = 0  # multiply-adds of a depthwise convolution


@dataclasses.dataclass(frozen=True)
class Operand:
    """What a step reads of the tensor that ``maker`` makes: all of it, or the part that a view shows."""

    maker: Step
    offset: int
    elements: int


class Tape(TorchDispatchMode):
    """Records the steps of all that is called under it on tensors that depend on ``image``.

    What depends on weights alone, such as the folding of a batch norm, is not recorded. ``decompose`` turns a call
    into steps: it gets this tape, the op, its arguments by name and its outputs. It is not asked about views.
    """

    def __init__(self, image: Tensor, model: nn.Module, decompose: Callable[..., None]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._makers = {_storage(image): Step("source", image.numel())}
        self._weights: dict[int, Step] = {}
        self._parameters = {_storage(p) for p in model.parameters()}
        self._decompose = decompose
        self._alive: list[Any] = [image]  # the address of a freed storage may be used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        inputs, outputs = tensors(arguments.values()), tensors([result])
        self._alive.append((inputs, outputs))
        held = {_storage(t) for t in inputs}
        new = any(_storage(t) not in held for t in outputs) or func._schema.is_mutable
        if new and any(map(self.depends, inputs)):
            self._decompose(self, func, arguments, outputs)
        return result

    def depends(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` depends on the image."""
        return _storage(tensor) in self._makers

    def is_parameter(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._parameters

    def operand(self, tensor: Tensor) -> Operand:
        """``tensor`` as something to read; what was padded or broadcast counts as what it was made from."""
        key = _storage(tensor)
        maker = self._makers.get(key)
        if maker is None:
            maker = self._weights.setdefault(key, Step("source", tensor.numel()))
        return Operand(maker, int(tensor.storage_offset()), min(tensor.numel(), maker.elements))

    def step(
        self, kind: str, reads: Sequence[Operand], elements: int, weight: Tensor | None = None
    ) -> Operand:
        """Adds a step that writes ``elements``; a ``weight`` [O, ...] costs each a multiply-add per ``...``."""
        macs = 0 if weight is None else elements * (weight.numel() // weight.shape[0])
        made = Step(
            kind,
            elements,
            (*reads, *([] if weight is None else [self.operand(weight)])),
            matrix=0 if kind == "depthwise" else macs,
            vector=macs if kind == "depthwise" else 0,
        )
        self.steps.append(made)
        return Operand(made, 0, elements)

    def name(self, tensor: Tensor, result: Operand) -> None:
        """From now on ``tensor`` is ``result``."""
        self._makers[_storage(tensor)] = result.maker


def tensors(values: Any) -> list[Tensor]:
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
