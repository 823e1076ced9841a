"""What a result was measured on (stored in every row), and the ceilings measured in the same run."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import effdet_kernels
from bench.runner import Effort, Local, alternate
from effdet.version import __version__

_LARGE = 1 << 28  # bytes: beyond the caches of a CPU
_HUGE = 1 << 31  # long enough on a GPU for its start not to count
_LONGEST_S = 0.2  # of a matrix product on a CPU
_QUICK = Effort(rounds=5, seconds=0.05, settle_s=0.0)


def describe() -> dict[str, str | int | float]:
    """Processor, accelerator, thread count, load, commit and versions."""
    machine: dict[str, str | int | float] = {
        "cpu": _cpu_name(),
        "cpu_model": _cpu_model(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0,
        "commit": _commit(),
        "effdet_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with contextlib.suppress(metadata.PackageNotFoundError):
        machine["triton"] = metadata.version("triton")
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
        machine["cuda"] = torch.version.cuda or ""
    return machine


def gpu_clocks() -> dict[str, str]:
    """SM and memory clock, temperature and power of torch's GPU as nvidia-smi reads them now."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    which = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", "-i", which, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields.split(","), done.stdout.splitlines()[0].split(", "), strict=False))


def slug(device: str) -> str:
    """A folder's name for the results of this machine: processor and cores, or the GPU's name.

    With the processor's model: virtual machines of several generations may say no more than "AMD EPYC".
    """
    if device == "cuda":
        return _plain(torch.cuda.get_device_name())
    return _plain(f"{_cpu_name()} {_cpu_model()} {os.cpu_count()}core")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unknown"


@functools.cache
def bandwidth(device: str, nbytes: int) -> float:
    """Bytes read plus written per second by a copy that moves about ``nbytes``.

    On a CPU the copy is as large as what is compared with it, so that data that fit in a cache are compared with the
    speed of that cache; on a GPU it is always large, and the L2 cache is flushed before each call.
    """
    size = _HUGE if device == "cuda" else min(_LARGE, 1 << max(12, nbytes.bit_length() - 1))
    source = torch.rand(size // 8, device=device)
    target = torch.empty_like(source)
    timing = alternate({"copy": Local(lambda: target.copy_(source), device)}, _QUICK)
    return 2 * source.nbytes / timing["copy"].min_s


@functools.cache
def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product of random numbers; of a smaller one where a CPU is slow in the dtype."""
    if device == "cuda":
        return _product_rate(device, dtype, 8192)
    rate = _product_rate(device, dtype, 192)
    size = max(s for s in (192, 384, 768, 1536) if s == 192 or 2 * s**3 < rate * _LONGEST_S)
    rate = max(rate, _product_rate(device, dtype, size))
    # Half precision can be widened and computed in float32.
    return max(rate, matrix_rate(device, torch.float32)) if dtype.itemsize == 2 else rate


def _product_rate(device: str, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = alternate({"mm": Local(lambda: a @ b, device)}, _QUICK)
    return 2 * size**3 / timing["mm"].min_s


def floor(device: str, dtype: torch.dtype, nbytes: int, flops: int) -> dict[str, float]:
    """The roofline of one call: the longer of moving ``nbytes`` and of ``flops`` at the measured ceilings."""
    rate, peak = bandwidth(device, 1 << max(nbytes, 1).bit_length()), matrix_rate(device, dtype)
    return {"floor_s": max(nbytes / rate, flops / peak), "bandwidth": rate, "matrix_rate": peak}


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor()


def _cpu_model() -> str:
    return f"family {_cpuinfo('cpu family')} model {_cpuinfo('model')}"


def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == field), "")


def _commit() -> str:
    """Of the kernels that run: an installed package need not be that of this checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(effdet_kernels.__file__).resolve().parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
