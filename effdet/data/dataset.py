"""Detection data sets: pictures of a folder with the annotations of a parser."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.utils.data
from PIL import Image

from .image import load_image
from .parsers import Parser, create_parser
from .seeding import sample_rng


class DetectionDatset(torch.utils.data.Dataset):
    """Samples (image, target). (The spelling is the public name; `DetectionDataset` is an alias.)

    target = {"img_idx": int, "img_size": (width, height), "bbox": float32 [n, 4] in pixels, yxyx
    unless the parser is told otherwise, "cls": int64 [n], 1-based}.

    A picture stays as stored, whatever its EXIF orientation says, unless the annotations have its
    upright size.

    Args:
        data_dir: folder that the parser's file names are relative to.
        parser: a parser, or the name of one, made with `parser_kwargs`.
        transform: callable (image, target) -> (image, target).

    Attributes:
        seed: when set, the random numbers of a sample's transform depend on (seed, epoch, index)
            only; see `set_epoch`.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike,
        parser: Parser | str | None = None,
        parser_kwargs: dict | None = None,
        transform: Callable | None = None,
    ):
        super().__init__()
        if isinstance(parser, str):
            parser = create_parser(parser, **(parser_kwargs or {}))
        if not isinstance(parser, Parser):
            raise ValueError(f"parser: got {parser!r}; takes a Parser or the name of one")
        self.data_dir = Path(data_dir)
        self.seed: int | None = None
        self.epoch = 0
        self._parser = parser
        self._transform = transform
        self._warned_size = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the transforms' random numbers; call it before iterating."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._parser.img_ids)

    def __getitem__(self, index: int):
        info = self._parser.img_infos[index]
        target = {"img_idx": index, "img_size": (info["width"], info["height"])}
        if self._parser.has_labels:
            target.update(self._parser.get_ann_info(index))
        image = self._load(info)
        if self._transform is not None:
            with sample_rng(self.seed, self.epoch, index):
                image, target = self._transform(image, target)
        return image, target

    def _load(self, info: dict) -> Image.Image:
        path = self.data_dir / info["file_name"]
        image = load_image(path, exif=False)
        size = (info["width"], info["height"])
        if image.size == size:
            return image
        upright = load_image(path, exif=True)
        if upright.size == size:
            return upright
        if not self._warned_size:
            self._warned_size = True
            warnings.warn(
                f"{path}: is {image.width}x{image.height}, the annotations say "
                f"{size[0]}x{size[1]}; boxes may be misplaced in this and similar files",
                stacklevel=2,
            )
        return image

    @property
    def parser(self) -> Parser:
        """The parser, with the image list and the categories."""
        return self._parser

    @property
    def transform(self) -> Callable | None:
        """Callable (image, target) -> (image, target), or None."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        self._transform = transform


DetectionDataset = DetectionDatset


class SkipSubset(torch.utils.data.Dataset):
    """Every n-th sample of a data set."""

    def __init__(self, dataset: DetectionDatset, n: int = 2):
        if n < 1:
            raise ValueError(f"n: got {n}; takes a number from 1 on")
        self.dataset = dataset
        self.indices = range(0, len(dataset), n)

    def set_epoch(self, epoch: int) -> None:
        """As `DetectionDatset.set_epoch`."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return self.dataset[self.indices[index]]

    @property
    def seed(self) -> int | None:
        """As `DetectionDatset.seed`."""
        return self.dataset.seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self.dataset.seed = seed

    @property
    def parser(self) -> Parser:
        """The parser of the whole data set."""
        return self.dataset.parser

    @property
    def transform(self) -> Callable | None:
        """The transform of the whole data set."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        self.dataset.transform = transform
