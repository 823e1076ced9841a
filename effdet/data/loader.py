"""Batches: collate, prefetch to the device, normalise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from effdet.distributed import get_rank, get_world_size

from .constants import IMAGENET_DEFAULT_MEAN as IMAGENET_DEFAULT_MEAN
from .constants import IMAGENET_DEFAULT_STD as IMAGENET_DEFAULT_STD
from .constants import IMAGENET_INCEPTION_MEAN as IMAGENET_INCEPTION_MEAN
from .constants import IMAGENET_INCEPTION_STD as IMAGENET_INCEPTION_STD
from .dataset import DetectionDatset, SkipSubset
from .random_erasing import RandomErasing
from .samplers import EpochSampler
from .transforms import transforms_coco_eval, transforms_coco_train

MAX_NUM_INSTANCES = 100


class DetectionFastCollate:
    """Make a batch of samples (image [3, H, W] as uint8 array or tensor, target dict).

    Per-instance keys become [B, max_instances, ...] float32 tensors filled up with `instance_fill`;
    other keys are stacked. A key that some samples lack is filled with `instance_fill` for those.
    With an `anchor_labeler` the targets are labels instead: `label_cls_{level}` [B, H, W, A],
    `label_bbox_{level}` [B, H, W, 4 A], `label_num_positives` [B].

    Instances beyond `max_instances` do not fit: the first loss warns, and `dropped_instances`
    counts them (in each worker process). Labelling here never drops any.
    """

    def __init__(
        self,
        instance_keys: set[str] | None = None,
        instance_shapes: dict[str, tuple] | None = None,
        instance_fill: float = -1,
        max_instances: int = MAX_NUM_INSTANCES,
        anchor_labeler=None,
    ):
        self.instance_keys = set(instance_keys or ("bbox", "bbox_ignore", "cls"))
        self.instance_shapes = dict(instance_shapes or {})
        for key, shape in {"bbox": (4,), "bbox_ignore": (4,), "cls": ()}.items():
            self.instance_shapes.setdefault(key, (max_instances, *shape))
        self.instance_fill = instance_fill
        self.max_instances = max_instances
        self.anchor_labeler = anchor_labeler
        self.dropped_instances = 0

    def __call__(self, batch: list[tuple]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The images [B, 3, H, W], of the dtype that they have, and the targets of the batch."""
        images = torch.stack([torch.as_tensor(image) for image, _ in batch])
        targets = [target for _, target in batch]
        labelled = {"bbox", "cls", "bbox_ignore"} if self.anchor_labeler is not None else set()
        result = {}
        for key in dict.fromkeys(key for target in targets for key in target):
            if key not in labelled:
                values = [target.get(key) for target in targets]
                stack = self._stack_instances if key in self.instance_keys else self._stack
                result[key] = stack(key, values)
        if self.anchor_labeler is not None:
            result.update(self._label(targets))
        return images, result

    def _stack_instances(self, key: str, values: list) -> torch.Tensor:
        shape = self.instance_shapes.get(key)
        if shape is None:
            sample = np.asarray(next(value for value in values if value is not None))
            shape = (self.max_instances, *sample.shape[1:])
        stacked = torch.full((len(values), *shape), self.instance_fill, dtype=torch.float32)
        for row, value in zip(stacked, values, strict=True):
            if value is not None:
                kept = min(len(value), len(row))
                row[:kept] = torch.as_tensor(np.asarray(value)[:kept])
                if key == "bbox":
                    self._count_dropped(len(value) - kept, len(row))
        return stacked

    def _count_dropped(self, dropped: int, capacity: int) -> None:
        if dropped and not self.dropped_instances:
            warnings.warn(
                f"an image has {dropped + capacity} boxes, max_instances={capacity}: the last "
                f"{dropped} are left out (these and further ones are counted in "
                "dropped_instances); raise max_instances to keep them",
                stacklevel=4,
            )
        self.dropped_instances += dropped

    def _stack(self, key: str, values: list) -> torch.Tensor:
        arrays = [None if value is None else np.asarray(value) for value in values]
        sample = next(array for array in arrays if array is not None)
        if any(array is not None and array.shape != sample.shape for array in arrays):
            raise ValueError(
                f"target {key!r} has shapes {[getattr(a, 'shape', None) for a in arrays]} in one "
                "batch; name it in instance_keys to pad it"
            )
        absent = np.full_like(sample, self.instance_fill)
        stacked = np.stack([absent if array is None else array for array in arrays])
        tensor = torch.from_numpy(stacked)
        if tensor.is_floating_point():
            return tensor.float()
        return tensor.to(torch.int32) if isinstance(values[0], (tuple, list)) else tensor

    def _label(self, targets: list[dict]) -> dict[str, torch.Tensor]:
        labels = [
            self.anchor_labeler.label_anchors(
                torch.as_tensor(target["bbox"]), torch.as_tensor(target["cls"]), filter_valid=False
            )
            for target in targets
        ]
        classes, boxes, positives = zip(*labels, strict=True)
        result = {}
        for level in range(len(classes[0])):
            result[f"label_cls_{level}"] = torch.stack([image[level] for image in classes])
            result[f"label_bbox_{level}"] = torch.stack([image[level] for image in boxes])
        counts = [torch.as_tensor(count, dtype=torch.float32).reshape(()) for count in positives]
        result["label_num_positives"] = torch.stack(counts)
        return result


