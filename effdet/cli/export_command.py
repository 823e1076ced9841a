"""``effdet export``: a weights file from a training checkpoint, or from one of TensorFlow."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_command

_TEXT = """\
Writes the averaged weights of a checkpoint of `effdet train` in half precision, with the model's
name, input size and class names. The first 8 digits of the file's SHA-256 become part of its name,
but for .safetensors, which the Hugging Face Hub takes as it is.
With --model, CHECKPOINT holds the variables of google/automl's EfficientDet by name: an .npz file,
or where tensorflow is installed a checkpoint's prefix. They are written in float32.

examples:
  effdet export run/best.pth --out weights/mine.pth    writes weights/mine-1a2b3c4d.pth
  effdet detect photos/ --checkpoint weights/mine-1a2b3c4d.pth
  effdet export run/best.pth --out model.safetensors   once it is uploaded to the Hub:
  effdet detect photos/ --checkpoint hf://owner/name
  effdet export d0.npz --model tf_efficientdet_d0 --out d0.safetensors
"""


def add_parser(commands: Any) -> None:
    """The command and its options, added to the subparsers of ``effdet``."""
    parser = add_command(commands, "export", "write a weights file to ship", _TEXT)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="last.pth or best.pth of a run")
    parser.add_argument("--model", metavar="NAME", help="tf_efficientdet_* of TensorFlow's weights")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help=".pth (a hash is added) or .safetensors"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the file and print its path; the exit status."""
    from effdet.engine.checkpoint import export_half
    from effdet.engine.tf_export import export_tf

    if args.model:
        path = export_tf(args.checkpoint, args.model, args.out)
    else:
        path = export_half(args.checkpoint, args.out)
    print(f"{path} ({path.stat().st_size:,} bytes)")
    return 0
