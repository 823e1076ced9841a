"""A small op, the running sum, with right Triton kernels and with kernels that have a bug each that often goes unseen.

The backward, the running sum from the other end, has a kernel of each kind too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from effdet_kernels import _library
from effdet_kernels._library import TensorSpec
from effdet_kernels.spec import Case, OpSpec

BLOCK = 16


@triton.jit
def _block_sum_kernel(x_ptr, partial_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(x, 0))


@triton.jit
def _running_sum_kernel(
    x_ptr, partial_ptr, y_ptr, n, blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr, BUG: tl.constexpr
):
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    if BUG == "reads and writes past its end":
        x = tl.load(x_ptr + at)
    else:
        x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    before = tl.arange(0, WIDE)
    if BUG == "reads memory that nothing wrote":
        partial = tl.load(partial_ptr + before) * (before < block)
    else:
        partial = tl.load(partial_ptr + before, mask=before < block, other=0.0)
    y = tl.cumsum(x, 0) + tl.sum(partial, 0)
    if BUG == "writes past its end" or BUG == "reads and writes past its end":
        tl.store(y_ptr + at, y)
    else:
        tl.store(y_ptr + at, y, mask=at < n)


@triton.jit
def _added_up_kernel(x_ptr, carry_ptr, n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Adds a block's sum to what all later blocks start with, whichever block comes first."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    later = tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float32) + tl.sum(x, 0)
    tl.atomic_add(carry_ptr + later, total, mask=later > block)


@triton.jit
def _from_carry_kernel(x_ptr, carry_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + at, tl.cumsum(x, 0) + tl.load(carry_ptr + tl.program_id(0)), mask=at < n)


@triton.jit
def _carried_sum_kernel(x_ptr, carry_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Each program takes over from the one before it, which may not have run yet."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    carry = tl.load(carry_ptr + block)
    tl.store(y_ptr + at, tl.cumsum(x, 0) + carry, mask=at < n)
    tl.store(carry_ptr + block + 1, carry + tl.sum(x, 0))


def _out_spec(x):
    return [TensorSpec(tuple(x.shape), x.dtype, x.device)]


def _launcher(bug: str):
    def launch(x):
        x = x.contiguous()
        (y,) = (spec.empty() for spec in _out_spec(x))
        n = x.numel()
        blocks = triton.cdiv(n, BLOCK)
        if blocks == 0:
            return y
        if bug == "depends on program order":
            carry = torch.zeros(blocks + 1)
            _carried_sum_kernel[(blocks,)](x, carry, y, n, BLOCK)
            return y
        wide = triton.next_power_of_2(blocks)
        if bug == "adds up in any order":
            carry = torch.zeros(wide)
            _added_up_kernel[(blocks,)](x, carry, n, BLOCK, wide)
            _from_carry_kernel[(blocks,)](x, carry, y, n, BLOCK)
            return y
        partial = torch.empty(wide)
        _block_sum_kernel[(blocks,)](x, partial, n, BLOCK)
        if bug == "leaves elements unwritten":
            blocks = n // BLOCK
        _running_sum_kernel[(blocks,)](x, partial, y, n, blocks, BLOCK, wide, bug)
        return y

    return launch


def _backward(bug: str):
    launch = _launcher(bug)

    def backward(grads, x, needs):
        (grad,) = grads
        found = [launch(grad.flip(0)).flip(0)] if needs[0] else []
        if bug == "changes what it reads":
            grad.zero_()
        return found

    return backward


def _spec(name: str, forward_bug: str, backward_bug: str) -> OpSpec:
    op = _library.define(
        f"{name}(Tensor x) -> Tensor",
        out_spec=_out_spec,
        impls={"reference": lambda x: x.cumsum(0), "triton": _launcher(forward_bug)},
        backwards={"triton": _backward(backward_bug)},
        differentiable=("x",),
    )
    return OpSpec(
        name=name,
        op=lambda x: op(x),
        reference=lambda x: x.cumsum(0),
        cases=(Case("odd", lambda g: {"x": torch.rand(85, generator=g, dtype=torch.float64)}),),
        mutants={},
        diff_args=("x",),
        dtypes=(torch.float32,),
        magnitude=lambda x: [x.abs().cumsum(0)],
        reduction=lambda x: len(x),
    )


BUGS = (
    "writes past its end",
    "reads and writes past its end",
    "leaves elements unwritten",
    "reads memory that nothing wrote",
    "depends on program order",
    "adds up in any order",
)
SPECS = {
    "none": _spec("running_sum", "none", "none"),
    **{f"forward {bug}": _spec(f"running_sum_{i}", bug, "none") for i, bug in enumerate(BUGS)},
    **{
        f"backward {bug}": _spec(f"running_sum_backward_{i}", "none", bug)
        for i, bug in enumerate((*BUGS, "changes what it reads"))
    },
}