class PrefetchLoader:
    """Moves batches to a device and normalises them there: (x - 255 mean) / (255 std), float32.

    On CUDA the copy and the normalisation of the next batch run on a stream of their own while the
    caller works on the current one; a batch is handed over on the caller's current stream.
    """

    def __init__(
        self,
        loader: DataLoader,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        re_prob: float = 0.0,
        re_mode: str = "pixel",
        re_count: int = 1,
        device: torch.device | str | None = None,
    ):
        self.loader = loader
        self.device = _device(device)
        self.mean = (torch.tensor(mean, dtype=torch.float32) * 255).to(self.device).view(1, 3, 1, 1)
        self.std = (torch.tensor(std, dtype=torch.float32) * 255).to(self.device).view(1, 3, 1, 1)
        self.random_erasing = None
        if re_prob > 0:
            self.random_erasing = RandomErasing(
                re_prob, mode=re_mode, max_count=re_count, device=self.device
            )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        if self.device.type == "cuda":
            return self._iter_cuda()
        return (self._prepare(images, target) for images, target in self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def sampler(self):
        """The sampler of the wrapped loader."""
        return self.loader.sampler

    @property
    def dataset(self):
        """The data set of the wrapped loader."""
        return self.loader.dataset

    def _prepare(self, images: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
        sizes = target  # on the host, so that erasing needs no synchronisation
        images = images.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        target = {key: value.to(self.device, non_blocking=True) for key, value in target.items()}
        if self.random_erasing is not None:
            self.random_erasing(images, sizes)
        return images, target

    def _iter_cuda(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # for mean and std
        waiting = None
        for images, target in self.loader:
            with torch.cuda.stream(stream):
                batch = self._prepare(images, target)
                ready = stream.record_event()
            if waiting is not None:
                yield self._hand_over(*waiting)
            waiting = batch, ready
        if waiting is not None:
            yield self._hand_over(*waiting)

    def _hand_over(self, batch: tuple, ready: torch.cuda.Event) -> tuple:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        images, target = batch
        for tensor in (images, *target.values()):
            tensor.record_stream(current)
        return images, target


def create_loader(
    dataset: DetectionDatset | SkipSubset,
    input_size: int | Sequence[int],
    batch_size: int,
    is_training: bool = False,
    use_prefetcher: bool = True,
    re_prob: float = 0.0,
    re_mode: str = "pixel",
    re_count: int = 1,
    interpolation: str = "bilinear",
    fill_color: str | int | Sequence[int] = "mean",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    num_workers: int = 1,
    distributed: bool = False,
    pin_mem: bool = False,
    anchor_labeler=None,
    transform_fn: Callable | None = None,
    collate_fn: Callable | None = None,
    device: torch.device | str | None = None,
    *,
    seed: int | None = None,
    scale: tuple[float, float] = (0.1, 2.0),
    max_instances: int = MAX_NUM_INSTANCES,
    drop_last: bool = False,
    worker_init_fn: Callable[[int], None] | None = None,
) -> PrefetchLoader | DataLoader:
    """Loader of (images float32 [B, 3, H, W], target dict of tensors).

    Args:
        dataset: its `transform` is set.
        input_size: one number, (H, W) or (3, H, W), in pixels.
        batch_size: images per batch.
        is_training: shuffle, flip and scale jitter (`scale`); else letterbox, in order.
        use_prefetcher: give batches on `device`; otherwise normalised on the CPU by the workers.
        re_prob: of random erasing, in training with the prefetcher: the share of images.
        re_mode: what is put there, see `RandomErasing`.
        re_count: the most rectangles per image.
        interpolation: of the resizing, a name of Pillow's; in training also "random".
        fill_color: around the image: "mean", one level 0..255, or three.
        mean: subtracted from pixels of 0 to 1, per channel.
        std: divided by, per channel.
        num_workers: processes that load; 0: this one.
        distributed: this process's share of the samples.
        pin_mem: batches in page-locked memory.
        anchor_labeler: label in the workers, see `DetectionFastCollate`.
        transform_fn: transform in place of the built-in ones.
        collate_fn: collate in place of `DetectionFastCollate`.
        device: default is CUDA where available, else the CPU.
        seed: makes order and transforms a function of (seed, epoch) alone; see `set_epoch`.
        scale: smallest and largest factor of the scale jitter.
        max_instances: boxes kept per image.
        drop_last: leave out an incomplete last batch.
        worker_init_fn: called in each worker with its number.
    """
    size = (input_size,) * 2 if isinstance(input_size, int) else tuple(input_size)[-2:]
    if transform_fn is None:
        settings = (interpolation, use_prefetcher, fill_color, mean, std)
        if is_training:
            transform_fn = transforms_coco_train(size, *settings, scale=scale)
        else:
            transform_fn = transforms_coco_eval(size, *settings)
    dataset.transform = transform_fn
    generator = None
    if seed is not None:
        dataset.seed = seed
        generator = torch.Generator().manual_seed(seed)

    rank, world_size = (get_rank(), get_world_size()) if distributed else (0, 1)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(dataset, is_training, seed, rank, world_size),
        num_workers=num_workers,
        pin_memory=pin_mem,
        drop_last=drop_last,
        worker_init_fn=worker_init_fn,
        collate_fn=collate_fn
        or DetectionFastCollate(max_instances=max_instances, anchor_labeler=anchor_labeler),
        generator=generator,
    )
    if not use_prefetcher:
        return loader
    return PrefetchLoader(
        loader,
        mean=mean,
        std=std,
        re_prob=re_prob if is_training else 0.0,
        re_mode=re_mode,
        re_count=re_count,
        device=device,
    )


def set_epoch(loader: PrefetchLoader | DataLoader, epoch: int, first_batch: int = 0) -> None:
    """Choose the epoch of a loader of `create_loader` before iterating it.

    With a seed, order and transforms are then a function of (seed, epoch), whatever `num_workers`,
    and starting at `first_batch` gives the same batches from there on as the whole epoch does.
    """
    inner: Any = loader.loader if isinstance(loader, PrefetchLoader) else loader
    inner.sampler.set_epoch(epoch, first_batch * inner.batch_size)
    inner.dataset.set_epoch(epoch)


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
