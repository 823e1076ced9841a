"""The harness: calls an op on a case, on one backend, and says how its error compares with the bound.

Outputs start as NaN between guard zones, ``torch.empty`` is filled with NaN, inputs lie in buffers of NaN: a kernel
that leaves an element unwritten, writes or reads outside, or reads memory that nothing wrote, is caught. Programs of an
interpreted Triton kernel run in shuffled order, CPU kernels with several thread counts: what depends on order is
caught too.
"""

from __future__ import annotations

import contextlib
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _dispatch, _library, _triton
from effdet_kernels.bound import as_list, differentiable, flatten, map_tensors, with_leaves
from effdet_kernels.spec import Case, Inputs, OpSpec

_GUARD = 64  # elements before and after a guarded buffer
_NONFINITE = (torch.nan, torch.inf, -torch.inf)
Arrangement = Callable[[Tensor], Tensor]


class CheckError(AssertionError):
    """A kernel broke a rule that is not a matter of rounding."""


def backends(spec: OpSpec) -> dict[str, str | None]:
    """Backends that implement the op, each with the reason why it is absent here, or None."""
    impls = operator(spec).impls
    return {name: _dispatch.unavailable_reason(name) for name in impls}


def operator(spec: OpSpec) -> _library.Op:
    """The registered op behind a spec."""
    return _library.OPS[spec.name]


# Checks ------------------------------------------------------------------------------------------


def check_forward(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    arrange: Arrangement | None = None,
) -> float:
    """Worst error over the bound (pass: at most 1) of one call.

    ``arrange`` changes the memory layout of every input; values stay.

    Raises:
        CheckError: the kernel wrote outside of its outputs, or into its inputs.
    """
    inputs = spec.inputs(case, dtype, device)
    if arrange is not None:
        inputs = {name: map_tensors(value, arrange) for name, value in inputs.items()}
    return spec.error_ratio(inputs, run_guarded(spec, inputs, backend), dtype, case.times)


def run_guarded(spec: OpSpec, inputs: Inputs, backend: str, seed: int = 0) -> list[Tensor]:
    """The outputs of a call that is watched as the module's docstring says; ``seed`` draws the order of programs."""
    before = {name: map_tensors(value, torch.clone) for name, value in inputs.items()}
    shuffled = _triton.shuffled(seed) if _triton.INTERPRET else contextlib.nullcontext()
    with torch.no_grad(), _dispatch.use_backend(backend), guarded_outputs(), shuffled:
        outputs = flatten(spec.op(**inputs))
    for name, value in inputs.items():
        for now, then in zip(as_list(value), as_list(before[name]), strict=True):
            if isinstance(now, Tensor) and not _same_bits(now, then):
                raise CheckError(f"{name}: the kernel changed its input")
    return outputs


def check_gradient(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
) -> float:
    """Worst error over the bound of the gradients of one call of the registered op, for random output gradients."""
    inputs = with_leaves(spec, spec.inputs(case, dtype, device))
    with _dispatch.use_backend(backend), through_registration(operator(spec)), guarded_outputs():
        outputs = flatten(spec.op(**inputs))
        grads = random_gradients(outputs, case.times)
        found = gradients(spec, inputs, outputs, grads)
    return spec.gradient_ratio(inputs, grads, found, dtype, case.times)


def random_gradients(outputs: Sequence[Tensor], times: int = 1) -> list[Tensor | None]:
    """Normal numbers for every output that has a gradient, the same for the same shapes; repeated as the batch is."""
    generator = torch.Generator().manual_seed(1)

    def draw(out: Tensor) -> Tensor:
        first = out.chunk(times)[0] if times > 1 else out
        drawn = torch.randn(first.shape, generator=generator, dtype=torch.float64).to(out)
        return drawn.repeat(times, *[1] * (out.dim() - 1)) if times > 1 else drawn

    return [draw(out) if out.requires_grad else None for out in outputs]


