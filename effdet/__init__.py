"""EfficientDet on hand-written kernels, with the names of the PyPI package `effdet` 0.4.1."""

from .bench import DetBenchPredict, DetBenchTrain, unwrap_bench
from .config import default_detection_model_configs, get_efficientdet_config
from .efficientdet import EfficientDet
from .factory import create_model, create_model_from_config
from .helpers import load_checkpoint, load_pretrained

__all__ = [
    "DetBenchPredict",
    "DetBenchTrain",
    "EfficientDet",
    "create_model",
    "create_model_from_config",
    "default_detection_model_configs",
    "get_efficientdet_config",
    "load_checkpoint",
    "load_pretrained",
    "unwrap_bench",
]
