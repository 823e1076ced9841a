"""The training loop: one optimizer step after the other, stoppable and resumable at each."""

from __future__ import annotations

import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from effdet.bench import DetBenchTrain
from effdet.data import coco_folder, set_epoch
from effdet.factory import create_model

from . import checkpoint as checkpoints
from .config import TrainConfig
from .data import eval_loader, train_loader
from .devices import resolve_device
from .ema import ModelEma
from .evaluate import Evaluation, evaluate
from .interrupt import StopSignal
from .log import JsonLog, plot_curves
from .schedule import WarmupCosine, build_optimizer
from .weights import load_model


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: ``exit_code`` is 0, or 128 + the number of the signal that stopped it."""

    exit_code: int
    best_ap: float
    last: Path
    best: Path


class TrainingDiverged(ValueError):
    """The loss is no longer finite."""


class Trainer:
    """Trains one model on one COCO-format folder.

    ``out/last.pth`` holds the complete state after each epoch and when stopped, ``out/best.pth``
    that of the best AP so far, ``out/epoch-N.pth`` those of the last epochs if ``config.keep`` asks
    for them, ``out/log.jsonl`` the log and ``out/curves.png`` its plot. A run
    that was stopped and resumed ends with the weights of one that was not: equal bit for bit on
    the CPU with the same number of threads.

    Args:
        config: the settings.
        resume: a checkpoint's content (`effdet.engine.checkpoint.read`) to go on from, whose
            settings are ``config``'s.
        quiet: show no progress bars.
    """

    def __init__(
        self, config: TrainConfig, resume: dict[str, Any] | None = None, quiet: bool = False
    ) -> None:
        self.config = config
        self.quiet = quiet
        self.device = resolve_device(config.device)
        if config.amp == "fp16" and self.device.type == "cpu":
            raise ValueError("amp: got 'fp16' on the CPU, takes 'bf16' or 'off' there")
        self.out = Path(config.out)
        train_set = coco_folder(config.data, config.train_split)
        self.class_names = list(train_set.parser.cat_names)
        self.category_ids = [int(i) for i in train_set.parser.cat_ids]
        _seed_everything(config.seed)
        self.model: Any = self._build_model(fresh=resume is None).to(self.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if config.freeze_backbone:
            self.model.backbone.requires_grad_(False)
        self.ema = ModelEma(self.model, config.ema_decay)
        self.bench = DetBenchTrain(self.model, create_labeler=True)
        side = config.eval_size
        self.eval_size = (side, side) if side else tuple(self.model.config.image_size)
        self.loader = train_loader(train_set, self.model.config, config, self.device)
        self.steps_per_epoch = len(train_set) // config.batch_size
        self.val_set: Any = None
        self.val_loader: Any = None
        if config.eval_every:
            self.val_set = coco_folder(config.data, config.val_split)
            if list(self.val_set.parser.cat_names) != self.class_names:
                raise ValueError(
                    f"data {config.data}: the classes of split {config.val_split} differ from"
                    f" those of {config.train_split}"
                )
            self.val_loader = eval_loader(
                self.val_set,
                self.model.config,
                config.batch_size,
                config.workers,
                self.device,
                self.eval_size,
            )
        self.optimizer = build_optimizer(
            self.model, config.optimizer, config.lr, config.momentum, config.weight_decay
        )
        steps = self.steps_per_epoch
        self.schedule = WarmupCosine(
            config.lr, round(config.warmup_epochs * steps), config.epochs * steps
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.epoch = 0
        self.step_in_epoch = 0
        self.best_ap = -1.0
        if resume is not None:
            self._restore(resume)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = JsonLog(self.out / "log.jsonl")
        self.log.write(
            "config",
            **config.to_dict(),
            resumed_at_step=self.step,
            images=len(train_set),
            parameters=sum(p.numel() for p in self.model.parameters()),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
        )

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    def fit(self) -> TrainResult:
        """Train to the end, or until Ctrl-C or SIGTERM; either way ``last.pth`` is up to date."""
        with StopSignal() as stop:
            while self.epoch < self.config.epochs and not stop:
                self._train_epoch(stop)
                if not stop:
                    self._finish_epoch(stop)
            if stop:
                self._save()
        self.log.close()
        return TrainResult(
            stop.exit_code if stop else 0,
            self.best_ap,
            self.out / "last.pth",
            self.out / "best.pth",
        )

    def _build_model(self, fresh: bool) -> Any:
        size = (self.config.size, self.config.size) if self.config.size else None
        count = len(self.class_names)
        if fresh and self.config.checkpoint:
            model: Any = load_model(self.config.model, self.config.checkpoint, size).model
            if model.config.num_classes != count:
                model.reset_head(num_classes=count)
            return model
        return create_model(
            self.config.model, num_classes=count, pretrained_backbone=False, image_size=size
        )

    def _train_epoch(self, stop: StopSignal) -> None:
        self.model.train()
        if self.config.freeze_backbone:
            self.model.backbone.eval()
        set_epoch(self.loader, self.epoch, self.step_in_epoch)
        bar = self._bar(f"epoch {self.epoch + 1}/{self.config.epochs}", self.steps_per_epoch)
        bar.update(self.step_in_epoch)
        window = _Window(self.device)
        for images, target in self.loader:
            lr = self._train_step(images, target, window)
            self.step_in_epoch += 1
            bar.update()
            if self.step % self.config.log_every == 0 or self.step_in_epoch == self.steps_per_epoch:
                losses = window.means()
                if not all(abs(v) < float("inf") for v in losses.values()):
                    bar.close()
                    raise TrainingDiverged(
                        f"loss is {losses['loss']} at step {self.step}; a lower learning rate than"
                        f" {self.config.lr:g} or a longer warm-up may help"
                    )
                speed = window.images_per_second()
                self.log.write(
                    "step",
                    step=self.step,
                    epoch=self.epoch + 1,
                    lr=lr,
                    images_per_second=round(speed, 2),
                    **{name: round(value, 6) for name, value in losses.items()},
                )
                bar.set_postfix_str(
                    f"loss {losses['loss']:.3f}, lr {lr:.2g}, {speed:.1f} images/s,"
                    f" ends in {self._eta(speed)}"
                )
                window = _Window(self.device)
            if stop:
                break
        bar.close()

    def _train_step(self, images: torch.Tensor, target: dict[str, Any], window: _Window) -> float:
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        lr = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._autocast():
            losses = self.bench(images, target)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(losses["loss"]).backward()
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model)
        window.add(losses, len(images))
        return lr

    def _finish_epoch(self, stop: StopSignal) -> None:
        """Evaluate when due, write checkpoints, go to the next epoch; nothing when stopped."""
        number = self.epoch + 1
        due = self.config.eval_every and (
            number % self.config.eval_every == 0 or number == self.config.epochs
        )
        result = self._evaluate(stop) if due else None
        if stop:
            return
        best = result is not None and result.stats["AP"] >= self.best_ap
        fields: dict[str, Any] = {}
        if result is not None:
            self.best_ap = max(self.best_ap, result.stats["AP"])
            fields = {**result.stats, "per_class": result.per_class}
            self._print(
                f"epoch {number}: AP {result.stats['AP']:.4f}, AP50 {result.stats['AP50']:.4f},"
                f" AP75 {result.stats['AP75']:.4f}{' (best)' if best else ''}"
            )
        self.epoch, self.step_in_epoch = number, 0
        self.log.write("epoch", epoch=number, step=self.step, best_ap=self.best_ap, **fields)
        self._save()
        checkpoints.keep_epoch(self.out / "last.pth", number, self.config.keep)
        if best or not self.config.eval_every:
            checkpoints.save_as_well(self.out / "last.pth", "best.pth")
        if not plot_curves(self.out / "log.jsonl", self.out / "curves.png") and number == 1:
            self._print('no curves.png: matplotlib is missing (pip install "effdet-kernels[plot]")')

    def _evaluate(self, stop: StopSignal) -> Evaluation | None:
        bar = self._bar("evaluating", len(self.val_set))
        try:
            return evaluate(
                self.ema.module,
                self.val_loader,
                self.val_set,
                autocast=self._autocast,
                progress=bar.update,
                stop=stop,
            )
        finally:
            bar.close()

    def _save(self) -> None:
        content = {
            "format": checkpoints.FORMAT,
            "model": self.config.model,
            "image_size": list(self.eval_size),
            "class_names": self.class_names,
            "category_ids": self.category_ids,
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "best_ap": self.best_ap,
            "state_dict": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": checkpoints.rng_state(),
        }
        checkpoints.save_atomically(content, self.out / "last.pth")

    def _restore(self, content: dict[str, Any]) -> None:
        if content["class_names"] != self.class_names:
            raise ValueError(
                f"data {self.config.data}: classes {self.class_names} differ from the"
                f" checkpoint's {content['class_names']}"
            )
        self.model.load_state_dict(content["state_dict"])
        self.ema.module.load_state_dict(content["state_dict_ema"])
        self.ema.updates = content["ema_updates"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.epoch = content["epoch"]
        self.step_in_epoch = content["step_in_epoch"]
        self.best_ap = content["best_ap"]
        checkpoints.restore_rng_state(content["rng"])

    def _autocast(self) -> Any:
        if self.config.amp == "off":
            return nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.config.amp]
        return torch.autocast(self.device.type, dtype)

    def _bar(self, text: str, total: int) -> tqdm:
        hidden = True if self.quiet else None  # None: hidden where stderr is no terminal
        return tqdm(total=total, desc=text, disable=hidden, leave=False, dynamic_ncols=True)

    def _print(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)

    def _eta(self, images_per_second: float) -> str:
        steps = self.config.epochs * self.steps_per_epoch - self.step
        return tqdm.format_interval(steps * self.config.batch_size / max(images_per_second, 1e-9))


class _Window:
    """Sums of the losses since the last log line, kept on the device to avoid a sync per step."""

    def __init__(self, device: torch.device) -> None:
        self._sums = {
            name: torch.zeros((), device=device) for name in ("loss", "class_loss", "box_loss")
        }
        self._steps = 0
        self._images = 0
        self._start = time.perf_counter()

    def add(self, losses: dict[str, torch.Tensor], images: int) -> None:
        for name, total in self._sums.items():
            total += losses[name].detach()
        self._steps += 1
        self._images += images

    def means(self) -> dict[str, float]:
        return {name: float(total) / self._steps for name, total in self._sums.items()}

    def images_per_second(self) -> float:
        return self._images / max(time.perf_counter() - self._start, 1e-9)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
