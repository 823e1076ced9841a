"""Plans: what a model runs by, one for each shape of its inputs.

In eval mode without gradients a plan is, on a CPU, a list of native kernel calls (`native_plan`), on a GPU a CUDA graph
(`graph`); in training mode on a CPU it is two such lists, of forward and backward (`training_plan`). All are made of
the model's own forward when a shape is met first, and repeat it without going through its modules. A forward that does
what a plan cannot repeat runs module by module; `EfficientDet.plan_reason` says why.

Plans belong to a model and to its weights: a change that `Watch` sees drops them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from effdet_kernels import _dispatch, _native

from . import graph
from .native_plan import NotPlannableError, Plan
from .padding import Size
from .training_plan import TrainingPlan
from .watch import Watch

__all__ = ["NotPlannableError", "Plans", "TrainingPlans", "images_of", "use_plan"]

_MAX_PLANS = 8
_AnyPlan = Plan | graph.Graph | TrainingPlan
_enabled: ContextVar[bool] = ContextVar("effdet_plan", default=True)
_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def use_plan(enabled: bool) -> Iterator[None]:
    """Inside, models run by plans where they can (`True`, as they do anyway) or module by module (`False`)."""
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


class Plans:
    """The plans of one model in eval mode: made on first use, at most eight, dropped when the model changes.

    A forward takes tensors, of which all but the first may be None. With `graphs_only` there are none on a CPU. A copy
    or an unpickled one is empty.
    """

    most = _MAX_PLANS

    def __init__(self, graphs_only: bool = False) -> None:
        self._lock = threading.Lock()
        self._graphs_only = graphs_only
        self.clear()

    def clear(self) -> None:
        """Forget all plans, why some could not be made, and their memory."""
        self._watch: Watch | None = None
        self._plans: OrderedDict[Hashable, _AnyPlan | NotPlannableError] = OrderedDict()
        self._arenas: list[Tensor] = []

    def clear_if_changed(self) -> None:
        """Free the memory of plans that no call will use: the model was moved or cast."""
        with self._lock:
            if self._watch is not None and not self._watch.unchanged():
                self.clear()

    def __deepcopy__(self, memo: Any) -> Plans:
        return type(self)(self._graphs_only)

    def __reduce__(self) -> Any:
        return type(self), (self._graphs_only,)

    def run(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        *inputs: Any,
        settings: Hashable = (),
    ) -> Any:
        """What `forward(*inputs)` returns, by a plan, or None where no plan serves this call.

        Of `model` modules, weights, hooks and modes are watched; whatever else `forward` depends on belongs into
        `settings`.
        """
        if self._refusal(model, inputs):
            return None
        plan = self.find(model, forward, *inputs, settings=settings)
        return None if isinstance(plan, NotPlannableError) else plan.run(*inputs)

    def reason(self, model: nn.Module, forward: Callable[..., Any], *inputs: Any) -> str | None:
        """Why no plan serves such a call, or None where one does."""
        refusal = self._refusal(model, inputs)
        if refusal:
            return refusal
        plan = self.find(model, forward, *inputs)
        return str(plan) if isinstance(plan, NotPlannableError) else None

    def find(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        *inputs: Any,
        settings: Hashable = (),
    ) -> _AnyPlan | NotPlannableError:
        """The plan of a call that is not refused, made if need be; or why there is none."""
        layouts = [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in inputs]
        with self._lock:
            watch = self._watched(model, inputs)
            if not watch.plain:
                return NotPlannableError("a module has hooks or is in training mode")
            key = (settings, self._where(inputs), *layouts)
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = self._tried(forward, inputs)
                if len(self._plans) > self.most:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return plan

    def _watched(self, model: nn.Module, inputs: Sequence[Any]) -> Watch:
        values = not graph.serves(inputs)
        if self._watch is None or self._watch.values != values or not self._watch.unchanged():
            self.clear()
            self._watch = Watch(model, values)
        return self._watch

    def _where(self, inputs: Sequence[Any]) -> Hashable:
        """What a plan depends on beside the model and its inputs."""
        if graph.serves(inputs):
            return _dispatch.requested()
        return torch.get_num_threads(), _native.module().isa()

    def _tried(
        self, forward: Callable[..., Any], inputs: Sequence[Any]
    ) -> _AnyPlan | NotPlannableError:
        try:
            with use_plan(False):
                return self._made(forward, inputs)
        except NotPlannableError as error:
            shapes = [tuple(t.shape) for t in inputs if t is not None]
            _logger.info("no plan for inputs of %s: %s", shapes, error)
            return NotPlannableError(str(error))  # without traceback and cause, which hold tensors

    def _made(self, forward: Callable[..., Any], inputs: Sequence[Any]) -> _AnyPlan:
        if graph.serves(inputs):
            return graph.Graph(forward, inputs)
        return Plan(forward, inputs[0], self._arenas)

    def _refusal(self, model: nn.Module, inputs: Sequence[Tensor | None]) -> str | None:
        """Why this call is none that a plan may take, whatever the model does, or None."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "the call is compiled or traced"
        if not _enabled.get():
            return "use_plan(False)"
        return self._of_another_kind(model, inputs)

    def _of_another_kind(self, model: nn.Module, inputs: Sequence[Tensor | None]) -> str | None:
        """Why these plans are not for a call in this mode, on these inputs, or None."""
        if model.training or torch.is_grad_enabled():
            return "the model is in training mode" if model.training else "gradients are enabled"
        given = [t for t in inputs if t is not None]
        refusal = _unusual(model, given)
        if refusal:
            return refusal
        by_graph, device = graph.serves(inputs), given[0].device.type
        if not by_graph and (device != "cpu" or self._graphs_only):
            return f"inputs are on {device}"
        return graph.refusal(given) if by_graph else _no_kernels()


