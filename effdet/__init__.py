"""EfficientDet on hand-written kernels, with the names of the PyPI package `effdet` 0.4.1."""

from . import _conflict as _conflict  # first: what follows may not be ours
from . import distributed as distributed
from . import evaluation as evaluation
from .bench import DetBenchPredict, DetBenchTrain, unwrap_bench
from .config import default_detection_model_configs, get_efficientdet_config
from .data import (
    DetectionDatset,
    SkipSubset,
    create_dataset,
    create_loader,
    create_parser,
)
from .detections import Detection, Detections
from .detector import Detector
from .efficientdet import EfficientDet
from .evaluator import CocoEvaluator, OpenImagesEvaluator, PascalEvaluator, create_evaluator
from .factory import create_model, create_model_from_config
from .helpers import load_checkpoint, load_pretrained

__all__ = [
    "CocoEvaluator",
    "DetBenchPredict",
    "DetBenchTrain",
    "Detection",
    "DetectionDatset",
    "Detections",
    "Detector",
    "EfficientDet",
    "OpenImagesEvaluator",
    "PascalEvaluator",
    "SkipSubset",
    "create_dataset",
    "create_evaluator",
    "create_loader",
    "create_model",
    "create_model_from_config",
    "create_parser",
    "default_detection_model_configs",
    "get_efficientdet_config",
    "load_checkpoint",
    "load_pretrained",
    "unwrap_bench",
]
