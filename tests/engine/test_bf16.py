"""The bundled model in bfloat16 finds as much as in float32."""

from __future__ import annotations

import pytest
import torch

from effdet import DetBenchPredict
from effdet.data import coco_folder
from effdet.engine.data import eval_loader
from effdet.engine.weights import load_model
from effdet.evaluator import CocoEvaluator
from effdet.scenes import generate_scenes


@torch.inference_mode()
def average_precision(dtype: torch.dtype, folder: str) -> float:
    loaded = load_model()
    dataset = coco_folder(folder, "val", num_classes=len(loaded.class_names))
    loader = eval_loader(dataset, loaded.model.config, 8, 0, torch.device("cpu"))
    bench = DetBenchPredict(loaded.model.to(dtype).eval())
    evaluator = CocoEvaluator(dataset)
    for images, target in loader:
        evaluator.add_predictions(bench(images.to(dtype), img_info=target).float(), target)
    evaluator.evaluate()
    return evaluator.stats["AP"]


def test_average_precision_stays_within_half_a_point(tmp_path):
    generate_scenes(tmp_path, 100, 2024, split="val")
    full = average_precision(torch.float32, str(tmp_path))
    assert full > 0.8
    assert average_precision(torch.bfloat16, str(tmp_path)) == pytest.approx(full, abs=0.005)
