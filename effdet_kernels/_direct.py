"""Calls past the dispatcher: ``possible`` says which, ``Call`` is those with gradients, an ``autograd.Function`` around
an op's own functions.

Through ``torch.library`` a call with gradients costs a few hundred microseconds, more than many kernels. What the
dispatcher is there for (compilers, exporters, modes, functorch, tensor subclasses, the profiler) still goes through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from effdet_kernels._library import Op

_PLAIN = (Tensor, nn.Parameter)


def possible(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing but autograd needs to see a call of these tensors."""
    return (
        all(type(t) in _PLAIN for t in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


class Call(torch.autograd.Function):
    """One call of an op: ``Call.apply(op, backend, args, *tensors)`` with the tensors of ``args``, in order."""

    @staticmethod
    def forward(ctx: Any, op: Op, backend: str, args: Sequence[Any], *tensors: Tensor) -> Any:
        output = op.direct(backend, args)
        ctx.op = op
        op.setup_context(ctx, args, output)
        return tuple(output) if isinstance(output, list) else output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # With a graph of the gradients asked for, the registered op says that it has none.
        registered = torch.is_grad_enabled()
        return None, None, None, *ctx.op.gradients(ctx, grads, registered=registered)
