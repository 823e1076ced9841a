"""Options that several subcommands share, and their types."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any


def size_type(text: str) -> tuple[int, int]:
    """``512`` or ``512x640`` (height x width) to (height, width)."""
    sides = text.lower().split("x")
    try:
        height, width = (int(s) for s in (sides if len(sides) == 2 else sides * 2))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; takes 512 or 384x640") from None
    if height < 32 or width < 32:
        raise argparse.ArgumentTypeError(f"{text!r} is too small; takes sides of 32 pixels or more")
    return height, width


def _number(text: str, kind: type, fits: Callable[[Any], bool], takes: str) -> Any:
    value = None
    with contextlib.suppress(ValueError):
        value = kind(text)
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} takes {takes}")
    return value


def share_type(text: str) -> float:
    """A number in [0, 1]."""
    return _number(text, float, lambda x: 0.0 <= x <= 1.0, "a number from 0 to 1")


def positive_float(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda x: x > 0.0, "a number above 0")


def positive_int(text: str) -> int:
    """An integer >= 1."""
    return _number(text, int, lambda x: x >= 1, "an integer >= 1")


def natural_int(text: str) -> int:
    """An integer >= 0."""
    return _number(text, int, lambda x: x >= 0, "an integer >= 0")


def add_command(commands: Any, name: str, summary: str, text: str) -> argparse.ArgumentParser:
    """A subparser whose ``--help`` shows ``text`` as it is written."""
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary}\n\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_optional_positional(
    parser: argparse.ArgumentParser, name: str, **described: str
) -> argparse.Action:
    """A positional argument that may be missing, before or behind options.

    Before Python 3.12.7 argparse takes none behind them for `nargs="?"`, and calls it unrecognized.
    """
    parse = parser.parse_known_args

    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        known, rest = parse(*args, **kwargs)
        if getattr(known, name) is None and len(rest) == 1 and not rest[0].startswith("-"):
            setattr(known, name, rest.pop())
        return known, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]
    return parser.add_argument(name, nargs="?", **described)  # type: ignore[arg-type]


def add_model_options(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """--model, --checkpoint, --size and --device: see `effdet.engine.weights.load_model`."""
    group = parser.add_argument_group("model (default: the small one that comes with the package)")
    group.add_argument("--model", default="", metavar="NAME", help="see `effdet models`")
    group.add_argument(
        "--checkpoint",
        default="",
        metavar="FILE",
        help="weights, also hf://owner/name; `effdet train` writes in them which model they are for",
    )
    group.add_argument(
        "--size",
        type=size_type,
        metavar="N|HxW",
        help="input size in pixels (default: the one trained at); pictures are letterboxed to it",
    )
    if device:
        group.add_argument(
            "--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ..."
        )


def add_suppression_options(parser: argparse.ArgumentParser) -> None:
    """Which candidates become detections: see `effdet.postprocess.Suppression`."""
    group = parser.add_argument_group("suppression of overlapping boxes")
    group.add_argument(
        "--soft-nms", action="store_true", help="gaussian soft-NMS instead of hard NMS"
    )
    group.add_argument(
        "--max-det",
        type=positive_int,
        default=100,
        metavar="N",
        help="most objects per picture (default: 100)",
    )
    group.add_argument(
        "--max-per-class",
        type=positive_int,
        metavar="N",
        help="most objects of a class per picture (default: no limit)",
    )
    group.add_argument(
        "--iou",
        type=share_type,
        metavar="X",
        help="hard NMS removes boxes that overlap a better one by more (default: 0.5)",
    )
    group.add_argument(
        "--sigma",
        type=positive_float,
        metavar="X",
        help="soft-NMS multiplies their scores by exp(-IoU^2 / X) (default: 0.5)",
    )
    group.add_argument(
        "--class-agnostic", action="store_true", help="boxes suppress those of other classes too"
    )


def suppression_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_suppression_options` read, by the names that `DetBenchPredict` has for it."""
    return {
        "soft_nms": args.soft_nms,
        "max_det": args.max_det,
        "max_per_class": args.max_per_class,
        "iou_threshold": args.iou,
        "sigma": args.sigma,
        "class_agnostic": args.class_agnostic,
    }
