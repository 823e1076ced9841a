"""A tape of a forward and its backward: the kernels that ops of ours launch, and what torch does in between.

It is taken without computing anything, from the model's own code, and is what a training plan is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from effdet_kernels import _library, _native

from .native_plan import Maps, NotPlannableError, storage_of, tensors_in
from .torch_steps import as_kernel

_aten = torch.ops.aten
_ALLOCATE = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_VIEWS = {_aten._unsafe_view.default, _aten._reshape_alias.default}
_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class TorchStep(NamedTuple):
    """A torch function that was called; `outs` are what it returned, empty where it changes its first argument."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Tensor]


Step = _native.Launch | TorchStep


class Tape:
    """What a forward does, and autograd's backward of it to `parameters`, without what nothing depends on.

    Attributes:
        forward, backward: the steps of each, with kernels of ours in torch's place where there are some.
        classes, boxes: the forward's outputs. Like all tensors here they are memory without numbers.
        grads: of those outputs that need gradients.
        found: the parameters' gradients, None for one that no output depends on.
        made: what the steps allocate, by storage.

    Raises:
        NotPlannableError: of the constructor; the message says what cannot be repeated.
    """

    def __init__(
        self, forward: Callable[[Tensor], Maps], x: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        with torch.random.fork_rng(devices=()), _native.recorded(packs=True) as steps:
            notes = _Notes(steps)
            with notes:
                self.classes, self.boxes = forward(x)
                middle = len(steps)
                ends = [out for out in (*self.classes, *self.boxes) if out.requires_grad]
                self.grads = [torch.empty_like(out) for out in ends]
                self.found = torch.autograd.grad(ends, parameters, self.grads, allow_unused=True)
        self.made = notes.made
        results = [*self.classes, *self.boxes, *(g for g in self.found if g is not None)]
        needed = _needed(steps, results)
        self.forward = [
            _translated(s) for s, need in zip(steps[:middle], needed, strict=False) if need
        ]
        self.backward = [
            _translated(s) for s, need in zip(steps[middle:], needed[middle:], strict=True) if need
        ]


class _Notes(TorchDispatchMode):
    """Notes what torch computes, and lets ops of ours note what they launch.

    Results hold no numbers: their memory is only there to tell them apart. What exists already is not changed.
    """

    def __init__(self, steps: list[Any]) -> None:
        super().__init__()
        self._steps = steps
        # By storage. None is freed, so that no address means two things.
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == _library.NAMESPACE:
            name = func._schema.name.split("::")[1]
            with self:
                return _library.kernel_of(name)(*args)
        with self:
            composed = func.decompose(*args, **kwargs)
        if composed is not NotImplemented:
            return composed
        if func.is_view or func in _VIEWS:
            return func(*args, **kwargs)
        if _WAITING & set(func.tags):
            raise NotPlannableError(f"{func} waits for a value")
        if func._schema.is_mutable:
            return self._changed(func, args, kwargs)
        result = func(*args, **kwargs)
        outs = tensors_in(result)
        given = {storage_of(t) for t in tensors_in((args, kwargs)) if t.numel()}
        if any(storage_of(out) in given for out in outs):
            raise NotPlannableError(f"{func} returns its argument")
        self.made.update((storage_of(out), out) for out in outs)
        if func not in _ALLOCATE and outs:
            self._steps.append(TorchStep(func, args, kwargs, outs))
        return result

    def _changed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        written = [
            a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
        ]
        if not written[0] or any(written[1:]) or len(func._schema.returns) != 1:
            raise NotPlannableError(f"{func} changes more than its first argument")
        self._steps.append(TorchStep(func, args, kwargs, []))
        return args[0]


def _needed(steps: Sequence[Step], results: Iterable[Tensor]) -> list[bool]:
    """Of each step, whether something depends on it: kernels and changes in place count as needed."""
    read = {storage_of(t) for t in results}
    needed = [False] * len(steps)
    for i in reversed(range(len(steps))):
        step = steps[i]
        outs = step.outs if isinstance(step, TorchStep) else []
        if outs and not any(storage_of(out) in read for out in outs):
            continue
        needed[i] = True
        read.update(storage_of(t) for t in touched(step))
    return needed


def _translated(step: Step) -> Step:
    if not isinstance(step, TorchStep):
        return step
    return as_kernel(step.function, step.args, step.kwargs, step.outs) or step


def name_of(step: Step) -> str:
    """The name of a step's kernel or torch function, for messages."""
    return str(step.function) if isinstance(step, TorchStep) else step[0]


def touched(step: Step) -> list[Tensor]:
    """The tensors that a step reads or writes."""
    return tensors_in(step if isinstance(step, TorchStep) else step[1])