class TrainingPlans(Plans):
    """The plans of one model in training mode, on a CPU; likewise.

    They outlive evaluations: only a model that differs at the next step of training drops them. They hold no copies of
    weights and share their memory, so there may be many: training on images of many sizes needs one for each.
    """

    most = 64

    def release(self) -> None:
        """Free the memory between forward and backward; the next step of training takes it again."""
        self._arenas.clear()

    def _watched(self, model: nn.Module, inputs: Sequence[Any]) -> Watch:
        if self._watch is None or not self._watch.unchanged():
            self.clear()
            self._watch = Watch(model, values=False, gradients=True)
        return self._watch

    def _where(self, inputs: Sequence[Any]) -> Hashable:
        return _native.module().isa(), *(p.requires_grad for p in self._parameters())

    def _parameters(self) -> Sequence[Tensor]:
        assert self._watch is not None
        return self._watch.parameters

    def _made(self, forward: Callable[..., Any], inputs: Sequence[Any]) -> TrainingPlan:
        trained = [p for p in self._parameters() if p.requires_grad]
        return TrainingPlan(forward, inputs[0], trained, self._arenas)

    def _of_another_kind(self, model: nn.Module, inputs: Sequence[Tensor | None]) -> str | None:
        if not (model.training and torch.is_grad_enabled()):
            return "gradients are disabled" if model.training else "gradients are enabled"
        (x,) = inputs
        if x is None or x.device.type != "cpu":
            return "inputs are not on a CPU"
        if x.requires_grad or torch.is_inference_mode_enabled() or torch.is_anomaly_enabled():
            return "the gradient of the images is wanted, or autograd is in an unusual mode"
        return _unusual(model, [x]) or _no_kernels()


def _unusual(model: nn.Module, given: Sequence[Tensor]) -> str | None:
    """What else may have to see a call, or stands in the way of one."""
    if "_is_replica" in vars(model):
        return "the model is one of nn.DataParallel's copies"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a torch mode is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if any(type(t) is not Tensor or t.is_neg() or t.is_conj() or not t.numel() for t in given):
        return "an input is empty, a view that negates, or of a subclass of Tensor"
    if torch.is_autocast_enabled(given[0].device.type):
        return "autocast is enabled"
    return _native.REASON


def _no_kernels() -> str | None:
    if _dispatch.requested() not in (None, "cpu"):
        return f"backend {_dispatch.requested()!r} was asked for"
    return None


def images_of(
    model: nn.Module,
    sizes: Sequence[int | Size],
    batch: int,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
) -> Iterator[Tensor]:
    """Zeros for images of `sizes`, (H, W) or a side, on the device of `model` and, by default, in its dtype.

    Raises:
        ValueError: `model` is in training mode.
    """
    if model.training:
        raise ValueError("warmup: got a model in training mode, takes one in eval mode")
    like = next(model.parameters())
    for size in sizes:
        height, width = (size, size) if isinstance(size, int) else size
        x = torch.zeros(batch, 3, height, width, dtype=dtype or like.dtype, device=like.device)
        yield x.contiguous(memory_format=memory_format)
