"""The whole network as one flat list of C++ kernel calls: what runs on a CPU in eval mode without gradients.

A plan is made by running the model's own forward once while the kernel calls are noted instead of made
(`effdet_kernels._native.recorded`). Weights are packed then, and the maps in between get places in one arena, those
that are never needed at once sharing them. Later calls of the same shape are a single native call. A network with an
operation on maps that is no kernel of ours gets no plan and runs module by module.

Plans belong to a model and to its weights: any change that `Watch` sees drops them.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from effdet_kernels import _dispatch, _native

from .watch import Watch

Maps = tuple[list[Tensor], list[Tensor]]
Forward = Callable[[Tensor], Maps]

_ALIGNMENT = 64
_MAX_PLANS = 8
_ARENA, _INPUT = 0, 1  # slots; outputs follow
_SLOT_SHIFT = 48
_WRITTEN = ("y", "y_sums", "row_sums", "gates")  # fields of kernels that are outputs
_enabled: ContextVar[bool] = ContextVar("effdet_plan", default=True)


@contextlib.contextmanager
def use_plan(enabled: bool) -> Iterator[None]:
    """Inside, models run by plans where they can (`True`, as they do anyway) or module by module (`False`)."""
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


class NotPlannableError(Exception):
    """The network does something to a map that no kernel of ours does; the message says what."""


class Buffer(NamedTuple):
    """Bytes of memory that are needed from step `first` to step `last`."""

    size: int
    first: int
    last: int


def place(buffers: list[Buffer]) -> tuple[list[int], int]:
    """Offsets such that no two buffers that are needed at once overlap, and the bytes that takes.

    Largest first, each at the lowest offset that is free during its life.
    """
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for i in sorted(range(len(buffers)), key=lambda i: -buffers[i].size):
        mine = buffers[i]
        alive = [
            j for j in placed if buffers[j].first <= mine.last and mine.first <= buffers[j].last
        ]
        offset = 0
        for j in sorted(alive, key=lambda j: offsets[j]):
            if offset + mine.size <= offsets[j]:
                break
            offset = max(offset, offsets[j] + buffers[j].size)
        offsets[i] = offset
        placed.append(i)
    total = max((o + b.size for o, b in zip(offsets, buffers, strict=True)), default=0)
    return offsets, total


class _NoOther(TorchDispatchMode):
    """Raises when a torch operation other than a view, or an op of ours, reads a map of the network."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.maps = {_storage(x)}
        self.kept: list[Tensor] = []  # no storage is freed, so no address means two things

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(_storage(t) in self.maps for t in _tensors((args, kwargs))):
            return result
        outputs = _tensors(result)
        if func.namespace == "effdet_kernels":
            self.kept += outputs
            self.maps.update(_storage(t) for t in outputs)
        elif any(_storage(t) not in self.maps for t in outputs):
            raise NotPlannableError(f"{func} of a map")
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    return []


