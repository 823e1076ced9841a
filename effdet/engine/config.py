"""Settings of a training run; the defaults are the paper's (arXiv:1911.09070, section 5.1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from . import recipes
from .schedule import default_learning_rate


@dataclass
class TrainConfig:
    """Everything that decides the weights that a run ends with, and where they are written.

    Attributes:
        data: COCO-format folder (see `effdet.data.coco_folder`).
        out: folder for checkpoints, log and plot.
        model: name of the configuration (``effdet models`` lists them).
        checkpoint: weights to start from; empty trains from random weights, or from ``pretrained``.
        pretrained: "coco": start from the model's published weights; "imagenet": from its backbone's, by timm.
        train_split, val_split: names of the two splits in ``data``.
        recipe: the recipe that the settings were made from (`TrainConfig.of_recipe`), for the log.
        epochs: length of the run.
        batch_size: images of an optimizer step, over all processes and parts.
        accumulate: parts that a process takes its share of a batch in, one after the other, to save
            memory; batch norm and the normalisation of the loss are then those of a part.
        size: side of the square input in training, in pixels; 0 takes the model's own.
        eval_size: side of the input in evaluation, which the checkpoint names as its size; 0 takes
            ``size``. Training on smaller crops is faster; objects larger than them suffer.
        optimizer: "sgd" or "adamw".
        lr: peak learning rate; 0 takes `default_learning_rate` for the batch size.
        momentum, weight_decay: of the optimizer; the decay spares biases, BN and fusion weights.
        warmup_epochs: length of the linear warm-up; fractions are allowed.
        warmup_start: where it begins, as a fraction of ``lr``.
        clip_grad: largest L2 norm of the gradient; 0 does not clip.
        ema_decay: final decay of the averaged weights.
        bn_momentum, bn_eps: of every batch norm, momentum being 1 - decay; 0 keeps the model's.
        sync_bn: batch norm takes its statistics from the images of all processes.
        global_loss: the loss is divided by the positive anchors of all processes; off: each
            process divides by its own.
        grad_checkpointing: keep what is between blocks only and compute the rest again in the
            backward: less memory, about a third more time.
        scale_min, scale_max: range of the random scale jitter relative to the input size.
        freeze_backbone: train BiFPN and heads only; the backbone's BN statistics stay as they are.
        amp: "off", "bf16" or "fp16" autocast.
        device: "auto", "cpu", "cuda", "cuda:1", …
        workers: loader processes; 0 loads in the training process. Does not change the result.
        seed: of weights, sample order and augmentation.
        eval_every: evaluate after every so many epochs (and after the last); 0 never.
        keep: checkpoints of the last so many epochs that stay besides ``last.pth``; 0 none.
        save_every: also write ``last.pth`` after every so many optimizer steps; 0 never.
        log_every: steps between two step lines in the log.
        nan_watch: what to do with a step whose loss or gradient is not finite. "stop": end the run,
            naming the first layer and the images; "skip": leave the step out, say so in the log,
            end the run after 10 in a row; "off": no look at each step.
        tensorboard: also log for TensorBoard, to ``out/tensorboard``; takes the package tensorboard.
        channels_last: keep tensors in NHWC memory, the layout that the kernels work in.
    """

    data: str
    out: str
    model: str = "efficientdet_nano"
    checkpoint: str = ""
    pretrained: str = ""
    train_split: str = "train"
    val_split: str = "val"
    recipe: str = ""
    epochs: int = 300
    batch_size: int = 16
    accumulate: int = 1
    size: int = 0
    eval_size: int = 0
    optimizer: str = "sgd"
    lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 4e-5
    warmup_epochs: float = 1.0
    warmup_start: float = 0.1
    clip_grad: float = 10.0
    ema_decay: float = 0.9998
    bn_momentum: float = 0.0
    bn_eps: float = 0.0
    sync_bn: bool = True
    global_loss: bool = True
    grad_checkpointing: bool = False
    scale_min: float = 0.1
    scale_max: float = 2.0
    freeze_backbone: bool = False
    amp: str = "off"
    device: str = "auto"
    workers: int = 2
    seed: int = 42
    eval_every: int = 1
    keep: int = 0
    save_every: int = 0
    log_every: int = 20
    nan_watch: str = "stop"
    tensorboard: bool = False
    channels_last: bool = True

    def __post_init__(self) -> None:
        self._require("epochs", self.epochs >= 1, "an integer >= 1")
        self._require("batch_size", self.batch_size >= 1, "an integer >= 1")
        self._require(
            "accumulate",
            self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
            f"an integer >= 1 that divides batch_size {self.batch_size}",
        )
        self._require(
            "pretrained", self.pretrained in ("", "coco", "imagenet"), "'', 'coco' or 'imagenet'"
        )
        self._require(
            "pretrained", not (self.pretrained and self.checkpoint), "'' with a checkpoint"
        )
        self._require("size", self.size == 0 or self.size >= 32, "0 or an integer >= 32")
        self._require(
            "eval_size", self.eval_size == 0 or self.eval_size >= 32, "0 or an integer >= 32"
        )
        self._require("optimizer", self.optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'")
        self._require("lr", 0 <= self.lr < float("inf"), "a finite number >= 0")
        self._require("momentum", 0 <= self.momentum < 1, "a number in [0, 1)")
        self._require("weight_decay", self.weight_decay >= 0, "a number >= 0")
        self._require("warmup_epochs", self.warmup_epochs >= 0, "a number >= 0")
        self._require("warmup_start", 0 <= self.warmup_start <= 1, "a number in [0, 1]")
        self._require("clip_grad", self.clip_grad >= 0, "a number >= 0")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "a number in [0, 1)")
        self._require("bn_momentum", 0 <= self.bn_momentum < 1, "a number in [0, 1)")
        self._require("bn_eps", 0 <= self.bn_eps < 1, "a number in [0, 1)")
        self._require("scale_min", self.scale_min > 0, "a number > 0")
        self._require("scale_max", self.scale_max >= self.scale_min, "a number >= scale_min")
        self._require("amp", self.amp in ("off", "bf16", "fp16"), "'off', 'bf16' or 'fp16'")
        self._require("workers", self.workers >= 0, "an integer >= 0")
        self._require("seed", self.seed >= 0, "an integer >= 0")
        self._require("eval_every", self.eval_every >= 0, "an integer >= 0")
        self._require("keep", self.keep >= 0, "an integer >= 0")
        self._require("save_every", self.save_every >= 0, "an integer >= 0")
        self._require("log_every", self.log_every >= 1, "an integer >= 1")
        self._require(
            "nan_watch", self.nan_watch in ("stop", "skip", "off"), "'stop', 'skip' or 'off'"
        )
        if self.lr == 0:
            self.lr = default_learning_rate(self.optimizer, self.batch_size)

    def _require(self, name: str, valid: bool, takes: str) -> None:
        if not valid:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, takes {takes}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def of_recipe(cls, recipe: str, **given: Any) -> TrainConfig:
        """The settings of a recipe (`effdet.engine.recipes.settings`), except those given here."""
        return cls(**recipes.settings(recipe, given))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`; keys of other versions are an error, never ignored."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"training settings: unknown {', '.join(unknown)}")
        return cls(**values)
