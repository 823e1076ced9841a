"""torchvision with its compiled operators where they load, else with declarations only."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

STUB = Path(__file__).resolve().parents[3] / "tests" / "oracle" / "torchvision_stub.py"


@functools.cache
def prepare() -> bool:
    """Makes ``import torchvision`` work; whether its operators are the compiled ones.

    Its compiled library is built for one torch. Beside another, importing torchvision fails unless its operators are
    declared first; the declarations that the tests use serve. Raises ImportError where torchvision is not installed.
    """
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        raise ImportError("No module named 'torchvision'")
    folder = Path(package.submodule_search_locations[0])
    for library in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return hasattr(torch.ops.torchvision, "nms")
    stub = importlib.util.spec_from_file_location("torchvision_stub", STUB)
    assert stub is not None and stub.loader is not None
    stub.loader.exec_module(importlib.util.module_from_spec(stub))
    return False
