"""The kernels in the place of torch functions: what torch computes, to the bit; the rest is left to torch."""

from __future__ import annotations

import pytest
import torch

from effdet import torch_steps
from effdet_kernels import _native

aten = torch.ops.aten


def maps(dtype, *shape, seed=0):
    t = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def launched(function, *args, outs=(), **kwargs):
    launch = torch_steps.as_kernel(function, args, kwargs, outs)
    assert launch is not None
    _native.launch(launch[0], **launch[1])


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 70, 40, 17), (1, 1, 1, 1), (37,)])
def test_elementwise_kernels_are_torchs(dtype, shape):
    a, b = maps(dtype, *shape), maps(dtype, *shape, seed=1)
    cases = [
        (aten.add.Tensor, (a, b), {}),
        (aten.add.Tensor, (a, b), {"alpha": 0.5}),
        (aten.mul.Tensor, (a, 1.0625), {}),
    ]
    if len(shape) == 4:
        channels = maps(dtype, *shape[:2], 1, 1, seed=2)
        cases += [
            (aten.add.Tensor, (a, channels.expand(shape)), {}),
            (aten.add.Tensor, (channels.expand(shape), a), {}),
        ]
    for function, args, kwargs in cases:
        out = torch.full_like(a, torch.nan)
        launched(function, *args, outs=[out], **kwargs)
        assert torch.equal(out, function(*args, **kwargs)), function
    for factor in (0.01, 0.9):
        changed, expected = a.clone(), a.clone()
        launched(aten.lerp_.Scalar, changed, b, factor)
        expected.lerp_(b, factor)
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(changed, expected, atol=tolerance, rtol=tolerance)
    changed = a.clone()
    launched(aten.add_.Tensor, changed, b)
    assert torch.equal(changed, a + b)


def test_counters_and_matrices_in_the_other_order():
    counter = torch.tensor(41)
    launched(aten.add_.Tensor, counter, 1)
    assert counter == 42
    for shape in ((3, 5), (16, 16), (130, 37), (1152, 48)):
        x = maps(torch.float32, *shape)
        out = torch.full((shape[1], shape[0]), torch.nan)
        launched(aten.clone.default, x.t(), outs=[out], memory_format=torch.contiguous_format)
        assert torch.equal(out, x.t())


def test_what_no_kernel_does_is_left_to_torch():
    a = maps(torch.float32, 2, 5, 3, 4)
    planes = a.contiguous()
    whole = torch.ones(2, 5, 3, 4, dtype=torch.int32)
    for function, args, kwargs in (
        (aten.add.Tensor, (a, planes), {}),
        (aten.add.Tensor, (a, 1.0), {}),
        (aten.add.Tensor, (a, a.double()), {}),
        (aten.add.Tensor, (whole, whole), {}),
        (aten.mul.Tensor, (a, a), {}),
        (aten.mul.Tensor, (a[:, ::2], 2.0), {}),
        (aten.sum.dim_IntList, (a, [2, 3]), {}),
        (aten.clone.default, (a,), {}),
        (aten.sin.default, (a,), {}),
    ):
        outs = [function(*args, **kwargs)]
        assert torch_steps.as_kernel(function, args, kwargs, outs) is None, function
