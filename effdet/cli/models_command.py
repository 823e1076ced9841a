"""``effdet models``: what can be built."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from typing import Any

from .options import add_command

_TEXT = """\
Lists every configuration: input size (height x width), parameters, anchors at that size, and
whether weights are published. Counting parameters builds each model without memory.

examples:
  effdet models
  effdet models 'tf_*' '*lite*'
"""


def add_parser(commands: Any) -> None:
    """The command and its options, added to the subparsers of ``effdet``."""
    parser = add_command(commands, "models", "list the models and their sizes", _TEXT)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="only names that match")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table of the models that match; the exit status."""
    from effdet.config.model_config import efficientdet_model_param_dict, get_efficientdet_config

    names = [
        name
        for name in sorted(efficientdet_model_param_dict)
        if not args.patterns or any(fnmatch(name, pattern) for pattern in args.patterns)
    ]
    if not names:
        raise ValueError(f"no model matches {' '.join(args.patterns)}; `effdet models` lists all")
    print(f"{'name':<24} {'size':>10} {'parameters':>12} {'anchors':>8}  weights")
    for name in names:
        config = get_efficientdet_config(name)
        size = "x".join(str(side) for side in config.image_size)
        weights = config.get("url", "").rpartition("/")[2]
        if name == "efficientdet_nano":
            weights = "bundled (scenes)"
        print(
            f"{name:<24} {size:>10} {_parameters(name):>12} {_anchors(config):>8,}"
            f"  {weights or 'none'}"
        )
    return 0


def _parameters(name: str) -> str:
    import torch

    from effdet.factory import create_model

    try:
        with torch.device("meta"):
            model = create_model(name, pretrained_backbone=False)
    except ImportError:
        return "needs timm"
    return f"{sum(p.numel() for p in model.parameters()):,}"


def _anchors(config: Any) -> int:
    from effdet.anchors import get_feat_sizes

    sizes = get_feat_sizes(tuple(config.image_size), config.max_level)[config.min_level :]
    cells = sum(_area(size) for size in sizes)
    return cells * config.num_scales * len(config.aspect_ratios)


def _area(size: Any) -> int:
    height, width = (size["height"], size["width"]) if isinstance(size, dict) else size
    return int(height) * int(width)
