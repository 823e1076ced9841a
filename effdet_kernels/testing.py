"""The harness: calls an op on a case, on one backend, and says how its error compares with the bound.

Outputs start as NaN between guard zones, ``torch.empty`` is filled with NaN, inputs lie in buffers of NaN: a kernel
that leaves an element unwritten, writes or reads outside, or reads memory that nothing wrote, is caught. Programs of an
interpreted Triton kernel run in shuffled order, CPU kernels with several thread counts: what depends on order is
caught too.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from effdet_kernels import _cuda, _dispatch, _library, _triton
from effdet_kernels.bound import (
    as_list,
    differentiable,
    flatten,
    map_tensors,
    tensors_of,
    vector_jacobian,
    with_leaves,
)
from effdet_kernels.guards import CheckError, channels_last, guarded_outputs, same_bits
from effdet_kernels.spec import Case, Inputs, OpSpec

_NONFINITE = (torch.nan, torch.inf, -torch.inf)
Arrangement = Callable[[Tensor], Tensor]
Parts = Callable[[int], list[list[int]]]


# How the gradients of n tensors are asked for: the tensors of each backward call.
def together(n: int) -> list[list[int]]:
    """All in one call."""
    return [list(range(n))]


def one_by_one(n: int) -> list[list[int]]:
    """A call for each."""
    return [[i] for i in range(n)]


def every_other(n: int) -> list[list[int]]:
    """Two calls: the even ones, the odd ones."""
    return [part for part in (list(range(0, n, 2)), list(range(1, n, 2))) if part]


def all_but_the_first(n: int) -> list[list[int]]:
    """Weights that are trained behind a frozen layer, then the input alone."""
    return [part for part in (list(range(1, n)), [0]) if part]


PARTS = {
    "one by one": one_by_one,
    "every other": every_other,
    "all but the first": all_but_the_first,
}


def backends(spec: OpSpec) -> dict[str, str | None]:
    """Backends that implement the op, each with the reason why it is absent here, or None."""
    impls = operator(spec).impls
    return {name: _dispatch.unavailable_reason(name) for name in impls}


def operator(spec: OpSpec) -> _library.Op:
    """The registered op behind a spec."""
    return _library.OPS[spec.name]


def backward_backend(spec: OpSpec, backend: str, device: str = "cpu") -> str:
    """The backend that computes the gradients of a call on ``backend``."""
    with _dispatch.use_backend(backend):
        return operator(spec).backward_backend(device)


# CUDA kernels refuse every layout but channels_last.
_USUAL = {"cuda": channels_last, "cuda_emu": channels_last}


def usual_layout(backend: str) -> Arrangement | None:
    """How inputs lie that no layout is asked for; None: as they are drawn."""
    return _USUAL.get(backend)


def arranged(inputs: Inputs, arrange: Arrangement | None) -> Inputs:
    """``inputs`` with every tensor laid out by ``arrange``; None: as they are."""
    if arrange is None:
        return inputs
    return {name: map_tensors(value, arrange) for name, value in inputs.items()}


def takes(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    gradient: bool = False,
) -> bool:
    """Whether the kernel of ``backend`` takes this case, or its backward does; only those in CUDA refuse some.

    The kernels do not run.
    """
    usual = usual_layout(backend)
    if usual is None:
        return True
    inputs = arranged(spec.inputs(case, dtype, device), usual)
    try:
        with (
            _cuda.recorded(),
            torch.set_grad_enabled(gradient),
            _dispatch.strictly(),
            _dispatch.use_backend(backend),
        ):
            leaves = with_leaves(spec, inputs) if gradient else inputs
            outputs = flatten(spec.op(**leaves))
            if gradient:
                drawn = random_gradients(outputs)
                gradients(spec, leaves, outputs, [g if g is None else usual(g) for g in drawn])
    except _dispatch.BackendError:
        return False
    except Exception:  # what is wrong is for a check to say
        return True
    return True


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
    inputs = arranged(spec.inputs(case, dtype, device), arrange or usual_layout(backend))
    return spec.error_ratio(inputs, run_guarded(spec, inputs, backend), dtype, case.times)


def run_guarded(spec: OpSpec, inputs: Inputs, backend: str, seed: int = 0) -> list[Tensor]:
    """The outputs of a call that is watched as the module's docstring says; ``seed`` draws the order of programs."""
    before = _copies(inputs)
    with torch.no_grad(), _dispatch.use_backend(backend), guarded_outputs(), _shuffled(seed):
        outputs = flatten(spec.op(**inputs))
    _refuse_changes(inputs, before)
    return outputs


