"""The processes of one training run: how they find each other, and what they agree on."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .devices import resolve_device


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; all methods are collective, and free for just one.

    Attributes:
        rank: number of this process, from 0; process 0 writes the files.
        count: how many there are.
        device: what this process computes on.
    """

    rank: int
    count: int
    device: torch.device

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes, for a decision that all must take alike."""
        if self.count == 1:
            return list(numbers)
        values = torch.tensor(numbers)  # on the host, where no kernel has to be waited for
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.tolist()

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the tensors of process 0, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def launched() -> bool:
    """Whether ``torchrun`` (or what sets the same variables) started this as one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started; leave them at the end. Alone: just the device.

    Where they were joined before, they stay so.

    Args:
        device: as for ``resolve_device``. "auto" and "cuda" give each process of a machine a GPU of
            its own, and NCCL for what is on them; "cpu" takes gloo alone.

    Raises:
        ValueError: no such device, or fewer GPUs than processes.
    """
    if not launched() and not (dist.is_available() and dist.is_initialized()):
        yield Processes(0, 1, resolve_device(device))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own = resolve_device(device)
    if own.type == "cuda" and own.index is None:
        own = resolve_device(f"cuda:{local}")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    here = not dist.is_initialized()
    if here:
        store, rank, count = next(dist.rendezvous("env://"))
        # After a restart the launcher's store may still have the addresses of the processes before.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), own)
    finally:
        if here:
            gc.collect()  # what still holds the group would end it too late, with threads running
            dist.destroy_process_group()
