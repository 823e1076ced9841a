"""Argument checks. Each error names the op, the argument, what it got and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def describe(value: Any) -> str:
    """One line on a value for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def _describe_shape(shape: Sequence[int | str | None]) -> str:
    return f"a tensor [{', '.join('*' if s is None else str(s) for s in shape)}]"


def tensor(
    op: str,
    name: str,
    value: Any,
    shape: Sequence[int | str | None],
    *,
    dtypes: Sequence[torch.dtype] = FLOATING,
    device: torch.device | None = None,
) -> None:
    """Checks that ``value`` is a tensor of ``shape`` (ints are exact; strings name free sizes), dtype and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: got {describe(value)}, takes {_describe_shape(shape)}")
    fits = value.dim() == len(shape)
    if fits:
        for got, want in zip(value.shape, shape, strict=True):  # all() takes twice as long
            fits = fits and (got == want or not isinstance(want, int))
    if not fits:
        raise ValueError(f"{op}: {name}: got {describe(value)}, takes {_describe_shape(shape)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name}: got {describe(value)}, takes dtype {names}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name}: got {describe(value)}, takes a tensor on {device}")


def choice(op: str, name: str, value: Any, options: Sequence[Any]) -> None:
    """Checks that ``value`` is one of ``options``."""
    if value not in options:
        raise ValueError(
            f"{op}: {name}: got {value!r}, takes one of {', '.join(map(repr, options))}"
        )


def number(
    op: str, name: str, value: Any, *, least: float | None = None, above: float | None = None
) -> None:
    """Checks that ``value`` is a number, at least ``least`` or above ``above``; NaN is refused."""
    if isinstance(value, (Tensor, str, bool)):
        raise TypeError(f"{op}: {name}: got {describe(value)}, takes a number")
    if least is not None and not value >= least:
        raise ValueError(f"{op}: {name}: got {value!r}, takes a number of at least {least}")
    if above is not None and not value > above:
        raise ValueError(f"{op}: {name}: got {value!r}, takes a number above {above}")
