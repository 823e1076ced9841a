"""A training run in float64, on its own or as one of the processes of torchrun: DATA OUT BATCH ACCUMULATE."""

from __future__ import annotations

import sys

import torch

from effdet.engine.config import TrainConfig
from effdet.engine.processes import joined
from effdet.engine.trainer import Trainer


def _widen(trainer: Trainer) -> Trainer:
    losses = trainer.learner.losses

    def wide(forward, images, target):
        wide = {k: v.double() if v.is_floating_point() else v for k, v in target.items()}
        return losses(forward, images.double(), wide)

    trainer.learner.losses = wide
    trainer._show = lambda epoch, result: None
    return trainer


def main(data: str, out: str, batch: str, *flags: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    config = TrainConfig(
        data,
        out,
        batch_size=int(batch),
        size=64,
        epochs=2,
        lr=0.02,
        eval_every=0,
        log_every=1,
        workers=0,
        device="cpu",
        sync_bn="own_norms" not in flags,
        global_loss="own_loss" not in flags,
        grad_checkpointing="again" in flags,
    )
    with joined("cpu") as processes:
        _widen(Trainer(config, processes, quiet=True)).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
