"""The harness: calls an op on a case, on one backend, and says how its error compares with the bound."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _dispatch, _library
from effdet_kernels.spec import Case, Inputs, OpSpec, flatten, map_tensors

_GUARD = 64  # elements before and after a guarded buffer


def backends(spec: OpSpec) -> dict[str, str | None]:
    """Backends that implement the op, each with the reason why it is absent here, or None."""
    impls = operator(spec).impls
    return {name: _dispatch.unavailable_reason(name) for name in impls}


def operator(spec: OpSpec) -> _library.Op:
    """The registered op behind a spec."""
    return _library.OPS[spec.name]


def check_forward(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> float:
    """Worst error over the bound (pass: at most 1) of one call, its outputs poisoned with NaN and guarded.

    ``arrange`` changes the memory layout of every floating input; values stay.
    """
    inputs = case.inputs(dtype, device, spec.keep_wide)
    inputs = {name: map_tensors(value, arrange) for name, value in inputs.items()}
    with _dispatch.use_backend(backend), guarded_outputs():
        outputs = spec.op(**inputs)
    return spec.error_ratio(inputs, outputs, dtype)


def check_gradient(
    spec: OpSpec,
    case: Case,
    backend: str,
    device: str = "cpu",
    fast: bool = False,
    registered: bool = True,
) -> bool:
    """torch.autograd.gradcheck of one case in float64.

    ``fast`` compares random projections of the Jacobian instead of every entry.
    ``registered``: through the registered op and its backward op, also where the public function
    would run the reference under autograd.
    """
    inputs = case.inputs(torch.float64, device)
    names = [n for n in spec.diff_args if _has_tensor(inputs[n])]
    layout = [(n, len(inputs[n]) if isinstance(inputs[n], list) else None) for n in names]
    leaves = [t.requires_grad_() for n in names for t in _as_list(inputs[n])]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = list(tensors)
        changed: Inputs = dict(inputs)
        for name, count in layout:
            changed[name] = rest.pop(0) if count is None else [rest.pop(0) for _ in range(count)]
        route = through_registration(operator(spec)) if registered else contextlib.nullcontext()
        with _dispatch.use_backend(backend), route:
            return tuple(out for out in flatten(spec.op(**changed)) if out.requires_grad)

    return torch.autograd.gradcheck(call, leaves, nondet_tol=0.0, fast_mode=fast)


@contextlib.contextmanager
def through_registration(op: _library.Op) -> Iterator[None]:
    """Inside, calls of ``op`` go to the dispatcher even where the reference could serve them directly."""
    with unittest.mock.patch.object(op, "_is_plain_torch", lambda args: False):
        yield


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def sliced(tensor: Tensor) -> Tensor:
    """The same values as a view with gaps, at an offset that no vector load is aligned to."""
    if tensor.dim() == 0:
        return tensor
    roomy = torch.full([2 * n + 1 for n in tensor.shape], torch.nan, device=tensor.device)
    roomy = roomy.to(tensor.dtype) if tensor.is_floating_point() else roomy.zero_().to(tensor.dtype)
    steps = [slice(0, -1, 2) for _ in tensor.shape]
    steps[-1] = slice(1, None, 2)
    view = roomy[tuple(steps)]
    return view.copy_(tensor)


LAYOUTS = {"contiguous": contiguous, "channels_last": channels_last, "sliced": sliced}


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Inside, kernels' outputs start as NaN (integers: the lowest), between two zones that must stay as they are.

    Raises:
        AssertionError: at the end, when a kernel wrote outside of its output.
    """
    taken: list[tuple[Tensor, int]] = []
    plain = _library.TensorSpec.empty

    def empty(spec: _library.TensorSpec) -> Tensor:
        layout = plain(spec)
        poison: Any = torch.nan if layout.is_floating_point() else torch.iinfo(layout.dtype).min
        buffer = torch.full(
            (layout.numel() + 2 * _GUARD,), poison, dtype=spec.dtype, device=spec.device
        )
        taken.append((buffer, layout.numel()))
        return buffer.as_strided(layout.shape, layout.stride(), _GUARD)

    with unittest.mock.patch.object(_library.TensorSpec, "empty", empty):
        yield
    for buffer, numel in taken:
        for zone in (buffer[:_GUARD], buffer[_GUARD + numel :]):
            untouched = (
                zone.isnan() if zone.is_floating_point() else zone == torch.iinfo(zone.dtype).min
            )
            assert bool(untouched.all()), "a kernel wrote outside of its output"


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and bool(value))


def _as_list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else value
