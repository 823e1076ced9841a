"""Detection on a video or a camera, frame by frame."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from effdet.detector import Detector
from effdet.draw import draw_text
from effdet.video import VideoReader, VideoWriter, Window, is_live

from .detect_run import categories, write_json

_SMOOTHING = 0.9  # of the frame rate that is shown


@dataclass(frozen=True)
class VideoSummary:
    """What became of a video: frames, objects, frames per second, the file of detections."""

    frames: int
    objects: int
    rate: float
    file: Path


def detect_video(
    detector: Detector,
    source: str,
    out: Path,
    *,
    draw: bool = True,
    show: bool = False,
    most: int | None = None,
) -> VideoSummary:
    """Detect on every frame; write OUT/<name>.json and, with `draw`, OUT/<name>.mp4 with boxes and the frame rate.

    A camera or stream goes on until Ctrl-C, which keeps what was written, or `most` frames.

    Args:
        detector: used frame by frame.
        source: as `effdet.video.VideoReader` takes it.
        out: an existing folder.
        draw: write the annotated video.
        show: show it in a window, until q is pressed.
        most: stop after so many frames.

    Raises:
        ImportError: OpenCV is not installed.
        FileNotFoundError, VideoError: it cannot be opened, written or shown.
    """
    name = _name(source)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    started = time.perf_counter()
    with ExitStack() as stack:
        reader = stack.enter_context(VideoReader(source))
        writer = (
            stack.enter_context(VideoWriter(out / f"{name}.mp4", reader.rate)) if draw else None
        )
        window = Window(source) if show else None
        total = min(filter(None, (reader.count, most)), default=None)
        bar = stack.enter_context(
            tqdm(total=total, desc=source, unit="frame", leave=False, disable=None)
        )
        rate = 0.0
        try:
            last = time.perf_counter()
            for number, frame in enumerate(reader):
                found = detector(frame)
                assert not isinstance(found, list)
                now = time.perf_counter()
                rate = _smoothed(rate, 1 / max(now - last, 1e-6))
                last = now
                width, height = found.size
                place = {"file_name": source, "frame": number, "seconds": number / reader.rate}
                images.append({"id": number + 1, **place, "width": width, "height": height})
                annotations += found.to_coco(number + 1)
                bar.update()
                if writer or window:
                    drawn = np.asarray(draw_text(found.draw(), f"{rate:.1f} frames/s"))
                    if writer:
                        writer.write(drawn)
                    if window and not window.show(drawn):
                        break
                if number + 1 == most:
                    break
        except KeyboardInterrupt:
            if not is_live(source):
                raise
    seconds = time.perf_counter() - started
    document = {"images": images, "annotations": annotations, "categories": categories(detector)}
    write_json(document, out / f"{name}.json")
    return VideoSummary(
        len(images), len(annotations), len(images) / max(seconds, 1e-6), out / f"{name}.json"
    )


def _smoothed(before: float, now: float) -> float:
    return _SMOOTHING * before + (1 - _SMOOTHING) * now if before else now


def _name(source: str) -> str:
    """A file name without suffix for the outputs."""
    if is_live(source):
        return "".join(c if c.isalnum() else "_" for c in source)
    return Path(source).stem
