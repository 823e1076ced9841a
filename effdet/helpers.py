"""Loading weights into a model, from a file or a URL, with checks that name what is wrong."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import hub, safetensors_file
from .download import DownloadError, download
from .errors import CheckpointError

__all__ = [
    "CheckpointError",
    "DownloadError",
    "load_checkpoint",
    "load_pretrained",
    "read_checkpoint",
]

StateDict = dict[str, Tensor]
_logger = logging.getLogger(__name__)
_KEYS_SHOWN = 3
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


def load_pretrained(
    model: nn.Module,
    url: str,
    filter_fn: Callable[[StateDict], StateDict] | None = None,
    strict: bool = True,
) -> None:
    """Fetch the weights at `url` through torch's cache, or from the Hub (`hf://`), and load them into `model`.

    Without a URL it only logs a warning. `filter_fn` maps the state dict before it is loaded.

    Raises:
        DownloadError: the file cannot be fetched or fails its hash.
        CheckpointError: the file cannot be read or does not belong to the model.
    """
    if not url:
        _logger.warning("No pretrained weights exist for this model; it keeps its initial weights.")
        return
    path = hub.fetch(url) if hub.is_reference(url) else download(url)
    state_dict = _read_state_dict(path, use_ema=False)
    _load(model, filter_fn(state_dict) if filter_fn else state_dict, path, strict)


def load_checkpoint(
    model: nn.Module, checkpoint_path: str | Path, use_ema: bool = True, strict: bool = True
) -> None:
    """Load the weights in a file into `model`.

    The file may be on the Hub: `hf://owner/name[@revision][/file]`. It is a state dict, or a
    training checkpoint that has one as `state_dict_ema` (averaged; taken first if `use_ema`),
    `state_dict` or `model`; saved by torch, or as `.safetensors`. What wrappers put in front of every
    key (`module.`, `_orig_mod.`) is dropped, and of a bench the model is taken. Nothing in the file is
    executed.

    Raises:
        FileNotFoundError: no such file.
        DownloadError: it cannot be fetched from the Hub.
        CheckpointError: the file cannot be read, holds non-finite weights, or does not belong to
            the model.
    """
    path = local_path(checkpoint_path)
    _load(model, _read_state_dict(path, use_ema), path, strict)


def local_path(checkpoint: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint, fetched first if it is on the Hub.

    Raises:
        DownloadError: it cannot be fetched.
    """
    return hub.fetch(str(checkpoint)) if hub.is_reference(checkpoint) else Path(checkpoint)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """The content of a file saved by torch, or of a `.safetensors` file; on the CPU.

    The file may be on the Hub. Nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        DownloadError: it cannot be fetched from the Hub.
        CheckpointError: the file cannot be read.
    """
    path = local_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint_path: no file at {path}")
    return safetensors_file.read(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_state_dict(path: Path, use_ema: bool) -> StateDict:
    return state_dict_of(read_checkpoint(path), path, use_ema)


def state_dict_of(content: Any, path: str | os.PathLike[str], use_ema: bool = True) -> StateDict:
    """The weights in what `read_checkpoint` gave for `path`, without the prefixes of wrappers.

    Raises:
        CheckpointError: there are none, or some are not finite.
    """
    names = ("state_dict_ema", "state_dict", "model")[0 if use_ema else 1 :]
    if isinstance(content, Mapping):
        content = next((content[name] for name in names if content.get(name)), content)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds no state dict, but a {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: holds no state dict: its key {key!r} is no text")
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: holds no state dict: {key!r} is a {type(value).__name__}, not a tensor"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"{path}: the weights hold NaN or infinity, first in {key!r}")
    result = dict(content)
    while prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in result)), ""):
        result = {key.removeprefix(prefix): value for key, value in result.items()}
    return result


def _read_torch(path: Path) -> Any:
    # Training scripts keep their parsed arguments in checkpoints; a Namespace is plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = "it is not a checkpoint of torch, or it holds objects other than tensors and"
            reason += " plain data, which are refused because loading them can run code"
            raise CheckpointError(f"{path}: cannot be read: {reason}") from error
        except Exception as error:  # the bytes of a damaged pickle can lead to any of them
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path}: cannot be read, it may be incomplete ({first})"
            ) from error


def _load(model: nn.Module, state_dict: StateDict, path: Path, strict: bool) -> None:
    own = model.state_dict()
    state_dict = _without_bench(state_dict, own)
    problems = []
    if strict:
        problems.append(("missing from the file", [k for k in own if k not in state_dict]))
        problems.append(("not in the model", [k for k in state_dict if k not in own]))
    shared = [k for k in state_dict if k in own]
    reshaped = [
        f"{k} {tuple(state_dict[k].shape)} for {tuple(own[k].shape)}"
        for k in shared
        if state_dict[k].shape != own[k].shape
    ]
    problems.append(("of another shape", reshaped))
    found = [f"{len(keys)} {what} ({_first(keys)})" for what, keys in problems if keys]
    if found:
        name = getattr(getattr(model, "config", None), "name", type(model).__name__)
        raise CheckpointError(
            f"{path}: not a checkpoint of this model ({name}, {len(own)} keys; the file has"
            f" {len(state_dict)}): {'; '.join(found)}"
        )
    model.load_state_dict(state_dict, strict=strict)


def _without_bench(state_dict: StateDict, own: Mapping[str, Tensor]) -> StateDict:
    """Of the state dict of a bench that of its model, unless the keys in `own` are a bench's too."""
    inner = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
    rest = [k for k in state_dict if not k.startswith("model.")]
    if not inner or any(k.startswith("model.") for k in own):
        return state_dict
    return inner if all(k.endswith("anchors.boxes") for k in rest) else state_dict


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:_KEYS_SHOWN]) + (", ..." if len(keys) > _KEYS_SHOWN else "")
