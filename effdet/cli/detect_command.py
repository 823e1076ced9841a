"""``effdet detect``: find objects on pictures, videos and cameras."""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effdet.files import free_name

from .options import (
    add_command,
    add_model_options,
    add_suppression_options,
    positive_int,
    share_type,
    suppression_of,
)

if TYPE_CHECKING:
    from effdet.detections import Detections
    from effdet.detector import Detector
    from effdet.engine.detect_run import Picture

_TEXT = """\
Writes OUT/<name> with the boxes drawn and OUT/detections.json: the list of files and the
detections in COCO's result format (bbox is x, y, width, height in pixels of the file, upright).
A file that is no picture is reported, the others are still processed, and the exit code is 1.
The table's time is that since the line before; the first includes one-time set-up.
A video gives OUT/<name>.mp4 and OUT/<name>.json, a camera until Ctrl-C, with the frame rate.

examples:
  effdet detect street.jpg                             the small bundled model
  effdet detect photos/ 'more/*.png' --out boxes --model tf_efficientdet_d0 --score 0.4
  effdet detect photos/ --checkpoint run/best.pth      a model of `effdet train`
  effdet detect data/annotations/instances_val.json    the pictures that it lists, with their ids
  effdet detect clip.mp4                               a video
  effdet detect camera:0 --show                        a camera, in a window
  torchrun --nproc-per-node 8 -m effdet detect photos/ --resume
                                                       shared out; stopped, it goes on where it was
"""


def add_parser(commands: Any) -> None:
    """The command and its options, added to the subparsers of ``effdet``."""
    parser = add_command(
        commands, "detect", "find objects on pictures and videos and draw them", _TEXT
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders or patterns of pictures; a COCO annotation file; a video; camera:N",
    )
    parser.add_argument(
        "--out", default="detections", metavar="DIR", help="where to write (default: detections)"
    )
    parser.add_argument(
        "--score", type=share_type, default=0.3, help="lowest score to keep (default: 0.3)"
    )
    parser.add_argument(
        "--no-pictures", action="store_true", help="write the json only, no picture or video"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what a run with the same --out has done"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="default: 16 on a GPU, 1 on a CPU"
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=2,
        metavar="N",
        help="threads that read (default: 2)",
    )
    parser.add_argument(
        "--dtype", default="auto", help="auto (default), float32, bfloat16 or float16"
    )
    parser.add_argument("--show", action="store_true", help="videos: show the frames; q stops")
    parser.add_argument(
        "--frames", type=positive_int, metavar="N", help="videos: stop after so many frames"
    )
    add_model_options(parser)
    add_suppression_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Detect on all inputs; the exit status."""
    from effdet.engine.detect_run import of_all, patient_group
    from effdet.engine.detect_video import output_names
    from effdet.engine.processes import joined
    from effdet.video import is_video

    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may have letters that the terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    videos = list(dict.fromkeys(text for text in args.inputs if is_video(text)))
    pictures, failures = find_images(
        [text for text in args.inputs if text not in videos], not args.no_pictures
    )
    video_names = output_names(videos)
    _refuse_overwriting(args, pictures, list(video_names.values()))
    with joined(args.device) as processes:
        first = processes.rank == 0
        group = patient_group(processes)
        if first:
            for failure in failures:
                _report(failure)
        if not pictures and not videos:
            return 1
        detector = _detector(args, processes.device)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        if first:
            size = f"{detector.size[0]}x{detector.size[1]}"
            print(f"{detector.name} at {size}, weights {detector.source}")
        own: list[str] = []
        if pictures:
            own += _detect_pictures(args, detector, pictures, processes)
        for video in videos[processes.rank :: processes.count]:
            own += _detect_video(args, detector, video, video_names[video])
        failures += of_all(own, group)
        if failures and first:
            _report(f"{len(failures)} of the inputs failed")
    return 1 if failures else 0


def _detector(args: argparse.Namespace, device: Any) -> Detector:
    from effdet.detector import Detector

    return Detector(
        args.model,
        checkpoint=args.checkpoint,
        device=device,
        dtype=args.dtype,
        size=args.size,
        score=args.score,
        batch_size=args.batch_size,
        workers=args.workers,
        **suppression_of(args),
    )


def _detect_pictures(
    args: argparse.Namespace, detector: Detector, pictures: list[Picture], processes: Any
) -> list[str]:
    """Detect on pictures, this process's share of them; what failed."""
    from effdet.engine.detect_run import only_run

    alone = only_run(Path(args.out)) if processes.rank == 0 else contextlib.nullcontext()
    with alone:
        return _run_pictures(args, detector, pictures, processes)


