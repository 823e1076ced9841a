"""``summary.md``: what a training run was and came to, for a person to read."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effdet.files import replacing

from .config import TrainConfig
from .log import read_log
from .schedule import default_learning_rate

FILE = "summary.md"
_FIGURES = ("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge", "AR100")
_HEADLINE = ("data", "out", "model", "epochs")  # settings that have a place of their own
_FILES = {
    "best.pth": "the checkpoint of the best AP (of the last epoch, if nothing is evaluated)",
    "last.pth": "the complete state at the end; `--resume` goes on from it",
    "epoch-*.pth": "the checkpoints of the last epochs",
    "log.jsonl": "the log: configuration, steps, epochs",
    "curves.png": "plots of the log",
    "precision_recall.json": "precision over recall of an evaluation",
    "tensorboard": "the log for TensorBoard",
}


def write_summary(out: str | os.PathLike[str], log: str | os.PathLike[str]) -> Path:
    """Write ``summary.md`` into a run's folder and return its path.

    It has model, data, the settings that differ from the defaults, the figures of the best and the
    last evaluation, those of each class, and the files that are there. Of what a resumed run wrote
    again the later counts.

    Args:
        out: the folder.
        log: the run's log (`effdet.engine.log.JsonLog`), which has a ``config`` record.

    Raises:
        ValueError: the log has no ``config`` record.
        OSError: the log cannot be read, or the file not be written.
    """
    out, records = Path(out), read_log(log)
    configs = [r for r in records if r["kind"] == "config"]
    if not configs:
        raise ValueError(f"log {os.fspath(log)}: has no record of kind config")
    epochs = {r["epoch"]: r for r in records if r["kind"] == "epoch"}
    steps = {r["step"]: r for r in records if r["kind"] == "step"}
    parts = [
        _headline(configs, epochs, steps),
        _settings(configs[-1]),
        *_results(epochs),
        _files(out),
    ]
    path = out / FILE
    with replacing(path) as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _headline(
    configs: Sequence[Mapping[str, Any]],
    epochs: Mapping[int, Mapping[str, Any]],
    steps: Mapping[int, Mapping[str, Any]],
) -> str:
    config = configs[-1]
    lines = {
        "model": _shown(config.get("model", "?")),
        "parameters": _count(config.get("parameters")),
        "data": f"{_shown(config.get('data', '?'))}, {_count(config.get('images'))} images to train on",
        "epochs": f"{max(epochs, default=0)} of {config.get('epochs', '?')}",
        "speed": _speed(steps),
        "ran on": _environment(config),
    }
    if len(configs) > 1:
        lines["times resumed"] = str(len(configs) - 1)
    return f"# {lines['model']}\n\n" + _table(("", ""), lines.items())


def _speed(steps: Mapping[int, Mapping[str, Any]]) -> str:
    speeds = [r["images_per_second"] for r in steps.values() if "images_per_second" in r]
    return f"{statistics.median(speeds):.3g} images a second, median" if speeds else "not known"


def _environment(config: Mapping[str, Any]) -> str:
    parts = [f"device {config.get('device', '?')}", f"torch {config.get('torch', '?')}"]
    for name in ("processes", "threads"):
        if name in config:
            parts.append(f"{name}: {config[name]}")
    return ", ".join(map(str, parts))


def _settings(config: Mapping[str, Any]) -> str:
    changed = [
        (f"`{field.name}`", _shown(config[field.name]), _shown(_default(field, config)))
        for field in dataclasses.fields(TrainConfig)
        if field.name in config
        and field.name not in _HEADLINE
        and config[field.name] != _default(field, config)
    ]
    if not changed:
        return "## Settings\n\nThe defaults."
    return "## Settings that differ from the defaults\n\n" + _table(
        ("setting", "here", "default"), changed
    )


def _default(field: dataclasses.Field, config: Mapping[str, Any]) -> Any:
    """The default of a setting, where 0 stands for a value that others decide: that one."""
    if field.name == "lr" and {"optimizer", "batch_size"} <= config.keys():
        return default_learning_rate(config["optimizer"], config["batch_size"])
    return field.default


def _results(epochs: Mapping[int, Mapping[str, Any]]) -> list[str]:
    measured = {number: r for number, r in epochs.items() if "AP" in r}
    if not measured:
        return ["## Figures\n\nNothing was evaluated."]
    last = max(measured)
    best = max(measured, key=lambda number: (measured[number]["AP"], number))
    names = [name for name in _FIGURES if name in measured[last] or name in measured[best]]
    rows = [(name, *(_figure(measured[n].get(name)) for n in (best, last))) for name in names]
    head = ("", f"best: epoch {best}", f"last: epoch {last}")
    text = "COCO's figures of the averaged weights on the validation split; AP over IoU 0.50:0.95."
    parts = [f"## Figures\n\n{text}\n\n{_table(head, rows)}"]
    per_class = measured[best].get("per_class")
    if per_class:
        lines = [
            (_shown(name), _figure(figures.get("AP")), _figure(figures.get("AP50")))
            for name, figures in per_class.items()
        ]
        parts.append(f"## Classes, epoch {best}\n\n" + _table(("class", "AP", "AP50"), lines))
    return parts


def _files(out: Path) -> str:
    lines = [
        (f"`{path.name}`", meaning)
        for pattern, meaning in _FILES.items()
        for path in sorted(out.glob(pattern), key=lambda path: (len(path.name), path.name))
    ]
    return "## Files\n\n" + (_table(("file", ""), lines) if lines else "None.")


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _figure(value: float | None) -> str:
    return "no objects" if value is None or value < 0 else f"{value:.4f}"


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _shown(value: Any) -> str:
    """A value in a cell of a table."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split()) or "–"
