"""What the forward of a model launches as a CUDA graph, noted without a GPU, and how long that can take.

Only launches of our own kernels are noted: what torch adds (folding norms together, sums over parts, casts) is not in
the sum, nor is what a graph waits between kernels.
"""

from __future__ import annotations

import contextlib
import statistics
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch

import effdet
from bench import launches
from bench.model import default_size
from bench.predict import Prediction, predicted
from bench.sass import ARCHITECTURES
from effdet import graph
from effdet.plan import use_plan
from effdet_kernels import _library, _triton
from effdet_kernels.verify import DTYPES


def of_model(
    name: str, size: int, batch: int, dtype: torch.dtype, shared_kb: int
) -> list[_triton.Launch]:
    """The launches of an eval forward of ``[batch, 3, size, size]``, on a GPU with ``shared_kb`` a block.

    The model is on "meta": nothing is computed.

    Raises:
        ValueError: no such model, or a size or batch that is not positive.
    """
    default_size(name)
    if min(size, batch) < 1:
        raise ValueError(f"--size and --batch must be positive, got {size} and {batch}")
    model = effdet.create_model(name, pretrained_backbone=False, image_size=size)
    model = model.eval().to("meta", dtype)
    x = torch.empty(batch, 3, size, size, dtype=dtype, device="meta")
    with torch.no_grad(), use_plan(False), _as_on_a_gpu():
        with _triton.recorded(shared_kb):
            model(x)  # which norms it folds is known after that
        with _triton.recorded(shared_kb) as noted:
            model(x)
    return noted


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Inside, ops on "meta" call their Triton launchers, and models fold their norms together."""

    def call(op: _library.Op, *args: Any) -> Any:
        return op.direct("triton", args)

    with (
        unittest.mock.patch.object(_library.Op, "__call__", call),
        unittest.mock.patch.dict(graph.CAPTURES, meta=graph.CudaCapture),
    ):
        yield


def predictions(noted: list[_triton.Launch], architecture: int) -> dict[str, list[Prediction]]:
    """By kernel, those of its launches in order."""
    found: dict[str, list[Prediction]] = {}
    for launch in noted:
        prediction = predicted(launch, launches.compiled(launch, architecture))
        found.setdefault(launch.kernel.__name__, []).append(prediction)
    return found


def report(name: str, size: int | None, batch: int, label: str, architecture: int) -> None:
    """Prints a line per kernel, the longest first, and the sum."""
    size = size or default_size(name)
    noted = of_model(name, size, batch, DTYPES[label], ARCHITECTURES[architecture])
    found = predictions(noted, architecture)
    sums = {kernel: sum(p.alone for p in each) for kernel, each in found.items()}
    print(f"{name} {size}x{size} b{batch} {label} sm_{architecture}, microseconds")
    print(f"{'kernel':<36}{'launches':>9}{'one program':>13}{'all programs':>14}{'sum':>9}")
    for kernel in sorted(found, key=lambda kernel: -sums[kernel]):
        each = found[kernel]
        program = statistics.median(p.program for p in each)
        total = statistics.median(p.total for p in each)
        print(
            f"{kernel:<36}{len(each):>9}{program * 1e6:>13.1f}{total * 1e6:>14.1f}{sums[kernel] * 1e6:>9.1f}"
        )
    print(f"{'together':<36}{len(noted):>9}{'':>27}{sum(sums.values()) * 1e6:>9.1f}")
    print("one and all programs: medians; sum: of each launch the longer of both, with the launch")
