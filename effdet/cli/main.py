"""Entry point: parse, run the subcommand, turn what a user can cause into one clear line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from effdet.version import __version__

_COMMANDS = ("detect", "eval", "train", "scenes", "export", "demo", "models", "info")
_DESCRIPTION = """\
EfficientDet object detection: train it, measure it, run it.

first steps, all offline:
  effdet demo --out demo              detect on a drawn scene and measure the bundled model
  effdet detect photo.jpg --out boxes draw boxes with the bundled model
  effdet train DATA --out run         train on a folder in COCO format
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: all went well. 1: something failed, or some of the files did. 2: wrong usage.
    130 and 143: stopped by Ctrl-C or SIGTERM.
    """
    parser = argparse.ArgumentParser(
        prog="effdet",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the code an error came from"
    )
    parser.add_argument("--version", action="version", version=f"effdet {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        module = importlib.import_module(f"effdet.cli.{name}_command")
        module.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("effdet: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output went away; keep the interpreter from flushing into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, RuntimeError, OSError, KeyError, ImportError) as error:
        if args.traceback or not _is_explained(error):
            raise
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"effdet {args.command}: error: {message}", file=sys.stderr)
        return 1


def _is_explained(error: Exception) -> bool:
    """Whether the error speaks to the user; one raised by the interpreter or torch shows its trace.

    Errors of the system (a missing file, a full disk) and those that this package raises do. A
    `KeyError` or `RuntimeError` from anywhere else is a bug, and a bug must be seen.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, ImportError) and error.name is not None:
        return False  # an import statement failed; our own messages name no module
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    raised_here = module.split(".")[0] in ("effdet", "effdet_kernels")
    return raised_here and bool(error.args) and " " in str(error.args[0])