def _shuffled(seed: int) -> contextlib.AbstractContextManager[None]:
    return _triton.shuffled(seed) if _triton.INTERPRET else _cuda.emulated_order(seed)


def _copies(inputs: Inputs) -> Inputs:
    return {
        name: map_tensors(value, lambda t: t.detach().clone()) for name, value in inputs.items()
    }


def _refuse_changes(inputs: Inputs, before: Inputs) -> None:
    for name, value in inputs.items():
        for now, then in zip(tensors_of(value), tensors_of(before[name]), strict=True):
            if not same_bits(now.detach(), then):
                raise CheckError(f"{name}: the kernel changed its input")


def check_gradient(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    arrange: Arrangement | None = None,
    arrange_grads: Arrangement | None = None,
    parts: Parts = together,
    only: int | None = None,
) -> float:
    """Worst error over the bound of the gradients of one call of the registered op, for random output gradients.

    ``arrange`` changes the memory layout of every input, ``arrange_grads`` that of the outputs' gradients. The
    gradients are asked for in several backward calls, as ``parts`` divides them: a caller may need some only. With
    ``only``, no output but that one gets a gradient: no loss depends on the others.

    Raises:
        CheckError: a kernel wrote outside of its outputs, or into its inputs or the outputs' gradients.
    """
    inputs = arranged(spec.inputs(case, dtype, device), arrange or usual_layout(backend))
    inputs = _asking(spec, inputs)
    grads, found = run_backward_guarded(spec, case, inputs, backend, arrange_grads, parts, only)
    return spec.gradient_ratio(inputs, grads, found, dtype, case.times)


