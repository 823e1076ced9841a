"""Argument checks that the ops share: maps, BN vectors, padding, lists, matching dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _checks
from effdet_kernels.ops._activations import ACTIVATIONS, accumulation_dtype


def feature_map(op: str, name: str, value: Any, like: Tensor | None = None) -> None:
    """Checks a map [B, C, H, W] of at least one pixel, with dtype and device of ``like``."""
    device = None if like is None else like.device
    _checks.tensor(op, name, value, ("B", "C", "H", "W"), device=device)
    if min(value.shape[1:]) < 1:
        raise ValueError(
            f"{op}: {name}: got {_checks.describe(value)},"
            " takes at least one channel, row and column"
        )
    if like is not None:
        same_dtype(op, name, value, like)


def dense(op: str, name: str, value: Any, shape: Sequence[int | str], like: Tensor) -> None:
    """Checks a tensor of ``shape`` with the dtype and device of the map ``like``."""
    _checks.tensor(op, name, value, shape, device=like.device)
    same_dtype(op, name, value, like)


def depthwise_weight(op: str, name: str, value: Any, like: Tensor, channels: int) -> None:
    """Checks a depthwise weight [channels, 1, k, k]."""
    dense(op, name, value, (channels, 1, "k", "k"), like)
    if value.shape[2] != value.shape[3]:
        raise ValueError(f"{op}: {name}: got {_checks.describe(value)}, takes a square kernel")


def same_dtype(op: str, name: str, value: Tensor, like: Tensor) -> None:
    """Checks that ``value`` has the dtype of ``like``; under autocast the op casts both."""
    if value.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        want = str(like.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name}: got {_checks.describe(value)}, takes {want} as x has")


def channel_vector(op: str, name: str, value: Any, channels: int, like: Tensor) -> None:
    """Checks a per-channel vector [channels] in the accumulation dtype of the map ``like``."""
    dtype = accumulation_dtype(like.dtype)
    _checks.tensor(op, name, value, (channels,), dtypes=(dtype,), device=like.device)


def activation(op: str, name: str, value: Any) -> None:
    """Checks the name of an activation."""
    _checks.choice(op, name, value, tuple(ACTIVATIONS))


def statistics(op: str, value: Any, x: Tensor) -> None:
    """Checks whether statistics are asked for, which an empty batch has not."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: statistics: got {_checks.describe(value)}, takes a bool")
    if value and x.shape[0] < 1:
        got = _checks.describe(x)
        raise ValueError(f"{op}: x: got {got}, takes a batch of at least 1 with statistics")


def integer(op: str, name: str, value: Any, *, least: int) -> None:
    """Checks that ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name}: got {_checks.describe(value)}, takes an int")
    _checks.number(op, name, value, least=least)


def four_paddings(op: str, name: str, value: Any) -> list[int]:
    """Checks (left, right, top, bottom), none negative, and returns it as a list."""
    if not isinstance(value, (tuple, list)) or len(value) != 4:
        raise ValueError(f"{op}: {name}: got {value!r}, takes 4 ints (left, right, top, bottom)")
    for side in value:
        integer(op, name, side, least=0)
    return list(value)


def tensor_list(
    op: str, name: str, value: Any, counts: Sequence[int] | None = None
) -> list[Tensor]:
    """Checks a list of tensors, not empty or of one of ``counts`` lengths, and returns it."""
    takes = "at least one tensor" if counts is None else f"{' or '.join(map(str, counts))} tensors"
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: {name}: got {_checks.describe(value)}, takes a list of {takes}")
    if (len(value) not in counts) if counts is not None else not value:
        raise ValueError(f"{op}: {name}: got a list of {len(value)}, takes {takes}")
    return list(value)


def anchors_per_location(op: str, cls_output: Tensor, num_classes: int) -> int:
    """A, of class maps [B, A * num_classes, H, W]; refuses channels that are no multiple."""
    channels = cls_output.shape[1]
    if channels % num_classes:
        raise ValueError(
            f"{op}: cls_outputs[0]: got {_checks.describe(cls_output)},"
            f" takes channels divisible by {num_classes} classes"
        )
    return channels // num_classes


def convolved_size(
    op: str, x: Tensor, kernel: int, stride: int, padding: Sequence[int]
) -> tuple[int, int]:
    """(height, width) of a convolution's output; refuses a padded map smaller than the kernel."""
    left, right, top, bottom = padding
    height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
    if height < kernel or width < kernel:
        raise ValueError(
            f"{op}: padding: got a padded map of {height}x{width},"
            f" takes at least the kernel's {kernel}x{kernel}"
        )
    # Multiples of the stride, whose quotients an export of any size knows.
    down, across = ((n - kernel) - (n - kernel) % stride for n in (height, width))
    return down // stride + 1, across // stride + 1
