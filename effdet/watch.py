"""Sees, in a few microseconds, whether a model is still the one that a plan was made of."""

from __future__ import annotations

from operator import attrgetter, is_, methodcaller
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _global

_version = attrgetter("_version")
_data_ptr = methodcaller("data_ptr")
_training = attrgetter("training")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    _global._global_forward_hooks,
    _global._global_forward_pre_hooks,
    _global._global_backward_hooks,
    _global._global_backward_pre_hooks,
)


class Watch:
    """A snapshot of a model: modules, parameters, buffers, their versions and places, hooks, modes.

    Attributes: `plain`: no hooks, and every module in eval mode.

    In-place changes that go through `.data` or another alias leave no trace; see `EfficientDet.refresh`.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules = modules
        self._dicts = [d for m in modules for d in (m._modules, m._parameters, m._buffers) if d]
        self._values = self._members()
        self._hooks = [getattr(m, name) for m in modules for name in _HOOKS]
        self._tensors = [v for v in self._values if isinstance(v, Tensor)]
        self._versions = list(map(_version, self._tensors))
        # One tensor per module: what replaces storage (`to`, `load_state_dict`) does so for all of a module.
        self._first = [
            t
            for m in modules
            for t in [*m._parameters.values(), *m._buffers.values()][:1]
            if t is not None
        ]
        self._places = list(map(_data_ptr, self._first))
        self.plain = not self._hooked() and not any(map(_training, modules))
        self._was_hooked = self._hooked()
        self._modes = list(map(_training, modules))

    def _members(self) -> list[Any]:
        return [value for d in self._dicts for value in d.values()]

    def _hooked(self) -> bool:
        return any(self._hooks) or any(_GLOBAL_HOOKS)

    def unchanged(self) -> bool:
        """Whether nothing of the snapshot differs now."""
        members = self._members()
        return (
            len(members) == len(self._values)
            and all(map(is_, members, self._values))
            and list(map(_version, self._tensors)) == self._versions
            and list(map(_data_ptr, self._first)) == self._places
            and self._hooked() == self._was_hooked
            and list(map(_training, self._modules)) == self._modes
        )
