"""``effdet detect``: find objects on pictures."""

from __future__ import annotations

import argparse
import glob
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from effdet.files import replacing

from .options import (
    add_command,
    add_model_options,
    add_suppression_options,
    share_type,
    suppression_of,
)

if TYPE_CHECKING:
    from effdet.engine.detector import Detections

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TEXT = """\
Writes OUT/<name> with the boxes drawn and OUT/detections.json: the list of files and the
detections in COCO's result format (bbox is x, y, width, height in pixels of the file, upright).
A file that is no picture is reported, the others are still processed, and the exit code is 1.
The table's time is from the picture to its boxes; that of the first includes one-time set-up.

examples:
  effdet detect street.jpg                             the small bundled model
  effdet detect photos/ 'more/*.png' --out boxes --model tf_efficientdet_d0 --score 0.4
  effdet detect photos/ --checkpoint run/best.pth      a model of `effdet train`
"""


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "detect", "find objects on pictures and draw them", _TEXT)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders or patterns")
    parser.add_argument(
        "--out", default="detections", metavar="DIR", help="where to write (default: detections)"
    )
    parser.add_argument(
        "--score", type=share_type, default=0.3, help="lowest score to keep (default: 0.3)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write detections.json only")
    add_model_options(parser)
    add_suppression_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from effdet.data import load_image
    from effdet.draw import draw_detections
    from effdet.engine.detector import Detector
    from effdet.engine.devices import resolve_device
    from effdet.engine.weights import load_model

    files, failures = find_images(args.images)
    for failure in failures:
        _report(failure)
    if not files:
        return 1
    loaded = load_model(args.model, args.checkpoint, args.size)
    device = resolve_device(args.device)
    detector = Detector(loaded.model, device, args.score, **suppression_of(args))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{loaded.name} at {detector.size[0]}x{detector.size[1]}, weights {loaded.source}")
    column = max(len(str(f)) for f in files)
    print(f"{'file':<{column}}  {'size':>11}  {'boxes':>5}  {'ms':>7}")
    names = _output_names(files)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file in files:
        try:
            picture = load_image(file)
            start = time.perf_counter()
            found = detector(picture)
            elapsed = 1000 * (time.perf_counter() - start)
            if not args.no_pictures:
                drawn = draw_detections(
                    picture,
                    found.boxes.tolist(),
                    found.labels.tolist(),
                    found.scores.tolist(),
                    loaded.class_names,
                )
                _save_picture(drawn, out / names[file])
        except (ValueError, OSError) as error:
            message = str(error) if str(file) in str(error) else f"{file}: {error}"
            failures.append(message)
            _report(message)
            continue
        width, height = picture.size
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": str(file), "width": width, "height": height})
        annotations += _coco_results(found, image_id, loaded.category_ids)
        size = f"{width}x{height}"
        print(f"{file!s:<{column}}  {size:>11}  {len(found.boxes):>5}  {elapsed:>7.1f}")
    categories = [
        {"id": i, "name": name}
        for i, name in zip(loaded.category_ids, loaded.class_names, strict=True)
    ]
    target = out / "detections.json"
    document = {"images": images, "annotations": annotations, "categories": categories}
    with replacing(target) as partial:
        partial.write_text(json.dumps(document))
    print(f"{len(annotations)} objects on {len(images)} pictures: {target}")
    if failures:
        _report(f"{len(failures)} of the inputs failed")
    return 1 if failures else 0


def find_images(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Expand files, folders (their pictures, not recursive) and patterns; without duplicates.

    Returns:
        The files in the order given, sorted within a folder or pattern, and one message for each
        argument that leads to no file.
    """
    files: dict[Path, None] = {}
    failures = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not found:
                failures.append(f"{argument}: the folder holds no pictures ({_suffixes()})")
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(argument, recursive=True))
            found = [p for p in found if p.is_file()]
            if not found:
                failures.append(f"{argument}: no such file, folder or pattern")
        files.update(dict.fromkeys(found))
    return list(files), failures


def _output_names(files: list[Path]) -> dict[Path, str]:
    """A file name in the output folder for each input: its own, numbered where two are the same."""
    names: dict[Path, str] = {}
    used: set[str] = set()
    for file in files:
        suffix = file.suffix.lower() if file.suffix.lower() in (".jpg", ".jpeg") else ".png"
        name, number = f"{file.stem}{suffix}", 1
        while name.lower() in used:
            number += 1
            name = f"{file.stem}_{number}{suffix}"
        used.add(name.lower())
        names[file] = name
    return names


def _coco_results(found: Detections, image_id: int, ids: list[int]) -> list[dict[str, Any]]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": ids[label - 1],
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(score, 5),
        }
        for (x0, y0, x1, y1), score, label in rows
    ]


def _save_picture(picture: Image.Image, target: Path) -> None:
    kind = "JPEG" if target.suffix in (".jpg", ".jpeg") else "PNG"
    with replacing(target) as partial:
        picture.save(partial, format=kind, **({"quality": 92} if kind == "JPEG" else {}))


def _suffixes() -> str:
    return " ".join(sorted(_SUFFIXES))


def _report(message: str) -> None:
    print(f"effdet detect: {message}", file=sys.stderr)
