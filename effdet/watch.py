"""Sees, in a few dozen microseconds, whether a model is still the one that a plan was made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as _global

from effdet_kernels import _native

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # without gradients no other is called
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_CONSTANTS = ("eps", "momentum", "drop_prob", "p")  # attributes that people change between steps
_GLOBAL_HOOKS = (
    _global._global_forward_hooks,
    _global._global_forward_pre_hooks,
)
_GLOBAL_BACKWARD_HOOKS = (
    _global._global_backward_hooks,
    _global._global_backward_pre_hooks,
)


class Watch:
    """A snapshot of a model: modules, parameters, buffers, their addresses, hooks, modes.

    With `values`, for plans that hold copies of weights, their versions too; in-place changes that go through `.data`
    or another alias leave no trace (see `EfficientDet.refresh`). Without, for plans that read weights where they are.
    With `gradients`, for plans that have a backward, hooks on that, too, and the constants of norms and dropout.

    Attributes: `plain`: no such hooks, and, without `gradients`, every module in eval mode; `values`; `parameters`.
    """

    def __init__(self, model: nn.Module, values: bool, gradients: bool = False) -> None:
        modules = list(model.modules())
        names = _HOOKS + _BACKWARD_HOOKS if gradients else _HOOKS
        hooks = [getattr(m, name) for m in modules for name in names] + list(_GLOBAL_HOOKS)
        hooks += _GLOBAL_BACKWARD_HOOKS if gradients else ()
        members = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        # Without gradients no kernel has to do with the one left out.
        left_out = None if gradients else "num_batches_tracked"
        named = [item for d in members for item in d.items() if item[0] != left_out]
        tensors = [t for _, t in named if isinstance(t, Tensor)]
        # Those made in inference mode have no version.
        counted = [t for t in tensors if not t.is_inference()] if values else []
        # Of each module one address: what moves storage (`to`, `load_state_dict`) moves all of them. A plan that reads
        # there must know of every other way, too.
        own = [[*m._parameters.values(), *m._buffers.values()] for m in modules]
        first = [next((t for t in group if t is not None), None) for group in own]
        placed = [t for t in first if t is not None] if values else tensors
        watched = [d for d in members if d] + hooks
        read = Tensor._version, Tensor.data_ptr
        modes = [vars(m) for m in modules]
        seen = [_native.module().Watch(watched, counted, placed, modes, "training", *read)]
        for name in _CONSTANTS if gradients else ():
            having = [attributes for attributes in modes if name in attributes]
            seen.append(_native.module().Watch([], [], [], having, name, *read))
        self._native = seen
        self.values = values
        self.plain = not any(hooks) and (gradients or not any(m.training for m in modules))
        self.parameters = list(model.parameters())

    def unchanged(self) -> bool:
        """Whether nothing of the snapshot differs now."""
        return all(part.unchanged() for part in self._native)
