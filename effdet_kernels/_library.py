"""The one ``torch.library.Library`` of the package, and ``define``, which registers an op with it.

An op is registered from five things: its schema, an ``out_spec`` (shapes, dtypes and layouts of its outputs, shared by
the fake kernel and by allocation), its implementations and its backwards by backend name, and the names of its
differentiable arguments.
``define`` derives the rest: the fake, the autocast rule, the backward op ``<name>_backward`` and its autograd formula.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from effdet_kernels import _cuda, _direct, _dispatch

NAMESPACE = "effdet_kernels"
OPS: dict[str, Op] = {}
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


class TensorSpec(NamedTuple):
    """Shape, dtype, device and memory format of one output."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format = torch.contiguous_format

    def empty(self) -> Tensor:
        """Uninitialised memory of this specification."""
        # Naming the format takes as long as the allocation.
        if self.memory_format is torch.contiguous_format:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return torch.empty(
            self.shape, dtype=self.dtype, device=self.device, memory_format=self.memory_format
        )

    def arranged(self, tensor: Tensor) -> Tensor:
        """``tensor`` in exactly this dtype and these strides: itself or a copy."""
        shape = tuple(self.shape)
        if tensor.shape != shape:
            raise RuntimeError(f"an implementation returned {tuple(tensor.shape)}, not {shape}")
        strides = _strides(shape, self.memory_format)
        if tensor.dtype == self.dtype and tensor.stride() == strides:
            return tensor
        out = tensor.to(self.dtype).contiguous(memory_format=self.memory_format)
        # contiguous() may leave any stride in a dimension of size 1 or in an empty tensor.
        return out if out.stride() == strides else out.as_strided(shape, strides)


@functools.lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[int, ...]:
    """Those of a new tensor."""
    return torch.empty(shape, device="meta", memory_format=memory_format).stride()


def nchw(shape: Sequence[Any], like: Tensor) -> TensorSpec:
    """Specification of a feature map: ``shape`` [B, C, H, W], channels_last, dtype and device of ``like``."""
    return TensorSpec(tuple(shape), like.dtype, like.device, torch.channels_last)


