"""``effdet export``: a weights file to ship, or detection as ONNX or as a program of ``torch.export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import (
    add_command,
    add_model_options,
    add_optional_positional,
    add_suppression_options,
    positive_int,
    suppression_of,
)

if TYPE_CHECKING:
    from effdet.export import ExportOptions

_WEIGHTS, _GRAPHS = (".pth", ".safetensors"), (".onnx", ".pt2")
_SUPPRESSION = {"soft_nms", "max_det", "max_per_class", "iou", "sigma", "class_agnostic"}
_TEXT = """\
What is written follows from the suffix of --out.

.pth, .safetensors: the averaged weights of a checkpoint of `effdet train` in half precision, with
the model's name, input size and class names. The first 8 digits of the file's SHA-256 become part
of its name, but for .safetensors, which the Hugging Face Hub takes as it is. With --model,
CHECKPOINT holds the variables of google/automl's EfficientDet by name: an .npz file, or where
tensorflow is installed a checkpoint's prefix. They are written in float32.

.onnx, .pt2: detection with its suppression, for programs that do not have this package. The file
is run on pictures and compared with the model before it appears. Pictures are RGB in [0, 255],
letterboxed to the size of the model; see docs/export.md.

examples:
  effdet export run/best.pth --out weights/mine.pth    writes weights/mine-1a2b3c4d.pth
  effdet export run/best.pth --out model.safetensors   for the Hub: --checkpoint hf://owner/name
  effdet export d0.npz --model tf_efficientdet_d0 --out d0.safetensors
  effdet export --out small.onnx                       the bundled model
  effdet export run/best.pth --out mine.onnx --any-size --soft-nms --check photos/
  effdet export --model tf_efficientdet_d0 --out d0.pt2 --batch 1
"""


def add_parser(commands: Any) -> None:
    """The command and its options, added to the subparsers of ``effdet``."""
    parser = add_command(commands, "export", "write a file to ship: weights, ONNX, .pt2", _TEXT)
    add_optional_positional(
        parser, "weights", metavar="CHECKPOINT", help="the same as --checkpoint"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help=" ".join((*_WEIGHTS, *_GRAPHS))
    )
    add_model_options(parser, device=False)
    group = parser.add_argument_group("what an .onnx or .pt2 file takes and returns")
    group.add_argument(
        "--outputs",
        choices=("detections", "raw"),
        default="detections",
        help="detections (default), or the boxes and scores of all anchors, for an NMS of your own",
    )
    group.add_argument("--batch", type=positive_int, metavar="N", help="pictures (default: any)")
    group.add_argument("--any-size", action="store_true", help="any height and width that fit")
    group.add_argument(
        "--no-normalise", action="store_true", help="pictures come with mean and deviation applied"
    )
    group.add_argument(
        "--img-info", action="store_true", help="inputs img_scale and img_size: boxes of the file"
    )
    group.add_argument("--opset", type=int, metavar="N", help=".onnx only, 18 (default) to 23")
    group.add_argument(
        "--check", nargs="+", metavar="IMAGES", help="pictures to check on (default: drawn ones)"
    )
    group.add_argument("--no-check", action="store_true", help="do not run the file")
    add_suppression_options(parser)
    parser.set_defaults(run=run, default_of=parser.get_default)


def run(args: argparse.Namespace) -> int:
    """Write the file and print what it is; the exit status."""
    suffix = Path(args.out).suffix.lower()
    if suffix not in (*_WEIGHTS, *_GRAPHS):
        raise ValueError(f"--out: got {args.out}, takes {', '.join((*_WEIGHTS, *_GRAPHS))}")
    if args.weights and args.checkpoint:
        raise ValueError(f"--checkpoint: got {args.checkpoint} besides {args.weights}, takes one")
    checkpoint = args.weights or args.checkpoint
    if suffix in _GRAPHS:
        _write_graph(args, checkpoint, suffix)
    else:
        _write_weights(args, checkpoint)
    return 0


def _write_weights(args: argparse.Namespace, checkpoint: str) -> None:
    from effdet.engine.checkpoint import export_half
    from effdet.engine.tf_export import export_tf

    _refuse_others(args, {"weights", "checkpoint", "model", "out"}, ".onnx and .pt2")
    if not checkpoint:
        raise ValueError("CHECKPOINT: is missing; .pth and .safetensors hold the weights of one")
    if args.model:
        path = export_tf(checkpoint, args.model, args.out)
    else:
        path = export_half(checkpoint, args.out)
    print(f"{path} ({path.stat().st_size:,} bytes)")


def _write_graph(args: argparse.Namespace, checkpoint: str, suffix: str) -> None:
    from effdet.bench import DetBenchPredict
    from effdet.engine.weights import load_model
    from effdet.export import export_onnx, export_pt2

    options = _options(args)
    if suffix != ".onnx" and args.opset is not None:
        raise ValueError(f"--opset: goes with .onnx, got --out {args.out}")
    if args.check and args.no_check:
        raise ValueError("--check: got pictures with --no-check, takes one of the two")
    loaded = load_model(args.model, checkpoint, args.size)
    bench = DetBenchPredict(loaded.model)
    bench.set_suppression(**suppression_of(args))
    common: dict[str, Any] = {
        "check": not args.no_check,
        "images": _pictures(args.check),
        "class_names": loaded.class_names,
    }
    print(f"{loaded.name}, weights {loaded.source}")
    if suffix == ".pt2":
        print(export_pt2(bench, args.out, options, **common))
    else:
        given = {} if args.opset is None else {"opset": args.opset}
        print(export_onnx(bench, args.out, options, **common, **given))


def _options(args: argparse.Namespace) -> ExportOptions:
    from effdet.export import ExportOptions

    if args.outputs == "raw":
        _refuse_others(args, set(vars(args)) - _SUPPRESSION, "--outputs detections")
    return ExportOptions(
        outputs=args.outputs,
        batch=args.batch,
        any_size=args.any_size,
        normalise=not args.no_normalise,
        img_info=args.img_info,
    )


def _pictures(arguments: list[str] | None) -> list[Path] | None:
    """The files, and those in the folders, that --check names."""
    from effdet.pictures import find_pictures

    if arguments is None:
        return None
    found = [find_pictures(p) if p.is_dir() else [p] for p in map(Path, arguments)]
    return [path for paths in found for path in paths]


def _refuse_others(args: argparse.Namespace, kept: set[str], where: str) -> None:
    """Raises ValueError of an option that was given and is not among `kept`; it goes with `where`."""
    for name, value in vars(args).items():
        if name not in {"command", "traceback", *kept} and value != args.default_of(name):
            raise ValueError(f"--{name.replace('_', '-')}: goes with {where}, not with this")
