"""A look, at import, for the PyPI package `effdet` in the same environment: both install into this folder.

Whichever came last has overwritten files of the other, and uninstalling one takes files of the other with it.
"""

from __future__ import annotations

import csv
import os
import warnings
from fnmatch import fnmatch

_REMEDY = "type: pip uninstall effdet effdet-kernels; pip install effdet-kernels"
_SHOWN = 3


def check(package: str) -> None:
    """Look beside `package`, the folder of this package, for what pip notes of the other one.

    An editable installation has nothing of the kind beside it, as its folder is not pip's to write to.

    Raises:
        ImportError: files of this package were overwritten.

    Warns:
        UserWarning: the other one is installed, but these files are as they were.
    """
    site = os.path.dirname(package)
    names = os.listdir(site)
    others = [name for name in names if fnmatch(name, "effdet-*.dist-info")]
    if not others:
        return
    both = f"{package}: effdet-kernels and {others[0].removesuffix('.dist-info')} are both installed here"
    changed = []
    for name in names:
        if fnmatch(name, "effdet_kernels-*.dist-info"):
            changed += _changed_files(site, os.path.join(site, name, "RECORD"))
    if changed:
        shown = ", ".join(changed[:_SHOWN])
        raise ImportError(f"{both}, and {len(changed)} files are not ours ({shown}); {_REMEDY}")
    warnings.warn(
        f"{both}; uninstalling or upgrading effdet will break this package; {_REMEDY}", stacklevel=2
    )


def _changed_files(site: str, record: str) -> list[str]:
    """Python files of effdet whose size is not the one that was installed, where the record has it."""
    changed = []
    with open(record, newline="", encoding="utf-8") as file:
        for name, _, size in csv.reader(file):
            if size and name.startswith("effdet/") and name.endswith(".py"):
                path = os.path.join(site, name)
                if not os.path.isfile(path) or os.path.getsize(path) != int(size):
                    changed.append(name)
    return changed


check(os.path.dirname(os.path.abspath(__file__)))
