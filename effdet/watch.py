"""Sees, in a few dozen microseconds, whether a model is still the one that a plan was made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as _global

from effdet_kernels import _native

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # without gradients no other is called
_GLOBAL_HOOKS = (
    _global._global_forward_hooks,
    _global._global_forward_pre_hooks,
)


class Watch:
    """A snapshot of a model: modules, parameters, buffers, their addresses, forward hooks, modes.

    With `values`, for plans that hold copies of weights, their versions too; in-place changes that go through `.data`
    or another alias leave no trace (see `EfficientDet.refresh`). Without, for plans that read weights where they are.

    Attributes: `plain`: no forward hooks, and every module in eval mode; `values`.
    """

    def __init__(self, model: nn.Module, values: bool) -> None:
        modules = list(model.modules())
        hooks = [getattr(m, name) for m in modules for name in _HOOKS] + list(_GLOBAL_HOOKS)
        members = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        named = [item for d in members for item in d.items() if item[0] != "num_batches_tracked"]
        tensors = [t for _, t in named if isinstance(t, Tensor)]  # no kernel reads the one left out
        # Those made in inference mode have no version.
        counted = [t for t in tensors if not t.is_inference()] if values else []
        # Of each module one address: what moves storage (`to`, `load_state_dict`) moves all of them. A plan that reads
        # there must know of every other way, too.
        own = [[*m._parameters.values(), *m._buffers.values()] for m in modules]
        first = [next((t for t in group if t is not None), None) for group in own]
        placed = [t for t in first if t is not None] if values else tensors
        watched = [d for d in members if d] + hooks
        modes = [vars(m) for m in modules]
        self._native = _native.module().Watch(
            watched, counted, placed, modes, "training", Tensor._version, Tensor.data_ptr
        )
        self.values = values
        self.plain = not any(hooks) and not any(m.training for m in modules)

    def unchanged(self) -> bool:
        """Whether nothing of the snapshot differs now."""
        return self._native.unchanged()
