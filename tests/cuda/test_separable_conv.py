"""Every way that separable_conv's launcher may cut a call: small calls alone would see the smallest tiles only."""

from __future__ import annotations

import pytest
import torch

from effdet_kernels import _cuda, _dispatch, testing
from effdet_kernels.ops import _walk
from effdet_kernels.ops.separable_conv import cuda, cuda_bwd
from effdet_kernels.ops.separable_conv.spec import SPEC

SHORT = [
    cuda.Cut(rows=8, warps=4, groups=2, depth=8, stages=2),
    cuda.Cut(rows=8, warps=8, groups=1, depth=2, stages=3),
    cuda.Cut(rows=8, warps=8, groups=2, depth=6, stages=4),
    cuda.Cut(rows=4, warps=4, groups=2, depth=4, stages=2),
    cuda.Cut(rows=4, warps=8, groups=1, depth=2, stages=4),
    cuda.Cut(rows=2, warps=8, groups=2, depth=2, stages=3),
    cuda.Cut(rows=2, warps=2, groups=1, depth=4, stages=2),
]
FLOAT = [
    cuda.Cut(rows=4, warps=4, groups=2, depth=3, stages=2),
    cuda.Cut(rows=4, warps=8, groups=1, depth=1, stages=3),
    cuda.Cut(rows=2, warps=6, groups=1, depth=8, stages=4),
    cuda.Cut(rows=1, warps=2, groups=2, depth=2, stages=2),
]
CUTS = [(torch.bfloat16, cut) for cut in SHORT] + [(torch.float16, SHORT[0])]
CUTS += [(torch.float32, cut) for cut in FLOAT]
CASES = ("vectors", "vectors_predict", "vectors_slices", "fused_vectors_softmax")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "cut"), CUTS)
def test_every_cut_is_within_the_bound(monkeypatch, name, dtype, cut):
    case = next(case for case in SPEC.cases if case.name == name)
    unit = 16 // dtype.itemsize
    vectors = SPEC.inputs(case, dtype)["x"][0].shape[1] // unit
    depth = min(cut.depth, vectors if dtype == torch.float32 else vectors + vectors % 2)
    monkeypatch.setattr(cuda, "_cut", lambda *_: cut._replace(depth=depth))
    assert testing.check_forward(SPEC, case, dtype, "cuda_emu") <= 1
    if name == "vectors":
        assert testing.check_nonfinite(SPEC, case, dtype, "cuda_emu") <= 1


@pytest.mark.parametrize("channels", [8, 64, 88, 112, 160, 224, 288, 384])
@pytest.mark.parametrize("widest", [36, 64, 384, 810])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kb", [99, 163, 227])
def test_the_models_channels_have_a_cut_on_every_device(channels, widest, size, kb):
    if (channels, size, kb) == (384, 4, 99):
        pytest.skip("float32's taps and smallest patch alone are 98 KB")
    for batch in (1, 128):
        cut = cuda._cut(size, channels, widest, batch, ((64, 64), (32, 32)), kb)
        assert cut is not None
        assert cut.stages > 1 or cut.depth >= channels * size // 16


def test_a_block_fits_the_smallest_shared_memory():
    case = next(case for case in SPEC.cases if case.name == "blocks_two_nets")
    with _cuda.emulated_shared_memory(99):
        for dtype in (torch.float32, torch.bfloat16):
            assert testing.check_forward(SPEC, case, dtype, "cuda_emu") <= 1


PLAIN = [case.name for case in SPEC.cases if "plain" in case.name]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_blocks_that_take_several_tiles_go_back_right(monkeypatch, name, multiprocessors):
    monkeypatch.setattr(_walk, "MULTIPROCESSORS", multiprocessors)
    case = next(case for case in SPEC.cases if case.name == name)
    with _dispatch.strictly():
        assert testing.check_gradient(SPEC, case, torch.bfloat16, "cuda_emu") <= 1
        for parts in testing.PARTS.values():
            assert testing.check_gradient(SPEC, case, torch.bfloat16, "cuda_emu", parts=parts) <= 1


def test_the_backward_of_64_channels_fits_the_smallest_shared_memory():
    plain, wide = (
        next(case for case in SPEC.cases if case.name == name)
        for name in ("blocks_plain", "vectors_plain_wide")
    )
    with _cuda.emulated_shared_memory(99), _dispatch.strictly():
        assert testing.check_gradient(SPEC, plain, torch.float16, "cuda_emu") <= 1
        with pytest.raises(_dispatch.BackendError, match=r"x\[0\]: has 88 channels, whose tile is"):
            testing.check_gradient(SPEC, wide, torch.float16, "cuda_emu")


@pytest.mark.parametrize(("channels", "out_channels"), [(8, 8), (64, 64), (88, 128), (128, 72)])
def test_the_backward_takes_the_shared_memory_that_its_launcher_says(channels, out_channels):
    """A little less, and the kernel says so."""
    x = torch.ones(1, channels, 2, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    dw = torch.ones(channels, 1, 3, 3, dtype=torch.bfloat16)
    pw = torch.ones(out_channels, channels, 1, 1, dtype=torch.bfloat16)
    grad = torch.ones(1, out_channels, 2, 3, dtype=torch.bfloat16)
    grad = grad.to(memory_format=torch.channels_last)
    call = [grad], [x], [dw], [pw], [True], [True], [True]
    needed = cuda_bwd.shared_bytes(channels, out_channels)
    assert needed % 16 == 0
    try:
        _cuda._emulator.set_shared_limit(needed)
        cuda_bwd._launch(*call)
        _cuda._emulator.set_shared_limit(needed - 16)
        with pytest.raises(RuntimeError, match="shared"):
            cuda_bwd._launch(*call)
    finally:
        _cuda._emulator.set_shared_limit(227 * 1024)
