"""Launcher of the CUDA kernels of ``pointwise_conv``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdet_kernels import _cuda, _library, _native
from effdet_kernels.ops import _walk

_MOST_CHANNELS = 4032  # of x; csrc/pointwise_conv/cuda.h has the same
_MOST_EXCITED = 4160  # of x and of what squeeze-excite reduces them to; there, too


def refusal(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    act: str,
    statistics: bool = False,
) -> str | None:
    """Why the kernels do not take a call, or None."""
    if statistics:
        return "statistics: got True, takes False"
    if gate is not None and gate.dtype not in (torch.float32, x.dtype):
        return f"gate: is {gate.dtype}, takes float32 or the dtype of x"
    reason = _cuda.refused_map("x", x)
    if reason is None and residual is not None:
        reason = _cuda.refused_map("residual", residual)
    if reason is not None:
        return reason
    return refused_weight(x, weight)


def refused_weight(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernels do not take a weight, of maps in the dtype of ``x``."""
    unit = 16 // x.element_size()
    if weight.shape[0] % unit:
        return f"weight: has {weight.shape[0]} output channels, takes a multiple of {unit}"
    if weight.shape[1] > _MOST_CHANNELS:
        return f"weight: has {weight.shape[1]} input channels, takes at most {_MOST_CHANNELS}"
    if weight.numel() > _cuda.MOST_INSIDE:
        return f"weight: has {weight.numel()} elements, takes at most {_cuda.MOST_INSIDE}"
    return _cuda.misaligned("weight", weight)


def refused_excite(x: Tensor, reduce_weight: Tensor) -> str | None:
    """Why the kernels do not take squeeze-excite, of maps in the dtype of ``x``."""
    if reduce_weight.dtype not in (torch.float32, x.dtype):
        return f"se_reduce_weight: is {_cuda.dtype_name(reduce_weight.dtype)}, takes float32 or the dtype of x"
    together = sum(reduce_weight.shape[:2])
    if together > _MOST_EXCITED:
        return f"se_reduce_weight: has {together} channels on both sides, takes at most {_MOST_EXCITED}"
    return None


class Excite(NamedTuple):
    """Squeeze-excite whose gates the kernel makes itself, of what ``run_to_parts`` of a depthwise convolution gives."""

    parts: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor
    act: str
    gate: str

    def fields(self, pixels: int) -> dict[str, Any]:
        """As a kernel takes them, for maps of so many pixels."""
        return {
            "weight_dtype": _cuda.DTYPE_CODES[self.reduce_weight.dtype],
            "parts": self.parts,
            "part_count": self.parts.shape[1],
            "pixels": pixels,
            "reduced": len(self.reduce_weight),
            "reduce_weight": _cuda.aligned(self.reduce_weight),
            "reduce_bias": self.reduce_bias.contiguous(),
            "expand_weight": _cuda.aligned(self.expand_weight),
            "expand_bias": self.expand_bias.contiguous(),
            "act": _native.ACTIVATIONS.index(self.act),
            "hard": int(self.gate == "hard_sigmoid"),
        }


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    act: str,
    statistics: bool = False,
    *,
    excite: Excite | None = None,
) -> list[Tensor]:
    """The op's result; with ``excite`` the gates are its."""
    batch, channels, height, width = x.shape
    out_channels = weight.shape[0]
    y = _library.nchw((batch, out_channels, height, width), x).empty()
    if batch == 0:
        return [y]
    images, fields = batch, _cuda.map_fields
    maps = [x] if residual is None else [x, residual]
    if gate is None and excite is None and _one_image(maps):
        images, fields = 1, _rows
    _cuda.launch(
        "pointwise_conv",
        x,
        dtype=_cuda.DTYPE_CODES[x.dtype],
        gate_dtype=_cuda.DTYPE_CODES[x.dtype if gate is None else gate.dtype],
        multiprocessors=_walk.MULTIPROCESSORS,
        batch=images,
        in_channels=channels,
        out_channels=out_channels,
        act=_native.ACTIVATIONS.index(act),
        x=fields(x),
        weight=weight.contiguous(),
        scale=_cuda.dense(scale),
        shift=_cuda.dense(shift),
        gate=_cuda.dense(gate),
        excite=None if excite is None else excite.fields(height * width),
        residual=None if residual is None else fields(residual),
        y=y,
    )
    return [y]


def _one_image(maps: list[Tensor]) -> bool:
    """Whether the pixels of all images lie one after another: then no tile ends with an image."""
    dense = all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    return dense and max(m.numel() for m in maps) <= _cuda.MOST_INSIDE


def _rows(x: Tensor) -> tuple[Tensor, int, int, int, int, int]:
    """The pixels of all images as one row of one image, for a kernel."""
    pixels = x.shape[0] * x.shape[2:].numel()
    return x, 1, pixels, 0, 0, x.shape[1]
