"""What a result was measured on: one dictionary, stored in every row."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from effdet.version import __version__


def describe() -> dict[str, str | int]:
    """Processor, accelerator, thread count, commit and versions."""
    machine: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "effdet_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda or ""
    try:
        import triton

        machine["triton"] = triton.__version__
    except ImportError:
        pass
    return machine


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
