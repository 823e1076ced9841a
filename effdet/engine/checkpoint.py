"""Checkpoints: written in one step, read without running code, and small weight files to ship."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from effdet import safetensors_file
from effdet.helpers import CheckpointError, read_checkpoint

FORMAT = "effdet-checkpoint-1"
_EPOCH_FILE = re.compile(r"epoch-[0-9]+\.pth")


def save_atomically(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """``torch.save`` to a temporary file beside ``path``, flushed to the disk, then renamed.

    Never half a file: after a crash or a loss of power ``path`` holds the old content or the new.

    Raises:
        OSError: it cannot be written (no space left, for one); ``path`` is as it was.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        # torch's archive writer says nothing of why a write failed: the bytes are made first.
        content_bytes = io.BytesIO()
        torch.save(content, content_bytes)
        with open(partial, "wb") as file:
            file.write(content_bytes.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        kept = f"; the one of before is kept as {path}" if path.exists() else ""
        reason = f"{error.strerror}: checkpoint {path.name} was not written{kept}"
        raise OSError(error.errno, reason) from error
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_as_well(path: Path, name: str) -> None:
    """Give the checkpoint ``path`` another name beside it; no space of its own where there are hard links.

    Files are replaced, never written to, so that neither name changes with the other.
    """
    copy = path.with_name(name)
    partial = path.with_name(name + ".part")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
    os.replace(partial, copy)


def keep_epoch(path: Path, epoch: int, most: int) -> None:
    """Keep the checkpoint ``path`` besides as ``epoch-<epoch>.pth``, and of such files the last ``most``."""
    if most < 1:
        return
    save_as_well(path, f"epoch-{epoch}.pth")
    kept = [file for file in path.parent.iterdir() if _EPOCH_FILE.fullmatch(file.name)]
    for file in sorted(kept, key=lambda file: int(file.stem.removeprefix("epoch-")))[:-most]:
        file.unlink()


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint on the CPU. Only tensors and plain containers load; no code is run.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is truncated, no checkpoint, or holds pickled code.
    """
    content = read_checkpoint(os.fspath(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return content


def rng_state() -> dict[str, Any]:
    """State of the generators that a training step may draw from, as tensors and lists."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`; a CUDA state is ignored where there is no CUDA device."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def export_half(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the averaged weights of a training checkpoint in half precision, to ship or share.

    The file holds ``model``, ``image_size``, ``class_names``, ``category_ids`` and ``state_dict``,
    and ``bn_eps`` where it is not the configuration's.
    The first 8 digits of its SHA-256 are put into its name, the convention of torch.hub:
    ``out`` = ``dir/name.pth`` gives ``dir/name-1a2b3c4d.pth``, which is returned.
    ``out`` = ``dir/name.safetensors`` is written under that name, as the Hugging Face Hub, which
    keeps hashes itself, wants it.

    Raises:
        CheckpointError: not a checkpoint of ``effdet train``, or a weight exceeds half's range.
    """
    content = read(checkpoint)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint}: not written by `effdet train`")
    weights = _half(content["state_dict_ema"], checkpoint)
    small = {key: content[key] for key in ("model", "image_size", "class_names", "category_ids")}
    if content.get("bn_eps"):
        small["bn_eps"] = content["bn_eps"]
    out = Path(out)
    if out.suffix == ".safetensors":
        safetensors_file.write(out, weights, {**small, "image_size": list(small["image_size"])})
        return out
    partial = out.with_name(out.name + ".part")
    # the legacy format has no per-tensor archive entries, a third of the size of a small model
    torch.save({**small, "state_dict": weights}, partial, _use_new_zipfile_serialization=False)
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()[:8]
    final = out.with_name(f"{out.stem}-{digest}{out.suffix}")
    os.replace(partial, final)
    return final


def _half(weights: dict[str, torch.Tensor], checkpoint: object) -> dict[str, torch.Tensor]:
    halves = {}
    for name, value in weights.items():
        half = value.half() if value.is_floating_point() else value
        if not bool(torch.isfinite(half).all()):
            raise CheckpointError(f"{checkpoint}: {name} does not fit half precision")
        halves[name] = half.contiguous()
    return halves
