"""``effdet scenes``: draw a data set."""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from effdet.scenes import CLASS_NAMES, generate_scenes

from .options import add_command, natural_int, positive_int

_TEXT = f"""\
Draws pictures of {", ".join(CLASS_NAMES)} shapes on textured backgrounds and writes
them with their boxes in COCO format: OUT/images/ and OUT/instances_SPLIT.json. The same seed,
split and size give the same pixels and boxes, whatever the count.

examples:
  effdet scenes data --count 1200 --seed 1
  effdet scenes data --count 100 --seed 2 --split val
  effdet train data --out run
"""


def add_parser(commands: Any) -> None:
    """The command and its options, added to the subparsers of ``effdet``."""
    parser = add_command(commands, "scenes", "draw a labelled data set from a seed", _TEXT)
    parser.add_argument("out", metavar="OUT", help="folder to write to; may hold other splits")
    parser.add_argument("--count", type=positive_int, default=100, help="pictures (default: 100)")
    parser.add_argument("--seed", type=natural_int, default=0, help="default: 0")
    parser.add_argument("--split", default="train", help="name of the split (default: train)")
    parser.add_argument("--size", type=positive_int, default=256, help="side (default: 256)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw a split and print its annotation file; the exit status."""
    with tqdm(total=args.count, desc="drawing", unit="scene", leave=False, disable=None) as bar:
        path = generate_scenes(
            args.out,
            args.count,
            args.seed,
            args.size,
            args.split,
            progress=lambda done: bar.update(done - bar.n),
        )
    print(f"{args.count} scenes: {path}")
    return 0
