from __future__ import annotations

import pytest
import torch
from torch import nn

from effdet.engine.ema import ModelEma


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def test_average_follows_its_definition_with_the_warm_decay():
    model = _model()
    ema = ModelEma(model, decay=0.2)
    expected = model[0].weight.detach().double().clone()
    for step in range(6):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        ema.update(model)
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach().double()
        torch.testing.assert_close(ema.module[0].weight.double(), expected)
    assert ema.updates == 6


def test_running_statistics_are_averaged_and_counters_copied():
    model = _model().train()
    ema = ModelEma(model, decay=0.5)
    model(torch.randn(4, 1, 3, 3) + 5)
    ema.update(model)
    torch.testing.assert_close(
        ema.module[1].running_mean, 0.9 * model[1].running_mean, msg="first decay is 1/10, from 0"
    )
    assert int(ema.module[1].num_batches_tracked) == 1


def test_the_copy_is_frozen_in_eval_mode_and_apart_from_the_model():
    model = _model()
    ema = ModelEma(model)
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert ema.module[0].weight.data_ptr() != model[0].weight.data_ptr()


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="decay: got"):
        ModelEma(_model(), decay)
