"""Choosing the device to run on."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """``auto`` is the current CUDA device where there is one, else the CPU; else as torch names it.

    Raises:
        ValueError: no such device, or CUDA asked for where torch finds none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, takes auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: got {name!r}, but torch finds {torch.cuda.device_count()} CUDA devices"
        )
    return device