def moments(channels: int, like: Tensor) -> list[TensorSpec]:
    """Specifications of mean and variance [channels] of a map like ``like``: in its accumulation dtype."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [TensorSpec((channels,), wide, like.device) for _ in range(2)]


def _conform(
    specs: Iterable[TensorSpec], outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """``outputs`` as ``specs`` want them, no alias of an input or of each other."""
    taken = {_storage(tensor) for tensor in inputs}
    found = []
    for spec, output in zip(specs, outputs, strict=True):
        out = spec.arranged(output)
        if _storage(out) in taken:
            out = spec.arranged(out.clone(memory_format=spec.memory_format))
        taken.add(_storage(out))
        found.append(out)
    return found


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among ``values`` and in the lists among them, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


class Op:
    """A registered op; call it with every argument of its schema, in order."""

    def __init__(
        self,
        schema: str,
        out_spec: Callable[..., list[TensorSpec]],
        impls: dict[str, Callable[..., Any]],
        backwards: dict[str, Callable[..., Any]],
        differentiable: Sequence[str],
        nondifferentiable_outputs: Sequence[int] | Callable[..., Sequence[int]],
        saved_outputs: Sequence[int] | Callable[..., Sequence[int]],
        autocast: Sequence[str] | Literal["float32"],
    ) -> None:
        self.schema = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
        self.name = self.schema.name.split("::")[1]
        self.impls = impls
        self.out_spec = out_spec
        self._arguments = [argument.name for argument in self.schema.arguments]
        self._differentiable = [self._arguments.index(name) for name in differentiable]
        self._nondifferentiable_outputs = nondifferentiable_outputs
        self._saved_outputs = saved_outputs
        self.backwards = (
            {**backwards, "reference": self._reference_backward} if differentiable else {}
        )
        self.autocast = autocast
        self._returns_list = str(self.schema.returns[0].type) == "List[Tensor]"
        self._register(schema)

    def __call__(self, *args: Any) -> Any:
        route, device = self._route(args)
        if route == "dispatcher":
            return self.overload(*args)
        if torch.is_autocast_enabled(device):
            args = tuple(self._cast(args, torch.get_autocast_dtype(device)))
            with torch.autocast(device, enabled=False):
                return self._served(route, args)
        return self._served(route, args)

    def _route(self, args: Sequence[Any]) -> tuple[str, str]:
        """How a call is served, and its device: by the "dispatcher", or past it by a backend.

        Eager calls spare the dispatcher. Those with gradients that the reference serves go through its own graph, so
        that nothing is computed twice.
        """
        if torch.compiler.is_compiling():
            return "dispatcher", ""
        tensors = _tensors(args)
        if not self._needs_gradients(tensors):
            device = tensors[0].device.type
            if device not in ("cpu", "cuda") or not _direct.possible(tensors):
                return "dispatcher", ""
            return _dispatch.choose(self.name, self.impls, device, args), device
        device = tensors[0].device.type
        direct = _direct.possible(tensors)
        # Of others, fake tensors among them, the address, which a kernel may refuse, is not known yet.
        serving = _dispatch.choose(self.name, self.impls, device, args if direct else None)
        if (
            serving != "reference"
            and _dispatch.requested() is None
            and self.backward_backend(device) == "reference"
        ):
            serving = "reference"  # a kernel's backward would compute the reference's forward again
        if direct:
            return serving, device
        # The reference reads values, which a fake tensor has not.
        if serving == "reference" and not any(isinstance(t, FakeTensor) for t in tensors):
            return serving, device
        return "dispatcher", ""

    def _needs_gradients(self, tensors: Sequence[Tensor]) -> bool:
        if not self._differentiable or not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for t in tensors)

    def _served(self, backend: str, args: Sequence[Any]) -> Any:
        if backend == "reference":
            return self._conformed(self.impls["reference"], args)
        tensors = _tensors(args)
        if not self._needs_gradients(tensors):
            return self.direct(backend, args)
        output = _direct.Call.apply(self, backend, args, *tensors)
        return list(output) if self._returns_list else output

    # Registration --------------------------------------------------------------------------------

    def _register(self, schema: str) -> None:
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._forward, "CPU")
        _LIBRARY.impl(self.name, self._forward, "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self._fake, lib=_LIBRARY)
        for device in ("cpu", "cuda"):
            _LIBRARY.impl(self.name, self._autocast_kernel(device), f"Autocast{device.upper()}")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        if self._differentiable:
            self._register_backward(schema)

    def _register_backward(self, schema: str) -> None:
        arguments = schema.partition("(")[2].rpartition(") ->")[0]
        name = f"{self.name}_backward"
        saved = "Tensor[] outputs, " if self._saved_outputs else ""
        _LIBRARY.define(f"{name}(Tensor?[] grads, {arguments}, {saved}bool[] needs) -> Tensor[]")
        _LIBRARY.impl(name, self._backward, "CPU")
        _LIBRARY.impl(name, self._backward, "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._fake_backward, lib=_LIBRARY)
        self._backward_overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}",
            self._autograd_backward,
            setup_context=self.setup_context,
            lib=_LIBRARY,
        )

    # Kernels of the dispatcher -------------------------------------------------------------------

    def _forward(self, *args: Any) -> Any:
        device = _tensors(args)[0].device.type
        backend = _dispatch.choose(self.name, self.impls, device, args)
        if backend != "reference":
            return self.direct(backend, args)
        return self._conformed(self.impls[backend], args)

    def _conformed(self, implementation: Callable[..., Any], args: Sequence[Any]) -> Any:
        """What ``implementation`` returns, in the layouts of ``out_spec`` and apart from the inputs."""
        outputs = implementation(*args)
        flat = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return self.pack(_conform(self.out_spec(*args), flat, _tensors(args)))

    def direct(self, backend: str, args: Sequence[Any]) -> Any:
        """The same of a kernel, whose outputs are never an input's memory."""
        outputs = self.impls[backend](*args)
        flat = (outputs,) if isinstance(outputs, Tensor) else outputs
        specs = self.out_spec(*args)
        return self.pack([s.arranged(out) for s, out in zip(specs, flat, strict=True)])

    def _fake(self, *args: Any) -> Any:
        return self.pack([spec.empty() for spec in self.out_spec(*args)])

    def pack(self, flat: list[Tensor]) -> Any:
        if self._returns_list:
            return flat
        return flat[0] if len(flat) == 1 else tuple(flat)

    def _autocast_kernel(self, device: str) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def kernel(*args: Any) -> Any:
            cast = self._cast(args, torch.get_autocast_dtype(device))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.overload(*cast)

        return kernel

    def _cast(self, args: Sequence[Any], low: torch.dtype) -> list[Any]:
        """The arguments as the op's autocast rule wants them, ``low`` being the autocast dtype."""
        if self.autocast == "float32":
            return [_cast(value, torch.float32) for value in args]
        return [
            _cast(value, low) if name in self.autocast else value
            for name, value in zip(self._arguments, args, strict=True)
        ]

    # Autograd ------------------------------------------------------------------------------------

    def saved_positions(self, args: Sequence[Any]) -> Sequence[int]:
        """Which outputs of a call the backwards take."""
        return self._saved_outputs(*args) if callable(self._saved_outputs) else self._saved_outputs

    def setup_context(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        layout: list[Any] = []  # per argument: a marker for what was saved, or the value itself
        saved: list[Tensor] = []
        for value in inputs:
            if isinstance(value, Tensor):
                layout.append(_SavedTensor())
                saved.append(value)
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
                layout.append(_SavedList(len(value)))
                saved.extend(value)
            else:
                layout.append(value)
        flat = [output] if isinstance(output, Tensor) else list(output)
        ctx.arguments = len(saved)  # tensors among the inputs
        if self._saved_outputs:
            positions = self.saved_positions(inputs)
            layout.append(_SavedList(len(positions)))
            saved.extend(flat[i] for i in positions)
        ctx.save_for_backward(*saved)
        ctx.layout = layout
        ctx.backend = _dispatch.requested()
        ctx.output_is_list = self._returns_list
        constant = self._nondifferentiable_outputs
        if callable(constant):
            constant = constant(*inputs)
        if constant:
            ctx.mark_non_differentiable(*[flat[i] for i in constant])

    def _autograd_backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        flat = iter(self.gradients(ctx, grads[0] if ctx.output_is_list else grads, registered=True))
        # A list of tensors takes a list of gradients, differentiable or not; an empty list may be one.
        return tuple(
            next(flat)
            if isinstance(item, _SavedTensor)
            else [next(flat) for _ in range(item.count)]
            if isinstance(item, _SavedList)
            else []
            if item == []
            else None
            for item in ctx.layout[: len(self._arguments)]
        )

    def gradients(self, ctx: Any, grads: Sequence[Any], *, registered: bool) -> list[Tensor | None]:
        """A gradient or None for each tensor among the arguments, in order; by the backward op if ``registered``."""
        saved = list(ctx.saved_tensors)
        found: list[Tensor | None] = [None] * len(saved)
        args: list[Any] = []
        variables: list[int] = []  # positions in ``saved``
        position = 0
        for index, item in enumerate(ctx.layout):
            first = position
            if isinstance(item, _SavedTensor):
                position += 1
                item = saved[first]
            elif isinstance(item, _SavedList):
                position += item.count
                item = saved[first:position]
            args.append(item)
            if index in self._differentiable:
                variables += range(first, position)
        needs = [saved[i].requires_grad for i in variables]
        backward = self._backward_overload if registered else self._gradients
        if ctx.backend is None and _dispatch.requested() is None:
            computed = iter(backward(list(grads), *args, needs))
        else:
            with _dispatch.use_backend(ctx.backend):
                computed = iter(backward(list(grads), *args, needs))
        for i, need in zip(variables, needs, strict=True):
            found[i] = next(computed) if need else None
        return found[: ctx.arguments]

    def _backward(self, grads: list[Tensor | None], *rest: Any) -> list[Tensor]:
        *args, needs = rest
        variables = _tensors([args[i] for i in self._differentiable])
        needed = [t for t, need in zip(variables, needs, strict=True) if need]
        gradients = self._gradients(grads, *rest)
        return _conform(map(_like_spec, needed), gradients, _tensors([grads, *args]))

    def _gradients(self, grads: list[Tensor | None], *rest: Any) -> list[Tensor]:
        """What the backward returns: in any layout, perhaps an output's gradient itself."""
        device = _tensors(rest)[0].device.type
        backward = self.backwards[self.backward_backend(device, (grads, *rest))]
        # A backward may be called inside an autocast region; the forward's casts are in the graph already.
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return backward(grads, *rest)
        return backward(grads, *rest)

    def backward_backend(self, device: str, args: Sequence[Any] | None = None) -> str:
        """What a backward on ``device``, called with ``args``, runs on: the backend asked for if it has one that takes
        them, else by the device's order."""
        name = f"{self.name}_backward"
        return _dispatch.choose(name, self.backwards, device, args, or_next=True)

    def _reference_backward(self, grads: list[Tensor | None], *rest: Any) -> list[Tensor]:
        args, needs = rest[: len(self._arguments)], rest[-1]
        reference = self.impls["reference"]
        return reference_backward(reference, grads, args, self._differentiable, needs)

    def _fake_backward(self, grads: list[Tensor | None], *rest: Any) -> list[Tensor]:
        *args, needs = rest
        variables = _tensors([args[i] for i in self._differentiable])
        return [_like_spec(t).empty() for t, need in zip(variables, needs, strict=True) if need]


@dataclasses.dataclass(frozen=True)
class _SavedTensor:
    """Marks an argument that was saved as one tensor."""


@dataclasses.dataclass(frozen=True)
class _SavedList:
    """Marks an argument that was saved as a list of ``count`` tensors."""

    count: int


def _like_spec(tensor: Tensor) -> TensorSpec:
    """Gradients are dense: channels_last for maps and 4-d weights that are so, contiguous otherwise."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device, layout)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        eligible = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return [_cast(item, dtype) for item in value]
    return value


def reference_backward(
    reference: Callable[..., Any],
    grads: Sequence[Tensor | None],
    args: Sequence[Any],
    differentiable: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of ``reference`` by recomputing it under autograd: the definition of a right backward.

    ``needs`` has one flag per tensor among the differentiable arguments, in order; one gradient per set flag returns.
    """
    wanted = iter(needs)
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if next(wanted):
            leaves.append(tensor.requires_grad_())
        return tensor

    inputs = list(args)
    for i in differentiable:
        if isinstance(inputs[i], Tensor):
            inputs[i] = leaf(inputs[i])
        elif isinstance(inputs[i], (list, tuple)):
            inputs[i] = [leaf(t) for t in inputs[i]]
    with torch.enable_grad():
        outputs = reference(*inputs)
        flat = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    pairs = [
        (out, grad)
        for out, grad in zip(flat, grads, strict=True)
        if grad is not None and out.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(t) for t in leaves]
    outs = [out for out, _ in pairs]
    found = torch.autograd.grad(outs, leaves, [w.to(o.dtype) for o, w in pairs], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def kernel_of(name: str) -> Callable[..., Any]:
    """What the dispatcher calls for the op, or the backward op, of this name on a CPU."""
    op = OPS.get(name)
    return OPS[name.removesuffix("_backward")]._backward if op is None else op._forward


def emulate(path: Path) -> None:
    """For tests: loads the emulator of CUDA at ``path``, and gives the ops with CUDA kernels the backend cuda_emu."""
    _cuda.load_emulator(path)
    for op in OPS.values():
        for kernels in (op.impls, op.backwards):
            if "cuda" in kernels:
                kernels["cuda_emu"] = kernels["cuda"]


def define(
    schema: str,
    *,
    out_spec: Callable[..., list[TensorSpec]],
    impls: dict[str, Callable[..., Any]],
    backwards: dict[str, Callable[..., Any]] | None = None,
    differentiable: Sequence[str] = (),
    nondifferentiable_outputs: Sequence[int] | Callable[..., Sequence[int]] = (),
    saved_outputs: Sequence[int] | Callable[..., Sequence[int]] = (),
    autocast: Sequence[str] | Literal["float32"] = "float32",
) -> Op:
    """Registers an op and returns it.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor`` without the namespace; no defaults (the public function has them).
        out_spec: called with the op's arguments; the specifications of its outputs, flat.
        impls: backend name to function; ``"reference"`` must be there. All take the op's arguments, positionally.
        backwards: backend name to backward; all take ``(grads, *arguments, needs)``: a gradient per output (autograd
            hands zeros for one that no loss depends on), the op's arguments, and a flag per tensor among the
            differentiable ones. They return a gradient per set flag, in order. Where none is given the reference is
            recomputed under autograd.
        differentiable: names of the arguments (tensors or lists of tensors) that have gradients.
        nondifferentiable_outputs: positions of outputs without gradient, or a function of the op's arguments to them.
        saved_outputs: positions of outputs that the backwards take, as a list before ``needs``, or a function of the
            op's arguments to them.
        autocast: arguments cast to the autocast dtype, or ``"float32"``: all floating arguments to float32.
    """
    op = Op(
        schema,
        out_spec,
        impls,
        backwards or {},
        differentiable,
        nondifferentiable_outputs,
        saved_outputs,
        autocast,
    )
    OPS[op.name] = op
    return op
