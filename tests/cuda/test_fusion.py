"""weighted_fusion in CUDA: walks and tiles that only large maps have, and which pixel a max-pool's gradient goes to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import effdet_kernels as ek
from effdet_kernels import _cuda, testing, use_backend
from effdet_kernels.ops.weighted_fusion import cuda, cuda_bwd, spec

if _cuda.emulator_reason() is not None:  # a run that has collected this without --emulator
    pytest.skip("no emulator", allow_module_level=True)

CASES = {case.name: case for case in spec.SPEC.cases}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POOLED = ("vectors_bottom_up", "vectors_last", "vectors_pool_alone", "vectors_pool_uncovered")


@pytest.fixture
def walking(monkeypatch):
    """Threads walk down as many rows as they do on a full GPU."""
    monkeypatch.setattr(cuda, "_FILLING", 1)
    cuda_bwd._each.cache_clear()
    yield
    cuda_bwd._each.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("vectors_")])
def test_long_walks(name, dtype, walking):
    assert testing.check_forward(spec.SPEC, CASES[name], dtype, "cuda_emu") <= 1
    assert testing.check_gradient(spec.SPEC, CASES[name], dtype, "cuda_emu") <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize(("columns", "some"), [(2, 1), (3, 2), (4, 1), (8, 3)])
@pytest.mark.parametrize("name", POOLED)
def test_tiles_under_a_max_pool(name, columns, some, rows, dtype, monkeypatch):
    def plan(batch, vectors, height, width, size, padding):
        height, width = (size[0] + padding[2] + 1) // 2, (size[1] + padding[0] + 1) // 2
        tiles = 1 if columns >= width else -(-(width - 1) // (columns - 1))
        return rows, columns, some, batch * tiles * -(-vectors // some) * -(-height // rows)

    monkeypatch.setattr(cuda_bwd, "_pooled", plan)
    assert testing.check_gradient(spec.SPEC, CASES[name], dtype, "cuda_emu") <= 1
    testing.check_gradient_repeatable(spec.SPEC, CASES[name], dtype, "cuda_emu")


def test_the_plan_of_tiles_covers_all_places_with_blocks_that_there_can_be():
    for vectors in (1, 3, 8, 11, 28, 48, 96):
        for width in (1, 2, 4, 31, 32, 33, 64, 257, 1000):
            for some in range(1, min(vectors, 32) + 1):
                columns, _, across = cuda_bwd._tiles(vectors, width, some)
                tiles = across // -(-vectors // some)
                assert columns * some <= 256
                assert tiles * (columns - 1) + 1 >= width
                assert tiles == 1 or (tiles - 1) * (columns - 1) + 1 < width


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [(0, 1, 0, 1), (1, 1, 1, 1), (2, 0, 1, 2)], ids=str)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        (0.0, 1.0),
        (-0.0, 0.0, -1.0),
        (-torch.inf, -torch.inf, 3.0),
        (torch.nan, 1.0, 2.0, torch.inf),
    ],
    ids=["ties", "zeros", "infinities", "nan"],
)
def test_a_pools_gradient_goes_where_torch_sends_it(values, alone, padding, dtype):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(values), (2, 24, 9, 12), generator=generator)
    x = torch.tensor(values)[drawn].to(dtype).contiguous(memory_format=torch.channels_last)
    size = [(n + a + b - 3) // 2 + 1 for n, a, b in ((9, *padding[2:]), (12, *padding[:2]))]
    # With a pool before it the map is gathered, in a pass of its own.
    maps = [x] if alone else [x.flip(0).contiguous(memory_format=torch.channels_last), x]
    leaves = [m.clone().requires_grad_() for m in maps]
    with use_backend("cuda_emu"), testing.through_registration(testing.operator(spec.SPEC)):
        y = ek.weighted_fusion(
            leaves,
            None,
            method="sum",
            resample=["max"] * len(maps),
            size=size,
            pool_padding=padding,
        )
        grad = torch.randint(1, 30, y.shape, generator=generator).to(dtype)  # sums are exact
        grad = grad.contiguous(memory_format=torch.channels_last)
        found = torch.autograd.grad(y, leaves, grad)
    for m, got in zip(maps, found, strict=True):
        wide = m.double()
        wide[wide == -torch.inf] = -1e300  # above the padding
        wide.requires_grad_()
        pooled = F.max_pool2d(F.pad(wide, padding, value=-torch.inf), 3, 2)
        (expected,) = torch.autograd.grad(pooled, wide, grad.double())
        assert torch.equal(got.double(), expected)
