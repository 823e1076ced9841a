"""Frames of video files and cameras, and annotated videos, by OpenCV (``pip install "effdet-kernels[video]"``)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
_STREAMS = ("rtsp://", "rtmp://", "http://", "https://")
_CAMERA = "camera"
_USUAL_RATE = 25.0  # of a source that does not say
_LARGEST_RATE = 1000.0  # what is above is a header's mistake


class VideoError(ValueError):
    """A video or camera that cannot be opened or written. The message names it."""


def is_video(text: str) -> bool:
    """Whether a command's argument means a video file, a camera ("camera", "camera:1") or a stream's address."""
    named = text.lower()
    return named.startswith(_STREAMS) or _camera(text) is not None or named.endswith(SUFFIXES)


def is_live(text: str) -> bool:
    """Whether it has no end: a camera or a stream."""
    return text.lower().startswith(_STREAMS) or _camera(text) is not None


class VideoReader:
    """The frames of a video file, camera or stream: iterate for uint8 arrays [H, W, 3], RGB.

    Args:
        source: a path, "camera" or "camera:1" for the first or second one, or the address of a stream.

    Attributes:
        rate: frames per second, on average; 25 where the source does not say, or nothing usable.
        seconds: when the last frame that was read is to be seen: of a file as it says, else since the first.
        count: frames in all as the file's header says, 0 where that is not known.

    Raises:
        ImportError: OpenCV is not installed.
        FileNotFoundError: no such file.
        VideoError: it cannot be opened.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        cv2 = _opencv()
        name = os.fspath(source)
        camera = _camera(name)
        if camera is None and not is_live(name) and not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such file")
        self._capture = cv2.VideoCapture(name if camera is None else camera)
        if not self._capture.isOpened():
            raise VideoError(f"{name}: OpenCV cannot open it; takes a video file, camera or stream")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= _LARGEST_RATE else _USUAL_RATE
        self.seconds = 0.0
        self._live, self._position = is_live(name), cv2.CAP_PROP_POS_MSEC
        self.count = 0 if self._live else max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        started, number = time.monotonic(), 0
        while True:
            there, frame = self._capture.read()
            if not there:
                return
            if self._live:
                started = started if number else time.monotonic()
                self.seconds = time.monotonic() - started
            else:
                position = self._capture.get(self._position) / 1000
                self.seconds = position if position > 0 else number / self.rate
            number += 1
            yield np.ascontiguousarray(frame[:, :, ::-1])

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._capture.release()


class VideoWriter:
    """An MP4 or AVI file of frames; it appears complete or not, and not at all without a frame.

    Args:
        path: ends in .mp4 or .avi.
        rate: frames per second.

    Raises:
        ImportError: OpenCV is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], rate: float) -> None:
        self._cv2 = _opencv()
        self.path, self.rate = Path(path), rate
        self._partial = self.path.with_name(f"{self.path.stem}.part{self.path.suffix}")
        self._writer: Any = None
        self._size: tuple[int, int] | None = None  # (width, height)

    def write(self, frame: np.ndarray) -> None:
        """Append a frame [H, W, 3] uint8, RGB; one of another size, as streams have, is brought to the first's.

        Raises:
            VideoError: the file cannot be written.
        """
        self._size = self._size or (frame.shape[1], frame.shape[0])
        if self._writer is None:
            codec = "mp4v" if self.path.suffix.lower() == ".mp4" else "MJPG"
            width, height = self._size
            code = self._cv2.VideoWriter_fourcc(*codec)
            self._writer = self._cv2.VideoWriter(
                str(self._partial), code, self.rate, (width, height)
            )
            if not self._writer.isOpened():
                raise VideoError(f"{self.path}: OpenCV cannot write it ({codec}, {width}x{height})")
        if frame.shape[1::-1] != self._size:
            frame = self._cv2.resize(frame, self._size)
        self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        self._writer.release()
        try:
            if error is None:
                self._complete()
        finally:
            self._partial.unlink(missing_ok=True)

    def _complete(self) -> None:
        # OpenCV does not say when the disk is full: the end, where the index is, is then missing.
        written = self._cv2.VideoCapture(os.fspath(self._partial))
        whole = written.isOpened()
        written.release()
        if not whole:
            raise VideoError(f"{self.path}: OpenCV could not write all of it; is the disk full?")
        os.replace(self._partial, self.path)


class Window:
    """Frames on the screen.

    Raises:
        ImportError: OpenCV is not installed.
    """

    def __init__(self, title: str) -> None:
        self._cv2 = _opencv()
        self.title = title

    def show(self, frame: np.ndarray) -> bool:
        """Show a frame [H, W, 3] uint8, RGB; False when the user has pressed q or Esc.

        Raises:
            VideoError: there is no screen, or OpenCV was built without windows.
        """
        try:
            self._cv2.imshow(self.title, np.ascontiguousarray(frame[:, :, ::-1]))
            return self._cv2.waitKey(1) & 0xFF not in (ord("q"), 27)
        except self._cv2.error as error:
            raise VideoError(
                "--show: this OpenCV opens no windows here; it takes a screen and the package"
                " opencv-python in place of opencv-python-headless"
            ) from error


def _camera(text: str) -> int | None:
    """The number of "camera" or "camera:N"; None of anything else."""
    name, colon, number = text.lower().partition(":")
    if name != _CAMERA or (colon and not number.isdigit()):
        return None
    return int(number or 0)


def _opencv() -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ImportError('video takes OpenCV: pip install "effdet-kernels[video]"') from error
    return cv2
