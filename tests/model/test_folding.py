"""Norms that are folded together: the values of folds made one by one, whatever changes between two forwards."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import effdet
from effdet import folding
from effdet.folding import Folds, fold
from effdet.plan import use_plan


def norm(channels: int, dtype=torch.float32, **options) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels, **options).eval()
    for vector in (module.weight, module.bias, module.running_mean):
        if vector is not None:
            nn.init.normal_(vector)
    nn.init.uniform_(module.running_var, 0.5, 1.5)
    return module.to(dtype)


@pytest.fixture
def norms() -> list[tuple[nn.BatchNorm2d, torch.Tensor | None]]:
    torch.manual_seed(0)
    return [
        (norm(8), None),
        (norm(3), torch.randn(3)),
        (norm(16, eps=1e-3), torch.randn(16)),
        (norm(5, affine=False), None),
        (norm(4, torch.bfloat16), torch.randn(4).bfloat16()),
        (norm(4, torch.bfloat16), torch.randn(4)),  # of two dtypes
        (norm(6, torch.float64), None),
        (norm(8), None),
    ]


@pytest.fixture
def ahead(captures, monkeypatch):
    """A forward that folds: what it returns, and how many of its folds were made one by one."""
    folds, alone = Folds(), []
    one_by_one = folding._fold

    def forward(norms):
        alone.clear()
        with torch.no_grad(), folds.ahead(nn.Identity(), torch.empty(1, 3, 4, 4)):
            monkeypatch.setattr(folding, "_fold", lambda *a: (alone.append(a), one_by_one(*a))[1])
            found = [fold(*pair) for pair in norms]
            monkeypatch.setattr(folding, "_fold", one_by_one)
        return found, len(alone)

    return forward


def agree(found, norms) -> bool:
    with torch.no_grad():
        pairs = zip(found, (fold(*pair) for pair in norms), strict=True)
        return all(
            a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-6, atol=1e-6)
            for got, want in pairs
            for a, b in zip(got, want, strict=True)
        )


def test_second_forward_folds_together_all_that_are_of_one_dtype(ahead, norms):
    found, alone = ahead(norms)
    assert alone == len(norms) and agree(found, norms)
    found, alone = ahead(norms)
    assert alone == 1 and agree(found, norms)


def test_folds_are_of_the_values_that_norms_have_when_a_forward_begins(ahead, norms):
    ahead(norms)
    norms[0][0].weight.data.mul_(2)  # leaves no trace in a version
    norms[1][1].add_(1)
    norms[2][0].running_var = torch.full((16,), 4.0)
    norms[6][0].weight = nn.Parameter(torch.full((6,), 3.0, dtype=torch.float64))
    found, alone = ahead(norms)
    assert alone == 1 and agree(found, norms)


def test_what_was_not_asked_for_before_is_folded_by_itself(ahead, norms):
    ahead(norms[:3])
    found, alone = ahead(norms[1:])
    assert alone == len(norms) - 3 and agree(found, norms[1:])
    changed = [(norms[1][0], torch.randn(3)), *norms[2:]]  # another bias before the same norm
    found, alone = ahead(changed)
    assert alone == 2 and agree(found, changed)


def test_norms_in_training_mode_and_without_statistics_are_left_out(ahead, norms):
    ahead(norms)
    norms[0][0].train()
    norms[7][0].running_mean = None
    found, _ = ahead(norms[1:7])
    assert agree(found, norms[1:7])


def test_gradients_and_other_devices_fold_one_by_one(norms):
    folds = Folds()  # gradients are enabled, and no graphs are made here
    with folds.ahead(nn.Identity(), torch.empty(1, 3, 4, 4)):
        scale, _ = fold(*norms[0])
    assert scale.requires_grad
    assert not folds._asked


def test_copies_and_pickles_of_a_model_hold_no_norms_of_it(captures):
    model = effdet.create_model("efficientdet_nano", pretrained_backbone=False).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), use_plan(False):
        model(x)
        assert model._folds._asked
        size = len(pickle.dumps(model))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not other._folds._asked
            other.backbone.conv_stem.weight.data.zero_()
            next(m for m in other.modules() if isinstance(m, nn.BatchNorm2d)).bias.data.fill_(7)
            other(x)
        model._folds = Folds()
        assert len(pickle.dumps(model)) == size


def test_a_forward_that_fails_leaves_nothing_behind(captures, norms):
    folds = Folds()
    with (
        pytest.raises(RuntimeError, match="no"),
        torch.no_grad(),
        folds.ahead(nn.Identity(), torch.empty(1, 3, 4, 4)),
    ):
        raise RuntimeError("no")
    assert folding._ahead.get() is None
