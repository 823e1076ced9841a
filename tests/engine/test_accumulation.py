from __future__ import annotations

import copy

import pytest
import torch

from effdet.data import set_epoch
from effdet.engine.config import TrainConfig
from effdet.engine.processes import Processes
from effdet.engine.trainer import Trainer

ALONE = Processes(0, 1, torch.device("cpu"))


def _trainer(scenes, out, **settings) -> Trainer:
    shared = {"size": 64, "eval_every": 0, "workers": 0, "warmup_epochs": 0, "clip_grad": 0}
    return Trainer(TrainConfig(str(scenes), str(out), **{**shared, **settings}), ALONE, quiet=True)


def test_a_step_takes_the_mean_gradient_of_its_parts(scenes, tmp_path):
    trainer = _trainer(
        scenes, tmp_path, batch_size=4, accumulate=2, epochs=1, lr=0.01, weight_decay=0
    )
    bench = copy.deepcopy(trainer.learner.bench).train()
    set_epoch(trainer.loader, 0, 0)
    parts = [batch for batch, _ in zip(trainer.loader, range(2), strict=False)]
    assert [len(images) for images, _ in parts] == [2, 2]
    gradients = []
    for images, target in parts:
        bench.zero_grad()
        bench(images.contiguous(memory_format=torch.channels_last), target)["loss"].backward()
        gradients.append([p.grad for p in bench.parameters()])
    before = [p.detach().clone() for p in trainer.learner.model.parameters()]
    trainer.schedule = lambda step: 0.01 if step == 0 else 0.0
    trainer.fit()
    assert trainer.step == 2
    # Momentum goes on without a rate: the first step is all that was taken.
    for start, now, *of_parts in zip(
        before, trainer.learner.model.parameters(), *gradients, strict=True
    ):
        want = start - 0.01 * sum(of_parts) / 2
        torch.testing.assert_close(now.detach(), want, rtol=1e-5, atol=1e-6)


def test_parts_do_not_change_the_length_of_a_run(scenes, tmp_path):
    whole = _trainer(scenes, tmp_path / "a", batch_size=4, epochs=3)
    parts = _trainer(scenes, tmp_path / "b", batch_size=4, epochs=3, accumulate=4)
    assert whole.steps_per_epoch == parts.steps_per_epoch == 2
    assert whole.config.lr == parts.config.lr and whole.schedule == parts.schedule


def test_a_batch_that_has_no_such_parts_is_named():
    with pytest.raises(ValueError, match=r"accumulate: got 3, takes .* divides batch_size 4"):
        TrainConfig("d", "o", batch_size=4, accumulate=3)
