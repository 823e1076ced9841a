"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on random problems."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler (g++, or CXX)")
@pytest.mark.parametrize("op", ["soft_nms"])
def test_fuzz(op, tmp_path):
    program = tmp_path / op
    sources = [ROOT / "tests" / "native" / f"{op}_fuzz.cpp", ROOT / "csrc" / op / "cpu.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-fopenmp", "-fsanitize=address,undefined"]
    command = [
        COMPILER,
        *flags,
        "-fno-sanitize-recover=all",
        f"-I{ROOT / 'csrc'}",
        "-o",
        str(program),
    ]
    subprocess.run([*command, *map(str, sources)], check=True)
    # libgomp keeps its threads' memory to the end of the process: not a leak of ours.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr[-2000:]
