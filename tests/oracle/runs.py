"""Batches of a whole training run in files: made once by this project, read by both sides."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Batch = tuple[Tensor, dict[str, Tensor]]


def write_batches(folder: Path, batches: Iterable[Batch], count: int) -> None:
    """Write ``count`` batches of uint8 images and targets, all of the same shapes: a .npy file for each name."""
    folder.mkdir()
    files: dict[str, np.memmap] = {}
    for number, (images, target) in enumerate(batches):
        for name, value in {"images": images, **target}.items():
            array = value.numpy()
            if name not in files:
                files[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", "w+", array.dtype, (count, *array.shape)
                )
            files[name][number] = array
    if number + 1 != count:
        raise ValueError(f"count: got {count}, but there were {number + 1} batches")
    for file in files.values():
        file.flush()


class Batches:
    """The batches of a folder, mapped into memory; images normalised with mean and std, of [0, 1]."""

    def __init__(self, folder: Path, mean: list[float], std: list[float]) -> None:
        self._arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        self._mean = (torch.tensor(mean) * 255).view(1, 3, 1, 1)
        self._std = (torch.tensor(std) * 255).view(1, 3, 1, 1)

    def __len__(self) -> int:
        return len(self._arrays["images"])

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        values = {name: torch.from_numpy(a[number].copy()) for name, a in self._arrays.items()}
        images = values.pop("images").float().sub_(self._mean).div_(self._std)
        return images, values


@torch.no_grad()
def detections(bench: nn.Module, batches: Batches) -> Tensor:
    """Rows of a predict bench for each image ``[images, 100, 6]``, in pixels of the photo."""
    bench.eval()
    return torch.cat([bench(images, target) for images, target in batches])
