"""``effdet eval``: figures of a model on a folder in COCO format, of Pascal VOC or of OpenImages."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .options import (
    add_command,
    add_model_options,
    add_suppression_options,
    natural_int,
    positive_int,
    suppression_of,
)

_TEXT = """\
Prints COCO's figures (AP is averaged over IoU 0.50:0.95) and the AP of each class. DATA is laid
out as for `effdet train`, and its classes must be the model's.

Of Pascal VOC and OpenImages it prints their metrics, AP at IoU 0.50. DATA is then the folder that
holds VOC2007 and VOC2012, or annotations and validation.

examples:
  effdet scenes data --count 100 --seed 7 --split val && effdet eval data
  effdet eval coco --model tf_efficientdet_d0 --results results.json
  effdet eval data --checkpoint run/best.pth --split test --plots plots
  effdet eval VOCdevkit --dataset voc0712 --model tf_efficientdet_d0 --checkpoint voc.pth
                                                       test of 2007
  torchrun --nproc-per-node 8 -m effdet eval coco --model tf_efficientdet_d7
                                                       each process takes its share
"""
_DATASETS = ("coco", "voc", "voc2007", "voc0712", "openimages", "openimages-challenge2019")
_LABELS = {
    "AP": "AP    @ IoU 0.50:0.95",
    "AP50": "AP50  @ IoU 0.50",
    "AP75": "AP75  @ IoU 0.75",
    "APsmall": "AP    small objects",
    "APmedium": "AP    medium objects",
    "APlarge": "AP    large objects",
}


def add_parser(commands: Any) -> None:
    """The command and its options, added to the subparsers of ``effdet``."""
    parser = add_command(commands, "eval", "measure COCO AP on a data set", _TEXT)
    parser.add_argument("data", metavar="DATA", help="folder in COCO format, or see --dataset")
    parser.add_argument(
        "--dataset",
        default="coco",
        choices=_DATASETS,
        metavar="NAME",
        help=f"what DATA is: {', '.join(_DATASETS)}; coco (default): any folder in COCO format",
    )
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="default: 8")
    parser.add_argument("--workers", type=natural_int, default=2, help="default: 2")
    parser.add_argument("--results", default="", metavar="FILE", help="write detections as json")
    parser.add_argument(
        "--plots",
        default="",
        metavar="FOLDER",
        help="write precision over recall there: precision_recall.json, and .png with matplotlib",
    )
    add_model_options(parser)
    add_suppression_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure the model on a split and print the figures; the exit status."""
    from effdet.engine.weights import load_model

    measure(
        load_model(args.model, args.checkpoint, args.size),
        args.data,
        args.split,
        kind=args.dataset,
        device=args.device,
        batch_size=args.batch_size,
        workers=args.workers,
        results=args.results,
        plots=args.plots,
        **suppression_of(args),
    )
    return 0


def measure(
    loaded: Any,
    data: str,
    split: str,
    *,
    kind: str = "coco",
    device: str = "auto",
    batch_size: int = 8,
    workers: int = 2,
    results: str = "",
    plots: str = "",
    **suppression: Any,
) -> dict[str, float]:
    """Evaluate a `effdet.engine.weights.LoadedModel`, print the table and return the figures.

    `kind` is what `data` holds: "coco", or another name of `effdet.create_dataset`. `suppression` is
    as for `effdet.engine.evaluate.evaluate`; `plots` is a folder for precision over recall. Processes
    that `torchrun` started share the images, and process 0 prints and writes.

    Raises:
        ValueError: the data set has other classes than the model, or has nothing to compare with.
        FileNotFoundError: annotations or pictures are missing.
    """
    from effdet.engine.data import eval_loader
    from effdet.engine.evaluate import evaluate
    from effdet.engine.processes import joined
    from effdet.evaluator import create_evaluator

    if plots and kind != "coco":
        raise ValueError(
            f"--plots: got --dataset {kind}; takes coco, whose metric has these curves"
        )
    dataset = _dataset(kind, data, split, len(loaded.class_names))
    with joined(device) as processes:
        first, several = processes.rank == 0, processes.count > 1
        if first:
            _introduce(loaded, dataset)
        model = loaded.model.to(processes.device)
        loader = eval_loader(
            dataset, model.config, batch_size, workers, processes.device, distributed=several
        )
        bar = tqdm(
            total=len(dataset),
            desc="evaluating",
            unit="image",
            leave=False,
            disable=None if first else True,
        )
        with bar:
            result = evaluate(
                model,
                loader,
                dataset,
                progress=lambda images: bar.update(images * processes.count),
                distributed=several,
                result_file=results,
                evaluator=create_evaluator(kind, dataset, distributed=several),
                **suppression,
            )
    assert result is not None  # nothing could stop it
    if first:
        _print(result, f"{len(dataset)} images of {data}, split {split}")
        if plots:
            _plot(result, Path(plots))
    return result.stats


def _dataset(kind: str, data: str, split: str, num_classes: int) -> Any:
    from effdet.data import coco_folder, create_dataset

    if kind == "coco":
        return coco_folder(data, split, num_classes)
    dataset: Any = create_dataset(kind, data, split)
    parser = dataset.parser
    if not parser.img_ids or not parser.has_labels:
        raise ValueError(f"{data}: {kind}, split {split}: has no annotated images")
    if parser.max_label != num_classes:
        raise ValueError(
            f"--dataset {kind}: has {parser.max_label} classes; the model has {num_classes}"
        )
    names = [info["file_name"] for info in parser.img_infos]
    missing = [name for name in names if not (dataset.data_dir / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{dataset.data_dir}: {len(missing)} of {len(names)} pictures are missing, the first is"
            f" {missing[0]}"
        )
    return dataset


def _introduce(loaded: Any, dataset: Any) -> None:
    print(f"{loaded.name}, weights {loaded.source}")
    names = [(loaded.class_names[c["id"] - 1], c["name"]) for c in dataset.parser.cat_dicts]
    other = [f"{theirs} ({ours} of the model)" for ours, theirs in names if ours != theirs]
    if other:
        print(
            f"note: {len(other)} classes have other names than the model's: {', '.join(other[:3])}"
        )


def _print(result: Any, what: str) -> None:
    print(what)
    for key in (key for key in _LABELS if key in result.stats):
        print(f"  {_LABELS[key]:<24} {_figure(result.stats[key])}")
    width = max(map(len, result.per_class))
    columns = list(next(iter(result.per_class.values())))
    print(f"  {'class':<{width}}", *(f"{column:>11}" for column in columns))
    for name, figures in result.per_class.items():
        print(f"  {name:<{width}}", *(f"{_figure(figures[column]):>11}" for column in columns))


def _plot(result: Any, folder: Path) -> None:
    from effdet.engine import plots
    from effdet.engine.evaluate import write_precision_recall

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / plots.CURVES_FILE
    write_precision_recall(result, file)
    page = plots.evaluation_page(result.per_class, result.precision_recall)
    if page is None:
        print('no plot: matplotlib is missing (pip install "effdet-kernels[plot]")')
    else:
        plots.save(page, file.with_suffix(".png"))
        print(f"plot: {file.with_suffix('.png')}")


def _figure(value: float | None) -> str:
    return "no objects" if value is None or math.isnan(value) or value < 0 else f"{value:.4f}"
