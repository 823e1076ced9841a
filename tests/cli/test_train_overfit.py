"""``effdet train`` learns 32 photos of COCO (--data) by heart, from random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from effdet.engine.log import read_log

PHOTOS = 32
SIZE = 320
SMALLEST = 12.0  # pixels of a box's shorter side at the input; the smallest anchor has 32
RECIPE = {
    "--model": "tf_efficientdet_lite0",
    "--size": SIZE,
    "--epochs": 160,
    "--batch-size": 8,
    "--opt": "adamw",
    "--lr": 0.003,
    "--weight-decay": 0,
    "--scale-min": 1,
    "--scale-max": 1,
    "--ema-decay": 0.99,
    "--eval-every": 20,
    "--device": "cpu",
    "--workers": 0,
    "--threads": 2,
}
ENOUGH = 0.95


def large_enough(photos: Path, folder: Path) -> int:
    """A COCO folder whose training and validation are the same PHOTOS, without crowds and small boxes.

    Photos that then have no box are passed over, and classes that none of them shows left out.

    Returns:
        The number of boxes.
    """
    content = json.loads((photos / "instances.json").read_text())
    scales = {i["id"]: SIZE / max(i["width"], i["height"]) for i in content["images"]}
    boxes = [
        box
        for box in content["annotations"]
        if not box["iscrowd"] and min(box["bbox"][2:]) * scales[box["image_id"]] >= SMALLEST
    ]
    chosen = sorted({box["image_id"] for box in boxes})[:PHOTOS]
    boxes = [box for box in boxes if box["image_id"] in chosen]
    shown = {box["category_id"] for box in boxes}
    images = [image for image in content["images"] if image["id"] in chosen]
    (folder / "images").mkdir(parents=True)
    for image in images:
        shutil.copy(photos / "images" / image["file_name"], folder / "images")
    of_these = {
        "images": images,
        "annotations": boxes,
        "categories": [c for c in content["categories"] if c["id"] in shown],
    }
    for split in ("train", "val"):
        (folder / f"instances_{split}.json").write_text(json.dumps(of_these))
    return len(boxes)


@pytest.mark.slow
def test_photos_are_learnt_by_heart(cli_process, data_dir, tmp_path, capsys):
    count = large_enough(data_dir / "photos", tmp_path / "photos")
    options = [part for option in RECIPE.items() for part in option]
    process = cli_process("train", tmp_path / "photos", "--out", tmp_path / "run", *options)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    epochs = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r["kind"] == "epoch"]
    with capsys.disabled():
        print(f"\n{PHOTOS} photos, {count} boxes:")
        for found in epochs:
            if "AP50" in found:
                print(f"  epoch {found['epoch']}: AP50 {found['AP50']:.4f}, AP {found['AP']:.4f}")
    assert epochs[-1]["AP50"] >= ENOUGH
