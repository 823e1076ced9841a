"""What only large images have in the CUDA kernels of decode_topk: lists that are full; logits at any address."""

from __future__ import annotations

import pytest
import torch

import effdet_kernels as ek
from effdet_kernels import _cuda, use_backend
from effdet_kernels.ops.decode_topk import cuda, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(9, 14), (5, 7), (3, 3), (1, 1)]
CLASSES, PER_LOCATION, BATCH = 13, 3, 2


def _ascending(*shape):
    batch, channels, height, width = shape
    steps = torch.arange(channels * height * width).view(1, height, width, channels)
    return (steps / 64 - 50).permute(0, 3, 1, 2).repeat(batch, 1, 1, 1)


def _spoilt(*shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    for place, value in enumerate((torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0)):
        x.view(-1)[place::23] = value
    return x


DRAWN = {
    "ascending": _ascending,
    "descending": lambda *shape: -_ascending(*shape),
    "equal": lambda *shape: torch.full(shape, -4.6),
    "rounded": lambda *shape: torch.randn(
        *shape, generator=torch.Generator().manual_seed(1)
    ).round(),
    "spoilt": _spoilt,
    "-inf": lambda *shape: torch.full(shape, -torch.inf),
}


def _moved(x, elements):
    """The map in channels_last, so many elements beyond an aligned address, NaN around it."""
    batch, channels, height, width = x.shape
    buffer = x.new_full((x.numel() + elements + 8,), torch.nan)
    place = buffer[elements : elements + x.numel()]
    place.copy_(x.permute(0, 2, 3, 1).reshape(-1))
    return place.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _check(draw, dtype, k, elements=0):
    generator = torch.Generator().manual_seed(0)
    logits = [
        _moved(draw(BATCH, CLASSES * PER_LOCATION, *size).to(dtype), elements) for size in SIZES
    ]
    codes = [
        _moved(torch.randn(BATCH, 4 * PER_LOCATION, *size, generator=generator).to(dtype), elements)
        for size in SIZES
    ]
    total = PER_LOCATION * sum(height * width for height, width in SIZES)
    anchors = torch.rand(total, 4, generator=generator) * 50
    limits = torch.rand(BATCH, 2, generator=generator) * 50
    with use_backend("cuda_emu"):
        found = ek.decode_topk(logits, codes, anchors, num_classes=CLASSES, k=k, limits=limits)
    expected = reference.decode_topk(logits, codes, anchors, CLASSES, k, limits, None)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found[1].view(bits), expected[1].view(bits))
    assert torch.equal(found[2], expected[2])
    assert torch.equal(found[3], expected[3])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DRAWN)
def test_a_full_list_keeps_the_best(monkeypatch, name, dtype):
    monkeypatch.setattr(cuda, "_ROOM", 150)
    _check(DRAWN[name], dtype, k=61)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 3, 6])
def test_logits_may_lie_at_any_address(elements, dtype):
    _check(DRAWN["spoilt"], dtype, 97, elements)
    _check(DRAWN["rounded"], dtype, 2000, elements)


def test_most_picks_fit_where_there_is_little_shared_memory():
    with _cuda.emulated_shared_memory(99):
        _check(DRAWN["rounded"], torch.bfloat16, 8192)
