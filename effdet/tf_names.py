"""Weights of google/automl's EfficientDet (TensorFlow) by the names of this package.

The names are facts of that repository's code (`efficientdet_arch.py`, `backbone/efficientnet_model.py`); they were not
compared with a published checkpoint. A kernel is stored as height, width, in, out; a depthwise one as height, width,
channels, 1.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from .efficientdet import EfficientDet
from .errors import CheckpointError

_AVERAGE = "/ExponentialMovingAverage"
_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
# Beside the weights: what an optimizer keeps.
_TRAINING_STATE = re.compile(r"global_step|beta[12]_power|.*/(Momentum|Adam(_1)?)")
_SHOWN = 3


def tf_names(model: EfficientDet) -> dict[str, list[str]]:
    """For each key of a `tf_efficientdet_*` model's state dict the variables that it is made of.

    That is one, but for the weights of a fusion, which are as many scalars, and `num_batches_tracked`, which has none.

    Raises:
        ValueError: it is another model; convolutions of those pad as TensorFlow does.
    """
    if not model.config.name.startswith("tf_efficientdet_"):
        raise ValueError(f"model: got {model.config.name}, takes a tf_efficientdet_*")
    keys = list(model.state_dict())
    blocks: dict[str, int] = {}  # of stage and place in it: number among all
    for key in keys:
        if found := re.match(r"backbone\.blocks\.(\d+\.\d+)\.", key):
            blocks.setdefault(found[1], len(blocks))
    expanding = {key.rsplit(".", 2)[0] for key in keys if key.endswith(".conv_pwl.weight")}
    names: dict[str, list[str]] = {}
    for key in keys:
        layer, _, field = key.rpartition(".")
        if field == "num_batches_tracked":
            names[key] = []
        elif layer.startswith("backbone."):
            names[key] = [_in_backbone(key, model.config, blocks, expanding)]
        elif layer.startswith("fpn."):
            names[key] = _in_fpn(key, model)
        else:
            names[key] = [_in_head(key, model.config)]
    return names


def _in_backbone(key: str, config: Any, blocks: Mapping[str, int], expanding: set[str]) -> str:
    root = config.backbone_name.removeprefix("tf_").replace("_", "-", 1)
    layer, _, field = key.removeprefix("backbone.").rpartition(".")
    if layer == "conv_stem":
        return f"{root}/stem/conv2d/kernel"
    if layer == "bn1":
        return f"{root}/stem/tpu_batch_normalization/{_NORM[field]}"
    found = re.fullmatch(r"blocks\.(\d+\.\d+)\.(.+)", layer)
    if not found:
        raise ValueError(f"model: {key} is of no backbone of google/automl")
    block = f"{root}/blocks_{blocks[found[1]]}"
    name = found[2]
    # Layers of a kind are numbered in the order in which a block makes them; the first has no number.
    convs = ["conv_pw"]
    if f"backbone.blocks.{found[1]}" in expanding:
        convs.append("conv_pwl")
    if name == "conv_dw":
        return f"{block}/depthwise_conv2d/depthwise_kernel"
    if name in convs:
        return f"{block}/conv2d{_number(convs.index(name))}/kernel"
    if re.fullmatch(r"bn\d", name):
        return f"{block}/tpu_batch_normalization{_number(int(name[2:]) - 1)}/{_NORM[field]}"
    if name in ("se.conv_reduce", "se.conv_expand"):
        number = _number(int(name == "se.conv_expand"))
        return f"{block}/se/conv2d{number}/{_conv_field(name, field)}"
    raise ValueError(f"model: {key} is of no backbone of google/automl")


def _in_fpn(key: str, model: EfficientDet) -> list[str]:
    config = model.config
    layer, _, field = key.rpartition(".")
    if found := re.fullmatch(r"fpn\.resample\.(\d+)\.conv\.(conv|bn)", layer):
        level = config.min_level + int(found[1])
        return [f"resample_p{level}/{_resampling(found[2], field)}"]
    found = re.fullmatch(r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.(.+)", key)
    if not found:
        raise ValueError(f"model: {key} is of no feature network of google/automl")
    cell, node = int(found[1]), int(found[2])
    place = f"fpn_cells/cell_{cell}/fnode{node}"
    maps = config.num_levels + node  # that there are before this node
    rest = found[3].rpartition(".")[0]
    if found[3] == "combine.edge_weights":
        count = model.state_dict()[key].numel()
        return [f"{place}/WSM{_number(i)}" for i in range(count)]
    if inner := re.fullmatch(r"combine\.resample\.(\d+)\.conv\.(conv|bn)", rest):
        fnode: Any = model.fpn.get_submodule(f"cell.{cell}.fnode.{node}")
        offsets = list(fnode.combine.inputs_offsets)
        index = offsets.index(int(inner[1]))
        return [f"{place}/resample_{index}_{inner[1]}_{maps}/{_resampling(inner[2], field)}"]
    if inner := re.fullmatch(r"after_combine\.conv\.(conv_dw|conv_pw|bn)", rest):
        combined = f"{place}/op_after_combine{maps}"
        if inner[1] == "bn":
            return [f"{combined}/bn/{_NORM[field]}"]
        return [f"{combined}/conv/{_conv_field(inner[1], field)}"]
    raise ValueError(f"model: {key} is of no feature network of google/automl")


def _in_head(key: str, config: Any) -> str:
    found = re.fullmatch(
        r"(class|box)_net\.(?:(predict)|conv_rep\.(\d+)|bn_rep\.(\d+)\.(\d+))\.(conv_dw|conv_pw|bn)\.(\w+)",
        key,
    )
    if not found:
        raise ValueError(f"model: {key} is of no head of google/automl")
    net, predict, conv, norm, level, kind, field = found.groups()
    if norm is not None:
        return f"{net}_net/{net}-{norm}-bn-{config.min_level + int(level)}/{_NORM[field]}"
    return f"{net}_net/{net}-{predict or conv}/{_conv_field(kind, field)}"


def _number(index: int) -> str:
    return f"_{index}" if index else ""


def _resampling(kind: str, field: str) -> str:
    return f"bn/{_NORM[field]}" if kind == "bn" else f"conv2d/{_conv_field('', field)}"


def _conv_field(layer: str, field: str) -> str:
    if field == "bias":
        return "bias"
    return {"conv_dw": "depthwise_kernel", "conv_pw": "pointwise_kernel"}.get(layer, "kernel")


def convert(
    arrays: Mapping[str, np.ndarray[Any, Any]], model: EfficientDet, average: bool = True
) -> dict[str, Tensor]:
    """A state dict for `model` of the variables of a checkpoint, each used exactly once.

    Args:
        arrays: by name; the state of an optimizer among them is left out.
        model: a `tf_efficientdet_*` of as many classes.
        average: take the moving averages of the weights where there are such.

    Raises:
        CheckpointError: names what is missing, unknown or of another shape.
    """
    plain = {
        n: a for n, a in arrays.items() if not _TRAINING_STATE.fullmatch(n.removesuffix(_AVERAGE))
    }
    averages = {n.removesuffix(_AVERAGE): a for n, a in plain.items() if n.endswith(_AVERAGE)}
    plain = {n: a for n, a in plain.items() if not n.endswith(_AVERAGE)}
    values = {**plain, **averages} if average else plain
    names = tf_names(model)
    wanted = [name for parts in names.values() for name in parts]
    problems = [
        ("missing", [name for name in wanted if name not in values]),
        ("unknown", sorted({*plain, *averages} - set(wanted))),
    ]
    found = [f"{len(n)} {what} ({', '.join(n[:_SHOWN])})" for what, n in problems if n]
    if found:
        raise CheckpointError(
            f"arrays: not the variables of {model.config.name}: {'; '.join(found)}"
        )
    own = model.state_dict()
    result = {key: _tensor([values[n] for n in parts], own[key]) for key, parts in names.items()}
    reshaped = [
        f"{names[key][0]} {tuple(values[names[key][0]].shape)} for {key} {tuple(own[key].shape)}"
        for key in own
        if result[key].shape != own[key].shape
    ]
    if reshaped:
        raise CheckpointError(
            f"arrays: {len(reshaped)} of another shape ({'; '.join(reshaped[:_SHOWN])})"
        )
    return result


def _tensor(parts: list[np.ndarray[Any, Any]], like: Tensor) -> Tensor:
    """Variables in this package's layout and in the dtype of `like`; zeros where there are none."""
    if not parts:
        return torch.zeros_like(like)
    if len(parts) > 1:
        return torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts])).to(like.dtype)
    value = torch.from_numpy(np.array(parts[0])).to(like.dtype)
    if value.ndim == 4:
        depthwise = value.shape[3] == 1 and like.shape[1] == 1
        value = value.permute(2, 3, 0, 1) if depthwise else value.permute(3, 2, 0, 1)
    return value.contiguous()


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The variables in an `.npz` file, or with tensorflow installed in a checkpoint (its prefix or folder).

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it cannot be read, or tensorflow is missing.
    """
    if Path(path).suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file.items())
        except FileNotFoundError:
            raise
        except (ValueError, OSError, EOFError, TypeError, BadZipFile, zlib.error) as error:
            raise CheckpointError(f"{path}: cannot be read as .npz ({error})") from error
    try:
        from tensorflow import train
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{path}: reading a checkpoint of TensorFlow takes the tensorflow package; an .npz file"
            " of its variables by name does not"
        ) from error
    return dict(_variables(train.load_checkpoint(os.fspath(path))))


def _variables(reader: Any) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for name in reader.get_variable_to_shape_map():
        yield name, reader.get_tensor(name)
