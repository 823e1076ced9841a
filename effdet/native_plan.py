"""The whole network as one flat list of C++ kernel calls: what runs on a CPU in eval mode without gradients.

A plan is made by running the model's own forward once while the kernel calls are noted instead of made
(`effdet_kernels._native.recorded`). Weights are packed then, and the maps in between get places in one arena, those
that are never needed at once sharing them. Later calls of the same shape are a single native call. A network with an
operation on maps that is no kernel of ours gets no plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from effdet_kernels import _native

Maps = tuple[list[Tensor], list[Tensor]]

_ALIGNMENT = 64
_ARENA, _INPUT = 0, 1  # slots; outputs follow
_SLOT_SHIFT = 48
_WRITTEN = ("y", "y_sums", "row_sums", "gates")  # fields of kernels that are outputs


class NotPlannableError(Exception):
    """A forward does something that no plan can repeat; the message says what."""


class Buffer(NamedTuple):
    """Bytes of memory that are needed from step `first` to step `last`."""

    size: int
    first: int
    last: int


def place(buffers: list[Buffer], outputs: list[Buffer]) -> tuple[list[tuple[int, int]], int]:
    """A (space, offset) for each buffer, such that no two that are needed at once overlap.

    Space 0 is the arena, of as many bytes as the second result says; space 1 + i is the memory of output i, which is
    free until the output is written. Largest first, each in the first output with room, else in the arena.
    """
    places = [(0, 0)] * len(buffers)
    inside: list[list[int]] = [[] for _ in range(1 + len(outputs))]
    for i in sorted(range(len(buffers)), key=lambda i: -buffers[i].size):
        mine = buffers[i]
        size = -(-mine.size // _ALIGNMENT) * _ALIGNMENT
        for space in [*range(1, 1 + len(outputs)), 0]:
            if space and mine.last >= outputs[space - 1].first:
                continue
            others = [j for j in inside[space] if _meet(mine, buffers[j])]
            offset = _lowest(size, sorted((places[j][1], buffers[j].size) for j in others))
            room = outputs[space - 1].size // _ALIGNMENT * _ALIGNMENT if space else 0
            if not space or offset + size <= room:
                places[i] = space, offset
                inside[space].append(i)
                break
    return places, max((places[i][1] + buffers[i].size for i in inside[0]), default=0)


def _meet(a: Buffer, b: Buffer) -> bool:
    return a.first <= b.last and b.first <= a.last


def _lowest(size: int, taken: list[tuple[int, int]]) -> int:
    """The lowest aligned offset at which `size` bytes are free; `taken` are (offset, size), in order."""
    offset = 0
    for start, length in taken:
        if offset + size <= start:
            break
        offset = max(offset, -(-(start + length) // _ALIGNMENT) * _ALIGNMENT)
    return offset


class _NoOther(TorchFunctionMode):
    """Raises when a torch function other than a view, or an op of ours, reads a map of the network."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.maps = {_storage(x)}
        self.kept: list[Tensor] = []  # no storage is freed, so no address means two things

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(_storage(t) in self.maps for t in _tensors((args, kwargs))):
            return result
        outputs = _tensors(result)
        name = getattr(func, "__name__", str(func))
        if getattr(func, "namespace", "") == "effdet_kernels":
            self.kept += outputs
            self.maps.update(_storage(t) for t in outputs)
        elif any(_storage(t) not in self.maps for t in outputs) or _writes(name):
            raise NotPlannableError(f"{name} of a map")
        return result


def _writes(name: str) -> bool:
    """Whether a torch function changes its argument, by torch's rule of names."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
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
        slots = {_storage(x): _INPUT} | {_storage(o): _INPUT + 1 + i for i, o in enumerate(outputs)}
        lives = _lives(launches)
        if any(_storage(out) not in lives for out in outputs):
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
            storage = _storage(tensor)
            inside = tensor.data_ptr() - storage
            if storage in slots:
                start = (
                    int(x.storage_offset()) * x.element_size() if slots[storage] == _INPUT else 0
                )
                return ((slots[storage] + 1) << _SLOT_SHIFT) + inside - start
            if storage in place_of:
                space, offset = place_of[storage]
                slot = _INPUT + space if space else _ARENA
                return ((slot + 1) << _SLOT_SHIFT) + offset + inside
            self._constants.append(tensor)
            return tensor.data_ptr()

        plan = _native.module().Plan()
        for name, fields in launches:
            getattr(plan, name)(_native.resolved(fields, address))
        self.constant_bytes = sum(
            t.nbytes for t in {_storage(t): t for t in self._constants}.values()
        )
        return plan

    def run(self, x: Tensor) -> Maps:
        """The network's outputs for images of the plan's shape."""
        outputs = [
            torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
            for shape, dtype in self._outputs
        ]
        arena = self._take_arena()
        bases = [arena.data_ptr(), x.data_ptr(), *[out.data_ptr() for out in outputs]]
        try:
            _native.check(self._native.run(bases, torch.get_num_threads()), "plan")
        finally:
            self._arenas.append(arena)
        return outputs[: self._levels], outputs[self._levels :]

    def _take_arena(self) -> Tensor:
        while True:
            try:
                arena = self._arenas.pop()
            except IndexError:
                return torch.empty(max(self.arena_bytes, 1), dtype=torch.uint8)
            if arena.numel() >= self.arena_bytes:
                return arena


def _lives(launches: list[_native.Launch]) -> dict[int, Buffer]:
    """What kernels write, by storage: from the step that writes it to the last that reads it."""
    lives: dict[int, Buffer] = {}
    for step, (_, fields) in enumerate(launches):
        for written in _written(fields):
            size = written.untyped_storage().nbytes()
            lives.setdefault(_storage(written), Buffer(size, step, step))
        for tensor in _tensors(fields):
            if _storage(tensor) in lives:
                lives[_storage(tensor)] = lives[_storage(tensor)]._replace(last=step)
    return lives


def _written(fields: dict[str, Any]) -> list[Tensor]:
    found = [fields[name] for name in _WRITTEN if isinstance(fields.get(name), Tensor)]
    return found + [t for output in fields.get("outputs", ()) for t in _written(output)]
