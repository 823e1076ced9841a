"""The error bound: how far a kernel's outputs and gradients may be from the float64 reference.

One formula for every op and dtype, per element:

    |y - ref| <= 2 u(out) |ref| + 2 sqrt(K) u(acc) M + terms

u is the unit roundoff, ``ref`` the reference in float64 on the rounded inputs, ``acc`` float32 (float64 for float64
inputs), K the longest reduction, M the sum of the magnitudes of what is added up, ``terms`` the declared extra errors.

For gradients M needs no formula of its own where the spec's ``magnitude`` is the op with every operand replaced by its
absolute value: that function is linear in each argument, so its vector-Jacobian product with |grad| adds up exactly
the magnitudes of the terms of the gradient. An activation stands in it as ``envelope``: the identity, as no
activation here exceeds its argument, whose derivative is 1.5 (the steepest activation) plus M (an error of the
argument moves the derivative). The same product with every operand squared is the squared 2-norm of the terms; it
bounds what the rounding of an intermediate to the input's dtype does. It does not allow for an intermediate that is
rounded across a kink (relu at 0, relu6 at 6, hard_swish at -3 and 3), where the derivative jumps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from effdet_kernels.spec import Inputs, OpSpec

STEEPEST = 1.5  # upper bound of |act'| over all activations (hard_swish at 3)
_ON_DEVICE = (
    1 << 22
)  # from this many input elements the float64 reference runs where the inputs are
_squared: ContextVar[bool] = ContextVar("effdet_kernels_squared_operands", default=False)


def forward_ratio(
    spec: OpSpec, inputs: Inputs, outputs: Any, dtype: torch.dtype, times: int = 1
) -> float:
    """Worst error of ``outputs`` over what is allowed.

    With ``times`` the batch is that many repeats; of the first, the middle and the last one.
    """
    exact = exact_inputs(spec, inputs, times)
    device = device_of(exact)
    found = [t.detach().to(device) for t in flatten(outputs)]
    tiles = list(zip(*(_some_tiles(t, times) for t in found), strict=True))
    if spec.compare is not None:
        return max(spec.compare(exact, tile, dtype) for tile in tiles)
    expected = flatten(spec.reference(**exact))
    # What is finite does not depend on inputs that are not; these must not spoil the magnitudes.
    finite = {name: map_tensors(exact[name], _finite) for name in spec.nonfinite}
    allowed = _allowed(spec, {**exact, **finite}, expected, dtype)
    worst = 0.0
    for tile in tiles:
        _check_shapes(spec, tile, expected)
        for got, want, slack in zip(tile, expected, allowed, strict=True):
            if slack is None:
                worst = max(worst, 0.0 if torch.equal(got, want) else math.inf)
            else:
                slack = slack + 2 * roundoff(got.dtype) * want.abs()
                slack = slack + torch.finfo(got.dtype).tiny
                worst = max(worst, ratio(got.double(), want, slack))
    return worst


def _allowed(
    spec: OpSpec, exact: Inputs, expected: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor | None]:
    """Per output what is allowed besides its own rounding; None: an integer output, which is exact."""
    magnitudes = iter(spec.magnitude(**exact) if spec.magnitude else ())
    terms = iter(spec.terms(exact, dtype) if spec.terms else ())
    unit = 2 * math.sqrt(spec.reduction(**exact) if spec.reduction else 1)
    unit *= roundoff(accumulator(dtype))
    return [
        unit * next(magnitudes) + next(terms, torch.zeros(())) if want.is_floating_point() else None
        for want in expected
    ]


def _some_tiles(tensor: Tensor, times: int) -> list[Tensor]:
    """The first, the middle and the last of ``times`` repeats along the batch."""
    if times == 1:
        return [tensor]
    tiles = tensor.chunk(times)
    return [tiles[i] for i in sorted({0, times // 2, times - 1})]


def _finite(tensor: Tensor) -> Tensor:
    """An infinity that a clipping activation took in leaves a finite value behind: 8 is above all of those."""
    return tensor.nan_to_num(0, 8, -8)


def _check_shapes(spec: OpSpec, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    if [t.shape for t in found] != [t.shape for t in expected]:
        got, want = ([list(t.shape) for t in tensors] for tensors in (found, expected))
        raise ValueError(f"{spec.name}: outputs of shapes {got}, the reference has {want}")


def gradient_ratio(
    spec: OpSpec,
    inputs: Inputs,
    grads: Sequence[Tensor | None],
    found: Sequence[Tensor],
    dtype: torch.dtype,
    times: int = 1,
) -> float:
    """Worst error over what is allowed of ``found``, the gradients of a call on ``inputs``.

    ``grads`` are the gradients of its outputs (None: of an output without gradient), ``found`` those of the tensors
    among ``spec.diff_args``, flat and in order. With ``times`` both repeat along the batch.
    """
    exact = exact_inputs(spec, inputs, times)
    device = device_of(exact)
    wide = [None if g is None else g.detach().to(device).double() for g in grads]
    if times > 1:
        wide = [None if g is None else g.chunk(times)[0] for g in wide]
    with torch.enable_grad():
        names, expected = _gradients(spec, exact, wide)
        magnitudes = (
            spec.gradient_magnitude(exact, wide)
            if spec.gradient_magnitude
            else _magnitude_gradients(spec, exact, wide, power=1)
        )
        short = dtype != accumulator(dtype) and spec.gradient_roundings
        squares = _magnitude_gradients(spec, exact, wide, power=2) if short else None
    unit = 2 * math.sqrt(_longest(spec, exact, times)) * roundoff(accumulator(dtype))
    worst = 0.0
    for i, (name, got, want) in enumerate(zip(names, found, expected, strict=True)):
        repeats = 1 if name in spec.batched else times  # what the repeats add up to
        slack = unit * magnitudes[i].detach() * repeats
        if squares is not None:
            norm = (squares[i] * repeats).sqrt()
            slack = slack + 4 * math.sqrt(spec.gradient_roundings) * roundoff(dtype) * norm
        want = want * repeats
        slack = slack + 2 * roundoff(got.dtype) * want.abs() + torch.finfo(got.dtype).tiny
        for tile in _some_tiles(got, times if name in spec.batched else 1):
            worst = max(worst, ratio(tile.to(device).double(), want, slack))
    return worst


def differentiable(spec: OpSpec, inputs: Inputs) -> list[tuple[str, Tensor]]:
    """The tensors among the differentiable arguments, each with the argument's name."""
    return [(name, t) for name in spec.diff_args for t in as_list(inputs[name])]