def run_backward_guarded(
    spec: OpSpec,
    case: Case,
    inputs: Inputs,
    backend: str,
    arrange_grads: Arrangement | None = None,
    parts: Parts = together,
    only: int | None = None,
    seed: int = 0,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The outputs' gradients, drawn, and those of the inputs, of a backward that is watched as ``run_guarded`` does."""
    arrange_grads = arrange_grads or usual_layout(backend)
    leaves = [t for _, t in differentiable(spec, inputs)]
    found: list[Tensor] = [torch.empty(0)] * len(leaves)
    before = _copies(inputs)
    registered = through_registration(operator(spec))
    with _dispatch.use_backend(backend), registered, _shuffled(seed):
        for part in parts(len(leaves)):
            for i, leaf in enumerate(leaves):
                leaf.requires_grad_(i in part)
            with guarded_outputs():
                outputs = flatten(spec.op(**inputs))
                grads = random_gradients(outputs, case.times)
                if only is not None:
                    grads = [g if k == only else None for k, g in enumerate(grads)]
                if arrange_grads is not None:
                    grads = [None if g is None else arrange_grads(g) for g in grads]
                given = {"gradient of an output": [g for g in grads if g is not None]}
                before_call = _copies(given)
                gradients_of_part = vector_jacobian(outputs, [leaves[i] for i in part], grads)
            for i, gradient in zip(part, gradients_of_part, strict=True):
                found[i] = gradient
            _refuse_changes(given, before_call)
    for leaf in leaves:
        leaf.requires_grad_()
    _refuse_changes(inputs, before)
    return grads, found


def _asking(spec: OpSpec, inputs: Inputs) -> Inputs:
    """``inputs`` in the memory they are in, the differentiable ones asking for gradients."""
    return {
        name: map_tensors(value, lambda t: t.detach().requires_grad_())
        if name in spec.diff_args
        else value
        for name, value in inputs.items()
    }


def random_gradients(outputs: Sequence[Tensor], times: int = 1) -> list[Tensor | None]:
    """Normal numbers for every output that has a gradient, the same for the same shapes; repeated as the batch is."""
    generator = torch.Generator().manual_seed(1)

    def draw(out: Tensor) -> Tensor:
        first = out.chunk(times)[0] if times > 1 else out
        drawn = torch.randn(first.shape, generator=generator, dtype=torch.float64).to(out)
        return drawn.repeat(times, *[1] * (out.dim() - 1)) if times > 1 else drawn

    return [draw(out) if out.requires_grad else None for out in outputs]


def outputs_to_take_alone(spec: OpSpec, case: Case) -> list[int]:
    """The first and the last output with a gradient, where there are several."""
    outputs = flatten(spec.reference(**with_leaves(spec, spec.inputs(case, torch.float32))))
    found = [k for k, out in enumerate(outputs) if out.requires_grad]
    return sorted({found[0], found[-1]}) if len(found) > 1 else []


def gradients(
    spec: OpSpec, inputs: Inputs, outputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """The gradients of the tensors among ``spec.diff_args``, in order."""
    return vector_jacobian(outputs, [t for _, t in differentiable(spec, inputs)], grads)


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
        if spec.derived is not None:
            with torch.no_grad():
                changed.update(spec.derived(changed))
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
    inputs = arranged(spec.inputs(case, dtype, device), usual_layout(backend))
    runs = _runs(lambda seed: run_guarded(spec, inputs, backend, seed), backend, device)
    _refuse_differences(runs, "output")


def check_gradient_repeatable(
    spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """The same of the gradients: three backward calls give the same bits.

    Raises:
        CheckError: they do not.
    """
    drawn = arranged(spec.inputs(case, dtype, device), usual_layout(backend))
    inputs = _asking(spec, drawn)

    def run(seed: int) -> list[Tensor]:
        return run_backward_guarded(spec, case, inputs, backend, seed=seed)[1]

    _refuse_differences(_runs(run, backend, device), "gradient")


def _runs(run: Callable[[int], list[Tensor]], backend: str, device: str) -> list[list[Tensor]]:
    threads = torch.get_num_threads()
    # torch may add up in another order on another number of threads; kernels may not.
    counts = (threads, 1, 3) if device == "cpu" and backend != "reference" else (threads,) * 3
    try:
        runs = []
        for seed, count in enumerate(counts):
            torch.set_num_threads(count)
            runs.append(run(seed))
        return runs
    finally:
        torch.set_num_threads(threads)


def _refuse_differences(runs: Sequence[Sequence[Tensor]], what: str) -> None:
    for other in runs[1:]:
        for k, (a, b) in enumerate(zip(runs[0], other, strict=True)):
            if not same_bits(a, b):
                raise CheckError(f"{what} {k}: two runs differ")


def check_nonfinite(
    spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> float:
    """Worst error over the bound with a NaN and infinities among the inputs, one tensor at a time.

    An output must be finite exactly where the reference's is.
    """
    worst = 0.0
    for name in spec.nonfinite:
        for i in range(len(as_list(spec.inputs(case, dtype, device)[name]))):
            inputs = spec.inputs(case, dtype, device)
            flat = as_list(inputs[name])[i].view(-1)
            if not flat.numel():
                continue
            for j, value in enumerate(_NONFINITE):
                flat[(i + j * max(1, flat.numel() // 3)) % flat.numel()] = value
            inputs = arranged(inputs, usual_layout(backend))
            worst = max(worst, spec.error_ratio(inputs, run_guarded(spec, inputs, backend), dtype))
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
    inputs = arranged(spec.inputs(case, torch.float32, device), usual_layout(backend))
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
            if a.dtype != b.dtype or not same_bits(a.detach(), b):
                raise CheckError(f"output {k}: {how} gives {a.dtype}, other than the op's rule")


@contextlib.contextmanager
def through_registration(op: _library.Op) -> Iterator[None]:
    """Inside, calls of ``op`` go through the dispatcher, whoever serves them."""
    with unittest.mock.patch.object(op, "_route", lambda args: ("dispatcher", "")):
        yield
