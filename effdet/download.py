"""Fetching a weight file into torch's cache: resumable, checked, safe to run in several processes.

The folder and the file names are those of `torch.hub`, so files fetched by either are shared.
"""

from __future__ import annotations

import hashlib
import re
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

_ATTEMPTS = 4
_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20
_RANGE_NOT_SATISFIABLE = 416
# What torch.hub writes into names: the first digits of the file's SHA-256.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")


class DownloadError(OSError):
    """A file could not be fetched, or is not the file that its name promises."""


def download(url: str) -> Path:
    """The local path of the file at `url`, fetched unless it is in the cache already.

    A broken transfer leaves `<name>.part`, which the next call continues. A name of the form
    `<base>-<hex>.<suffix>` has to match the file's SHA-256.

    Raises:
        DownloadError: names the file, the URL and the folder to put the file into by hand.
    """
    from filelock import FileLock

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = unquote(Path(urlparse(url).path).name)
    if not name:
        raise DownloadError(f"url: got {url!r}, expected one that ends in a file name")
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(path) + ".lock"):
        if path.exists():
            problem = _hash_problem(path, name)
            if problem:
                raise DownloadError(f"{path}: {problem}; delete it to fetch it again from {url}")
            return path
        part = path.with_name(name + ".part")
        try:
            _fetch_with_retries(url, part)
        except (OSError, HTTPException) as error:
            raise DownloadError(
                f"cannot fetch {name} from {url} ({error}); offline, put the file into {folder}"
            ) from error
        problem = _hash_problem(part, name)
        if problem:
            part.unlink()
            raise DownloadError(f"{url}: {problem}; nothing was kept")
        part.replace(path)
    return path


def _fetch_with_retries(url: str, part: Path) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            return _fetch(url, part)
        except urllib.error.HTTPError as error:
            if error.code == _RANGE_NOT_SATISFIABLE and part.exists():
                part.unlink()
            elif error.code < 500:
                raise
            last: Exception = error
        except (OSError, HTTPException) as error:
            last = error
        if attempt + 1 < _ATTEMPTS:
            time.sleep(0.2 * 2**attempt)
    raise last


def _fetch(url: str, part: Path) -> None:
    """One transfer, continuing at the end of `part`."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={done}-"} if done else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        resumed = response.status == 206
        expected = response.headers.get("Content-Length")
        received = 0
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                received += len(chunk)
    if expected is not None and received < int(expected):
        raise OSError(f"the connection ended after {received} of {expected} bytes")


def _hash_problem(path: Path, name: str) -> str | None:
    """What is wrong with the content of `path`, if the name says what it should be."""
    found = _HASH_IN_NAME.search(name)
    return hash_problem(path, found.group(1)) if found else None


def hash_problem(path: Path, expected: str) -> str | None:
    """What is wrong with the content of `path`, whose SHA-256 should begin with these digits; None if it does."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    actual = digest.hexdigest()
    if actual.startswith(expected):
        return None
    length = path.stat().st_size
    return f"the SHA-256 of its {length} bytes begins {actual[:8]}, expected {expected}"