def _gradients(
    spec: OpSpec, exact: Inputs, grads: Sequence[Tensor | None]
) -> tuple[list[str], list[Tensor]]:
    """The names of the arguments, and the reference's gradients."""
    changed = with_leaves(spec, exact)
    pairs = differentiable(spec, changed)
    outputs = flatten(spec.reference(**changed))
    return [n for n, _ in pairs], vector_jacobian(outputs, [t for _, t in pairs], grads)


def _magnitude_gradients(
    spec: OpSpec, exact: Inputs, grads: Sequence[Tensor | None], power: int
) -> list[Tensor]:
    """The vector-Jacobian product of ``spec.magnitude`` with |grads|, all operands to the ``power``."""
    assert spec.magnitude is not None
    operands = {
        name: map_tensors(value, lambda t: _operand(t, power)) for name, value in exact.items()
    }
    changed = with_leaves(spec, operands)
    sizes = [None if g is None else g.abs() ** power for g in grads]
    with _squaring(power == 2):
        outputs = spec.magnitude(**changed)
    # An operand stands in ``magnitude`` as its absolute value: the product has the operand's sign.
    return [
        t.abs()
        for t in vector_jacobian(outputs, [t for _, t in differentiable(spec, changed)], sizes)
    ]


def _operand(t: Tensor, power: int) -> Tensor:
    """``t`` with its sign and its magnitude to the ``power``; never 0, where |t| has no derivative."""
    if not t.is_floating_point():
        return t
    t = torch.where(t == 0, 1e-150, t)
    return t.abs() ** power * t.sign()


