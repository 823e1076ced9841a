"""The activations of the fused ops in plain torch: what every kernel's epilogue must compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "swish": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
    "leaky_relu": F.leaky_relu,  # slope 0.01
    "mish": F.mish,
}
_widens = True


@contextlib.contextmanager
def unwidened() -> Iterator[None]:
    """Inside, references compute in the dtype of their inputs, as plain torch code would: a peer for benchmarks."""
    global _widens
    _widens = False
    try:
        yield
    finally:
        _widens = True


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for fp32, bf16 and fp16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """``x`` in its accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)) if _widens else x


def conv_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Tensor:
    """``act(conv(x, weight) * scale + shift)``, ``x`` widened already; the scale goes into the weight."""
    weight = widen(weight)
    if scale is not None:
        weight = weight * scale.to(weight.dtype).view(-1, 1, 1, 1)
    bias = None if shift is None else shift.to(weight.dtype)
    return ACTIVATIONS[act](F.conv2d(x, weight, bias, stride, padding, 1, groups))


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a map [B, C, H, W], in its accumulation dtype."""
    # torch's own variance of a channels_last map is one long sum, in which equal values (bfloat16 has many) are
    # rounded alike: off by more than the error bound allows.
    rows = widen(y.detach()).movedim(1, -1)
    mean = rows.mean((0, 1, 2))
    return mean, (rows - mean).square_().mean((0, 1, 2))
