from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from effdet.engine.schedule import (
    WarmupCosine,
    build_optimizer,
    default_learning_rate,
    parameter_groups,
)


def test_warmup_is_linear_and_ends_at_the_peak():
    lr = WarmupCosine(peak=0.4, warmup_steps=10, total_steps=100)
    assert lr(0) == pytest.approx(0.04)
    steps = [lr(i + 1) - lr(i) for i in range(10)]
    assert steps == pytest.approx([0.036] * 10)
    assert lr(10) == pytest.approx(0.4)


def test_cosine_falls_to_zero_and_stays_there():
    lr = WarmupCosine(peak=0.4, warmup_steps=10, total_steps=110)
    values = [lr(i) for i in range(10, 111)]
    assert all(a > b for a, b in itertools.pairwise(values))
    assert lr(60) == pytest.approx(0.2)
    assert lr(35) == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)))
    assert lr(110) == 0.0
    assert lr(1000) == 0.0


def test_without_warmup_the_first_step_has_the_peak():
    assert WarmupCosine(0.1, 0, 5)(0) == pytest.approx(0.1)


def test_default_rate_is_linear_in_the_batch():
    assert default_learning_rate("sgd", 64) == pytest.approx(0.08)
    assert default_learning_rate("sgd", 16) == pytest.approx(0.02)
    assert default_learning_rate("adamw", 64) == pytest.approx(0.002)


def test_only_kernels_decay_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1, bias=False))
    model[2].weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, 4e-5)
    assert decayed["weight_decay"] == 4e-5 and plain["weight_decay"] == 0.0
    assert [p is model[0].weight for p in decayed["params"]] == [True]
    expected = {id(model[0].bias), id(model[1].weight), id(model[1].bias)}
    assert {id(p) for p in plain["params"]} == expected


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers(name, kind):
    optimizer = build_optimizer(nn.Linear(2, 2), name, 0.1, 0.9, 4e-5)
    assert type(optimizer) is kind
    assert [g["weight_decay"] for g in optimizer.param_groups] == [4e-5, 0.0]


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=r"'lion'.*'sgd' or 'adamw'"):
        build_optimizer(nn.Linear(2, 2), "lion", 0.1, 0.9, 0.0)
