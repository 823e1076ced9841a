"""torchvision with its compiled operators where they load, else with declarations only."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

import torch

STUB = Path(__file__).resolve().parents[3] / "tests" / "oracle" / "torchvision_stub.py"


@functools.cache
def prepare() -> bool:
    """Makes ``import torchvision`` work; whether its operators are the compiled ones.

    Its compiled library is built for one torch and its CUDA. Where it cannot be loaded, importing torchvision fails
    unless its operators are declared first; the declarations that the tests use serve. Raises ImportError where
    torchvision is not installed.
    """
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        raise ImportError("No module named 'torchvision'")
    folder = Path(package.submodule_search_locations[0])
    for library in folder.glob("_C*.so"):
        if _loads(library) or (torch.version.cuda is None and _loads_without_cuda(library)):
            return hasattr(torch.ops.torchvision, "nms")
    stub = importlib.util.spec_from_file_location("torchvision_stub", STUB)
    assert stub is not None and stub.loader is not None
    stub.loader.exec_module(importlib.util.module_from_spec(stub))
    return False


def _loads(library: Path) -> bool:
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _loads_without_cuda(library: Path) -> bool:
    """Loads a library for GPUs beside a torch without CUDA, for its operators on the CPU.

    Those call nothing of CUDA. Empty functions stand in for what the library takes from CUDA's libraries and torch's;
    a C compiler, ``nm`` and ``readelf`` are needed.
    """
    try:
        symbols = [s for s in _output("nm", "-D", "-u", library).split() if "cuda" in s.lower()]
        needed = re.findall(r"NEEDED.*\[(.*cuda.*)\]", _output("readelf", "-d", library))
        with tempfile.TemporaryDirectory() as folder:
            for name in needed:
                # Symbols have no version, or the name of their library for one.
                mine = {s.partition("@")[0] for s in symbols if s.endswith(f"@{name}")}
                mine = mine or {s for s in symbols if "@" not in s}
                source, versions, file = (
                    Path(folder, f"{name}{end}") for end in (".c", ".map", "")
                )
                source.write_text(
                    "".join(f"void *{s}(void) {{ return 0; }}\n" for s in sorted(mine))
                )
                versions.write_text(f"{name} {{ *; }};")
                options = f"-Wl,-soname,{name},--version-script,{versions}"
                _output("cc", "-shared", "-fPIC", options, source, "-o", file)
                ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.CalledProcessError):
        return False
    return _loads(library)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