def gradients(
    spec: OpSpec, inputs: Inputs, outputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """The gradients of the tensors among ``spec.diff_args``, in order."""
    leaves = [t for _, t in differentiable(spec, inputs)]
    pairs = [(out, g) for out, g in zip(outputs, grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [out for out, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True
    )
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def gradcheck(
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
    inputs = with_leaves(spec, spec.inputs(case, torch.float64, device))
    pairs = differentiable(spec, inputs)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = list(tensors)
        changed: Inputs = dict(inputs)
        for name in dict.fromkeys(name for name, _ in pairs):
            changed[name] = map_tensors(inputs[name], lambda _: rest.pop(0))
        route = through_registration(operator(spec)) if registered else contextlib.nullcontext()
        with _dispatch.use_backend(backend), route:
            return tuple(out for out in flatten(spec.op(**changed)) if out.requires_grad)

    # Some of torch's own gradients add up with atomics on a GPU; kernels may not.
    wobble = 1e-12 if backend == "reference" and device == "cuda" else 0.0
    leaves = [t for _, t in pairs]
    return torch.autograd.gradcheck(call, leaves, nondet_tol=wobble, fast_mode=fast)


def check_repeatable(
    spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """Three calls give the same bits: on a CPU with other numbers of threads, in another order of programs.

    Raises:
        CheckError: they do not.
    """
    inputs = spec.inputs(case, dtype, device)
    threads = torch.get_num_threads()
    # torch may add up in another order on another number of threads; kernels may not.
    counts = (threads, 1, 3) if device == "cpu" and backend != "reference" else (threads,) * 3
    runs = []
    try:
        for seed, count in enumerate(counts):
            torch.set_num_threads(count)
            runs.append(run_guarded(spec, inputs, backend, seed))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        for k, (a, b) in enumerate(zip(runs[0], other, strict=True)):
            if not _same_bits(a, b):
                raise CheckError(f"output {k}: two runs differ")


def check_nonfinite(
    spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> float:
    """Worst error over the bound with a NaN and infinities among the inputs, one argument at a time.

    An output must be finite exactly where the reference's is.
    """
    worst = 0.0
    for name in spec.nonfinite:
        inputs = spec.inputs(case, dtype, device)
        for i, tensor in enumerate(t for t in as_list(inputs[name]) if t.numel()):
            flat = tensor.view(-1)
            for j, value in enumerate(_NONFINITE):
                flat[(i + j * max(1, flat.numel() // 3)) % flat.numel()] = value
            worst = max(worst, spec.error_ratio(inputs, run_guarded(spec, inputs, backend), dtype))
            inputs = spec.inputs(case, dtype, device)
    return worst


def check_large(
    spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> float:
    """Worst error over the bound of one call of a case too large to copy or to guard."""
    inputs = spec.inputs(case, dtype, device)
    with torch.no_grad(), _dispatch.use_backend(backend):
        outputs = flatten(spec.op(**inputs))
    return spec.error_ratio(inputs, outputs, dtype, case.times)


def check_autocast(
    spec: OpSpec, case: Case, low: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """Under autocast to ``low``, float32 inputs give the bits that inputs cast by the op's rule give.

    Raises:
        CheckError: they do not.
    """
    inputs = spec.inputs(case, torch.float32, device)
    rule = operator(spec).autocast
    cast = {
        name: map_tensors(value, lambda t: t.to(low) if t.is_floating_point() else t)
        if rule != "float32" and name in rule
        else value
        for name, value in inputs.items()
    }
    with torch.no_grad(), _dispatch.use_backend(backend):
        explicit = flatten(spec.op(**cast))
        with torch.autocast(device, low):
            implicit = flatten(spec.op(**inputs))
            with torch.enable_grad():
                trained = flatten(spec.op(**with_leaves(spec, inputs)))
    for found, how in ((implicit, "autocast"), (trained, "autocast with gradients")):
        for k, (a, b) in enumerate(zip(found, explicit, strict=True)):
            if a.dtype != b.dtype or not _same_bits(a.detach(), b):
                raise CheckError(f"output {k}: {how} gives {a.dtype}, other than the op's rule")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(0, 1, -1), b.nan_to_num(0, 1, -1))
        if a.is_floating_point()
        else torch.equal(a, b)
    )


@contextlib.contextmanager
def through_registration(op: _library.Op) -> Iterator[None]:
    """Inside, calls of ``op`` go to the dispatcher even where the reference could serve them directly."""
    with unittest.mock.patch.object(op, "_is_plain_torch", lambda args: False):
        yield


# Memory --------------------------------------------------------------------------------------------


def contiguous(tensor: Tensor) -> Tensor:
    return _embedded(tensor, torch.contiguous_format)


def channels_last(tensor: Tensor) -> Tensor:
    return _embedded(tensor, torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


def sliced(tensor: Tensor) -> Tensor:
    """The same values as a view with gaps of NaN, at an offset that no vector load is aligned to."""
    if tensor.dim() == 0:
        return tensor
    roomy = _poisoned([2 * n + 1 for n in tensor.shape], tensor.dtype, tensor.device)
    steps = [slice(0, -1, 2) for _ in tensor.shape]
    steps[-1] = slice(1, None, 2)
    view = roomy[tuple(steps)]
    return view.copy_(tensor)


LAYOUTS = {"contiguous": contiguous, "channels_last": channels_last, "sliced": sliced}


def _embedded(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A dense copy between two zones of NaN."""
    strides = torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()
    buffer = _poisoned([tensor.numel() + 2 * _GUARD], tensor.dtype, tensor.device)
    return buffer.as_strided(tensor.shape, strides, _GUARD).copy_(tensor)


def _poisoned(shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
    """NaN; in integers the lowest number, in booleans True."""
    poison: Any = torch.nan if dtype.is_floating_point else True
    if not dtype.is_floating_point and dtype != torch.bool:
        poison = torch.iinfo(dtype).min
    return torch.full(tuple(shape), poison, dtype=dtype, device=device)


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Inside, kernels' outputs and all ``torch.empty`` start as NaN (integers: the lowest, or the highest).

    Outputs lie between two zones that must stay as they are.

    Raises:
        CheckError: at the end, when a kernel wrote outside of its output.
    """
    taken: list[tuple[Tensor, int]] = []
    plain = _library.TensorSpec.empty

    def empty(spec: _library.TensorSpec) -> Tensor:
        layout = plain(spec)
        buffer = _poisoned([layout.numel() + 2 * _GUARD], spec.dtype, spec.device)
        taken.append((buffer, layout.numel()))
        return buffer.as_strided(layout.shape, layout.stride(), _GUARD)

    with unittest.mock.patch.object(_library.TensorSpec, "empty", empty), _filled_empty():
        yield
    for buffer, numel in taken:
        for zone in (buffer[:_GUARD], buffer[_GUARD + numel :]):
            if not _same_bits(zone, _poisoned(zone.shape, zone.dtype, zone.device)):
                raise CheckError("a kernel wrote outside of its output")


@contextlib.contextmanager
def _filled_empty() -> Iterator[None]:
    """Inside, torch fills uninitialised memory with NaN (integers: the highest number)."""
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
