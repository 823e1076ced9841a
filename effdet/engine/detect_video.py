"""Detection on a video or a camera, frame by frame."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from effdet.detector import Detector
from effdet.draw import draw_text
from effdet.files import free_name
from effdet.video import VideoError, VideoReader, VideoWriter, Window, is_live

from .detect_run import RESULT_FILE, categories, write_json
from .interrupt import StopSignal

_SMOOTHING = 0.9  # of the frame rate that is shown
_WHOLE = 0.9  # of the length that a header states: those of some containers are estimates


@dataclass(frozen=True)
class VideoSummary:
    """What became of a video: frames, objects, frames per second, the file of detections, what to tell the user."""

    frames: int
    objects: int
    rate: float
    file: Path
    note: str = ""


def detect_video(
    detector: Detector,
    source: str,
    out: Path,
    *,
    name: str = "",
    draw: bool = True,
    show: bool = False,
    most: int | None = None,
) -> VideoSummary:
    """Detect on every frame; write OUT/<name>.json and, with `draw`, OUT/<name>.mp4 with boxes and the frame rate.

    A camera or stream goes on until Ctrl-C or SIGTERM, which keep what was written, or `most` frames. Of a file that is
    not read to its end by then nothing is written.

    Args:
        detector: used frame by frame.
        source: as `effdet.video.VideoReader` takes it.
        out: an existing folder.
        name: of the files; empty: the source's.
        draw: write the annotated video.
        show: show it in a window, until q is pressed.
        most: stop after so many frames.

    Raises:
        ImportError: OpenCV is not installed.
        FileNotFoundError, VideoError: it cannot be opened, written or shown, or has no frame.
    """
    name = name or _name(source)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    started = time.perf_counter()
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal()) if is_live(source) else False
        reader = stack.enter_context(VideoReader(source))
        writer = (
            stack.enter_context(VideoWriter(out / f"{name}.mp4", reader.rate)) if draw else None
        )
        window = Window(source) if show else None
        total = min(filter(None, (reader.count, most)), default=None)
        bar = stack.enter_context(
            tqdm(total=total, desc=source, unit="frame", leave=False, disable=None)
        )
        rate, note = 0.0, ""
        try:
            last = time.perf_counter()
            for number, frame in enumerate(reader):
                found = detector(frame)
                assert not isinstance(found, list)
                now = time.perf_counter()
                rate = _smoothed(rate, 1 / max(now - last, 1e-6))
                last = now
                width, height = found.size
                place = {"file_name": source, "frame": number, "seconds": reader.seconds}
                images.append({"id": number + 1, **place, "width": width, "height": height})
                annotations += found.to_coco(number + 1)
                bar.update()
                if writer or window:
                    drawn = np.asarray(draw_text(found.draw(), f"{rate:.1f} frames/s"))
                    if writer:
                        writer.write(drawn)
                    if window and not window.show(drawn):
                        break
                if number + 1 == most or stop:
                    break
            else:
                note = _note(reader)
        except KeyboardInterrupt:
            if not is_live(source):
                raise
        if not images and not stop:
            raise VideoError(f"{source}: no frame of it can be read")
    seconds = time.perf_counter() - started
    document = {"images": images, "annotations": annotations, "categories": categories(detector)}
    write_json(document, out / f"{name}.json")
    rate = len(images) / max(seconds, 1e-6)
    return VideoSummary(len(images), len(annotations), rate, out / f"{name}.json", note)


def output_names(sources: Sequence[str]) -> dict[str, str]:
    """A name without suffix for the outputs of each source: its own, numbered where two are the same."""
    used = {Path(RESULT_FILE).stem}
    return {source: free_name(_name(source), "", used) for source in sources}


def _note(reader: VideoReader) -> str:
    """What to say of a file that ends early, as one does that was cut off."""
    length = reader.count / reader.rate
    read = reader.seconds + 1 / reader.rate
    if read >= _WHOLE * length:
        return ""
    return f"ends after {read:.1f} s of {length:.1f}; the rest of it cannot be read"


def _smoothed(before: float, now: float) -> float:
    return _SMOOTHING * before + (1 - _SMOOTHING) * now if before else now


def _name(source: str) -> str:
    """A file name without suffix for the outputs."""
    if is_live(source):
        return "".join(c if c.isalnum() else "_" for c in source)
    return Path(source).stem
