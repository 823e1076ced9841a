"""``effdet eval``: COCO figures of a model on a folder in COCO format."""

from __future__ import annotations

import argparse
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

examples:
  effdet scenes data --count 100 --seed 7 --split val && effdet eval data
  effdet eval coco --model tf_efficientdet_d0 --results results.json
  effdet eval data --checkpoint run/best.pth --split test --plots plots
  torchrun --nproc-per-node 8 -m effdet eval coco --model tf_efficientdet_d7
                                                       each process takes its share
"""
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
    parser.add_argument("data", metavar="DATA", help="folder in COCO format")
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
    device: str = "auto",
    batch_size: int = 8,
    workers: int = 2,
    results: str = "",
    plots: str = "",
    **suppression: Any,
) -> dict[str, float]:
    """Evaluate a `effdet.engine.weights.LoadedModel`, print the table and return the figures.

    `suppression` is as for `effdet.engine.evaluate.evaluate`; `plots` is a folder for precision
    over recall. Processes that `torchrun` started share the images, and process 0 prints and writes.

    Raises:
        ValueError: the data set has more classes than the model.
    """
    from effdet.data import coco_folder
    from effdet.engine.data import eval_loader
    from effdet.engine.evaluate import evaluate
    from effdet.engine.processes import joined

    dataset = coco_folder(data, split, num_classes=len(loaded.class_names))
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
                **suppression,
            )
    assert result is not None  # nothing could stop it
    if first:
        _print(result, f"{len(dataset)} images of {data}, split {split}")
        if plots:
            _plot(result, Path(plots))
    return result.stats


def _introduce(loaded: Any, dataset: Any) -> None:
    print(f"{loaded.name}, weights {loaded.source}")
    other = [name for name in dataset.parser.cat_names if name not in loaded.class_names]
    if other:
        print(f"note: the model's classes are not named {', '.join(other[:5])}")


def _print(result: Any, what: str) -> None:
    print(what)
    for key, label in _LABELS.items():
        print(f"  {label:<24} {_figure(result.stats[key])}")
    width = max(map(len, result.per_class))
    print(f"  {'class':<{width}}  {'AP':>10}  {'AP50':>10}")
    for name, figures in result.per_class.items():
        print(f"  {name:<{width}}  {_figure(figures['AP']):>10}  {_figure(figures['AP50']):>10}")


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
    return "no objects" if value is None or value < 0 else f"{value:.4f}"
