"""What convolutions share whose last argument, ``statistics``, asks for mean and variance of each map they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _library
from effdet_kernels.ops import _gradients
from effdet_kernels.ops._activations import moments


def with_moments(maps: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The maps, rounded to ``dtype``, then the means [C] of all, then the biased variances [C], of before rounding."""
    means, variances = zip(*(moments(y) for y in maps), strict=True)
    return [*(y.to(dtype) for y in maps), *means, *variances]


def after_kernel(run: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """An op from ``run``, which takes its arguments but the last and returns maps alone."""

    def call(*args: Any) -> list[Tensor]:
        *rest, statistics = args
        if not statistics:
            return run(*rest)
        return with_moments(run(*_gradients.wide(rest)), _library._tensors(rest)[0].dtype)

    return call


def positions(*args: Any) -> tuple[int, ...]:
    """Where the statistics are among the outputs of an op with one map."""
    return (1, 2) if args[-1] else ()
