"""Detection on many files: shared out among processes, continued after a stop, merged into one result.

OUT/parts/ holds what is done so far: `settings.json`, what results depend on, and a file of JSON lines for each
process, a line for each picture. A line is written when its picture's results are complete; one that a kill cut off
counts as none, and so does one of a file that has changed its size since, or whose drawn copy has another name now.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
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
from effdet.distributed import all_gather
from effdet.files import replacing

from .processes import Processes

RESULT_FILE = "detections.json"
_PARTS, _SETTINGS, _DONE = "parts", "settings.json", "before.jsonl"
_PATIENCE = timedelta(days=7)  # of a process that has done its share before the others


@dataclass(frozen=True)
class Picture:
    """A file to look at.

    Attributes:
        file: its path.
        drawn_name: name of the annotated copy in the output folder; None: none is written.
        image_id: its id in the data set that lists it; None: it is numbered.
    """

    file: Path
    drawn_name: str | None
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
        self._group = patient_group(processes)
        settings = _settings(detector)
        if processes.rank == 0:
            self._begin(settings, resume)
        self._wait()
        self._check(settings)
        done = self._records()
        todo = [p for p in self.pictures if str(p.file) not in done]
        self.done_before = len(self.pictures) - len(todo)
        self.share = todo[processes.rank :: processes.count]
        self._wait()  # all have read before one writes

    def run(
        self, progress: Callable[[Picture, Detections], object], failed: Callable[[str], object]
    ) -> None:
        """Detect on this process's share.

        Args:
            progress: called with each picture and its detections, once they are kept.
            failed: called with a message for each file that cannot be used.
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
                try:
                    if picture.drawn_name is not None:
                        save_picture(found.draw(), self.out / picture.drawn_name)
                    record = _record(picture, found)
                except (OSError, ValueError) as error:
                    fail(picture.file, error)
                    continue
                _append(part, record)
                progress(picture, found)

    def merge(self) -> dict[str, Any] | None:
        """Wait for all processes; on process 0 write `detections.json` and return its content.

        Pictures are in the order of the list, without those that failed. If none did the parts are removed; else they
        stay, so that a run with `resume` tries just these again.

        Raises:
            RuntimeError: another run has taken away what this one did.
        """
        self._wait()
        if self.processes.rank:
            return None
        records = self._records()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        complete = True
        taken = {picture.image_id for picture in self.pictures}
        free = (number for number in itertools.count(1) if number not in taken)
        for picture in self.pictures:
            if str(picture.file) not in records:
                raise RuntimeError(
                    f"out: the results of {picture.file} have gone from {self._parts}: another run writes to the same"
                    " folder; takes one of its own"
                )
            record = records[str(picture.file)]
            if "error" in record:
                complete = False
                continue
            image_id = next(free) if picture.image_id is None else picture.image_id
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

    def _wait(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)

    def _begin(self, settings: dict[str, Any], resume: bool) -> None:
        if resume and (self._parts / _SETTINGS).exists():
            self._check(settings)
            self._keep_done()
            return
        if self._parts.exists():
            shutil.rmtree(self._parts)
        self._parts.mkdir(parents=True)
        write_json(settings, self._parts / _SETTINGS)

    def _keep_done(self) -> None:
        """Put what earlier runs have done into one file, without what is to be done again."""
        records = self._records()
        for picture in self.pictures:
            if not _is_done(picture, records.get(str(picture.file), {"error": ""})):
                records.pop(str(picture.file), None)
        parts = [part for part in self._parts.glob("*.jsonl") if part.name != _DONE]
        with replacing(self._parts / _DONE) as partial:
            partial.write_text("".join(json.dumps(r) + "\n" for r in records.values()))
        for part in parts:
            part.unlink()

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
            for line in part.read_text(encoding="utf-8", errors="replace").splitlines():
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


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Keep the runs of other processes out of a folder meanwhile, where the file system has locks.

    Raises:
        RuntimeError: another one is in it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"out: another run is writing to {out}; takes a folder of its own, or wait"
                ) from None
        yield
    finally:
        os.close(folder)


def patient_group(processes: Processes) -> Any:
    """A group of all processes that wait for each other as long as it takes; None of just one."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE) if processes.count > 1 else None


def of_all(messages: list[str], group: Any) -> list[str]:
    """The messages of all processes, once each has come here: torchrun ends all when one leaves with a failure."""
    if group is None:
        return messages
    return list(itertools.chain.from_iterable(all_gather(messages, group)))


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


def _record(picture: Picture, found: Detections) -> dict[str, Any]:
    width, height = found.size
    return {
        "file": str(picture.file),
        "bytes": picture.file.stat().st_size,
        "drawn": picture.drawn_name,
        "width": width,
        "height": height,
        "annotations": found.to_coco(),
    }


def _is_done(picture: Picture, record: dict[str, Any]) -> bool:
    """Whether the record is what this run would write, as far as can be told without looking at the picture."""
    if "error" in record or picture.drawn_name not in (None, record.get("drawn")):
        return False
    try:
        return picture.file.stat().st_size == record.get("bytes")
    except OSError:
        return False


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