def vector_jacobian(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """The gradients of ``leaves`` given those of ``outputs``; 0 where there is no way to a leaf."""
    pairs = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=True)
        if grad is not None and out.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(
        [out for out, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True
    )
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def _longest(spec: OpSpec, exact: Inputs, times: int) -> int:
    """K of the gradients: the forward's, the output channels, or the pixels that a weight's gradient adds up."""
    if spec.gradient_reduction is not None:
        return spec.gradient_reduction(**exact) * times
    forward = spec.reduction(**exact) if spec.reduction else 1
    outputs = [t for t in flatten(spec.reference(**exact)) if t.dim() == 4]
    pixels = sum(t.numel() // t.shape[1] for t in outputs) * times
    return max(forward, pixels, *(t.shape[1] for t in outputs))


@contextlib.contextmanager
def _squaring(on: bool) -> Iterator[None]:
    token = _squared.set(on)
    try:
        yield
    finally:
        _squared.reset(token)


class _Envelope(torch.autograd.Function):
    """m, with the derivative (1.5 + m); in squared operands (1.1 + sqrt(m))^2."""

    @staticmethod
    def forward(ctx: Any, m: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        ctx.squared = _squared.get()
        return m.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        return grad * ((STEEPEST + m.sqrt()).square() if ctx.squared else STEEPEST + m)


def squared_operands() -> bool:
    """Whether a ``magnitude`` is being called with the squares of its operands."""
    return _squared.get()


def envelope(m: Tensor, act: str) -> Tensor:
    """What stands for ``act`` in a ``magnitude`` whose derivative gives the magnitudes of gradients."""
    return m if act == "none" else _Envelope.apply(m)


# Numbers and tensors ---------------------------------------------------------------------------------


def ratio(got: Tensor, want: Tensor, allowed: Tensor) -> float:
    """max |got - want| / allowed; infinite where one is finite and the other is not.

    Which of NaN and the infinities it is may differ: inf - inf depends on the order of a sum.
    """
    if got.numel() == 0:
        return 0.0
    same = (got == want) | (~got.isfinite() & ~want.isfinite())
    both = got.isfinite() & want.isfinite()
    error = torch.where(both, (got - want).abs() / allowed, torch.inf).masked_fill(same, 0)
    return float(error.nan_to_num(torch.inf, torch.inf).max())


def roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels accumulate in for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flatten(outputs: Any) -> list[Tensor]:
    """The outputs of an op, lists among them too, as a flat list."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [t for item in outputs for t in flatten(item)]


def as_list(value: Any) -> list[Tensor]:
    """The tensor, or the tensors of the list, that an argument is; nothing for None."""
    if isinstance(value, Tensor):
        return [value]
    return list(value) if isinstance(value, (list, tuple)) else []


def map_tensors(value: Any, function: Any) -> Any:
    """``value`` with ``function`` applied to it, or to the tensors of the list it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return [function(item) for item in value]
    return value


def with_leaves(spec: OpSpec, inputs: Inputs) -> Inputs:
    """``inputs`` with the differentiable arguments detached and asking for gradients."""
    return {
        name: map_tensors(value, lambda t: t.detach().clone().requires_grad_())
        if name in spec.diff_args
        else value
        for name, value in inputs.items()
    }


def exact_inputs(spec: OpSpec, inputs: Inputs, times: int = 1) -> Inputs:
    """The first of ``times`` repeats, in float64; on the CPU unless it is large."""
    first = {
        name: map_tensors(value, lambda t: t.detach().chunk(times)[0])
        if times > 1 and name in spec.batched
        else value
        for name, value in inputs.items()
    }
    total = sum(t.numel() for value in first.values() for t in tensors_of(value))
    device = "cpu" if total < _ON_DEVICE else device_of(first)

    def widened(t: Tensor) -> Tensor:
        t = t.detach().to(device)
        return t.double() if t.is_floating_point() else t

    return {name: map_tensors(value, widened) for name, value in first.items()}


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors that an argument of any type holds."""
    return [t for t in as_list(value) if isinstance(t, Tensor)]


def device_of(inputs: Inputs) -> torch.device:
    """The device of the first tensor among ``inputs``."""
    return next(t.device for value in inputs.values() for t in tensors_of(value))
