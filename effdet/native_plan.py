"""The whole network as one flat list of C++ kernel calls: what runs on a CPU in eval mode without gradients.

A plan is made by running the model's own forward once while the kernel calls are noted instead of made
(`effdet_kernels._native.recorded`). Weights are packed then, and the maps in between get places in one arena, those
that are never needed at once sharing them. Later calls of the same shape are a single native call. A network with an
operation on maps that is no kernel of ours gets no plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from effdet_kernels import _native
from effdet_kernels._arena import Buffer, place

Maps = tuple[list[Tensor], list[Tensor]]

_ARENA, _INPUT = 0, 1  # slots; outputs follow
SLOT_SHIFT = 48
_WRITTEN = ("y", "y_sums", "row_sums", "gates")  # fields of kernels that are outputs


class NotPlannableError(Exception):
    """A forward does something that no plan can repeat; the message says what."""


class _NoOther(TorchFunctionMode):
    """Raises when a torch function other than a view, or an op of ours, reads a map of the network."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.maps = {storage_of(x)}
        self.kept: list[Tensor] = []  # no storage is freed, so no address means two things

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(storage_of(t) in self.maps for t in tensors_in((args, kwargs))):
            return result
        outputs = tensors_in(result)
        name = getattr(func, "__name__", str(func))
        if getattr(func, "namespace", "") == "effdet_kernels":
            self.kept += outputs
            self.maps.update(storage_of(t) for t in outputs)
        elif any(storage_of(t) not in self.maps for t in outputs) or _writes(name):
            raise NotPlannableError(f"{name} of a map")
        return result


def _writes(name: str) -> bool:
    """Whether a torch function changes its argument, by torch's rule of names."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def storage_of(tensor: Tensor) -> int:
    """The address of the memory that a tensor is a view of: what two views share."""
    return int(tensor.untyped_storage().data_ptr())


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a value, in lists, tuples and dictionaries too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item)]
    return []


class Plan:
    """The kernel calls of one network for one image shape; arenas are taken from a list and put back.

    Attributes: `arena_bytes`, `constant_bytes` (packed weights), `names` (of the kernels, in order).

    Raises:
        NotPlannableError: of the constructor; the message says what is in the way.
    """

    def __init__(self, forward: Callable[[Tensor], Maps], x: Tensor, arenas: list[Tensor]) -> None:
        guard = _NoOther(x)
        try:
            with guard, _native.recorded() as launches:
                classes, boxes = forward(x)
        except _native.NotRecordableError as error:
            raise NotPlannableError(str(error)) from error
        self._arenas = arenas
        self._levels = len(classes)
        outputs = [*classes, *boxes]
        self._outputs = [(out.shape, out.dtype) for out in outputs]
        self.names = [name for name, _ in launches]
        self._constants: list[Tensor] = []
        slots = {storage_of(x): _INPUT} | {
            storage_of(o): _INPUT + 1 + i for i, o in enumerate(outputs)
        }
        lives = _lives(launches)
        if any(storage_of(out) not in lives for out in outputs):
            raise NotPlannableError("an output that no kernel writes")
        self._native = self._bind(launches, lives, slots, x)

    def _bind(
        self,
        launches: list[_native.Launch],
        lives: dict[int, Buffer],
        slots: dict[int, int],
        x: Tensor,
    ) -> Any:
        outputs = [lives[storage] for storage, slot in slots.items() if slot > _INPUT]
        inner = {storage: life for storage, life in lives.items() if storage not in slots}
        places, self.arena_bytes = place(list(inner.values()), outputs)
        place_of = dict(zip(inner, places, strict=True))

        def address(tensor: Tensor) -> int:
            storage = storage_of(tensor)
            inside = tensor.data_ptr() - storage
            if storage in slots:
                start = (
                    int(x.storage_offset()) * x.element_size() if slots[storage] == _INPUT else 0
                )
                return ((slots[storage] + 1) << SLOT_SHIFT) + inside - start
            if storage in place_of:
                space, offset = place_of[storage]
                slot = _INPUT + space if space else _ARENA
                return ((slot + 1) << SLOT_SHIFT) + offset + inside
            self._constants.append(tensor)
            return tensor.data_ptr()

        plan = _native.module().Plan()
        for name, fields in launches:
            getattr(plan, name)(_native.resolved(fields, address))
        self.constant_bytes = sum(
            t.nbytes for t in {storage_of(t): t for t in self._constants}.values()
        )
        return plan

    def run(self, x: Tensor) -> Maps:
        """The network's outputs for images of the plan's shape."""
        outputs = [
            torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
            for shape, dtype in self._outputs
        ]
        arena = take_arena(self._arenas, self.arena_bytes)
        bases = [arena.data_ptr(), x.data_ptr(), *[out.data_ptr() for out in outputs]]
        try:
            _native.check(self._native.run(bases, torch.get_num_threads()), "plan")
        finally:
            self._arenas.append(arena)
        return outputs[: self._levels], outputs[self._levels :]


def take_arena(arenas: list[Tensor], size: int) -> Tensor:
    """One of at least ``size`` bytes; smaller ones are given up."""
    while True:
        try:
            arena = arenas.pop()
        except IndexError:
            return torch.empty(max(size, 1), dtype=torch.uint8)
        if arena.numel() >= size:
            return arena


def _lives(launches: list[_native.Launch]) -> dict[int, Buffer]:
    """What kernels write, by storage: from the step that writes it to the last that reads it."""
    lives: dict[int, Buffer] = {}
    for step, (_, fields) in enumerate(launches):
        for written in _written(fields):
            size = written.untyped_storage().nbytes()
            lives.setdefault(storage_of(written), Buffer(size, step, step))
        for tensor in tensors_in(fields):
            if storage_of(tensor) in lives:
                lives[storage_of(tensor)] = lives[storage_of(tensor)]._replace(last=step)
    return lives


def _written(fields: dict[str, Any]) -> list[Tensor]:
    found = [fields[name] for name in _WRITTEN if isinstance(fields.get(name), Tensor)]
    return found + [t for output in fields.get("outputs", ()) for t in _written(output)]
