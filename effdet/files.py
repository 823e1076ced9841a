"""Writing a file so that it appears complete or not at all; names for files that no other has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to: it takes the place of `path` at the end, and is deleted if the block raises."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def free_name(stem: str, suffix: str, used: set[str]) -> str:
    """`stem` and `suffix`, numbered between them where `used`, names in lower case, has it; then it has the result."""
    name, number = f"{stem}{suffix}", 1
    while name.lower() in used:
        number += 1
        name = f"{stem}_{number}{suffix}"
    used.add(name.lower())
    return name
