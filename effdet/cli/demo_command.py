"""``effdet demo``: the whole way from nothing to boxes and figures, offline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from effdet.scenes import generate_scenes

from . import detect_command
from .eval_command import measure
from .options import add_command

REQUIRED_AP50 = 0.90
_SCENES = 100
_SEED = 2024  # the bundled model was trained on other seeds
_TEXT = """\
Draws 100 scenes that the bundled model has never seen, detects on the first, measures COCO AP on
all of them, and fails when AP50 is below 0.90.

example:
  effdet demo --out demo
"""


def add_parser(commands: Any) -> None:
    """The command and its options, added to the subparsers of ``effdet``."""
    parser = add_command(commands, "demo", "try it: draw scenes, detect, measure", _TEXT)
    parser.add_argument("--out", default="demo", metavar="DIR", help="default: demo")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw scenes, detect on one, measure on all; the exit status."""
    from effdet.engine.weights import load_model

    out = Path(args.out)
    with tqdm(total=_SCENES, desc="drawing scenes", leave=False, disable=None) as bar:
        generate_scenes(
            out / "scenes", _SCENES, _SEED, split="val", progress=lambda done: bar.update(1)
        )
    scene = out / "scenes" / "images" / "val_000000.png"
    options = argparse.ArgumentParser()
    detect_command.add_parser(options.add_subparsers())
    code = detect_command.run(
        options.parse_args(["detect", str(scene), "--out", str(out / "detections")])
    )
    if code:
        return code
    stats = measure(load_model(), str(out / "scenes"), "val", workers=0)
    passed = stats["AP50"] >= REQUIRED_AP50
    print(
        f"AP50 {stats['AP50']:.4f} on {_SCENES} held-out scenes,"
        f" {'at least' if passed else 'BELOW'} {REQUIRED_AP50:.2f}"
    )
    print(f"annotated picture: {out / 'detections' / scene.name}")
    return 0 if passed else 1
