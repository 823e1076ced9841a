"""Videos and cameras: frames in, annotated frames and detections of each out."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from effdet import video
from effdet.cli import main
from effdet.engine.detect_video import detect_video

cv2 = pytest.importorskip("cv2")
FRAMES = 5


@pytest.fixture(scope="module")
def clip(tmp_path_factory, pictures):
    """An AVI file of drawn scenes, 10 frames a second."""
    path = tmp_path_factory.mktemp("clips") / "clip.avi"
    with video.VideoWriter(path, 10) as writer:
        for number in range(FRAMES):
            writer.write(np.asarray(Image.open(pictures[number]).convert("RGB")))
    return path


def test_frames_come_as_they_were_written(clip, pictures):
    with video.VideoReader(clip) as reader:
        assert reader.rate == 10 and reader.count == FRAMES
        frames = list(reader)
    assert len(frames) == FRAMES
    for frame, path in zip(frames, pictures, strict=False):
        picture = np.asarray(Image.open(path).convert("RGB"), np.float32)
        assert frame.shape == picture.shape and frame.dtype == np.uint8
        assert np.abs(frame - picture).mean() < 6  # JPEG; with red for blue it is far more


def test_detections_of_each_frame(detector, clip, tmp_path):
    done = detect_video(detector, str(clip), tmp_path)
    document = json.loads((tmp_path / "clip.json").read_text())
    assert done.frames == len(document["images"]) == FRAMES
    assert done.objects == len(document["annotations"]) > FRAMES
    assert [i["frame"] for i in document["images"]] == list(range(FRAMES))
    assert [i["seconds"] for i in document["images"]] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    with video.VideoReader(clip) as reader:
        wanted = [detector(frame).to_coco(n) for n, frame in enumerate(reader, start=1)]
    assert document["annotations"] == [entry for entries in wanted for entry in entries]
    with video.VideoReader(tmp_path / "clip.mp4") as drawn, video.VideoReader(clip) as plain:
        pairs = list(zip(drawn, plain, strict=True))
    for a, b in pairs:
        changed = np.abs(a.astype(int) - b).max(-1) > 60
        assert changed[:12, -60:].mean() > 0.2  # the frame rate
        assert changed[20:].mean() > 0.005  # boxes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.json", "clip.mp4"]


def test_stops_after_so_many_frames_and_writes_no_video_if_none_is_wanted(detector, clip, tmp_path):
    assert detect_video(detector, str(clip), tmp_path, draw=False, most=2).frames == 2
    assert [p.name for p in tmp_path.iterdir()] == ["clip.json"]


def test_command(cli_detect, clip, tmp_path, pictures):
    code, out, _ = cli_detect(clip, pictures[0], "--frames", 3, "--out", tmp_path)
    assert code == 0 and "objects on 3 frames" in out and "frames/s" in out
    names = ["clip.json", "clip.mp4", "detections.json", pictures[0].name]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.fixture
def cli_detect(capsys):
    def run(*arguments):
        code = main(["detect", *map(str, arguments), "--device", "cpu"])
        return code, *capsys.readouterr()

    return run


class Camera:
    """In place of cv2.VideoCapture(N): a camera that goes on until the user stops it."""

    opened: int

    def __init__(self, source, frame):
        self.frame, self.left = frame, 3
        if isinstance(source, int):
            type(self).opened = source

    def isOpened(self):
        return True

    def get(self, name):
        return 0.0

    def read(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return True, self.frame

    def release(self):
        pass


def test_a_camera_until_it_is_stopped(cli_detect, monkeypatch, tmp_path, pictures):
    frame = cv2.imread(str(pictures[0]))
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: Camera(source, frame))
    shown = []
    monkeypatch.setattr(cv2, "imshow", lambda title, image: shown.append(image), raising=False)
    monkeypatch.setattr(cv2, "waitKey", lambda delay: -1, raising=False)
    code, out, _ = cli_detect("camera:2", "--show", "--out", tmp_path)
    assert code == 0 and Camera.opened == 2 and len(shown) == 3
    assert "objects on 3 frames" in out
    monkeypatch.undo()
    document = json.loads((tmp_path / "camera_2.json").read_text())
    assert len(document["images"]) == 3
    with video.VideoReader(tmp_path / "camera_2.mp4") as reader:
        assert reader.rate == 25 and len(list(reader)) == 3


def test_a_camera_until_it_is_terminated(cli_detect, monkeypatch, tmp_path, pictures):
    class Terminated(Camera):
        def read(self):
            if self.left == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().read()

    frame = cv2.imread(str(pictures[0]))
    with monkeypatch.context() as patched:
        patched.setattr(cv2, "VideoCapture", lambda source: Terminated(source, frame))
        code, out, _ = cli_detect("camera", "--out", tmp_path)
    assert code == 0 and "objects on 1 frames" in out
    assert sorted(os.listdir(tmp_path)) == ["camera.json", "camera.mp4"]
    with video.VideoReader(tmp_path / "camera.mp4") as reader:
        assert len(list(reader)) == 1


def test_a_file_that_is_stopped_leaves_what_was_there(detector, clip, tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_text("of before")
    monkeypatch.setattr(video.VideoWriter, "write", stop_at_the_second(video.VideoWriter.write))
    with pytest.raises(KeyboardInterrupt):
        detect_video(detector, str(clip), tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"]


def stop_at_the_second(write):
    def stopping(self, frame):
        if self._writer is not None:
            raise KeyboardInterrupt
        write(self, frame)

    return stopping


def test_videos_of_one_name_are_all_kept_and_none_is_overwritten(cli_detect, clip, tmp_path):
    names = ["a/x.avi", "b/x.avi", "b/detections.avi"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(clip, tmp_path / name)
    paths = [tmp_path / name for name in names]
    assert cli_detect(*paths, paths[0], "--frames", 1, "--out", tmp_path / "out")[0] == 0
    stems = {p.stem for p in (tmp_path / "out").iterdir()}
    assert stems == {"x", "x_2", "detections_2"}
    shutil.copy(clip, tmp_path / "x.mp4")
    code, _, err = cli_detect(tmp_path / "x.mp4", "--out", tmp_path)
    assert code == 1 and "x.mp4 is one of the inputs" in err
    assert (tmp_path / "x.mp4").read_bytes() == clip.read_bytes()


class Frames:
    """In place of cv2.VideoCapture(file): frames at times of their own, in milliseconds."""

    def __init__(self, rate, count, times):
        self.properties = {cv2.CAP_PROP_FPS: rate, cv2.CAP_PROP_FRAME_COUNT: count}
        self.times = list(times)

    def isOpened(self):
        return True

    def get(self, name):
        return self.properties.get(name, 0.0)

    def read(self):
        if not self.times:
            return False, None
        self.properties[cv2.CAP_PROP_POS_MSEC] = self.times.pop(0)
        return True, np.zeros((32, 32, 3), np.uint8)

    def release(self):
        pass


@pytest.mark.parametrize(
    ("rate", "count", "times", "seconds", "note"),
    [
        (30, 120, [0, 33, 3960], [0, 0.033, 3.96], ""),  # a variable rate
        (10, 4, [0, 0, 0, 0], [0, 0.1, 0.2, 0.3], ""),  # no times at all
        (10, 100, [0, 100, 200], [0, 0.1, 0.2], "ends after 0.3 s of 10.0"),  # cut off
        (float("inf"), -9e18, [0, 0], [0, 0.04], ""),
        (float("nan"), 0, [0, 0], [0, 0.04], ""),
    ],
)
def test_times_and_length(detector, clip, tmp_path, monkeypatch, rate, count, times, seconds, note):
    monkeypatch.setattr(cv2, "VideoCapture", lambda name: Frames(rate, count, times))
    done = detect_video(detector, str(clip), tmp_path, draw=False)
    images = json.loads(done.file.read_text())["images"]
    assert [image["seconds"] for image in images] == pytest.approx(seconds)
    assert done.note.startswith(note) and bool(done.note) == bool(note)


def test_a_video_without_a_frame_is_named(cli_detect, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", lambda name: Frames(10, 5, []))
    code, _, err = cli_detect(clip, "--out", tmp_path)
    assert code == 1 and f"{clip}: no frame of it can be read" in err
    assert not list(tmp_path.iterdir())


def test_frames_of_another_size_are_brought_to_the_first(tmp_path):
    with video.VideoWriter(tmp_path / "a.mp4", 10) as writer:
        for size in ((64, 96), (32, 48), (200, 10)):
            writer.write(np.full((*size, 3), 200, np.uint8))
    with video.VideoReader(tmp_path / "a.mp4") as reader:
        frames = list(reader)
    assert [frame.shape for frame in frames] == 3 * [(64, 96, 3)]


def test_a_full_disk_leaves_no_half_of_a_video(tmp_path):
    class Full:
        def write(self, frame):
            pass

        def release(self):
            (tmp_path / "a.part.mp4").write_bytes(b"the end is missing")

    (tmp_path / "a.mp4").write_text("of before")
    with (
        pytest.raises(video.VideoError, match=r"a\.mp4: .*is the disk full"),
        video.VideoWriter(tmp_path / "a.mp4", 10) as writer,
    ):
        writer._writer = Full()
        writer.write(np.zeros((64, 64, 3), np.uint8))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"]


def test_q_ends_it(cli_detect, monkeypatch, tmp_path, clip):
    monkeypatch.setattr(cv2, "imshow", lambda title, image: None, raising=False)
    monkeypatch.setattr(cv2, "waitKey", lambda delay: ord("q"), raising=False)
    _, out, _ = cli_detect(clip, "--show", "--no-pictures", "--out", tmp_path)
    assert "objects on 1 frames" in out


def test_what_cannot_be_opened_is_named_and_the_others_go_on(cli_detect, tmp_path, clip):
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    code, out, err = cli_detect(
        text, tmp_path / "gone.mp4", clip, "--no-pictures", "--out", tmp_path / "out"
    )
    assert code == 1 and f"{FRAMES} frames" in out
    assert f"{text}: OpenCV cannot open it" in err and "gone.mp4: no such file" in err
    assert "2 of the inputs failed" in err


def test_an_error_leaves_no_half_of_a_video(clip, tmp_path):
    with pytest.raises(RuntimeError), video.VideoWriter(tmp_path / "a.mp4", 10) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_no_screen_is_said(monkeypatch):
    def imshow(title, image):
        raise cv2.error("not implemented")

    monkeypatch.setattr(cv2, "imshow", imshow, raising=False)
    with pytest.raises(video.VideoError, match="opencv-python in place of"):
        video.Window("w").show(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("text", "is_video", "is_live"),
    [
        ("a.MP4", True, False),
        ("folder/clip.webm", True, False),
        ("camera", True, True),
        ("camera:1", True, True),
        ("rtsp://host/stream", True, True),
        ("camera.png", False, False),
        ("camera:x", False, False),
        ("photos", False, False),
    ],
)
def test_kinds_of_inputs(text, is_video, is_live):
    assert (video.is_video(text), video.is_live(text)) == (is_video, is_live)
