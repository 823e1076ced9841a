"""Random numbers of one sample, independent of workers, order and resumption."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def sample_rng(seed: int | None, epoch: int, index: int) -> Iterator[None]:
    """Seed the global generators from (seed, epoch, index) for the block, then restore them.

    Transforms draw from Python's `random` (ours), NumPy or torch (a user's); all three are seeded.
    With seed None the block runs on the generators as they are.
    """
    if seed is None:
        yield
        return
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.seed(f"{seed}/{epoch}/{index}")
        np.random.seed(random.getrandbits(32))  # noqa: NPY002
        # default_generator, because torch.manual_seed would also touch CUDA, which forked workers
        # must not.
        torch.default_generator.manual_seed(random.getrandbits(63))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
