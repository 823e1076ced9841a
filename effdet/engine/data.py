"""The two loaders of a training run."""

from __future__ import annotations

import signal
from typing import Any, cast

import torch

from effdet.data import create_loader
from effdet.data.input_config import resolve_input_config
from effdet.data.loader import PrefetchLoader
from effdet.data.transforms import resolve_fill_color
from effdet.distributed import get_world_size

from .config import TrainConfig


def train_loader(
    dataset: Any, model_config: Any, config: TrainConfig, device: torch.device
) -> PrefetchLoader:
    """Flip, scale jitter, letterbox and normalise; an incomplete last batch is dropped.

    Order and samples are a function of (seed, epoch); see `effdet.data.set_epoch`. Of several
    processes each gets its share. A batch comes in ``config.accumulate`` parts.

    Raises:
        ValueError: the split holds fewer images than a batch, or a batch cannot be shared out.
    """
    processes = get_world_size()
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size: got {config.batch_size}, takes a multiple of {parts}: {processes}"
            f" processes, {config.accumulate} parts each"
        )
    if len(dataset) < config.batch_size:
        raise ValueError(
            f"batch_size: got {config.batch_size}, but the training split has {len(dataset)}"
            " images; takes at most that many"
        )
    size, mean, std, fill = input_geometry(model_config)
    loader = create_loader(
        dataset,
        size,
        config.batch_size // parts,
        is_training=True,
        interpolation="random",
        fill_color=fill,
        mean=mean,
        std=std,
        num_workers=config.workers,
        distributed=True,
        pin_mem=device.type == "cuda",
        device=device,
        seed=config.seed,
        scale=(config.scale_min, config.scale_max),
        max_instances=_most_boxes(dataset),
        drop_last=True,
        worker_init_fn=_ignore_interrupt,
    )
    return cast(PrefetchLoader, loader)  # asked for by default


def eval_loader(
    dataset: Any,
    model_config: Any,
    batch_size: int,
    workers: int,
    device: torch.device,
    size: tuple[int, int] | None = None,
    distributed: bool = False,
) -> PrefetchLoader:
    """Letterbox and normalise every image once, in order; the last batch may be smaller.

    With ``distributed`` each process gets its share, some images twice if they do not divide.
    ``size`` is (height, width) of the input; None takes the model's own.
    """
    own_size, mean, std, fill = input_geometry(model_config)
    loader = create_loader(
        dataset,
        size or own_size,
        batch_size,
        fill_color=fill,
        mean=mean,
        std=std,
        num_workers=workers,
        distributed=distributed,
        pin_mem=device.type == "cuda",
        device=device,
        seed=0,  # nothing is random, and nothing is drawn from the global generators
        max_instances=_most_boxes(dataset),
        worker_init_fn=_ignore_interrupt,
    )
    return cast(PrefetchLoader, loader)  # asked for by default


def input_geometry(model_config: Any) -> tuple[tuple[int, int], Any, Any, Any]:
    """(height, width), mean, std and the colour of the padding, as the model wants them."""
    inputs = resolve_input_config({}, model_config)
    fill = resolve_fill_color(inputs["fill_color"], inputs["mean"])
    return tuple(inputs["input_size"][-2:]), inputs["mean"], inputs["std"], fill


def _most_boxes(dataset: Any) -> int:
    counts = (len(dataset.parser.get_ann_info(i)["cls"]) for i in range(len(dataset)))
    return max(1, max(counts, default=0))


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
