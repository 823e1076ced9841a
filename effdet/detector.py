"""A model ready to look at pictures, of any kind and size, one or many."""

from __future__ import annotations

import numbers
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .bench import DetBenchPredict, unwrap_bench
from .data import transforms as T
from .detections import Detections
from .engine.data import input_geometry
from .engine.devices import resolve_device
from .engine.weights import LoadedModel, default_class_names, load_model
from .errors import check_number
from .padding import Size
from .pictures import find_pictures, read_picture

_BATCH_ON_GPU = 16
_SHARE = "a number in [0, 1]", numbers.Real, 0, 1
_COUNT = "an integer >= 1", numbers.Integral, 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Prepared(NamedTuple):
    """A picture as the network takes it."""

    source: Path | Image.Image
    size: Size  # (width, height) of the picture
    scale: float  # its size / the letterbox's
    pixels: np.ndarray  # [H, W, 3] uint8


class Detector:
    """Find objects on pictures: letterbox, normalise, run, scale back, keep what scores enough.

    Args:
        model: a configuration's name (see ``effdet models``), with its published COCO weights unless `checkpoint` is
            given; or an `EfficientDet` or a bench of one, used as it is on its device, in eval mode (each use puts
            it there), or copied to another device or dtype. Empty, without a checkpoint: the small model that comes
            with the package.
        checkpoint: a weights file, or hf://owner/name; a file of ``effdet train`` says which model it is for.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", …
        dtype: "auto" (bfloat16 on a GPU of compute capability 8.0 or later, else float32), "float32", "bfloat16",
            "float16", or a torch dtype.
        size: (height, width) that pictures are letterboxed to; None: the model's own.
        score: lowest score to keep, in [0, 1]; as an attribute it may be changed.
        max_det: most objects per picture.
        soft_nms: suppress overlaps with gaussian soft-NMS instead of hard NMS.
        iou_threshold, sigma, class_agnostic, max_per_class: see `effdet.postprocess.Suppression`.
        class_names: name of label 1, 2, … in place of the checkpoint's.
        batch_size: pictures per call of the network; None: 16 on a GPU, 1 on a CPU.
        workers: threads that read and letterbox pictures ahead of the network.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range.
        KeyError: no such model.
        CheckpointError: the file is unusable, or does not fit the model.
        OSError: no such file, or weights cannot be downloaded.
    """

    def __init__(
        self,
        model: str | nn.Module = "",
        *,
        checkpoint: str | os.PathLike[str] = "",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        size: Size | None = None,
        score: float = 0.3,
        max_det: int = 100,
        soft_nms: bool = False,
        iou_threshold: float | None = None,
        sigma: float | None = None,
        class_agnostic: bool = False,
        max_per_class: int | None = None,
        class_names: Sequence[str] | None = None,
        batch_size: int | None = None,
        workers: int = 2,
    ) -> None:
        check_number("score", score, *_SHARE)
        check_number("max_det", max_det, *_COUNT)
        check_number("workers", workers, *_COUNT)
        if batch_size is not None:
            check_number("batch_size", batch_size, *_COUNT)
        size = None if size is None else _checked_size(size)
        # A model that is given stays where it is, if nothing is said.
        if isinstance(model, nn.Module) and device == "auto":
            self.device = next(model.parameters()).device
        else:
            self.device = resolve_device(str(device))
        self.dtype = _resolve_dtype(dtype, self.device)
        loaded = _loaded(model, checkpoint, size)
        self.name, self.source = loaded.name, loaded.source
        self.class_names = _checked_names(class_names, loaded.class_names)
        self.category_ids = list(loaded.category_ids)
        self.score = score
        self.batch_size = batch_size or (_BATCH_ON_GPU if self.device.type == "cuda" else 1)
        self.workers = workers
        own_size, mean, std, fill = input_geometry(loaded.model.config)
        self.size = size or own_size
        self._letterbox = T.ResizePad(target_size=self.size, fill_color=fill)
        self._mean, self._std = (
            (torch.tensor(value).view(1, 3, 1, 1) * 255).to(self.device) for value in (mean, std)
        )
        self.bench = DetBenchPredict(_placed(loaded.model, self.device, self.dtype)).eval()
        self.bench.set_suppression(
            max_det=max_det,
            soft_nms=soft_nms,
            iou_threshold=iou_threshold,
            sigma=sigma,
            class_agnostic=class_agnostic,
            max_per_class=max_per_class,
        )

    def __call__(self, images: Any) -> Detections | list[Detections]:
        """Detect on a picture, or on several.

        Args:
            images: a path, PIL image, uint8 array [H, W, 3] or [H, W] (RGB, not OpenCV's BGR), or tensor [3, H, W]
                (uint8, or floating in [0, 1]); or several: a list of these, a folder's path or a tensor [B, 3, H, W].
                A file is turned upright as its EXIF tag says; what is no file is taken as it is.

        Returns:
            `Detections` of one picture, or a list with one for each, in order; of a folder in the order of its names.

        Raises:
            ImageError: a file holds no picture. TypeError, ValueError: this is no picture.
            OSError: a file cannot be opened.
        """
        folder = isinstance(images, (str, os.PathLike)) and os.path.isdir(images)
        batch = isinstance(images, Tensor) and images.ndim == 4
        if folder or batch or isinstance(images, (list, tuple)):
            return list(self.stream(images))
        return self._detect([self._prepare(images)])[0]

    def stream(
        self,
        images: Iterable[Any],
        on_error: Callable[[Any, Exception], object] | None = None,
    ) -> Iterator[Detections]:
        """Detect on many pictures; reading goes ahead of the network, and few are in memory at a time.

        Args:
            images: any number of single pictures as a call takes them; or a folder's path.
            on_error: called with a picture that cannot be read and its error (ImageError, OSError, TypeError,
                ValueError, or what else a reader of files raises), and the others go on; None: it is raised.

        Raises:
            TypeError: `images` is one picture.
        """
        batch: list[_Prepared] = []
        for prepared in self._ahead(_several(images), on_error):
            batch.append(prepared)
            if len(batch) == self.batch_size:
                yield from self._detect(batch)
                batch = []
        if batch:
            yield from self._detect(batch)

    def warmup(self, batch: int = 1) -> None:
        """Do now what the first call of `batch` pictures would do once: compile, pack weights, record, capture."""
        check_number("batch", batch, *_COUNT)
        height, width = self.size
        self._detect([self._prepare(Image.new("RGB", (width, height)))] * batch)

    def _ahead(
        self, images: Iterable[Any], on_error: Callable[[Any, Exception], object] | None
    ) -> Iterator[_Prepared]:
        """Pictures prepared by threads, in order, a batch and two per thread ahead."""
        waiting: deque[tuple[Any, Future[_Prepared]]] = deque()
        most = self.batch_size + 2 * self.workers
        with ThreadPoolExecutor(self.workers) as pool:
            for image in images:
                waiting.append((image, pool.submit(self._prepare, image)))
                if len(waiting) >= most:
                    yield from _finished(*waiting.popleft(), on_error)
            while waiting:
                yield from _finished(*waiting.popleft(), on_error)

    def _prepare(self, image: Any) -> _Prepared:
        path = Path(image) if isinstance(image, (str, os.PathLike)) else None
        picture = read_picture(image)
        resized, target = self._letterbox(picture, {"img_size": picture.size})
        return _Prepared(path or picture, picture.size, target["img_scale"], np.asarray(resized))

    def _detect(self, batch: list[_Prepared]) -> list[Detections]:
        # Results are picked from the rows out here: inference mode's tensors may not be written to.
        rows = self._rows(batch)
        return [
            self._result(of_one, prepared) for of_one, prepared in zip(rows, batch, strict=True)
        ]

    @torch.inference_mode()
    def _rows(self, batch: list[_Prepared]) -> Tensor:
        """Rows [B, max_det, 6] of the bench, on the CPU."""
        if self.bench.model.training:  # a training loop may have gone on with it
            self.bench.eval()
        pixels = torch.from_numpy(np.stack([p.pixels for p in batch])).permute(0, 3, 1, 2)
        x = (pixels.to(self.device) - self._mean) / self._std
        info = {
            "img_scale": torch.tensor([p.scale for p in batch], device=self.device),
            "img_size": torch.tensor([p.size for p in batch], device=self.device),
        }
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        # What is found stays the same: picks come in the order of their scores, so those below
        # `score` suppress none that are kept. The bench's scores are above its threshold.
        check_number("score", self.score, *_SHARE)
        below = float(np.nextafter(np.float32(self.score), np.float32(0)))
        least = max(below, self.bench.suppression().least_score)
        return self.bench(x, info, score_threshold=least).cpu()

    def _result(self, rows: Tensor, prepared: _Prepared) -> Detections:
        rows = rows[(rows[:, 5] > 0) & (rows[:, 4] >= self.score)]
        return Detections(
            rows[:, :4],
            rows[:, 4],
            rows[:, 5].long(),
            self.class_names,
            self.category_ids,
            prepared.size,
            prepared.source,
        )


