"""The one ``torch.library.Library`` of the package, and ``define``, which registers an op with it.

An op is registered from five things: its schema, an ``out_spec`` (shapes, dtypes and layouts of its outputs, shared by
the fake kernel and by allocation), its implementations and its backwards by backend name, and the names of its
differentiable arguments.
``define`` derives the rest: the fake, the autocast rule, the backward op ``<name>_backward`` and its autograd formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from effdet_kernels import _dispatch

NAMESPACE = "effdet_kernels"
OPS: dict[str, Op] = {}
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype, device and memory format of one output."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format = torch.contiguous_format

    def empty(self) -> Tensor:
        """Uninitialised memory of this specification."""
        return torch.empty(
            self.shape, dtype=self.dtype, device=self.device, memory_format=self.memory_format
        )

    def conform(self, tensor: Tensor, taken: set[int]) -> Tensor:
        """``tensor`` in exactly this dtype and these strides, in no storage of ``taken``, which its own joins."""
        if tuple(tensor.shape) != tuple(self.shape):
            raise RuntimeError(
                f"an implementation returned {tuple(tensor.shape)}, not {self.shape}"
            )
        out = tensor.to(self.dtype).contiguous(memory_format=self.memory_format)
        if _storage(out) in taken:
            out = out.clone(memory_format=self.memory_format)
        taken.add(_storage(out))
        if min(self.shape, default=2) > 1:
            return out
        # contiguous() may leave any stride in a dimension of size 1 or in an empty tensor.
        strides = torch.empty(self.shape, device="meta", memory_format=self.memory_format).stride()
        return out if out.stride() == strides else out.as_strided(self.shape, strides)


def nchw(shape: Sequence[Any], like: Tensor) -> TensorSpec:
    """Specification of a feature map: ``shape`` [B, C, H, W], channels_last, dtype and device of ``like``."""
    return TensorSpec(tuple(shape), like.dtype, like.device, torch.channels_last)


def _conform(
    specs: Iterable[TensorSpec], outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """``outputs`` as ``specs`` want them, no alias of an input or of each other."""
    taken = {_storage(tensor) for tensor in inputs}
    return [spec.conform(out, taken) for spec, out in zip(specs, outputs, strict=True)]


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
        nondifferentiable_outputs: Sequence[int],
        autocast: Sequence[str] | Literal["float32"],
    ) -> None:
        self.schema = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
        self.name = self.schema.name.split("::")[1]
        self.impls = impls
        self._out_spec = out_spec
        self._arguments = [argument.name for argument in self.schema.arguments]
        self._differentiable = [self._arguments.index(name) for name in differentiable]
        self._nondifferentiable_outputs = tuple(nondifferentiable_outputs)
        self.backwards = (
            {**backwards, "reference": self._reference_backward} if differentiable else {}
        )
        self.autocast = autocast
        self._returns_list = str(self.schema.returns[0].type) == "List[Tensor]"
        self._register(schema)

    def __call__(self, *args: Any) -> Any:
        return self._reference(args) if self._is_plain_torch(args) else self._overload(*args)

    def _is_plain_torch(self, args: Sequence[Any]) -> bool:
        """Whether this is an eager call with gradients that the reference serves.

        Autograd then goes through the reference's own graph: no backward op, so nothing is computed twice.
        """
        if not self._differentiable or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        tensors = _tensors(args)
        if not any(t.requires_grad for t in tensors):
            return False
        device = tensors[0].device.type
        serving = _dispatch.choose(self.name, self.impls, device)
        if _dispatch.requested() is None and self.backward_backend(device) == "reference":
            serving = "reference"  # a kernel forward would make its backward compute the reference's again
        return serving == "reference"

    def _reference(self, args: Sequence[Any]) -> Any:
        device = _tensors(args)[0].device.type
        if torch.is_autocast_enabled(device):
            args = self._cast(args, torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return self._conformed(self.impls["reference"], args)

    # Registration --------------------------------------------------------------------------------

    def _register(self, schema: str) -> None:
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._forward, "CPU")
        _LIBRARY.impl(self.name, self._forward, "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self._fake, lib=_LIBRARY)
        for device in ("cpu", "cuda"):
            _LIBRARY.impl(self.name, self._autocast_kernel(device), f"Autocast{device.upper()}")
        self._overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        if self._differentiable:
            self._register_backward(schema)

    def _register_backward(self, schema: str) -> None:
        arguments = schema.partition("(")[2].rpartition(") ->")[0]
        name = f"{self.name}_backward"
        _LIBRARY.define(f"{name}(Tensor?[] grads, {arguments}, bool[] needs) -> Tensor[]")
        _LIBRARY.impl(name, self._backward, "CPU")
        _LIBRARY.impl(name, self._backward, "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._fake_backward, lib=_LIBRARY)
        self._backward_overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}",
            self._autograd_backward,
            setup_context=self._setup_context,
            lib=_LIBRARY,
        )

    # Kernels of the dispatcher -------------------------------------------------------------------

    def _forward(self, *args: Any) -> Any:
        device = _tensors(args)[0].device.type
        return self._conformed(self.impls[_dispatch.choose(self.name, self.impls, device)], args)

    def _conformed(self, implementation: Callable[..., Any], args: Sequence[Any]) -> Any:
        """What ``implementation`` returns, in the layouts of ``out_spec`` and apart from the inputs."""
        outputs = implementation(*args)
        flat = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return self._pack(_conform(self._out_spec(*args), flat, _tensors(args)))

    def _fake(self, *args: Any) -> Any:
        return self._pack([spec.empty() for spec in self._out_spec(*args)])

    def _pack(self, flat: list[Tensor]) -> Any:
        if self._returns_list:
            return flat
        return flat[0] if len(flat) == 1 else tuple(flat)

    def _autocast_kernel(self, device: str) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def kernel(*args: Any) -> Any:
            cast = self._cast(args, torch.get_autocast_dtype(device))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self._overload(*cast)

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

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
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
        ctx.save_for_backward(*saved)
        ctx.layout = layout
        ctx.backend = _dispatch.requested()
        flat = [output] if isinstance(output, Tensor) else list(output)
        ctx.output_is_list = self._returns_list
        if self._nondifferentiable_outputs:
            ctx.mark_non_differentiable(*[flat[i] for i in self._nondifferentiable_outputs])

    def _autograd_backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        flat_grads = list(grads[0]) if ctx.output_is_list else list(grads)
        saved = iter(ctx.saved_tensors)
        args = [
            next(saved)
            if isinstance(item, _SavedTensor)
            else [next(saved) for _ in range(item.count)]
            if isinstance(item, _SavedList)
            else item
            for item in ctx.layout
        ]
        needs = [t.requires_grad for i in self._differentiable for t in _tensors([args[i]])]
        with _dispatch.use_backend(ctx.backend):
            computed = iter(self._backward_overload(flat_grads, *args, needs))
        wanted = iter(needs)
        # A list of tensors takes a list of gradients, differentiable or not; an empty list may be one.
        result: list[Any] = [
            [None] * item.count if isinstance(item, _SavedList) else [] if item == [] else None
            for item in ctx.layout
        ]
        for i in self._differentiable:
            if isinstance(args[i], Tensor):
                result[i] = next(computed) if next(wanted) else None
            elif isinstance(args[i], list):
                result[i] = [next(computed) if next(wanted) else None for _ in args[i]]
        return tuple(result)

    def _backward(self, grads: list[Tensor | None], *rest: Any) -> list[Tensor]:
        *args, needs = rest
        variables = _tensors([args[i] for i in self._differentiable])
        needed = [t for t, need in zip(variables, needs, strict=True) if need]
        device = variables[0].device.type
        backward = self.backwards[self.backward_backend(device)]
        # A backward may be called inside an autocast region; the forward's casts are in the graph already.
        with torch.autocast(device, enabled=False):
            gradients = backward(grads, *args, needs)
        return _conform(map(_like_spec, needed), gradients, _tensors([grads, *args]))

    def backward_backend(self, device: str) -> str:
        """What a backward on ``device`` runs on: the backend asked for if it has one, else by the device's order."""
        return _dispatch.choose(f"{self.name}_backward", self.backwards, device, or_next=True)

    def _reference_backward(self, grads: list[Tensor | None], *rest: Any) -> list[Tensor]:
        *args, needs = rest
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


def define(
    schema: str,
    *,
    out_spec: Callable[..., list[TensorSpec]],
    impls: dict[str, Callable[..., Any]],
    backwards: dict[str, Callable[..., Any]] | None = None,
    differentiable: Sequence[str] = (),
    nondifferentiable_outputs: Sequence[int] = (),
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
        nondifferentiable_outputs: positions of outputs without gradient.
        autocast: arguments cast to the autocast dtype, or ``"float32"``: all floating arguments to float32.
    """
    op = Op(
        schema,
        out_spec,
        impls,
        backwards or {},
        differentiable,
        nondifferentiable_outputs,
        autocast,
    )
    OPS[op.name] = op
    return op
