"""A forward with its backward as two flat lists of C++ kernel calls: what trains on a CPU.

A plan is made by running the model's own forward, and autograd's backward of it, once, while kernel calls are noted
instead of made. What torch does in between (running statistics, sums of gradients) is noted as well, and is a kernel of
ours where there is one for it, else a step that calls torch. Everything in between has a place in one arena, so that a
step of training allocates its outputs and the gradients of the parameters, no more, and goes through no module.

Weights are read where they are, and packed in every forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from effdet_kernels import _native
from effdet_kernels._arena import Buffer, aligned, place

from .native_plan import SLOT_SHIFT, Maps, NotPlannableError, storage_of, take_arena, tensors_in
from .tape import Step, Tape, TorchStep, name_of, touched

# Slots; those of outputs, of their gradients and of all parameters' gradients follow.
_ARENA, _INPUT = 0, 1
_MOST_BY_TORCH = 0.2  # of a plan's steps; with more there is little to gain


class _Place(NamedTuple):
    """Where a tensor's first byte is, and what it is."""

    slot: int
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def in_(self, memory: Sequence[Tensor]) -> Tensor:
        of = memory[self.slot].untyped_storage()
        start = 0
        if self.slot == _INPUT:
            x = memory[_INPUT]
            start = x.data_ptr() - int(of.data_ptr())
        place = (start + self.offset) // self.dtype.itemsize
        return torch.empty(0, dtype=self.dtype).set_(of, place, self.shape, self.strides)


