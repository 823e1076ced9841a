"""``effdet train``: train on a folder in COCO format, or go on with a stopped run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from effdet.engine.recipes import RECIPES

from .options import add_command, natural_int, positive_int

_TEXT = """\
DATA is a folder in COCO format: instances_train*.json and instances_val*.json in it or in
annotations/, the pictures in train*/ and val*/ or in images/. Category ids may be any.

The defaults are those of the authors' code: SGD with momentum 0.9, weight decay 4e-5 on
convolution weights only (not on biases, BN and fusion weights), a learning rate that warms up
linearly and then falls along a cosine, averaged weights (EMA), horizontal flips, scale jitter,
focal loss with alpha 0.25 and gamma 1.5, gradients clipped to a norm of 10. --recipe takes
another set: paper (the paper's first version: batch 128, warm-up from 0 over 5 % of the run, BN
momentum 0.003 and epsilon 1e-4), peer (how PyPI's effdet trains tf_efficientdet_d0) or finetune
(from COCO weights to another data set). Other options then change single settings of it.

OUT gets last.pth (the complete state), best.pth (of the best AP so far), log.jsonl, curves.png
and summary.md. Ctrl-C stops after the current step and leaves last.pth; --resume goes on from
there and ends with the weights of a run that was never stopped.

Under torchrun each process takes its share of every batch, on a GPU of its own or on the CPU.

examples:
  effdet train data --out run                          the small model, 300 epochs
  effdet train data --out run --model tf_efficientdet_d0 --batch-size 8 --amp bf16
  effdet train data --out run --epochs 30 --opt adamw --scale-min 0.5 --scale-max 1.5
                                                       small data: milder jitter, fewer epochs
  effdet train data --out run --model tf_efficientdet_d0 --pretrained coco --recipe finetune
  effdet train data --out run --checkpoint old.pth     start from weights, any classes
  effdet train data --out run --checkpoint old.pth --recipe finetune --batch-size 16
                                                       the recipe's rate follows the batch
  effdet train data --out run --batch-size 128 --accumulate 8 --grad-checkpointing
                                                       a large batch in little memory
  effdet train --resume run/last.pth                   go on with a stopped run
  torchrun --nproc-per-node 8 --max-restarts 3 -m effdet train data --out run --restart
                                                       eight GPUs; goes on from the last
                                                       checkpoint when a process dies
"""
# None of them changes the weights of a CPU run.
_MAY_CHANGE = {"data", "device", "workers", "out", "keep", "save_every", "log_every", "tensorboard"}


def add_parser(commands: Any) -> None:
    """The command and its options, added to the subparsers of ``effdet``."""
    parser = add_command(commands, "train", "train a model on a folder in COCO format", _TEXT)
    # Defaults are those of TrainConfig; what is not given is not in the namespace.
    parser.set_defaults(run=run, resume="", restart=False, quiet=False, threads=0)

    def option(flag: str, text: str, **settings: Any) -> None:
        parser.add_argument(flag, help=text, default=argparse.SUPPRESS, **settings)

    parser.add_argument(
        "data", nargs="?", metavar="DATA", default=argparse.SUPPRESS, help="folder in COCO format"
    )
    option("--out", "folder for checkpoints, log and plot", metavar="OUT")
    option("--model", "configuration (default: efficientdet_nano); see `effdet models`")
    option("--checkpoint", "weights to start from (default: random)", metavar="FILE")
    option(
        "--pretrained",
        "published weights to start from: of the whole model, or of its backbone (takes timm)",
        choices=("coco", "imagenet"),
    )
    parser.add_argument("--resume", metavar="FILE", help="go on from this checkpoint")
    parser.add_argument(
        "--restart", action="store_true", help="go on from OUT/last.pth where there is one"
    )
    option("--train-split", "default: train", metavar="NAME")
    option("--val-split", "default: val", metavar="NAME")
    option("--recipe", "paper, peer or finetune (see above)", choices=tuple(RECIPES))
    option("--epochs", "default: 300", type=positive_int)
    option(
        "--batch-size",
        "images of a step, over all processes and parts (default: 16)",
        type=positive_int,
    )
    option("--accumulate", "take a batch in so many parts (default: 1)", type=positive_int)
    option(
        "--grad-checkpointing",
        "compute activations again in the backward to save memory",
        action="store_true",
    )
    option("--size", "side of the square input (default: the model's)", type=positive_int)
    option("--eval-size", "side of the input in evaluation (default: --size)", type=positive_int)
    option("--opt", "sgd (default) or adamw", dest="optimizer", choices=("sgd", "adamw"))
    option("--lr", "peak rate (default: sgd 0.08, adamw 0.002, per 64 images)", type=float)
    option("--momentum", "default: 0.9", type=float)
    option("--weight-decay", "default: 4e-5", type=float)
    option("--warmup-epochs", "default: 1; fractions are allowed", type=float)
    option("--warmup-start", "its first rate / the peak (default: 0.1)", type=float)
    option("--clip-grad", "largest gradient norm, 0 for none (default: 10)", type=float)
    option("--ema-decay", "final decay of the averaged weights (default: 0.9998)", type=float)
    option("--bn-momentum", "of all BN, 1 - decay (default: the model's)", type=float)
    option("--bn-eps", "of all BN (default: the model's)", type=float)
    option(
        "--sync-bn",
        "BN statistics over all processes (default: on)",
        action=argparse.BooleanOptionalAction,
    )
    option(
        "--global-loss",
        "divide the loss by the positive anchors of all processes (default: on)",
        action=argparse.BooleanOptionalAction,
    )
    option("--scale-min", "smallest scale jitter (default: 0.1)", type=float)
    option("--scale-max", "largest scale jitter (default: 2)", type=float)
    option("--freeze-backbone", "train BiFPN and heads only", action="store_true")
    option("--amp", "mixed precision (default: off)", choices=("off", "bf16", "fp16"))
    option("--device", "auto (default), cpu, cuda, cuda:1, ...")
    option("--workers", "loader processes (default: 2)", type=natural_int)
    option("--seed", "default: 42", type=natural_int)
    option("--eval-every", "epochs between evaluations, 0 for never (default: 1)", type=natural_int)
    option("--keep", "epochs whose checkpoints stay as epoch-N.pth (default: 0)", type=natural_int)
    option(
        "--save-every", "steps between last.pth, 0 for epochs only (default: 0)", type=natural_int
    )
    option(
        "--nan-watch",
        "a step that is not finite ends the run (default), is left out, or is not looked for",
        choices=("stop", "skip", "off"),
    )
    option("--log-every", "steps between log lines (default: 20)", type=positive_int)
    option("--tensorboard", "also log for TensorBoard, to OUT/tensorboard", action="store_true")
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
    """Train, or go on with a run; the exit status."""
    import torch

    from effdet.engine.config import TrainConfig
    from effdet.engine.processes import joined
    from effdet.engine.trainer import Trainer

    if args.threads:
        torch.set_num_threads(args.threads)
    given = {k: v for k, v in vars(args).items() if k in TrainConfig.__dataclass_fields__}
    resume = args.resume
    if args.restart and not resume and "out" in given and os.path.exists(_last(given["out"])):
        resume = _last(given["out"])
    if resume:
        content, config = _resumed(resume, given)
    else:
        for name in ("data", "out"):
            if name not in given:
                print(f"effdet train: error: {name.upper()} is missing", file=sys.stderr)
                return 2
        content = None
        config = TrainConfig.of_recipe(**given) if "recipe" in given else TrainConfig(**given)
        if os.path.exists(_last(config.out)):
            last = _last(config.out)
            raise FileExistsError(
                f"{last} exists: go on with --resume {shlex.quote(last)}, or choose another --out"
            )
    with joined(config.device) as processes:
        result = Trainer(config, processes, resume=content, quiet=args.quiet).fit()
    if processes.rank > 0:
        return result.exit_code
    if result.exit_code:
        print(f"\nstopped; go on with: effdet train --resume {shlex.quote(str(result.last))}")
    else:
        print(f"done, best AP {result.best_ap:.4f}: {result.best}")
    return result.exit_code


def _last(out: str) -> str:
    return os.path.join(out, "last.pth")


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
        if name not in _MAY_CHANGE and settings.get(name, value) != value:
            raise ValueError(
                f"{name}: got {value!r}, but the run to resume has {settings[name]!r};"
                " leave it out, or start a new run with --checkpoint"
            )
    return content, TrainConfig.from_dict({**settings, **given})
