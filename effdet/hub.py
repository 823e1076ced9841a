"""Files on the Hugging Face Hub: `hf://owner/name[@revision][/file]`, or timm's `hf-hub:owner/name[@revision]`.

The file is `model.safetensors` unless one is named, `%2F` stands for a slash inside a revision. Files are kept in the
Hub's own cache; with `HF_HUB_OFFLINE=1` only that is looked at.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from . import safetensors_file
from .download import DownloadError, hash_problem

DEFAULT_FILE = "model.safetensors"
_REFERENCE = re.compile(
    r"(?:hf://|hf[-_]hub:)(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubFile(NamedTuple):
    """A file of a repository on the Hub; no revision is its main branch."""

    repo: str
    revision: str | None
    file: str


def is_reference(text: object) -> bool:
    """Whether this is meant as a file on the Hub."""
    return isinstance(text, str) and text.startswith(("hf://", "hf-hub:", "hf_hub:"))


def parse(reference: str) -> HubFile:
    """Take a reference apart.

    Raises:
        DownloadError: it has another form.
    """
    found = _REFERENCE.fullmatch(reference)
    if not found:
        raise DownloadError(
            f"{reference}: is no file on the Hub; takes hf://owner/name[@revision][/file]"
        )
    revision = found["revision"]
    return HubFile(found["repo"], revision and unquote(revision), found["file"] or DEFAULT_FILE)


def fetch(reference: str) -> Path:
    """The local path of the file, fetched unless the Hub's cache has it.

    Where a safetensors file does not say what it is for, a `config.json` beside it is fetched too.

    Raises:
        DownloadError: another form of reference, no such file, no connection, a damaged file, or the huggingface_hub
            package is missing.
    """
    wanted = parse(reference)
    path = _fetch(wanted, reference)
    # The cache names what it keeps of a large file by its SHA-256.
    content = path.resolve()
    if _SHA256.fullmatch(content.name):
        problem = hash_problem(content, content.name)
        if problem:
            raise DownloadError(f"{reference}: {problem}; delete {content} to fetch it again")
    if path.suffix == ".safetensors" and not safetensors_file.is_described(path):
        config = PurePosixPath(wanted.file).with_name(safetensors_file.CONFIG_NAME)
        with contextlib.suppress(DownloadError):  # not every repository has one
            _fetch(wanted._replace(file=str(config)), reference)
    return path


def _fetch(wanted: HubFile, reference: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download, utils
    except ModuleNotFoundError as error:
        raise DownloadError(
            f'{reference}: takes the huggingface_hub package: pip install "effdet-kernels[hub]"'
        ) from error
    where = f"{wanted.repo}, revision {wanted.revision or 'main'}"
    try:
        return Path(hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision))
    except utils.LocalEntryNotFoundError as error:
        problem = (
            f"{wanted.file} of {where} is not in the Hub's cache, and there is no connection or"
            " HF_HUB_OFFLINE is set; fetch it once where there is one, or give a local file"
        )
        cause: Exception = error
    except utils.EntryNotFoundError as error:
        problem, cause = f"{where} has no file {wanted.file}", error
    except utils.RevisionNotFoundError as error:
        problem, cause = f"{wanted.repo} has no revision {wanted.revision}", error
    except utils.RepositoryNotFoundError as error:
        problem = f"the Hub has no repository {wanted.repo}, or it takes an access token (HF_TOKEN)"
        cause = error
    except (OSError, ValueError) as error:
        problem, cause = f"cannot fetch {wanted.file} of {where} ({error})", error
    raise DownloadError(f"{reference}: {problem}") from cause
