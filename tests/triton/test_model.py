"""Whole networks on the Triton kernels, interpreted: a forward of D0 and a training step, against the reference.

The measure is the reference itself: in float32 the kernels may be off the float64 result twice as far as the reference
in float32 is, and as near to it in float64 as float64's roundoff allows the reference to be to float32's.
"""

from __future__ import annotations

import torch

from ..model.accuracy import (
    detector,
    forward,
    images,
    off,
    take_statistics_ahead,
    trainer,
    training_step,
)


def test_forward_equals_the_reference():
    model, x = detector(), images(1, 128)
    exact = forward(model, x, "reference", torch.float64)
    reference = forward(model, x, "reference")
    assert off(forward(model, x, "triton"), exact) <= 2 * off(reference, exact)


def test_training_step_equals_the_reference(monkeypatch):
    """With the statistics of batch norms from the convolutions' epilogues, as on a GPU."""
    take_statistics_ahead(monkeypatch)
    bench, x = trainer(), images(2, 64)
    exact = training_step(bench, x, "reference", torch.float64)
    reference = training_step(bench, x, "reference")
    assert off(training_step(bench, x, "triton"), exact) <= 2 * off(reference, exact)
