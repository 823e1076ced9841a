"""``effdet train``: train on a folder in COCO format, or go on with a stopped run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from .options import add_command, natural_int, positive_int

_TEXT = """\
DATA is a folder in COCO format: instances_train*.json and instances_val*.json in it or in
annotations/, the pictures in train*/ and val*/ or in images/. Category ids may be any.

The recipe is that of the EfficientDet paper: SGD with momentum 0.9, weight decay 4e-5 on
convolution weights only (not on biases, BN and fusion weights), a learning rate that warms up
linearly and then falls along a cosine, averaged weights (EMA), horizontal flips, scale jitter,
focal loss with alpha 0.25 and gamma 1.5, gradients clipped to a norm of 10.

OUT gets last.pth (the complete state), best.pth (of the best AP so far), log.jsonl and
curves.png. Ctrl-C stops after the current step and leaves last.pth; --resume goes on from there
and ends with the weights of a run that was never stopped.

examples:
  effdet train data --out run                          the small model, 300 epochs
  effdet train data --out run --model tf_efficientdet_d0 --batch-size 8 --amp bf16
  effdet train data --out run --epochs 30 --opt adamw --scale-min 0.5 --scale-max 1.5
                                                       small data: milder jitter, fewer epochs
  effdet train data --out run --checkpoint old.pth     start from weights, any classes
  effdet train --resume run/last.pth                   go on with a stopped run
"""
# None of them changes the weights of a CPU run.
_MAY_CHANGE = {"data", "device", "workers", "out", "keep"}


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "train", "train a model on a folder in COCO format", _TEXT)
    # Defaults are those of TrainConfig; what is not given is not in the namespace.
    parser.set_defaults(run=run, resume="", quiet=False, threads=0)

    def option(flag: str, text: str, **settings: Any) -> None:
        parser.add_argument(flag, help=text, default=argparse.SUPPRESS, **settings)

    parser.add_argument(
        "data", nargs="?", metavar="DATA", default=argparse.SUPPRESS, help="folder in COCO format"
    )
    option("--out", "folder for checkpoints, log and plot", metavar="OUT")
    option("--model", "configuration (default: efficientdet_nano); see `effdet models`")
    option("--checkpoint", "weights to start from (default: random)", metavar="FILE")
    parser.add_argument("--resume", metavar="FILE", help="go on from this checkpoint")
    option("--train-split", "default: train", metavar="NAME")
    option("--val-split", "default: val", metavar="NAME")
    option("--epochs", "default: 300", type=positive_int)
    option("--batch-size", "default: 16", type=positive_int)
    option("--size", "side of the square input (default: the model's)", type=positive_int)
    option("--eval-size", "side of the input in evaluation (default: --size)", type=positive_int)
    option("--opt", "sgd (default) or adamw", dest="optimizer", choices=("sgd", "adamw"))
    option("--lr", "peak rate (default: sgd 0.08, adamw 0.002, per 64 images)", type=float)
    option("--momentum", "default: 0.9", type=float)
    option("--weight-decay", "default: 4e-5", type=float)
    option("--warmup-epochs", "default: 1; fractions are allowed", type=float)
    option("--clip-grad", "largest gradient norm, 0 for none (default: 10)", type=float)
    option("--ema-decay", "final decay of the averaged weights (default: 0.9998)", type=float)
    option("--scale-min", "smallest scale jitter (default: 0.1)", type=float)
    option("--scale-max", "largest scale jitter (default: 2)", type=float)
    option("--freeze-backbone", "train BiFPN and heads only", action="store_true")
    option("--amp", "mixed precision (default: off)", choices=("off", "bf16", "fp16"))
    option("--device", "auto (default), cpu, cuda, cuda:1, ...")
    option("--workers", "loader processes (default: 2)", type=natural_int)
    option("--seed", "default: 42", type=natural_int)
    option("--eval-every", "epochs between evaluations, 0 for never (default: 1)", type=natural_int)
    option("--keep", "epochs whose checkpoints stay as epoch-N.pth (default: 0)", type=natural_int)
    option("--log-every", "steps between log lines (default: 20)", type=positive_int)
    option(
        "--channels-last",
        "NHWC memory layout (default: on)",
        action=argparse.BooleanOptionalAction,
    )
    parser.add_argument(
        "--threads", type=natural_int, metavar="N", help="CPU threads of torch (default: torch's)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    import torch

    from effdet.engine.config import TrainConfig
    from effdet.engine.trainer import Trainer

    if args.threads:
        torch.set_num_threads(args.threads)
    given = {k: v for k, v in vars(args).items() if k in TrainConfig.__dataclass_fields__}
    if args.resume:
        content, config = _resumed(args.resume, given)
    else:
        for name in ("data", "out"):
            if name not in given:
                print(f"effdet train: error: {name.upper()} is missing", file=sys.stderr)
                return 2
        content, config = None, TrainConfig(**given)
    last = os.path.join(config.out, "last.pth")
    if content is None and os.path.exists(last):
        raise FileExistsError(
            f"{last} exists: go on with --resume {shlex.quote(last)}, or choose another --out"
        )
    result = Trainer(config, resume=content, quiet=args.quiet).fit()
    if result.exit_code:
        print(f"\nstopped; go on with: effdet train --resume {shlex.quote(str(result.last))}")
    else:
        print(f"done, best AP {result.best_ap:.4f}: {result.best}")
    return result.exit_code


def _resumed(path: str, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The checkpoint and its settings; a given option may not contradict them."""
    from effdet.engine import checkpoint as checkpoints
    from effdet.engine.config import TrainConfig
    from effdet.helpers import CheckpointError

    content = checkpoints.read(path)
    if content.get("format") != checkpoints.FORMAT:
        raise CheckpointError(
            f"{path}: not written by `effdet train`, so no run can go on from it;"
            " start a new one from its weights with --checkpoint"
        )
    settings = {**content["config"], "out": os.path.dirname(path) or "."}
    for name, value in given.items():
        if name not in _MAY_CHANGE and settings[name] != value:
            raise ValueError(
                f"{name}: got {value!r}, but the run to resume has {settings[name]!r};"
                " leave it out, or start a new run with --checkpoint"
            )
    return content, TrainConfig.from_dict({**settings, **given})
