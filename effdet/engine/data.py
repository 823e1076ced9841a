"""Loaders for training and evaluation whose samples depend on (seed, epoch, index) alone."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from effdet.data.input_config import resolve_input_config
from effdet.data.loader import DetectionFastCollate, PrefetchLoader
from effdet.data.seeding import sample_rng
from effdet.data.transforms import resolve_fill_color, transforms_coco_eval, transforms_coco_train

from .config import TrainConfig


class SeededSamples(Dataset):
    """Wraps a data set so that a sample is a function of (seed, epoch, index).

    Indexed by ``(epoch, index)``; neither order nor the number of workers changes a sample.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
        epoch, index = key
        with sample_rng(self.seed, epoch, index):
            return self.dataset[index]


class EpochBatches(Sampler):
    """Batches of ``(epoch, index)`` keys in an order given by (seed, epoch).

    An incomplete last batch is dropped: BN statistics want whole ones. `seek` moves to any place
    in any epoch, which is what makes a run resumable in the middle of one.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if count < batch_size:
            raise ValueError(
                f"batch_size: got {batch_size}, but the training split has {count} images;"
                " takes at most that many"
            )
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.count // self.batch_size

    def seek(self, epoch: int, batch: int) -> None:
        """The next iteration yields the batches of ``epoch`` from number ``batch`` on."""
        self.epoch, self.start = epoch, batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.count))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for batch in range(self.start, len(self)):
            first = batch * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


def train_loader(
    dataset: Any, model_config: Any, config: TrainConfig, device: torch.device
) -> tuple[PrefetchLoader, EpochBatches]:
    """Flip, scale jitter, letterbox and normalise; returns the loader and its sampler."""
    size, mean, std, fill = input_geometry(model_config)
    dataset.transform = transforms_coco_train(
        size,
        use_prefetcher=True,
        fill_color=fill,
        scale=(config.scale_min, config.scale_max),
    )
    batches = EpochBatches(len(dataset), config.batch_size, config.seed)
    most = max(len(dataset.parser.get_ann_info(i)["cls"]) for i in range(len(dataset)))
    loader = DataLoader(
        SeededSamples(dataset, config.seed),
        batch_sampler=batches,
        collate_fn=DetectionFastCollate(max_instances=max(1, most)),
        num_workers=config.workers,
        worker_init_fn=_ignore_interrupt,
        persistent_workers=config.workers > 0,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    return PrefetchLoader(loader, mean=mean, std=std, device=device), batches


def eval_loader(
    dataset: Any,
    model_config: Any,
    batch_size: int,
    workers: int,
    device: torch.device,
    size: tuple[int, int] | None = None,
) -> PrefetchLoader:
    """Letterbox and normalise every image once, in order; the last batch may be smaller.

    ``size`` is (height, width) of the input; None takes the model's own.
    """
    own_size, mean, std, fill = input_geometry(model_config)
    dataset.transform = transforms_coco_eval(size or own_size, use_prefetcher=True, fill_color=fill)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=DetectionFastCollate(),
        num_workers=workers,
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),
    )
    return PrefetchLoader(loader, mean=mean, std=std, device=device)


def input_geometry(model_config: Any) -> tuple[tuple[int, int], Any, Any, Any]:
    """(height, width), mean, std and the colour of the padding, as the model wants them."""
    inputs = resolve_input_config({}, model_config)
    fill = resolve_fill_color(inputs["fill_color"], inputs["mean"])
    return tuple(inputs["input_size"][-2:]), inputs["mean"], inputs["std"], fill


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