def _finished(
    image: Any, future: Future[_Prepared], on_error: Callable[[Any, Exception], object] | None
) -> Iterator[_Prepared]:
    """What becomes of `image`, or nothing where it cannot be read."""
    try:
        prepared = future.result()
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        if on_error is None:
            raise
        on_error(image, error)
    else:
        yield prepared


def _several(images: Any) -> Iterable[Any]:
    """`images` if they are several; those in a folder.

    Raises:
        TypeError: they are one.
    """
    path = isinstance(images, (str, os.PathLike))
    if path and os.path.isdir(images):
        return find_pictures(images)
    array = isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4
    if path or array or isinstance(images, (bytes, Image.Image)):
        raise TypeError(
            f"images: got one {type(images).__name__}, takes several pictures, e.g. a list"
        )
    return images


def _checked_size(size: Sequence[int]) -> Size:
    takes = "takes (height, width), two integers >= 1"
    if isinstance(size, str) or not isinstance(size, Sequence):
        raise TypeError(f"size: got {size!r}, {takes}")
    if len(size) != 2 or not all(isinstance(n, numbers.Integral) and n >= 1 for n in size):
        raise ValueError(f"size: got {size!r}, {takes}")
    return int(size[0]), int(size[1])


def _checked_names(names: Sequence[str] | None, own: Sequence[str]) -> list[str]:
    """The names to use in place of the model's own."""
    if names is None:
        return list(own)
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names: got {names!r}, takes a list of strings")
    if len(names) != len(own):
        raise ValueError(
            f"class_names: got {len(names)} names, takes {len(own)}, one for each class of the model"
        )
    return list(names)


def _loaded(
    model: str | nn.Module, checkpoint: str | os.PathLike[str], size: Size | None
) -> LoadedModel:
    if not isinstance(model, nn.Module):
        if not isinstance(model, str):
            raise TypeError(f"model: got {type(model).__name__}, takes a name or an EfficientDet")
        return load_model(model, checkpoint, size)
    bare: Any = unwrap_bench(model)
    if checkpoint:
        raise ValueError("checkpoint: got a file with a model that has its weights, takes none")
    if not hasattr(bare, "config"):
        raise TypeError(f"model: got {type(bare).__name__}, takes a name or an EfficientDet")
    names = default_class_names(bare.config.num_classes)
    return LoadedModel(bare, bare.config.name, names, list(range(1, len(names) + 1)), "as given")


def _placed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`model` on the device and in the dtype: itself where it is so already, else a copy."""
    weight = next(model.parameters())
    if weight.device == device and weight.dtype == dtype:
        return model
    return deepcopy(model).to(device, dtype)


def _resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float32
    known = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if known is None or known not in _DTYPES.values():
        raise ValueError(f"dtype: got {dtype!r}, takes auto, {', '.join(_DTYPES)}")
    return known
