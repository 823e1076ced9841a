"""Detection on many files: shared out among processes, continued after a stop, merged into one result.

OUT/parts/ holds what is done so far: `settings.json`, what results depend on, and a file of JSON lines for each
process, a line for each picture. A line is written when its picture's results are complete; one that a kill cut off
counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from effdet.detections import Detections
from effdet.detector import Detector
from effdet.files import replacing

from .processes import Processes

RESULT_FILE = "detections.json"
_PARTS, _SETTINGS = "parts", "settings.json"
_PATIENCE = timedelta(days=7)  # of a process that has done its share before the others


@dataclass(frozen=True)
class Picture:
    """A file to look at.

    Attributes:
        file: its path.
        drawn_name: name of the annotated copy in the output folder.
        image_id: its id in the data set that lists it; None: it is numbered.
    """

    file: Path
    drawn_name: str
    image_id: int | str | None = None


class DetectionRun:
    """The detections of a list of pictures, in a folder.

    Args:
        detector: used on this process's share.
        pictures: all of them, the same on every process.
        out: the folder, seen by every process; made if need be.
        processes: this one among them.
        resume: what an earlier run with the same settings has done stays, whatever its number of processes.

    Raises:
        ValueError: `resume` of a run with other settings, named in the message.
        RuntimeError: the processes do not see the same folder.
    """

    def __init__(
        self,
        detector: Detector,
        pictures: Sequence[Picture],
        out: Path,
        processes: Processes,
        *,
        resume: bool = False,
    ) -> None:
        self.detector, self.pictures, self.out = detector, list(pictures), out
        self.processes = processes
        self._parts = out / _PARTS
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self._several else None
        settings = _settings(detector)
        if processes.rank == 0:
            self._begin(settings, resume)
        self._wait()
        self._check(settings)
        done = self._records()
        todo = [p for p in self.pictures if "error" in done.get(str(p.file), {"error": ""})]
        self.done_before = len(self.pictures) - len(todo)
        self.share = todo[processes.rank :: processes.count]
        self._wait()  # all have read before one writes

    def run(
        self, draw: bool, progress: Callable[[Picture, Detections], object], failed: Callable
    ) -> None:
        """Detect on this process's share.

        Args:
            draw: also write annotated pictures.
            progress: called with each picture and its detections, once they are kept.
            failed: called with the path and the error of each file that cannot be used.
        """
        by_file = {p.file: p for p in self.share}
        with self._open_part() as part:

            def fail(file: Path, error: Exception) -> None:
                message = str(error) if str(file) in str(error) else f"{file}: {error}"
                _append(part, {"file": str(file), "error": message})
                failed(message)

            for found in self.detector.stream(by_file, on_error=fail):
                assert isinstance(found.source, Path)
                picture = by_file[found.source]
                if draw:
                    try:
                        save_picture(found.draw(), self.out / picture.drawn_name)
                    except (OSError, ValueError) as error:
                        fail(picture.file, error)
                        continue
                _append(part, _record(found))
                progress(picture, found)

    def merge(self) -> dict[str, Any] | None:
        """Wait for all processes; on process 0 write `detections.json` and return its content.

        Pictures are in the order of the list, without those that failed. If none did the parts are removed; else they
        stay, so that a run with `resume` tries just these again.
        """
        self._wait()
        if self.processes.rank:
            return None
        records = self._records()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        complete = True
        for picture in self.pictures:
            record = records.get(str(picture.file), {"error": ""})
            if "error" in record:
                complete = False
                continue
            image_id = len(images) + 1 if picture.image_id is None else picture.image_id
            size = {"width": record["width"], "height": record["height"]}
            images.append({"id": image_id, "file_name": str(picture.file), **size})
            annotations += [{**entry, "image_id": image_id} for entry in record["annotations"]]
        document = {
            "images": images,
            "annotations": annotations,
            "categories": categories(self.detector),
        }
        write_json(document, self.out / RESULT_FILE)
        if complete:
            shutil.rmtree(self._parts)
        return document

    @property
    def _several(self) -> bool:
        return self.processes.count > 1

    def _wait(self) -> None:
        if self._several:
            dist.barrier(group=self._group)

    def _begin(self, settings: dict[str, Any], resume: bool) -> None:
        if resume and (self._parts / _SETTINGS).exists():
            return
        if self._parts.exists():
            shutil.rmtree(self._parts)
        self._parts.mkdir(parents=True)
        write_json(settings, self._parts / _SETTINGS)

    def _check(self, settings: dict[str, Any]) -> None:
        """Whether what is in the folder is of this run."""
        try:
            found = json.loads((self._parts / _SETTINGS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RuntimeError(
                f"out: {self.out.absolute()} of process {self.processes.rank} is not the folder of"
                " process 0; takes one that all of them see"
            ) from None
        for name, value in settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"resume: {self.out} holds results with {name} {found.get(name)!r}, this run has"
                    f" {value!r}; takes the same, another folder, or a run without resume"
                )

    def _records(self) -> dict[str, dict[str, Any]]:
        """What all processes have done so far, by file; of one done twice either, they are the same."""
        records: dict[str, dict[str, Any]] = {}
        for part in sorted(self._parts.glob("*.jsonl")):
            for line in part.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # cut off
                    record = json.loads(line)
                    if "error" not in record or record["file"] not in records:
                        records[record["file"]] = record
        return records

    @contextlib.contextmanager
    def _open_part(self) -> Iterator[TextIO]:
        path = self._parts / f"{self.processes.rank:05}.jsonl"
        cut = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as part:
            if cut:
                part.write("\n")
            yield part


def categories(detector: Detector) -> list[dict[str, Any]]:
    """The classes of a detector, in COCO's format."""
    pairs = zip(detector.category_ids, detector.class_names, strict=True)
    return [{"id": number, "name": name} for number, name in pairs]


def write_json(document: Any, path: Path) -> None:
    """Write a file that appears complete or not."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(document), encoding="utf-8")


def save_picture(picture: Any, target: Path) -> None:
    """Write a PIL image as JPEG or PNG, by the name's ending; the file appears complete or not."""
    kind = "JPEG" if target.suffix in (".jpg", ".jpeg") else "PNG"
    with replacing(target) as partial:
        picture.save(partial, format=kind, **({"quality": 92} if kind == "JPEG" else {}))


def _record(found: Detections) -> dict[str, Any]:
    width, height = found.size
    entries = found.to_coco()
    return {"file": str(found.source), "width": width, "height": height, "annotations": entries}


def _append(part: TextIO, record: dict[str, Any]) -> None:
    part.write(json.dumps(record) + "\n")
    part.flush()


def _settings(detector: Detector) -> dict[str, Any]:
    """What the results of a picture depend on."""
    digest = hashlib.sha256()
    for tensor in detector.bench.model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "model": detector.name,
        "weights": digest.hexdigest()[:16],
        "dtype": str(detector.dtype),
        "size": list(detector.size),
        "classes": detector.class_names,
        "score": detector.score,
        **asdict(detector.bench.suppression()),
    }