class Plan:
    """The kernel calls of one network for one image shape.

    Attributes: `arena_bytes`, `constant_bytes` (packed weights), `names` (of the kernels, in order).

    Raises:
        NotPlannableError: of the constructor; the message says what is in the way.
    """

    def __init__(self, forward: Forward, x: Tensor) -> None:
        guard = _NoOther(x)
        try:
            with guard, _native.recorded() as launches:
                classes, boxes = forward(x)
        except _native.NotRecordableError as error:
            raise NotPlannableError(str(error)) from error
        self._x = x.shape, x.stride(), x.dtype
        self._levels = len(classes)
        outputs = [*classes, *boxes]
        self._outputs = [(out.shape, out.dtype) for out in outputs]
        self.names = [name for name, _ in launches]
        self._constants: list[Tensor] = []
        slots = {_storage(x): _INPUT} | {_storage(o): _INPUT + 1 + i for i, o in enumerate(outputs)}
        self._native = self._bind(launches, slots, x)
        for out in outputs:
            if _storage(out) not in self._written:
                raise NotPlannableError("an output that no kernel writes")
        del self._written

    def _bind(self, launches: list[_native.Launch], slots: dict[int, int], x: Tensor) -> Any:
        lives = self._lives(launches, slots)
        offsets, self.arena_bytes = place(list(lives.values()))
        offset_of = dict(zip(lives, offsets, strict=True))

        def address(tensor: Tensor) -> int:
            storage = _storage(tensor)
            inside = tensor.data_ptr() - storage
            if storage in slots:
                start = x.storage_offset() * x.element_size() if slots[storage] == _INPUT else 0
                return ((slots[storage] + 1) << _SLOT_SHIFT) + inside - start
            if storage in offset_of:
                return ((_ARENA + 1) << _SLOT_SHIFT) + offset_of[storage] + inside
            self._constants.append(tensor)
            return tensor.data_ptr()

        plan = _native.module().Plan()
        for name, fields in launches:
            getattr(plan, name)(_native.resolved(fields, address))
        self.constant_bytes = sum(
            t.nbytes for t in {_storage(t): t for t in self._constants}.values()
        )
        return plan

    def _lives(self, launches: list[_native.Launch], slots: dict[int, int]) -> dict[int, Buffer]:
        """What the arena must hold, by storage; also notes which storages kernels write."""
        lives: dict[int, Buffer] = {}
        self._written: set[int] = set()
        for step, (_, fields) in enumerate(launches):
            for written in _written(fields):
                storage = _storage(written)
                self._written.add(storage)
                if storage not in slots:
                    size = -(-written.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
                    lives[storage] = Buffer(size, step, step)
            for tensor in _tensors(fields):
                if _storage(tensor) in lives:
                    lives[_storage(tensor)] = lives[_storage(tensor)]._replace(last=step)
        return lives

    def run(self, x: Tensor, arena: Tensor, threads: int) -> Maps:
        """The network's outputs for an image of the plan's shape; `arena` holds `arena_bytes`."""
        outputs = [
            torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
            for shape, dtype in self._outputs
        ]
        bases = [arena.data_ptr(), x.data_ptr(), *[out.data_ptr() for out in outputs]]
        _native.check(self._native.run(bases, threads), "plan")
        return outputs[: self._levels], outputs[self._levels :]


def _written(fields: dict[str, Any]) -> list[Tensor]:
    found = [fields[name] for name in _WRITTEN if isinstance(fields.get(name), Tensor)]
    return found + [t for output in fields.get("outputs", ()) for t in _written(output)]


class Plans:
    """The plans of one model: made on first use, at most eight, dropped when the model changes.

    A copy or an unpickled one is empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        self._watch: Watch | None = None
        self._plans: OrderedDict[Any, Plan | NotPlannableError] = OrderedDict()
        self._arenas: list[Tensor] = []

    def __deepcopy__(self, memo: Any) -> Plans:
        return Plans()

    def __reduce__(self) -> Any:
        return Plans, ()

    def run(self, model: nn.Module, forward: Forward, x: Tensor) -> Maps | None:
        """The outputs of `forward(x)` by a plan, or None where no plan serves this call."""
        if not _serves(model, x):
            return None
        plan = self.find(model, forward, x)
        if not isinstance(plan, Plan):
            return None
        arena = self._take_arena(plan.arena_bytes)
        try:
            return plan.run(x, arena, torch.get_num_threads())
        finally:
            self._arenas.append(arena)

    def find(
        self, model: nn.Module, forward: Forward, x: Tensor
    ) -> Plan | NotPlannableError | None:
        """The plan for images like x; why there is none; None while the model has hooks or trains."""
        module = _native.module()
        key = x.shape, x.stride(), x.dtype, torch.get_num_threads(), module.isa()
        with self._lock:
            if self._watch is None or not self._watch.unchanged():
                self.clear()
                self._watch = Watch(model)
            if not self._watch.plain:
                return None
            plan = self._plans.get(key)
            if plan is None:
                try:
                    plan = Plan(forward, x)
                except NotPlannableError as error:
                    plan = error.with_traceback(None)
                self._plans[key] = plan
                if len(self._plans) > _MAX_PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return plan

    def _take_arena(self, size: int) -> Tensor:
        while True:
            try:
                arena = self._arenas.pop()
            except IndexError:
                return torch.empty(max(size, 1), dtype=torch.uint8)
            if arena.numel() >= size:
                return arena


def _serves(model: nn.Module, x: Tensor) -> bool:
    """Whether this call is one that a plan may take: eval, no gradients, an ordinary tensor on the CPU."""
    if model.training or torch.is_grad_enabled() or not _enabled.get() or type(x) is not Tensor:
        return False
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or x.numel() == 0:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_neg() or x.is_conj():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return _dispatch.requested() in (None, "cpu") and _native.REASON is None