def _run_pictures(
    args: argparse.Namespace, detector: Detector, pictures: list[Picture], processes: Any
) -> list[str]:
    from effdet.engine.detect_run import RESULT_FILE, DetectionRun

    out = Path(args.out)
    work = DetectionRun(detector, pictures, out, processes, resume=args.resume)
    if work.done_before and processes.rank == 0:
        print(f"{work.done_before} of {len(pictures)} pictures were done before")
    column = max(len(str(p.file)) for p in pictures)
    alone = processes.count == 1
    if alone:
        print(f"{'file':<{column}}  {'size':>11}  {'boxes':>5}  {'ms':>7}")
    failures: list[str] = []
    last = time.perf_counter()

    def progress(picture: Picture, found: Detections) -> None:
        nonlocal last
        now = time.perf_counter()
        size = f"{found.size[0]}x{found.size[1]}"
        if alone:
            elapsed = 1000 * (now - last)
            print(f"{picture.file!s:<{column}}  {size:>11}  {len(found):>5}  {elapsed:>7.1f}")
        last = now

    def failed(message: str) -> None:
        failures.append(message)
        _report(message)

    work.run(progress, failed)
    document = work.merge()
    if document is not None:
        objects, images = len(document["annotations"]), len(document["images"])
        print(f"{objects} objects on {images} pictures: {out / RESULT_FILE}")
    return failures


def _detect_video(
    args: argparse.Namespace, detector: Detector, source: str, name: str
) -> list[str]:
    """Detect on one video or camera; what failed."""
    from effdet.engine.detect_video import detect_video
    from effdet.video import VideoError

    try:
        done = detect_video(
            detector,
            source,
            Path(args.out),
            name=name,
            draw=not args.no_pictures,
            show=args.show,
            most=args.frames,
        )
    except (VideoError, OSError) as error:
        _report(str(error))
        return [str(error)]
    if done.note:
        _report(f"{source}: {done.note}")
    print(
        f"{source}: {done.objects} objects on {done.frames} frames,"
        f" {done.rate:.1f} frames/s: {done.file}"
    )
    return []


def find_images(arguments: list[str], draw: bool = True) -> tuple[list[Picture], list[str]]:
    """Expand files, folders (their pictures, not recursive), patterns and COCO annotation files; without duplicates.

    Args:
        arguments: of the command.
        draw: whether pictures get a name for an annotated copy.

    Returns:
        The pictures in the order given, sorted within a folder or pattern, and one message for each
        argument that leads to no file.
    """
    from effdet.data import listed_pictures
    from effdet.engine.detect_run import Picture
    from effdet.pictures import find_pictures

    files: dict[Path, int | str | None] = {}
    failures = []
    for argument in arguments:
        path = Path(argument)
        ids: dict[Path, Any] = {}
        try:
            if path.is_dir():
                ids = dict.fromkeys(find_pictures(path))
            elif path.suffix.lower() == ".json" and path.exists():
                ids = listed_pictures(path)
            elif path.exists():
                ids = {path: None}
            else:
                found = sorted(Path(p) for p in glob.glob(argument, recursive=True))
                ids = dict.fromkeys(p for p in found if p.is_file())
                if not ids:
                    raise FileNotFoundError(f"{argument}: no such file, folder or pattern")
            _add(files, ids, argument)
        except (OSError, ValueError) as error:
            failures.append(str(error))
    names = _output_names(list(files)) if draw else {}
    pictures = [Picture(file, names.get(file), image_id) for file, image_id in files.items()]
    return pictures, failures


def _add(files: dict[Path, Any], more: dict[Path, Any], argument: str) -> None:
    """Add pictures with their ids, or None, to `files`.

    Raises:
        ValueError: another picture has the id.
    """
    owner = {image_id: file for file, image_id in files.items() if image_id is not None}
    for file, image_id in more.items():
        if image_id is not None and owner.setdefault(image_id, file) != file:
            raise ValueError(
                f"{argument}: the id {image_id} of {file} is that of {owner[image_id]}, too;"
                " takes data sets with different ids, or a run for each"
            )
    for file, image_id in more.items():
        if files.get(file) is None:
            files[file] = image_id


def _refuse_overwriting(
    args: argparse.Namespace, pictures: list[Picture], videos: list[str]
) -> None:
    """Raises ValueError where a file that would be written is one of the inputs."""
    from effdet.engine.detect_run import RESULT_FILE

    out = Path(args.out)
    inputs = {p.file for p in pictures} | {Path(text) for text in args.inputs}
    here = {folder for folder in {p.parent for p in inputs} if folder.resolve() == out.resolve()}
    written = {p.drawn_name.lower() for p in pictures if p.drawn_name}
    written |= {name.lower() + suffix for name in videos for suffix in (".mp4", ".json")}
    written |= {RESULT_FILE} if pictures else set()
    lost = sorted(p for p in inputs if p.parent in here and p.name.lower() in written)
    if lost:
        raise ValueError(
            f"out: {lost[0]} is one of the inputs and would be replaced; takes another folder"
        )


def _output_names(files: list[Path]) -> dict[Path, str]:
    """A file name in the output folder for each input: its own, numbered where two are the same."""
    names: dict[Path, str] = {}
    used: set[str] = set()
    for file in files:
        suffix = file.suffix.lower() if file.suffix.lower() in (".jpg", ".jpeg") else ".png"
        names[file] = free_name(file.stem, suffix, used)
    return names


def _report(message: str) -> None:
    print(f"effdet detect: {message}", file=sys.stderr)