class TrainingPlan:
    """The kernel calls of one network's forward and backward, for one shape of images.

    Attributes: `arena_bytes`; `names` (of the kernels and torch functions, forward and backward, in order).

    Args:
        forward: of images, to (class maps, box maps).
        x: images that need no gradient.
        parameters: those that need gradients.
        arenas: are taken from this list and put back.

    Raises:
        NotPlannableError: of the constructor; the message says what is in the way.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Maps],
        x: Tensor,
        parameters: Sequence[Tensor],
        arenas: list[Tensor],
    ) -> None:
        if not parameters:
            raise NotPlannableError("no parameter needs a gradient")
        self._arenas = arenas
        self._parameters = list(parameters)
        tape = Tape(forward, x, parameters)
        outputs = [*tape.classes, *tape.boxes]
        self._differentiable = [out.requires_grad for out in outputs]
        self._levels = len(tape.classes)
        self._outputs = [(out.shape, out.stride(), out.dtype) for out in outputs]
        self._grads = [(grad.shape, grad.stride()) for grad in tape.grads]
        self._slots = {storage_of(x): _INPUT}
        for end in [*outputs, *tape.grads]:
            if storage_of(end) not in tape.made or storage_of(end) in self._slots:
                raise NotPlannableError("outputs that share memory")
            self._slots[storage_of(end)] = 1 + len(self._slots)
        self._arrange(tape, outputs, x)

    def _arrange(self, tape: Tape, outputs: Sequence[Tensor], x: Tensor) -> None:
        """Gives everything its place and compiles the steps."""
        forward, backward, found = tape.forward, tape.backward, tape.found
        reads = {storage_of(t) for step in backward for t in touched(step)}
        self._reads_outputs = [storage_of(out) in reads for out in outputs]
        flat = self._flat(tape)
        fixed = flat.keys() | self._slots.keys()
        inner = {at for at in tape.made if at not in fixed}
        lives = _lives([*forward, *backward], inner)
        ends = {storage_of(g) for g in found if g is not None}
        places, self.arena_bytes = _placed(lives, len(forward), ends)
        x_start = x.data_ptr()

        def place_of(tensor: Tensor) -> tuple[int, int] | None:
            at = storage_of(tensor)
            start = x_start if self._slots.get(at) == _INPUT else at
            inside = tensor.data_ptr() - start
            if at in self._slots:
                return self._slots[at], inside
            if at in flat:
                return self._flat_slot, flat[at] + inside
            return (_ARENA, places[at] + inside) if at in places else None

        # Parameters and buffers are among them, whose addresses are watched.
        self._constants: list[Tensor] = []
        self._found = [None if g is None else _locate(g, place_of) for g in found]
        self._forward = self._compiled(forward, place_of)
        self._backward = self._compiled(backward, place_of)
        self.names = [name_of(step) for step in [*forward, *backward]]
        by_torch = sum(isinstance(step, TorchStep) for step in [*forward, *backward])
        if by_torch > _MOST_BY_TORCH * len(self.names):
            raise NotPlannableError(f"torch does {by_torch} of {len(self.names)} steps")

    def _flat(self, tape: Tape) -> dict[int, int]:
        """The offset, in one piece of memory for all, of gradients of parameters that are all of a storage."""
        self._flat_slot = 1 + len(self._slots)
        self._flat_bytes = 0
        flat: dict[int, int] = {}
        storages = [storage_of(g) for g in tape.found if g is not None]
        for grad in tape.found:
            if grad is None:
                continue
            at = storage_of(grad)
            alone = storages.count(at) == 1 and grad.untyped_storage().nbytes() == grad.nbytes
            if alone and at in tape.made and at not in self._slots:
                flat[at] = self._flat_bytes
                self._flat_bytes += aligned(grad.nbytes)
        return flat

    def _compiled(self, steps: Sequence[Step], place_of: Callable[..., Any]) -> list[Any]:
        """Native plans, and between them what torch does."""

        def address(tensor: Tensor) -> int:
            place = place_of(tensor)
            if place is None:
                self._constants.append(tensor)
                return tensor.data_ptr()
            return ((place[0] + 1) << SLOT_SHIFT) + place[1]

        compiled: list[Any] = []
        for step in steps:
            if isinstance(step, TorchStep):
                compiled.append(_Bound(step, place_of))
                continue
            if not compiled or isinstance(compiled[-1], _Bound):
                compiled.append(_native.module().Plan())
            name, fields = step
            getattr(compiled[-1], name)(_native.resolved(fields, address))
        return compiled

    def run(self, x: Tensor) -> Maps:
        """The network's outputs for images of the plan's shape, with a graph to the parameters."""
        maps = list(_Pass.apply(self, x, *self._parameters))
        return maps[: self._levels], maps[self._levels :]

    def run_forward(self, ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Class and box maps for x [B, 3, H, W]; ``ctx`` keeps what the backward reads."""
        arena = take_arena(self._arenas, self.arena_bytes)
        outputs = [torch.empty_strided(*of, dtype=dtype) for *of, dtype in self._outputs]
        _run(self._forward, [arena, x, *outputs])
        # Freed as soon as this graph's backward needs the arena no more.
        lease = arena.detach()
        weakref.finalize(lease, self._arenas.append, arena).atexit = False
        read = [out for out, reads in zip(outputs, self._reads_outputs, strict=True) if reads]
        ctx.save_for_backward(lease, x, *read, *self._parameters)
        constant = [o for o, has in zip(outputs, self._differentiable, strict=True) if not has]
        ctx.mark_non_differentiable(*constant)
        return tuple(outputs)

    def run_backward(self, ctx: Any, grads: Sequence[Tensor]) -> list[Tensor | None]:
        """Given the maps' gradients, those of the parameters; None for one without."""
        lease, x, *rest = ctx.saved_tensors
        read = iter(rest)
        outputs = [next(read) if reads else lease for reads in self._reads_outputs]
        wanted = [g for g, has in zip(grads, self._differentiable, strict=True) if has]
        ends = [
            grad
            if grad.stride() == strides
            else torch.empty_strided(shape, strides, dtype=grad.dtype).copy_(grad)
            for grad, (shape, strides) in zip(wanted, self._grads, strict=True)
        ]
        flat = torch.empty(self._flat_bytes, dtype=torch.uint8)
        memory = [lease, x, *outputs, *ends, flat]
        _run(self._backward, memory)
        return [None if at is None else self._handed_out(at, memory) for at in self._found]

    def _handed_out(self, place: _Place | Tensor, memory: Sequence[Tensor]) -> Tensor:
        if isinstance(place, Tensor):
            return place.clone()
        grad = place.in_(memory)
        return grad if place.slot == self._flat_slot else grad.clone()


