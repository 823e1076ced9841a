"""Order of the samples: reproducible, resumable in the middle of an epoch, split over processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Indices of one process for one epoch.

    The permutation depends on (seed, epoch) only. With several processes each takes every
    `world_size`-th sample; the order is extended from its start so that all take the same number.

    Args:
        data_source: the data set.
        shuffle: permute, anew in each epoch.
        seed: None draws one from torch's global generator at each pass (one process only; several
            processes use 0).
        rank, world_size: which of how many processes.
    """

    def __init__(
        self,
        data_source: Sized,
        shuffle: bool,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.data_source = data_source
        self.shuffle = shuffle
        self.seed = 0 if seed is None and world_size > 1 else seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many samples of this process to skip at its beginning."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return max(0, math.ceil(len(self.data_source) / self.world_size) - self.start)

    def __iter__(self) -> Iterator[int]:
        count = len(self.data_source)
        if self.shuffle:
            order = torch.randperm(count, generator=self._generator()).tolist()
        else:
            order = list(range(count))
        missing = -count % self.world_size
        while missing and order:
            order += order[:missing]
            missing = -len(order) % self.world_size
        yield from order[self.rank :: self.world_size][self.start :]

    def _generator(self) -> torch.Generator:
        generator = torch.Generator()
        if self.seed is None:
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        else:
            # Spread (seed, epoch) over 63 bits so that neighbouring seeds share no epoch.
            generator.manual_seed((self.seed * 0x9E3779B97F4A7C15 + self.epoch) % 2**63)
        return generator
