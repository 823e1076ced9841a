"""The only importer of triton: says whether Triton kernels can run here, and why not.

With TRITON_INTERPRET=1 in the environment before the first import, Triton's own interpreter runs kernels on CPU
tensors: slow, for tests.
"""

from __future__ import annotations

import contextlib
import os
import unittest.mock
from collections.abc import Iterator

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def _find_reason() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return 'triton is not installed: pip install "effdet-kernels" on Linux x86-64 brings it'
    if not INTERPRET and not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return None


REASON = _find_reason()


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Inside, the interpreter runs the programs of a grid in an order drawn with ``seed``."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    order: list[int] = []

    def shuffle(*grid: int) -> None:
        set_dim(*grid)
        generator = torch.Generator().manual_seed(seed)
        order[:] = torch.randperm(grid[0] * grid[1] * grid[2], generator=generator).tolist()

    def place(x: int, y: int, z: int) -> None:
        _, rows, depth = builder.grid_dim
        program = order[(x * rows + y) * depth + z]
        set_idx(program // (rows * depth), program // depth % rows, program % depth)

    with (
        unittest.mock.patch.object(builder, "set_grid_dim", shuffle),
        unittest.mock.patch.object(builder, "set_grid_idx", place),
    ):
        yield