class _Pass(torch.autograd.Function):
    """One run of a plan: `_Pass.apply(plan, x, *parameters)`."""

    @staticmethod
    def forward(ctx: Any, plan: TrainingPlan, x: Tensor, *parameters: Tensor) -> Any:
        ctx.plan = plan
        return plan.run_forward(ctx, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("EfficientDet: a second derivative was asked for; kernels have none")
        return None, None, *ctx.plan.run_backward(ctx, grads)


class _Bound:
    """A torch function whose arguments have places."""

    def __init__(self, step: TorchStep, place_of: Callable[..., Any]) -> None:
        def located(value: Any) -> Any:
            return _locate(value, place_of) if isinstance(value, Tensor) else value

        self._function, self._out = _into_memory(step)
        self._call = tree_map(located, (step.args, step.kwargs, step.outs))

    def run(self, memory: Sequence[Tensor]) -> None:
        def found(value: Any) -> Any:
            return value.in_(memory) if isinstance(value, _Place) else value

        # A place is a tuple, too.
        args, kwargs, outs = tree_map(found, self._call, is_leaf=lambda v: isinstance(v, _Place))
        if self._out:
            self._function(*args, **kwargs, **{self._out: outs[0]})
            return
        result = self._function(*args, **kwargs)
        for out, value in zip(outs, tensors_in(result) if outs else (), strict=True):
            out.copy_(value)


def _into_memory(step: TorchStep) -> tuple[Any, str]:
    """The overload of the step's function that writes where it is told to, and the name of that argument; or the
    function itself and no name."""
    schema = step.function._schema
    wanted = [(a.name, str(a.type)) for a in schema.arguments]
    packet = step.function.overloadpacket
    for name in packet.overloads() if len(step.outs) == 1 else ():
        overload = getattr(packet, name)
        arguments = overload._schema.arguments
        out = [a.name for a in arguments if a.is_out]
        if len(out) == 1 and [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted:
            return overload, out[0]
    return step.function, ""


def _run(steps: Sequence[Any], memory: Sequence[Tensor]) -> None:
    bases = [m.data_ptr() for m in memory]
    threads = torch.get_num_threads()
    with torch.no_grad():
        for step in steps:
            if isinstance(step, _Bound):
                step.run(memory)
            else:
                _native.check(step.run(bases, threads), "plan")


def _lives(steps: Sequence[Step], storages: set[int]) -> dict[int, Buffer]:
    """Of each of ``storages``, the first and the last step that has to do with it."""
    lives: dict[int, Buffer] = {}
    for i, step in enumerate(steps):
        for tensor in touched(step):
            at = storage_of(tensor)
            if at in storages:
                size = tensor.untyped_storage().nbytes()
                lives[at] = lives.get(at, Buffer(size, i, i))._replace(last=i)
    return lives


def _placed(lives: dict[int, Buffer], middle: int, ends: set[int]) -> tuple[dict[int, int], int]:
    """The offset of each buffer, and the bytes of all.

    What the backward reads of the forward, and what it returns, is alone in its place, so that a backward can run
    twice; others share theirs.
    """
    places: dict[int, int] = {}
    size = 0
    shared = []
    for at, buffer in lives.items():
        if at in ends or buffer.first < middle <= buffer.last:
            places[at] = size
            size += aligned(buffer.size)
        else:
            shared.append(at)
    inner, more = place([lives[at] for at in shared], [])
    places.update((at, size + offset) for at, (_, offset) in zip(shared, inner, strict=True))
    return places, size + more


def _locate(tensor: Tensor, place_of: Callable[..., Any]) -> _Place | Tensor:
    """The tensor's place; itself where it is none of the plan's."""
    place = place_of(tensor)
    if place is None:
        return tensor
    slot, offset = place
    return _Place(slot, offset, tensor.shape, tensor.stride(), tensor.dtype)
