"""What the specs of the ops share: random draws, byte counts, and the making of mutants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS
from effdet_kernels.spec import Inputs

BENCH = frozenset({"bench"})  # a real shape, timed by benchmarks
# More channels and pixels than a kernel takes at once, most often no multiple of what it takes.
BLOCKS = frozenset({"blocks"})
VECTORS = frozenset({"vectors"})
GPU = frozenset({"bench", "gpu"})  # one that only a GPU has the memory or the speed for


SAME = {
    3: (1, 1, 1, 1),
    5: (2, 2, 2, 2),
}  # padding of a depthwise convolution, by the kernel's side
HALVED = {3: (0, 1, 0, 1), 5: (1, 2, 1, 2)}  # the same with stride 2 on even sizes
FAR = 60.0  # standard deviation: values at which e^x overflows, and on both sides of every kink
ACTS = tuple(name for name in ACTIVATIONS if name != "none")


def normal(generator: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * std


def uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform numbers in float64."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def weights(generator: torch.Generator, *shape: int) -> Tensor:
    """Convolution weights [O, I, k, k] that keep the variance of their input."""
    fan_in = shape[1] * shape[2] * shape[3]
    return normal(generator, *shape, std=fan_in**-0.5)


def nbytes(*values: Any) -> int:
    """Bytes of tensors, of lists of tensors, and of None."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, (list, tuple)):
            total += nbytes(*value)
    return total


def mutant(reference: Callable[..., Any], change: Callable[[Inputs], Inputs]) -> Callable[..., Any]:
    """``reference`` called with some arguments changed."""

    def changed(**arguments: Any) -> Any:
        return reference(**{**arguments, **change(arguments)})

    return changed


def per_channel(vector: Tensor | None, default: float) -> Tensor:
    """``vector`` [C] (None: ``default``) shaped to act on [B, C, H, W] of any device."""
    if vector is None:
        return torch.tensor(default, dtype=torch.float64)  # a number goes with every device
    return vector.view(1, -1, 1, 1)


def with_moments_of_errors(y: Sequence[Tensor], errors: Sequence[Tensor]) -> list[Tensor]:
    """Errors of maps y, then what they make of the means, then of the variances, of all."""
    means, variances = zip(*map(moments_of_errors, y, errors), strict=True)
    return [*errors, *means, *variances]


def moments_of_errors(y: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """What errors of up to ``error`` in y [B, C, H, W] make of each channel's mean and biased variance, at most."""
    rows = (0, 2, 3)
    variance = y.var(rows, correction=0)
    return error.mean(rows), variance + 2 * variance.sqrt() * error.square().mean(rows).sqrt()
