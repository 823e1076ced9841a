"""What of the CUDA kernel of expand_depthwise depends on sizes: segments, shared memory, the one launch."""

from __future__ import annotations

import pytest
import torch

import effdet_kernels as ek
from effdet_kernels import _cuda, testing, use_backend
from effdet_kernels.guards import channels_last
from effdet_kernels.ops import _walk
from effdet_kernels.ops.expand_depthwise import cuda
from effdet_kernels.spec import iter_specs

SPEC = next(spec for spec in iter_specs() if spec.name == "expand_depthwise")
HALF = (torch.bfloat16, torch.float16)
SHAPES = [(3, 1), (3, 2), (5, 1), (5, 2)]


def arguments(channels, k, stride, dtype=torch.bfloat16, expand=8):
    """A call on a map of 3 by 5 pixels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x = channels_last(draw(1, channels, 3, 5).to(dtype))
    first = (draw(expand, channels, 1, 1) / channels**0.5).to(dtype)
    vectors = draw(expand), draw(expand)
    second = (draw(expand, 1, k, k) / k).to(dtype)
    return (x, first, *vectors, second), {"stride": stride, "padding": [k // 2] * 4, "act": "swish"}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["vectors_stride2", "vectors_5x5", "vectors_5x5_stride2"])
def test_segments_of_few_rows_are_within_the_bound(name, dtype, rows, monkeypatch):
    monkeypatch.setattr(_walk, "segments", lambda height, *rest: -(-height // rows))
    case = next(case for case in SPEC.cases if case.name == name)
    assert testing.check_forward(SPEC, case, dtype, "cuda_emu") <= 1


@pytest.mark.parametrize(("k", "stride"), SHAPES)
def test_what_is_fused_is_one_launch_that_fits_into_the_shared_memory_of_a_small_gpu(
    k, stride, monkeypatch
):
    fused = [
        c
        for c in range(8, 257, 8)
        if cuda.fuses(arguments(c, k, stride)[0][0], torch.empty(1, 1, k, k), stride)
    ]
    assert fused == list(range(8, fused[-1] + 1, 8))  # up to some number
    assert fused[-1] >= 112
    launched = []
    launch = _cuda.launch
    monkeypatch.setattr(
        _cuda,
        "launch",
        lambda name, *rest, **fields: (launched.append(name), launch(name, *rest, **fields)),
    )
    tensors, options = arguments(fused[-1], k, stride, expand=cuda._CHANNELS[k])
    with use_backend("cuda_emu"), _cuda.emulated_shared_memory(99):
        ek.expand_depthwise(*tensors, **options)
        assert launched == ["expand_depthwise"]
        tensors, options = arguments(fused[-1] + 8, k, stride)
        ek.expand_depthwise(*tensors, **options)
    assert launched[1:] == ["pointwise_conv", "depthwise_conv"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"stride": 3}, "stride: got 3, takes 1 or 2"),
        ({"k": 7}, "dw_weight: has a side of 7, takes 3 or 5"),
        ({"channels": 12}, "x: has 12 channels, takes a multiple of 8 in bfloat16"),
        ({"expand": 12}, "expand_weight: has 12 output channels, takes a multiple of 8"),
    ],
)
def test_what_the_kernels_lack_is_refused_by_name(changed, says):
    tensors, options = arguments(**{"channels": 8, "k": 3, "stride": 1, **changed})
    with use_backend("cuda_emu"), pytest.raises(ek.BackendError, match=says):
        ek.expand_depthwise(*tensors, **options)
