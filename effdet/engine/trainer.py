"""The training loop: one optimizer step after the other, stoppable and resumable at each."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from effdet.backbone.timm_models import INSTALL, import_timm
from effdet.data import coco_folder, set_epoch
from effdet.distributed import all_gather
from effdet.factory import create_model

from . import checkpoint as checkpoints
from . import plots
from .config import TrainConfig
from .data import eval_loader, train_loader
from .evaluate import Evaluation, evaluate, write_precision_recall
from .interrupt import StopSignal
from .learner import Learner, Losses, NotFinite
from .log import JsonLog, plot_curves
from .nan_watch import Batch
from .processes import Processes
from .schedule import WarmupCosine
from .summary import write_summary
from .tensorboard import TensorBoardLog
from .weights import load_model, set_norms

_LOSSES = "loss", "class_loss", "box_loss"
_MOST_SKIPPED = 10  # steps in a row


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: ``exit_code`` is 0, or 128 + the number of the signal that stopped it."""

    exit_code: int
    best_ap: float
    last: Path
    best: Path


class TrainingDiverged(ValueError):
    """The loss or a gradient is no longer finite."""


class Trainer:
    """Trains one model on one COCO-format folder.

    ``out/last.pth`` holds the complete state after each epoch and when stopped, ``out/best.pth``
    that of the best AP so far, ``out/epoch-N.pth`` those of the last epochs if ``config.keep`` asks
    for them, ``out/log.jsonl`` the log, ``out/curves.png`` its plots and ``out/summary.md`` a
    summary. A run that was stopped and resumed ends with the weights of one that was not: equal bit for bit on
    the CPU with the same number of threads.

    With several processes each makes a trainer; together they take the steps that one would take
    with the whole batch, and the first of them writes the files.

    Args:
        config: the settings.
        processes: those of the run, and what this one computes on (`effdet.engine.processes.joined`).
        resume: a checkpoint's content (`effdet.engine.checkpoint.read`) to go on from, whose
            settings are ``config``'s.
        quiet: show no progress bars.
    """

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        resume: dict[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.config = config
        self.processes = processes
        self.quiet = quiet or processes.rank > 0
        self.device = processes.device
        if config.amp == "fp16" and self.device.type == "cpu":
            raise ValueError("amp: got 'fp16' on the CPU, takes 'bf16' or 'off' there")
        self.out = Path(config.out)
        train_set = coco_folder(config.data, config.train_split)
        self.class_names = list(train_set.parser.cat_names)
        self.category_ids = [int(i) for i in train_set.parser.cat_ids]
        _seed_everything(config.seed)
        model, self.bn_eps = self._build_model(resume)
        set_norms(model, config.bn_momentum, self.bn_eps)
        self.learner = Learner(model.to(self.device), config, processes)
        side = config.eval_size
        self.eval_size = (side, side) if side else tuple(model.config.image_size)
        self.loader = train_loader(train_set, model.config, config, self.device)
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
                model.config,
                config.batch_size,
                config.workers,
                self.device,
                self.eval_size,
                distributed=processes.count > 1,
            )
        steps = self.steps_per_epoch
        self.schedule = WarmupCosine(
            config.lr,
            round(config.warmup_epochs * steps),
            config.epochs * steps,
            config.warmup_start,
        )
        self.signal = StopSignal()
        self.stopped = 0  # the number of the signal that all processes stop for
        self.epoch = 0
        self.step_in_epoch = 0
        self.skipped_in_a_row = 0
        self.best_ap = -1.0
        torch.manual_seed(config.seed + processes.rank)  # of stochastic depth
        if resume is not None:
            self._restore(resume)
        self.logs: list[JsonLog | TensorBoardLog] = []
        if processes.rank == 0:
            if config.tensorboard:  # which may be missing: nothing is written before it is there
                self.logs.append(TensorBoardLog(self.out / "tensorboard"))
            self.out.mkdir(parents=True, exist_ok=True)
            self.logs.append(JsonLog(self.out / "log.jsonl"))
        self._write_log(
            "config",
            **config.to_dict(),
            resumed_at_step=self.step,
            images=len(train_set),
            parameters=sum(p.numel() for p in model.parameters()),
            processes=processes.count,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
        )

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    def fit(self) -> TrainResult:
        """Train to the end, or until Ctrl-C or SIGTERM; either way ``last.pth`` is up to date."""
        with self.signal:
            while self.epoch < self.config.epochs and not self._stopping():
                self._train_epoch()
                if not self.stopped:
                    self._finish_epoch()
            if self.stopped:
                self._save()
        for log in self.logs:
            log.close()
        return TrainResult(
            128 + self.stopped if self.stopped else 0,
            self.best_ap,
            self.out / "last.pth",
            self.out / "best.pth",
        )

    def _stopping(self) -> bool:
        """Whether a signal told one of the processes to stop: then all do, at the same step."""
        (self.stopped,) = self.processes.largest(self.signal.number or 0)
        return bool(self.stopped)

    def _build_model(self, resume: dict[str, Any] | None) -> tuple[Any, float]:
        """The model, with weights to start from, and the epsilon of its batch norms (0: its own)."""
        size = (self.config.size, self.config.size) if self.config.size else None
        count = len(self.class_names)
        pretrained = self.config.pretrained if resume is None else ""
        if (resume is None and self.config.checkpoint) or pretrained == "coco":
            loaded = load_model(self.config.model, self.config.checkpoint, size)
            model: Any = loaded.model
            if model.config.num_classes != count:
                model.reset_head(num_classes=count)
            return model, self.config.bn_eps or loaded.bn_eps
        if pretrained and import_timm() is None:
            raise ImportError(f"pretrained: got {pretrained!r}, which takes timm: {INSTALL}")
        model = create_model(
            self.config.model,
            num_classes=count,
            pretrained_backbone=pretrained == "imagenet",
            image_size=size,
        )
        return model, (resume or {}).get("bn_eps", self.config.bn_eps)

    def _train_epoch(self) -> None:
        self.learner.train()
        set_epoch(self.loader, self.epoch, self.step_in_epoch * self.config.accumulate)
        bar = self._bar(f"epoch {self.epoch + 1}/{self.config.epochs}", self.steps_per_epoch)
        bar.update(self.step_in_epoch)
        window = _Window(self.processes)
        batches = _Timed(iter(self.loader))
        while self.step_in_epoch < self.steps_per_epoch:
            try:
                lr = self._train_step(batches, window)
            except TrainingDiverged:
                bar.close()
                raise
            self.step_in_epoch += 1
            bar.update()
            if self.step % self.config.log_every == 0 or self.step_in_epoch == self.steps_per_epoch:
                bar.set_postfix_str(self._log_window(window, lr, batches.waited()))
                window = _Window(self.processes)
            if self._stopping():
                break
            if self.config.save_every and self.step % self.config.save_every == 0:
                self._save()
        bar.close()

    def _log_window(self, window: _Window, lr: float, waited: float) -> str:
        """Write what happened since the last line; returns it for the progress bar."""
        losses = window.means()
        if not all(abs(v) < float("inf") for v in losses.values()):
            raise TrainingDiverged(f"loss is {losses['loss']} at step {self.step}{self._advice()}")
        speed, waited = window.images_per_second(), waited / window.seconds()
        self._write_log(
            "step",
            step=self.step,
            epoch=self.epoch + 1,
            lr=lr,
            images_per_second=round(speed, 2),
            waited_for_data=round(waited, 4),
            **{name: round(value, 6) for name, value in losses.items()},
        )
        loss = f"loss {losses['loss']:.3f}, " if losses else ""
        return (
            f"{loss}lr {lr:.2g}, {speed:.1f} images/s, {waited:.0%} of it waiting for data,"
            f" ends in {self._eta(speed)}"
        )

    def _train_step(self, batches: Iterator[Batch], window: _Window) -> float:
        """One optimizer step on the next batches; returns its learning rate."""
        lr = self.schedule(self.step)
        losses: list[Losses] = []
        try:
            losses = self.learner.step(batches, lr)
            self.skipped_in_a_row = 0
        except NotFinite as error:
            self._skip(error)
        window.add(losses, self.config.batch_size)
        return lr

    def _skip(self, error: NotFinite) -> None:
        """Say why a step was left out, or end the run."""
        infos = self.loader.dataset.parser.img_infos
        names = [infos[index]["file_name"] for index in error.images]
        report = f"step {self.step + 1} is not finite, first in {error.where}"
        if names:
            report += f"; images: {', '.join(names)}"
        self.skipped_in_a_row += 1
        if self.config.nan_watch == "stop" or self.skipped_in_a_row == _MOST_SKIPPED:
            raise TrainingDiverged(f"{report}{self._advice()}") from error
        self._write_log("skipped", step=self.step + 1, where=error.where, images=names)
        self._print(f"left out: {report}")

    def _advice(self) -> str:
        return (
            f"; a lower learning rate than {self.config.lr:g} or a longer warm-up may help."
            f" {self.out / 'last.pth'} is of before, if there is one"
        )

    def _finish_epoch(self) -> None:
        """Evaluate when due, write checkpoints, go to the next epoch; nothing when stopped."""
        number = self.epoch + 1
        due = self.config.eval_every and (
            number % self.config.eval_every == 0 or number == self.config.epochs
        )
        result = self._evaluate() if due else None
        if self._stopping():
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
        self._write_log("epoch", epoch=number, step=self.step, best_ap=self.best_ap, **fields)
        self._save()
        if self.processes.rank == 0:
            checkpoints.keep_epoch(self.out / "last.pth", number, self.config.keep)
            if best or not self.config.eval_every:
                checkpoints.save_as_well(self.out / "last.pth", "best.pth")
            self._show(number, result)

    def _show(self, epoch: int, result: Evaluation | None) -> None:
        """Bring the files for people up to date."""
        log = self.out / "log.jsonl"
        if result is not None:
            write_precision_recall(result, self.out / plots.CURVES_FILE, epoch)
        if not plot_curves(log, self.out / "curves.png") and epoch == 1:
            self._print('no curves.png: matplotlib is missing (pip install "effdet-kernels[plot]")')
        write_summary(self.out, log)

    def _evaluate(self) -> Evaluation | None:
        many = self.processes.count > 1
        if not self.config.sync_bn:  # each process has averaged statistics of its own images
            self.processes.share(self.learner.ema.module.buffers())
        bar = self._bar("evaluating", math.ceil(len(self.val_set) / self.processes.count))
        try:
            return evaluate(
                self.learner.ema.module,
                self.val_loader,
                self.val_set,
                autocast=self.learner.autocast,
                progress=bar.update,
                stop=None if many else self.signal,
                distributed=many,
            )
        finally:
            bar.close()

    def _save(self) -> None:
        rng, *rng_others = all_gather(checkpoints.rng_state())
        if self.processes.rank > 0:
            return
        content = {
            "format": checkpoints.FORMAT,
            "model": self.config.model,
            "bn_eps": self.bn_eps,
            "image_size": list(self.eval_size),
            "class_names": self.class_names,
            "category_ids": self.category_ids,
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "best_ap": self.best_ap,
            **self.learner.state(),
            "rng": rng,
            "rng_others": rng_others,
        }
        checkpoints.save_atomically(content, self.out / "last.pth")

    def _restore(self, content: dict[str, Any]) -> None:
        if content["class_names"] != self.class_names:
            raise ValueError(
                f"data {self.config.data}: classes {self.class_names} differ from the"
                f" checkpoint's {content['class_names']}"
            )
        self.learner.restore(content)
        self.epoch = content["epoch"]
        self.step_in_epoch = content["step_in_epoch"]
        self.best_ap = content["best_ap"]
        states = [content["rng"], *content.get("rng_others", [])]
        if self.processes.rank < len(states):  # more processes than before keep their seed's
            checkpoints.restore_rng_state(states[self.processes.rank])

    def _bar(self, text: str, total: int) -> tqdm:
        hidden = True if self.quiet else None  # None: hidden where stderr is no terminal
        return tqdm(total=total, desc=text, disable=hidden, leave=False, dynamic_ncols=True)

    def _write_log(self, kind: str, **fields: Any) -> None:
        for log in self.logs:
            log.write(kind, **fields)

    def _print(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)

    def _eta(self, images_per_second: float) -> str:
        steps = self.config.epochs * self.steps_per_epoch - self.step
        return tqdm.format_interval(steps * self.config.batch_size / max(images_per_second, 1e-9))


class _Timed:
    """An iterator that knows how long its caller waited for it."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._waited = 0.0

    def __iter__(self) -> _Timed:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - start
        return batch

    def waited(self) -> float:
        """Seconds since the last call of this."""
        waited, self._waited = self._waited, 0.0
        return waited


class _Window:
    """What happened since the last log line; losses stay on the device until they are asked for."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._sums = torch.zeros(len(_LOSSES), device=processes.device)
        self._parts = 0
        self._images = 0
        self._start = time.perf_counter()

    def add(self, losses: list[Losses], images: int) -> None:
        for part in losses:
            self._sums += torch.stack([part[name] for name in _LOSSES])
        self._parts += len(losses)
        self._images += images

    def means(self) -> dict[str, float]:
        """Mean losses over steps and processes; empty if there was no step."""
        if not self._parts:
            return {}
        means = self._processes.average(self._sums / self._parts)
        return dict(zip(_LOSSES, means.tolist(), strict=True))

    def images_per_second(self) -> float:
        return self._images / self.seconds()

    def seconds(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
