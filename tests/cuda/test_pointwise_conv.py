"""Blocks of the CUDA kernels of pointwise_conv that only large maps have; float32 gates; maps in maps."""

from __future__ import annotations

import pytest
import torch

import effdet_kernels as ek
from effdet_kernels import _cuda, testing, use_backend
from effdet_kernels.guards import channels_last
from effdet_kernels.ops import _walk
from effdet_kernels.spec import iter_specs

SPEC = next(spec for spec in iter_specs() if spec.name == "pointwise_conv")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF = DTYPES[1:]


@pytest.fixture
def large_blocks(monkeypatch):
    """As if no GPU had more than one multiprocessor: there are never too few large blocks."""
    monkeypatch.setattr(_walk, "MULTIPROCESSORS", 1)


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["vectors", "vectors_deep", "blocks_whole", "blocks_vectors_deep"])
def test_large_blocks_are_within_the_bound(name, dtype):
    case = next(case for case in SPEC.cases if case.name == name)
    assert testing.check_forward(SPEC, case, dtype, "cuda_emu") <= 1
    if "blocks" not in case.tags:
        testing.check_repeatable(SPEC, case, dtype, "cuda_emu")


def calls(dtype, out):
    """x and residual as parts of larger maps, weight, gate in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x = channels_last(draw(2, 64, 9, 23).to(dtype))[:, :40, 1:8, 2:21]
    residual = channels_last(draw(2, out + 8, 9, 23).to(dtype))[:, :out, 1:8, 2:21]
    return x, residual, (draw(out, 40, 1, 1) / 40**0.5).to(dtype), draw(2, 40).sigmoid()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("out", [16, 40, 64, 72, 112])
def test_a_float32_gate_of_16_bit_maps_is_not_rounded(out, dtype, large, request):
    if large:
        request.getfixturevalue("large_blocks")
    x, residual, weight, gate = calls(dtype, out)
    with use_backend("cuda_emu"):
        y = ek.pointwise_conv(x, weight, gate=gate, residual=residual)
    gated = (x.float() * gate[:, :, None, None]).to(dtype)  # rounded once
    exact = torch.einsum("bchw,oc->bohw", gated.double(), weight[:, :, 0, 0].double()) + residual
    torch.testing.assert_close(y, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_many_channels_fit_into_the_shared_memory_of_a_small_gpu(dtype, large_blocks):
    x = channels_last(torch.randn(1, 4032, 1, 2).to(dtype))
    weight = (torch.randn(96, 4032, 1, 1) / 64).to(dtype)
    residual = channels_last(torch.randn(1, 96, 1, 2).to(dtype))
    with use_backend("cuda_emu"), _cuda.emulated_shared_memory(99):
        ek.pointwise_conv(x, weight, gate=torch.rand(1, 4032), residual=residual)
