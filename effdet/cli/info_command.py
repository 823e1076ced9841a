"""``effdet info``: what is installed and which kernels can run here."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

from .options import add_command

_PACKAGES = (
    "triton", "numpy", "pillow", "omegaconf", "pycocotools", "tqdm", "timm", "matplotlib"
)  # fmt: skip
_TEXT = """\
Prints versions, devices and threads, and for each backend of the kernels whether it can be used
here; where it cannot, why and what to do. Put this into a bug report.

example:
  effdet info
"""


def add_parser(commands: Any) -> None:
    """The command and its options, added to the subparsers of ``effdet``."""
    parser = add_command(commands, "info", "show versions, devices and kernel backends", _TEXT)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print versions, devices and backends; the exit status."""
    import torch

    from effdet.version import __version__
    from effdet_kernels import _dispatch, _library, _native

    print(f"effdet       {__version__}")
    print(f"python       {platform.python_version()}, {platform.platform()}")
    print(f"torch        {torch.__version__}")  # with its build: cpu, cu130, …
    for name in _PACKAGES:
        print(f"{name:<12} {_version(name)}")
    print(f"cpu          {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if _native.REASON is None and not _native.module().BUILT_WITH_OPENMP:
        print("             the C++ kernels use one: they were built without OpenMP")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(
            f"cuda:{index}       {device.name}, compute capability {device.major}.{device.minor},"
            f" {device.total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.device_count():
        print("cuda         no device is visible to torch")
    print("\nbackends of the kernels")
    for backend in _dispatch.BACKENDS:
        reason = _dispatch.unavailable_reason(backend)
        print(f"  {backend:<10} {f'missing: {reason}' if reason else 'available'}")
    print("\nops and the backends that implement them")
    for name, op in sorted(_library.OPS.items()):
        gradient = f"; gradient: {', '.join(op.backwards)}" if op.backwards else ""
        print(f"  {name:<18} {', '.join(op.impls)}{gradient}")
    forced = os.environ.get(_dispatch.ENVIRONMENT_VARIABLE)
    if forced:
        print(f"\n{_dispatch.ENVIRONMENT_VARIABLE}={forced}: no other backend is used")
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
