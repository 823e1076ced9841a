"""What the forward of a model launches as a CUDA graph, noted without a GPU, and how long that can take.

Only launches of our own kernels are noted: what torch adds (folding norms together, sums over parts, casts) is not in
the sum, nor is what a graph waits between kernels.
"""

from __future__ import annotations

import collections
import contextlib
import statistics
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import effdet
from bench import launches
from bench.model import default_size
from bench.predict import Prediction, predicted
from bench.sass import ARCHITECTURES
from effdet import graph
from effdet.plan import use_plan
from effdet_kernels import _cuda, _dispatch, _library, _triton
from effdet_kernels.verify import DTYPES


def of_model(
    name: str, size: int, batch: int, dtype: torch.dtype, shared_kb: int
) -> list[_triton.Launch]:
    """The launches of an eval forward of ``[batch, 3, size, size]``, on a GPU with ``shared_kb`` a block.

    The model is on "meta": nothing is computed.

    Raises:
        ValueError: no such model, or a size or batch that is not positive.
    """
    with _forward(name, size, batch, dtype) as forward, _triton.recorded(shared_kb):
        forward()  # which norms it folds is known after that
        with _triton.recorded(shared_kb) as noted:
            forward()
    return noted


def with_cuda(name: str, size: int, batch: int, dtype: torch.dtype) -> collections.Counter[str]:
    """How often the same forward launches each kernel where CUDA kernels serve the calls that they take.

    What torch launches between them counts under the name of its operator.
    """
    with (
        _forward(name, size, batch, dtype, cuda=True) as forward,
        _triton.recorded() as triton,
        _cuda.recorded() as cuda,
        _TorchKernels() as torch_kernels,
    ):
        forward()
        triton.clear(), cuda.clear(), torch_kernels.names.clear()
        forward()
    ours = [launch.kernel.__name__ for launch in triton]
    return collections.Counter([*cuda, *ours, *torch_kernels.names])


class _TorchKernels(TorchDispatchMode):
    """Notes torch's operators that are a kernel each: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = isinstance(result, torch.Tensor) and not func.is_view
        if made and not str(func).startswith(("aten.empty", "aten.detach")):
            self.names.append(str(func))
        return result


@contextlib.contextmanager
def _forward(
    name: str, size: int, batch: int, dtype: torch.dtype, cuda: bool = False
) -> Iterator[Callable[[], Any]]:
    """The forward of a model on "meta", inside as it would be on a GPU."""
    default_size(name)
    if min(size, batch) < 1:
        raise ValueError(f"--size and --batch must be positive, got {size} and {batch}")
    model = effdet.create_model(name, pretrained_backbone=False, image_size=size)
    model = model.eval().to("meta", dtype)
    x = torch.empty(batch, 3, size, size, dtype=dtype, device="meta")
    with torch.no_grad(), use_plan(False), _as_on_a_gpu(cuda):
        yield lambda: model(x)


@contextlib.contextmanager
def _as_on_a_gpu(cuda: bool) -> Iterator[None]:
    """Inside, ops on "meta" call their launchers in Triton, or in CUDA, and models fold their norms together."""

    def call(op: _library.Op, *args: Any) -> Any:
        kernels = op.impls.get("cuda") if cuda else None
        taken = kernels is not None and _dispatch.refusal(kernels, args) is None
        return op.direct("cuda" if taken else "triton", args)

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
