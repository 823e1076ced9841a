"""Launcher of the CUDA kernels of the backward of ``weighted_fusion``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_kernels import _cuda, _library, _native
from effdet_kernels.ops import _walk
from effdet_kernels.ops._gradients import wanted
from effdet_kernels.ops.weighted_fusion import cuda

# As csrc/weighted_fusion has them.
_THREADS = 128
_POOL_THREADS = 256
_MOST_ROWS = 4
_MOST_POOL_ROWS = 32


def refusal(grads: Sequence[Tensor | None], *rest) -> str | None:
    """Why the kernels do not take a call, or None."""
    (grad,) = grads
    if grad is None:
        return "grads: got None, takes the gradient of y"
    args = rest[:-1]
    if grad.dtype != args[0][0].dtype:
        return f"grads: is {grad.dtype}, takes {args[0][0].dtype} as x has"
    return cuda.refusal(*args) or _cuda.refused_map("grads", grad)


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """The wanted gradients of the maps and of weight."""
    x, weight, method, resample, _, pool_padding, act, needs = rest
    of_x, of_weight = wanted((x, weight), needs)
    dx, d_weight = gradients(
        grads[0], x, weight, method, resample, pool_padding, of_x, of_weight, act
    )
    return [g for g in (*dx, d_weight) if g is not None]


def gradients(
    grad: Tensor,
    x: Sequence[Tensor],
    weight: Tensor | None,
    method: str,
    resample: str,
    pool_padding: Sequence[int],
    of_x: Sequence[bool],
    of_weight: bool = True,
    act: str = "none",
) -> tuple[list[Tensor | None], Tensor | None]:
    """Of a fusion, given that of its result: the gradients of x, where wanted, and of weight.

    grad [B, C, H, W] with the dtype of x; both as ``refusal`` wants them. That of weight is float32.
    """
    batch, channels, height, width = grad.shape
    dx = [
        _library.nchw(level.shape, level).empty() if need else None
        for level, need in zip(x, of_x, strict=True)
    ]
    of_weight = of_weight and weight is not None
    if batch == 0:
        return dx, torch.zeros(len(x), device=grad.device) if of_weight else None
    shape = channels * grad.element_size() // 16, height, width
    kinds, later = cuda.kinds(x, resample, (height, width)), False
    kernel = _kernel(kinds, dx)
    if kernel == "pooled":
        plan = _pooled(batch, *shape, tuple(x[-1].shape[2:]), tuple(pool_padding))
    else:
        plan = _each(batch, *shape, 2 if kernel == "halved" else 1)
        later = kernel == "each" and any(
            d is not None and kind != "identity" for d, kind in zip(dx, kinds, strict=True)
        )
    rows, columns, vectors, blocks = plan
    found = parts = delta = None
    if of_weight:
        found = torch.empty(len(x), dtype=torch.float32, device=grad.device)
        parts = torch.empty(blocks, len(x), dtype=torch.float32, device=grad.device)
    if later and act != "none":
        delta = torch.empty(batch, height, width, channels, dtype=torch.float32, device=grad.device)
    _cuda.launch(
        "weighted_fusion_gradient",
        grad,
        dtype=_cuda.DTYPE_CODES[grad.dtype],
        batch=batch,
        channels=channels,
        act=_native.ACTIVATIONS.index(act),
        grad=_cuda.map_fields(grad),
        dx=dx,
        delta=delta,
        parts=parts,
        of_weight=found,
        rows=rows,
        columns=columns,
        vectors=vectors,
        blocks=blocks,
        **cuda.fields(x, weight, method, resample, (height, width), pool_padding),
    )
    return dx, found


def _kernel(kinds: list[str], dx: list[Tensor | None]) -> str:
    """Which kernel looks at the result, as gradient_kernel in csrc/weighted_fusion/cuda_bwd.cu has it."""
    if any(kind != "identity" for kind in kinds[:-1]):
        return "each"
    if kinds[-1] == "max" and dx[-1] is not None:
        return "pooled"
    return "halved" if kinds == ["identity", "halved"] else "each"


@functools.cache
def _each(
    batch: int, vectors: int, height: int, width: int, side: int
) -> tuple[int, int, int, int]:
    """Rows, columns and vectors of a block, and how many; of ``side`` x ``side`` pixels a place."""
    height, width = height // side, width // side
    rows = cuda.rows(batch * height * width * vectors, _MOST_ROWS)
    return rows, 1, 1, batch * -(-(-(-height // rows) * width * vectors) // _THREADS)


@functools.cache
def _pooled(
    batch: int,
    vectors: int,
    height: int,
    width: int,
    size: tuple[int, int],
    pool_padding: tuple[int, ...],
) -> tuple[int, int, int, int]:
    """The same of places under a max-pool of a map of ``size``."""
    height, width = (size[0] + pool_padding[2] + 1) // 2, (size[1] + pool_padding[0] + 1) // 2
    # Pieces of 64 bytes at least, where there are as many channels.
    choices = {*range(4, min(vectors, 32) + 1, 4), *([vectors] if vectors <= 32 else [])}
    columns, some, across = min(
        (_tiles(vectors, width, some) for some in sorted(choices, reverse=True)),
        key=lambda found: found[2] * _threads(*found[:2]) * (1.1 if found[1] == 4 else 1),
    )
    segments = _walk.segments(
        height, _MOST_POOL_ROWS, batch * across, 2, _threads(columns, some) // 32
    )
    rows = -(-height // segments)
    return rows, columns, some, batch * across * -(-height // rows)


def _tiles(vectors: int, width: int, some: int) -> tuple[int, int, int]:
    """Columns and vectors of a block with ``some`` vectors, and blocks across; blocks overlap by a column."""
    most = min(width, _POOL_THREADS // some)
    tiles = max(1, -(-(width - 1) // max(1, most - 1)))
    columns = -(-(width - 1) // tiles) + 1
    return columns, some, tiles * -(-vectors // some)


def _threads(columns: int, vectors: int) -> int:
    return -(-columns * vectors // 32) * 32
