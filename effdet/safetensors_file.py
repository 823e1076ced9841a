"""Weights as safetensors, with what a detector needs to know about them in the file's header.

The header's metadata has one entry of ours, `effdet`: JSON with `model`, `image_size` (height, width), `class_names`,
`category_ids` and, where it is not the configuration's, `bn_eps`. A file without it may have a `config.json` beside it,
in which the same is called `effdet`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from .errors import CheckpointError
from .files import replacing

CONFIG_NAME = "config.json"
_ENTRY = "effdet"


def _is_list_of(kind: type) -> Any:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


_FIELDS = {
    "model": ("a name", lambda value: isinstance(value, str)),
    "image_size": ("[height, width]", lambda value: _is_list_of(int)(value) and len(value) == 2),
    "class_names": ("a list of names", _is_list_of(str)),
    "category_ids": ("a list of integers", _is_list_of(int)),
    "bn_eps": ("a number", lambda value: isinstance(value, (int, float))),
}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tensors of a file on the CPU: a state dict, or where they are described, the fields and `state_dict`.

    Raises:
        CheckpointError: the safetensors package is missing, the file is damaged, or a field is of another type.
    """
    safetensors = _import(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read, it may be incomplete ({error})") from error
    config = Path(path).with_name(CONFIG_NAME)
    if _ENTRY in metadata:
        fields = _fields(_object(metadata[_ENTRY], f"{path}: {_ENTRY}"), f"{path}: {_ENTRY}")
    elif config.is_file():
        fields = _fields(_object(config.read_bytes(), str(config)).get(_ENTRY, {}), str(config))
    else:
        fields = {}
    return {**fields, "state_dict": weights} if fields else weights


def is_described(path: str | os.PathLike[str]) -> bool:
    """Whether the header of a file has our entry; False for what is no such file, too."""
    safetensors = _import(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return _ENTRY in (file.metadata() or {})
    except safetensors.SafetensorError:
        return False


def write(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> None:
    """Write tensors, and what they are for, so that the file appears complete or not at all.

    Raises:
        CheckpointError: the safetensors package is missing, or a field is of another type.
    """
    _import(path)
    from safetensors.torch import save_file

    entry = json.dumps(_fields(dict(fields), str(path)))
    tensors = {key: value.contiguous() for key, value in weights.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt", _ENTRY: entry})


def _object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where}: is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: holds a {type(content).__name__}, takes an object")
    return content


def _fields(content: Any, where: str) -> dict[str, Any]:
    """The fields of `content` that we know, each of the right type."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: {_ENTRY}: got {content!r}, takes an object")
    for key, (takes, fits) in _FIELDS.items():
        if key in content and not fits(content[key]):
            raise CheckpointError(f"{where}: {key}: got {content[key]!r}, takes {takes}")
    return {key: content[key] for key in _FIELDS if key in content}


def _import(path: object) -> ModuleType:
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f'{path}: takes the safetensors package: pip install "effdet-kernels[hub]"'
        ) from error
    return safetensors
