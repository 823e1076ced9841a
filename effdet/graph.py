"""A forward as one CUDA graph: its kernels are captured once for a shape and launched together by later calls.

Captured is the ordinary forward, with the backends that `effdet_kernels` chooses. Kernels read the parameters where
they are, and what is computed of them (folded norms, packed weights) the graph computes each time: new values need no
new graph, only another address does, or another module, mode or hook (`Watch`).

A graph has memory of its own, as much as the forward needs: inputs are copied in, outputs are copied out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .native_plan import NotPlannableError

_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
_one_at_a_time = threading.Lock()  # of captures in a process: torch and CUDA have state in common


class CudaCapture:
    """Work on one GPU that is captured once and replayed on the stream of each caller."""

    def __init__(self, device: torch.device) -> None:
        self._used = torch.cuda.Event()
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def __del__(self) -> None:
        if not self.underway():  # of another capture, which this would spoil
            self._used.synchronize()  # a replay in flight keeps its memory

    @staticmethod
    def underway() -> bool:
        """Whether the caller captures a graph."""
        return torch.cuda.is_current_stream_capturing()

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Run `work` on the stream of the capture: kernels are compiled, libraries initialised."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    work()
            finally:
                current.wait_stream(self._stream)

    def capture(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, in memory of the graph; it is not computed before the first replay."""
        with (
            _one_at_a_time,
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),  # torch.cuda.graph that fails does not set it back
            torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            return work()

    @contextlib.contextmanager
    def turn(self) -> Iterator[Callable[[], None]]:
        """The function that replays; what a caller enqueues inside comes after what all earlier ones have enqueued."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            current.wait_event(self._used)
            try:
                yield self._graph.replay
            finally:
                self._used.record(current)


CAPTURES: dict[str, Any] = {"cuda": CudaCapture}  # by type of device


def serves(inputs: Sequence[Tensor | None]) -> bool:
    """Whether plans are graphs where the first input is."""
    return inputs[0] is not None and inputs[0].device.type in CAPTURES


def counts_launches(x: Tensor) -> bool:
    """Whether a forward of x takes its time by its launches: on a GPU, without gradients."""
    return not torch.is_grad_enabled() and serves([x])


def refusal(inputs: Sequence[Tensor]) -> str | None:
    """Why a call with `inputs` may not run by a graph, or None."""
    if any(t.device != inputs[0].device for t in inputs):
        return "inputs are on several devices"
    if CAPTURES[inputs[0].device.type].underway():
        return "the call is captured in a CUDA graph"
    return None


class Graph:
    """A forward of tensors, of which some may be None, for one layout of each of them.

    Raises:
        NotPlannableError: of the constructor: no graph can hold the forward; the message says why.
    """

    def __init__(self, forward: Callable[..., Any], inputs: Sequence[Tensor | None]) -> None:
        given = [t for t in inputs if t is not None]
        self._lock = threading.Lock()
        self._capture = CAPTURES[given[0].device.type](given[0].device)
        broken: list[str] = []

        def work(fresh: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Any]:
            own = [t if t is None else fresh(t) for t in inputs]
            return [t for t in own if t is not None], forward(*own)

        def warm_up() -> None:
            with _NoHost():
                work(torch.clone)

        def capture() -> tuple[list[Tensor], Any]:
            try:
                return work(torch.empty_like)
            except RuntimeError as error:  # what the end of the capture then raises hides it
                broken.append(str(error))
                raise

        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._capture.warm_up(warm_up)
            try:
                self._inputs, outputs = self._capture.capture(capture)
            except RuntimeError as error:
                broken.append(str(error))
                raise NotPlannableError(f"the capture failed: {broken[0]}") from error
        self._outputs, self._structure = tree_flatten(outputs)

    def run(self, *inputs: Tensor | None) -> Any:
        """What the forward returns for inputs of the graph's layouts, in memory of its own."""
        given = [t for t in inputs if t is not None]
        with self._lock, self._capture.turn() as replay:
            torch._foreach_copy_(self._inputs, given)
            replay()
            outputs = [torch.empty_like(t) for t in self._outputs]
            torch._foreach_copy_(outputs, self._outputs)
        return tree_unflatten(outputs, self._structure)


class _NoHost(TorchDispatchMode):
    """Raises where a forward waits for the device, or brings data to it: seen before a capture, it breaks none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if func.namespace == "effdet_kernels":  # look inside
            key = getattr(torch._C.DispatchKey, tensors[0].device.type.upper())
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        if _waits(func, args):
            raise NotPlannableError(f"{func} needs values on the host")
        result = func(*args, **kwargs)
        made = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        if len({t.device for t in [*tensors, *made] if t.dim()}) > 1:
            raise NotPlannableError(f"{func} moves data between devices")
        return result


def _waits(func: Any, args: Any) -> bool:
    """Whether a torch op reads values on the host: its tags say so, but for indices that are masks."""
    if func.overloadpacket in _INDEXING:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return not _WAITING.isdisjoint(func.tags)
