"""Finding out where a loss or a gradient that is not finite came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Mapping[str, Any]]


class BufferKeeper:
    """The buffers of a model (running statistics) as they were, to take back a step."""

    def __init__(self, model: nn.Module) -> None:
        self._of_floats: list[Tensor] = []
        self._of_integers: list[Tensor] = []
        for buffer in model.buffers():
            kind = self._of_floats if buffer.is_floating_point() else self._of_integers
            kind.append(buffer)
        self._kept = [b.clone() for b in (*self._of_floats, *self._of_integers)]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the present values."""
        self._copy(self._kept, [*self._of_floats, *self._of_integers])

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what `keep` remembered."""
        self._copy([*self._of_floats, *self._of_integers], self._kept)

    def _copy(self, to: list[Tensor], of: list[Tensor]) -> None:
        if to:
            torch._foreach_copy_(to, of)


def is_finite(losses: Sequence[Tensor], gradient_norm: Tensor | None) -> bool:
    """Whether all of these 0-d tensors are finite numbers; waits for the device once."""
    values = [*losses] if gradient_norm is None else [*losses, gradient_norm]
    return bool(torch.stack([v.detach().float() for v in values]).isfinite().all())


def first_trouble(
    model: nn.Module,
    loss_of: Callable[[Tensor, Mapping[str, Any]], dict[str, Tensor]],
    batch: Batch,
) -> str | None:
    """Run a batch forward and backward again, looking at every value; None if all are finite.

    Looked at in the order in which trouble spreads: the images, the boxes, the parameters, the
    output of each module (the innermost first), the losses, then the gradient of each module's
    output and of each parameter. The gradients of the model are lost. What a module computes in
    one fused op counts as that module's.

    Args:
        model: what is trained.
        loss_of: images and target to the losses, "loss" among them; calls ``model``.
        batch: images ``[B, 3, H, W]`` and target.

    Returns:
        what is not finite, to read after "in", e.g. "the output of fpn.cell.0.fnode.2".
    """
    images, target = batch
    found: list[str] = []
    if not _finite(images):
        rows = [str(i) for i, image in enumerate(images) if not _finite(image)]
        found.append(f"the input, image {', '.join(rows)} of the batch")
    boxes = target.get("bbox")
    if boxes is not None and not all(map(_finite, boxes)):
        found.append("the boxes of the batch")
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            found.append(f"the parameter {name}")
    hooks = [
        module.register_forward_hook(_watcher(name or "the model", found))
        for name, module in model.named_modules()
    ]
    try:  # all of it, whatever was found: other processes may be waiting in the same collectives
        model.zero_grad(set_to_none=True)
        losses = loss_of(images, target)
        for name, value in losses.items():
            if not _finite(value):
                found.append(f"{name}, though the outputs of the model are finite")
        losses["loss"].backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not _finite(parameter.grad):
                found.append(f"the gradient of {name}")
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return found[0] if found else None


def _watcher(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if not _finite(tensor):
                found.append(f"the output of {name}")
            elif tensor.requires_grad:
                tensor.register_hook(look_at_gradient)

    def look_at_gradient(gradient: Tensor) -> None:
        if not _finite(gradient):
            found.append(f"the gradient of the output of {name}")

    return look


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())
