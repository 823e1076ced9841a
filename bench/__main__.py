"""Entry point of the benchmarks."""

from __future__ import annotations

import argparse

from bench import kernels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kernel_parser = commands.add_parser("kernels", help="time each op on each backend")
    kernels.add_arguments(kernel_parser)
    kernel_parser.set_defaults(run=kernels.run)
    args = parser.parse_args()
    try:
        args.run(args)
    except (ValueError, kernels.WrongKernelError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
