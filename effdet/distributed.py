"""Collectives over processes, which also work when there is just one."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

# Kept for programs that set it: the group of the processes on this machine.
_LOCAL_PROCESS_GROUP = None


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes; 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if _initialized() else 1


def get_rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _initialized() else 0


def get_local_rank() -> int:
    """Number of this process on its machine, from 0."""
    if not _initialized():
        return 0
    if _LOCAL_PROCESS_GROUP is not None:
        return dist.get_rank(group=_LOCAL_PROCESS_GROUP)
    return int(os.environ.get("LOCAL_RANK", get_rank()))


def get_local_size() -> int:
    """Number of processes on this machine."""
    if not _initialized():
        return 1
    if _LOCAL_PROCESS_GROUP is not None:
        return dist.get_world_size(group=_LOCAL_PROCESS_GROUP)
    return int(os.environ.get("LOCAL_WORLD_SIZE", get_world_size()))


def is_main_process() -> bool:
    """Whether this is process 0."""
    return get_rank() == 0


def synchronize() -> None:
    """Wait until every process is here."""
    if get_world_size() > 1:
        dist.barrier()


def all_gather(data: Any, group=None) -> list:
    """List of every process's `data` (any picklable object), in the order of their ranks."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def gather(data: Any, dst: int = 0, group=None) -> list:
    """As `all_gather` on process `dst`; an empty list on the others."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * dist.get_world_size(group) if get_rank() == dst else None
    dist.gather_object(data, gathered, dst=dst, group=group)
    return gathered or []


def broadcast(data: Any, src: int = 0, group=None) -> Any:
    """Process `src`'s `data` (any picklable object) on every process."""
    if get_world_size() == 1:
        return data
    box = [data]
    dist.broadcast_object_list(box, src=src, group=group)
    return box[0]


def shared_random_seed() -> int:
    """A random number that is the same on every process."""
    return broadcast(int(torch.randint(2**31, ())))


def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict:
    """Sum or mean over the processes of each tensor; right on process 0 only."""
    world_size = get_world_size()
    if world_size == 1:
        return input_dict
    with torch.no_grad():
        reduced = {key: input_dict[key].detach().clone() for key in sorted(input_dict)}
        for value in reduced.values():
            dist.reduce(value, dst=0)
            if average and is_main_process():
                value /= world_size
    return reduced


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, a new tensor on each; carries no gradient."""
    total = value.detach().clone()
    if get_world_size() > 1:
        dist.all_reduce(total)
    return total


def all_gather_container(container, group=None, cat_dim: int = 0):
    """Gather tensors from all processes along `cat_dim`: one, or a list, tuple or dict of them."""
    return _join(container, all_gather(_to_cpu(container), group), cat_dim)


def gather_container(container, dst: int, group=None, cat_dim: int = 0):
    """As `all_gather_container` on process `dst`; None on the others."""
    gathered = gather(_to_cpu(container), dst, group)
    return _join(container, gathered, cat_dim) if gathered else None


def _to_cpu(container):
    if isinstance(container, torch.Tensor):
        return container.detach().cpu()
    if isinstance(container, dict):
        return {key: _to_cpu(value) for key, value in container.items()}
    if isinstance(container, (list, tuple)):
        return [_to_cpu(value) for value in container]
    raise TypeError(f"container: got {type(container).__name__}; takes tensors in a list or dict")


def _join(like, parts: list, cat_dim: int):
    """Concatenate the parts of each process, on the device of `like`."""
    if isinstance(like, torch.Tensor):
        return torch.cat([part.to(like.device) for part in parts], dim=cat_dim)
    if isinstance(like, dict):
        return {key: _join(like[key], [part[key] for part in parts], cat_dim) for key in like}
    columns = zip(*parts, strict=True)
    return type(like)(
        _join(value, list(column), cat_dim) for value, column in zip(like, columns, strict=True)
    )
