"""One optimizer step: the model, and all that a step needs and changes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effdet.bench import DetBenchTrain
from effdet.distributed import all_gather

from .config import TrainConfig
from .ema import ModelEma
from .nan_watch import Batch, BufferKeeper, first_trouble, is_finite
from .processes import Processes
from .schedule import build_optimizer

Losses = dict[str, Tensor]
# Running statistics are not read in training: there is nothing to send before a step.
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers": False}  # torch 2.13's name
if "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters:
    _NO_BUFFERS = {"broadcast_buffers": False}


class NotFinite(ArithmeticError):
    """A loss or a gradient of a step is not finite; the step was not taken.

    Attributes:
        where: what was not finite first.
        images: numbers of the images that it was computed from; empty if that is not known.
    """

    def __init__(self, where: str, images: list[int]) -> None:
        super().__init__(where, images)
        self.where = where
        self.images = images


class Learner:
    """A model that learns by one optimizer step after the other.

    With several processes each has one; a step of theirs is a step with the batches of all.

    Args:
        model: a bare EfficientDet on the device of ``processes``; changed in place.
        config: the settings.
        processes: those of the run.
    """

    def __init__(self, model: Any, config: TrainConfig, processes: Processes) -> None:
        self.config = config
        self.processes = processes
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if config.freeze_backbone:
            model.backbone.requires_grad_(False)
        model.set_grad_checkpointing(config.grad_checkpointing)
        self.model = model
        self.ema = ModelEma(model, config.ema_decay)
        many = processes.count > 1
        self.bench = DetBenchTrain(model, global_loss=many and config.global_loss)
        self._forward: Any = _averaging(self.bench, config, processes) if many else self.bench
        self.optimizer = build_optimizer(
            model, config.optimizer, config.lr, config.momentum, config.weight_decay
        )
        kind = processes.device.type
        self.scaler = torch.amp.GradScaler(kind, enabled=config.amp == "fp16")
        self._buffers = BufferKeeper(model) if config.nan_watch == "skip" else None

    def train(self) -> None:
        """Put the model in training mode, a frozen backbone excepted."""
        self.model.train()
        if self.config.freeze_backbone:
            self.model.backbone.eval()

    def step(self, batches: Iterator[Batch], lr: float) -> list[Losses]:
        """Take one step on the next batches, one for each part; returns their losses.

        Raises:
            NotFinite: on all processes; parameters, optimizer and averages are as they were, and
                with the watch "skip" the running statistics too.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        if self._buffers is not None:
            self._buffers.keep()
        count = self.config.accumulate
        parts, losses = [], []
        for part in range(count):
            batch = next(batches)
            with self._gradients_averaged(now=part == count - 1):
                found = self.losses(self._forward, *batch)
                self.scaler.scale(found["loss"] / count).backward()
            losses.append({name: value.detach() for name, value in found.items()})
            if self.config.nan_watch != "off":
                parts.append(batch)
        norm = None
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        if not self._is_good(losses, norm):
            raise self._take_back(parts)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model)
        return losses

    def losses(self, forward: Any, images: Tensor, target: Mapping[str, Any]) -> Losses:
        """``forward(images, target)`` in the memory format and precision of the settings."""
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            return forward(images, target)

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        if self.config.amp == "off":
            return nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.config.amp]
        return torch.autocast(self.processes.device.type, dtype)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold of this."""
        return {
            "state_dict": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self.model.load_state_dict(state["state_dict"])
        self.ema.module.load_state_dict(state["state_dict_ema"])
        self.ema.updates = state["ema_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _gradients_averaged(self, now: bool) -> AbstractContextManager:
        """Exchange gradients with the other processes in this backward, or leave it to a later one."""
        if now or self.processes.count == 1:
            return nullcontext()
        return self._forward.no_sync()

    def _is_good(self, losses: list[Losses], norm: Tensor | None) -> bool:
        """Whether loss and gradient are finite, on all processes. Large gradients of float16 are its scaler's."""
        if self.config.nan_watch == "off":
            return True
        if self.scaler.is_enabled():
            norm = None
        elif norm is None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        (bad,) = self.processes.largest(not is_finite([part["loss"] for part in losses], norm))
        return not bad

    def _take_back(self, parts: list[Batch]) -> NotFinite:
        """Leave the step out, and look for the reason."""
        if self.scaler.is_enabled():
            if not self.config.clip_grad:
                self.scaler.unscale_(self.optimizer)
            self.scaler.update()
        found = []
        for images, target in parts:
            where = first_trouble(
                self.model, lambda *batch: self.losses(self.bench, *batch), (images, target)
            )
            if where:
                found.append(NotFinite(where, target["img_idx"].tolist()))
        if self._buffers is not None:
            self._buffers.restore()
        found = [one for each in all_gather(found) for one in each]
        # Stochastic depth is drawn anew, so the same batch may do better now.
        return found[0] if found else NotFinite("a place that a second look did not find", [])


def _averaging(bench: DetBenchTrain, config: TrainConfig, processes: Processes) -> Any:
    """The bench as a module whose backward averages gradients over the processes."""
    # Of a 1x1 kernel both memory formats are the same bytes under different strides.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    devices = [processes.device] if processes.device.type == "cuda" else None
    forward = DistributedDataParallel(bench, device_ids=devices, **_NO_BUFFERS)
    if config.sync_bn:  # only now: DistributedDataParallel takes torch's own for GPUs only
        nn.SyncBatchNorm.convert_sync_batchnorm(bench.model)
    return forward
