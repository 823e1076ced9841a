"""Whole networks on the kernels of a CPU, and of a GPU where there is one: a forward of D0 and a training step.

The measure is the reference itself, on a CPU in the same dtype: the kernels may be off the float64 result twice as far.
"""

from __future__ import annotations

import pytest
import torch

from .accuracy import detector, forward, images, off, trainer, training_step

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(),
            reason="needs an NVIDIA GPU: no CUDA device is visible to torch",
        ),
    ),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("plan", [False, True], ids=["modules", "plan"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_forward_is_as_exact_as_the_reference(device, dtype, plan):
    model, x = detector(), images(1, 128)
    exact = forward(model, x, "reference", torch.float64)
    reference = forward(model, x, "reference", dtype)
    found = forward(model, x, None, dtype, device, plan)
    assert off(found, exact) <= 2 * off(reference, exact)


# In bfloat16 the statistics of a batch this small, 2 values a channel on the last level, leave noise for gradients.
@pytest.mark.parametrize(
    ("dtype", "frozen"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["float32", "float32-frozen", "bfloat16-frozen"],
)
@pytest.mark.parametrize("device", DEVICES)
def test_training_step_is_as_exact_as_the_reference(device, dtype, frozen):
    bench, x = trainer(frozen), images(2, 64)
    exact = training_step(bench, x, "reference", torch.float64)
    reference = training_step(bench, x, "reference", dtype)
    found = training_step(bench, x, None, dtype, device)
    assert off(found, exact) <= 2 * off(reference, exact)
