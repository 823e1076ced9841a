"""A weights file of this package from a TensorFlow checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from effdet import safetensors_file, tf_names
from effdet.config import get_efficientdet_config
from effdet.efficientdet import EfficientDet
from effdet.errors import CheckpointError

from . import checkpoint as checkpoints

_CLASSES = "class_net/class-predict/bias"


def export_tf(variables: str | os.PathLike[str], name: str, out: str | os.PathLike[str]) -> Path:
    """Write the weights of model ``name``, moving averages first, in float32 to ``out``.

    Args:
        variables: what `effdet.tf_names.read` takes: an ``.npz`` file, or a checkpoint.
        name: a ``tf_efficientdet_*``.
        out: ``.safetensors``, or ``.pth``; it says which model it is for.

    Raises:
        KeyError: no such model.
        ValueError: the model is not one of those.
        CheckpointError: the file cannot be read, or holds the variables of another model.
    """
    arrays = tf_names.read(variables)
    config = get_efficientdet_config(name)
    anchors = config.num_scales * len(config.aspect_ratios)
    if _CLASSES not in arrays:
        raise CheckpointError(f"{variables}: has no variable {_CLASSES} of google/automl")
    classes = arrays[_CLASSES].size // anchors
    config.num_classes = classes
    model = EfficientDet(config, pretrained_backbone=False)
    weights = tf_names.convert(arrays, model)
    fields = {"model": name, "image_size": list(config.image_size)}
    if Path(out).suffix == ".safetensors":
        safetensors_file.write(out, weights, fields)
    else:
        checkpoints.save_atomically({**fields, "state_dict": weights}, out)
    return Path(out)
