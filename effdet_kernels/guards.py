"""Memory in which a kernel's mistakes show: inputs among NaN, in several layouts, and outputs between guard zones."""

from __future__ import annotations

import contextlib
import functools
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _library

_GUARD = 64  # elements before and after a guarded buffer
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What stands in the zones around outputs: NaN of a kind that no arithmetic on the NaN around inputs makes, so that a
# kernel which reads there and writes here is seen. Integers have 0x5A in every byte.
_GUARD_BITS = {
    torch.bfloat16: 0x7FDA,
    torch.float16: 0x7E5A,
    torch.float32: 0x7FC05A5A,
    torch.float64: 0x7FF800005A5A5A5A,
}


class CheckError(AssertionError):
    """A kernel broke a rule that is not a matter of rounding."""


# Layouts of inputs -------------------------------------------------------------------------------


def contiguous(tensor: Tensor) -> Tensor:
    """Dense, in the order of the dimensions."""
    return _embedded(tensor, torch.contiguous_format)


def channels_last(tensor: Tensor) -> Tensor:
    """Dense with channels inside, where there are four dimensions."""
    return _embedded(tensor, _channels_last_of(tensor))


def unaligned(tensor: Tensor) -> Tensor:
    """Dense and channels_last, but at an address that is a multiple of one element only."""
    return _embedded(tensor, _channels_last_of(tensor), offset=_GUARD + 1)


def narrowed(tensor: Tensor) -> Tensor:
    """Some channels of a wider channels_last map: those of a pixel are dense, pixels are apart."""
    if tensor.dim() != 4:
        return contiguous(tensor)
    batch, channels, height, width = tensor.shape
    roomy = _poisoned([batch, height, width, channels + 3], tensor.dtype, tensor.device)
    return roomy.permute(0, 3, 1, 2)[:, 1 : channels + 1].copy_(tensor)


def sliced(tensor: Tensor) -> Tensor:
    """A view with gaps of NaN in every dimension, at an offset that no vector load is aligned to."""
    if tensor.dim() == 0:
        return tensor
    roomy = _poisoned([2 * n + 1 for n in tensor.shape], tensor.dtype, tensor.device)
    steps = [slice(0, -1, 2) for _ in tensor.shape]
    steps[-1] = slice(1, None, 2)
    return roomy[tuple(steps)].copy_(tensor)


def mixed(tensor: Tensor, turn: int = 1) -> Tensor:
    """One of three layouts, drawn by all values: tensors of a call need not lie alike. ``turn``: another draw."""
    total = float(tensor.double().nan_to_num(0, 0, 0).abs().sum())
    return (contiguous, channels_last, narrowed)[int(total * 2**16) // turn % 3](tensor)


# Each returns the same values in other memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "channels_last": channels_last,
    "unaligned": unaligned,
    "narrowed": narrowed,
    "sliced": sliced,
    "mixed": mixed,
    "mixed_again": functools.partial(mixed, turn=3),
}


def expanded(tensor: Tensor) -> Tensor:
    """The first value everywhere, with strides of 0: what ``y.sum().backward()`` hands to a backward."""
    return tensor.flatten()[:1].squeeze().expand(tensor.shape) if tensor.numel() else tensor


def _channels_last_of(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def _embedded(tensor: Tensor, memory_format: torch.memory_format, offset: int = _GUARD) -> Tensor:
    """A dense copy between two zones of NaN."""
    strides = torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()
    buffer = _poisoned([offset + tensor.numel() + _GUARD], tensor.dtype, tensor.device)
    return buffer.as_strided(tensor.shape, strides, offset).copy_(tensor)


def _poisoned(shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
    """NaN; in integers the lowest number, in booleans True."""
    poison: Any = torch.nan if dtype.is_floating_point else True
    if not dtype.is_floating_point and dtype != torch.bool:
        poison = torch.iinfo(dtype).min
    return torch.full(tuple(shape), poison, dtype=dtype, device=device)


# Outputs -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Inside, kernels' outputs and all ``torch.empty`` start as NaN (integers: the lowest, or the highest).

    Outputs lie between two zones that must stay as they are.

    Raises:
        CheckError: at the end, when a kernel wrote outside of its output.
    """
    taken: list[Tensor] = []
    plain = _library.TensorSpec.empty

    def empty(spec: _library.TensorSpec) -> Tensor:
        layout = plain(spec)
        buffer = _poisoned([layout.numel() + 2 * _GUARD], spec.dtype, spec.device)
        for zone in _zones(buffer):
            zone.fill_(_guard_of(spec.dtype))
        taken.append(buffer)
        return buffer.as_strided(layout.shape, layout.stride(), _GUARD)

    with unittest.mock.patch.object(_library.TensorSpec, "empty", empty), _filled_empty():
        yield
    for buffer in taken:
        if any(bool((zone != _guard_of(buffer.dtype)).any()) for zone in _zones(buffer)):
            raise CheckError("a kernel wrote outside of its output")


def _zones(buffer: Tensor) -> tuple[Tensor, Tensor]:
    """The bits before and after what ``buffer`` guards."""
    bits = _bits(buffer)
    return bits[:_GUARD], bits[-_GUARD:]


def _guard_of(dtype: torch.dtype) -> int:
    return _GUARD_BITS.get(dtype, int.from_bytes(b"\x5a" * dtype.itemsize, "big"))


@contextlib.contextmanager
def _filled_empty() -> Iterator[None]:
    """Inside, torch fills uninitialised memory with NaN (integers: the highest number)."""
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.use_deterministic_algorithms(was_on, warn_only=only_warned)


# Bits --------------------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit and to the sign of a zero; one NaN is like another."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    if not torch.equal(nan, b.isnan()):
        return False
    return torch.equal(*(_bits(t.masked_fill(nan, 0).contiguous()) for t in (a, b)))


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.view(_INTEGERS[tensor.itemsize])
