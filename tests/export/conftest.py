"""Files that several tests look at, each written once per process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import effdet
from effdet.engine.weights import load_model
from effdet.export import ExportOptions, ExportReport, export_onnx


@dataclass(frozen=True)
class Written:
    """A file, what it was made of, and what its check saw."""

    path: Path
    bench: effdet.DetBenchPredict
    options: ExportOptions
    report: ExportReport


@dataclass(frozen=True)
class Variant:
    """What a file is made of: settings of the bench, and arguments of `ExportOptions` and `export_onnx`."""

    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], torch.nn.Module] = lambda: load_model().model  # trained on drawn scenes


def overflowing() -> torch.nn.Module:
    """One class, scores far apart, and boxes of infinite height at the first anchor of every place."""
    torch.manual_seed(0)
    model = effdet.create_model("efficientdet_nano", num_classes=1, pretrained_backbone=False)
    with torch.no_grad():
        model.class_net.predict.conv_pw.weight.mul_(30)
        model.box_net.predict.conv_pw.bias[2] = 200.0
    return model.eval()


def spread(name: str) -> torch.nn.Module:
    """A configuration with random weights, published ones being out of reach here; its last layers are scaled up.

    So scores are spread over (0, 1), as a trained model's are, and boxes differ from their anchors by about a third.
    """
    torch.manual_seed(1)
    model = effdet.create_model(name, pretrained_backbone=False).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *model.config.image_size))
        for net, levels, std in zip((model.class_net, model.box_net), maps, (2, 0.3), strict=True):
            values = torch.cat([level.flatten() for level in levels])
            net.predict.conv_pw.weight.mul_(std / values.std())
    return model


VARIANTS = {
    "hard": Variant(),
    "soft": Variant({"soft_nms": True, "sigma": 0.3}, {"any_size": True, "img_info": True}),
    "agnostic": Variant(
        {"class_agnostic": True, "max_det_per_image": 30},
        {"batch": 2, "normalise": False},
        {"opset": 20},
    ),
    "per_class": Variant(
        {"max_per_class": 2, "iou_threshold": 0.3, "score_threshold": 0.1},
        {"any_size": True},
        {"opset": 23},
    ),
    "raw": Variant({}, {"outputs": "raw"}),
    "raw_any": Variant({}, {"outputs": "raw", "any_size": True}, {"opset": 21}),
    "few": Variant(
        {"max_detection_points": 40, "max_det_per_image": 60}, {"size": (128, 192)}, {}, overflowing
    ),
}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """The file of a variant, by its name."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def write(name: str) -> Written:
        variant = VARIANTS[name]
        bench = effdet.DetBenchPredict(variant.model())
        for key, value in variant.settings.items():
            assert hasattr(bench, key)
            setattr(bench, key, value)
        options = ExportOptions(**variant.options)
        path = folder / f"{name}.onnx"
        report = export_onnx(bench, path, options, **variant.arguments)
        return Written(path, bench, options, report)

    return write


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """For networks that are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
