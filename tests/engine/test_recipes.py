from __future__ import annotations

import pytest
import torch
from torch import nn

from effdet.engine.config import TrainConfig
from effdet.engine.processes import Processes
from effdet.engine.recipes import RECIPES
from effdet.engine.schedule import WarmupCosine
from effdet.engine.trainer import Trainer
from effdet.scenes import generate_scenes


def test_the_papers_figures():
    config = TrainConfig.of_recipe("paper", data="d", out="o")
    assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 4e-5)
    assert (config.lr, config.batch_size, config.epochs) == (pytest.approx(0.08), 128, 300)
    assert (config.warmup_epochs, config.warmup_start) == (pytest.approx(15), 0.0)
    assert (config.bn_momentum, config.bn_eps) == (pytest.approx(1 - 0.997), 1e-4)
    assert config.ema_decay == 0.9998


def test_rate_and_warmup_follow_what_is_given():
    config = TrainConfig.of_recipe("paper", data="d", out="o", batch_size=16, epochs=40)
    assert config.lr == pytest.approx(0.01) and config.warmup_epochs == pytest.approx(2)
    config = TrainConfig.of_recipe("paper", data="d", out="o", lr=0.3, warmup_epochs=1.5)
    assert (config.lr, config.warmup_epochs) == (0.3, 1.5)


def test_the_rate_of_sgd_is_not_given_to_adamw():
    config = TrainConfig.of_recipe("finetune", data="d", out="o", optimizer="adamw", batch_size=64)
    assert config.lr == pytest.approx(0.002)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_makes_settings_that_name_it(recipe):
    config = TrainConfig.of_recipe(recipe, data="d", out="o")
    assert config.recipe == recipe
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_an_unknown_recipe_is_named():
    with pytest.raises(ValueError, match="recipe: got 'mine', takes paper, peer, finetune"):
        TrainConfig.of_recipe("mine", data="d", out="o")


def test_warmup_from_zero():
    lr = WarmupCosine(peak=0.08, warmup_steps=4, total_steps=80, start=0.0)
    assert [lr(i) for i in range(5)] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])


def test_the_papers_norms_and_the_models_own(tmp_path):
    generate_scenes(tmp_path, 2, seed=0, size=64)
    shared = {"data": str(tmp_path), "batch_size": 2, "size": 64, "eval_every": 0, "workers": 0}
    alone = Processes(0, 1, torch.device("cpu"))

    def constants(config):
        norms = [
            m
            for m in Trainer(config, alone).learner.model.modules()
            if isinstance(m, nn.BatchNorm2d)
        ]
        return {(norm.momentum, norm.eps) for norm in norms}

    paper = TrainConfig.of_recipe("paper", out=str(tmp_path / "paper"), **shared)
    assert constants(paper) == {(0.003, 1e-4)}
    assert (0.01, 0.001) in constants(TrainConfig(out=str(tmp_path / "own"), **shared))
