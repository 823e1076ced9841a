"""`import effdet` costs little more than `import torch`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest

from effdet_kernels import _triton

# What takes long to import, and is imported where it is needed.
LATE = {"cv2", "huggingface_hub", "matplotlib", "onnx", "onnxruntime", "supervision", "timm"}
LATE |= {"filelock", "pycocotools", "torch._dynamo", "torch._inductor", "torchvision"}
MOST = 1.3  # times `import torch`


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_nothing_slow_is_imported():
    late = LATE if _triton.REASON is None else LATE | {"triton"}
    code = f"import sys, torch; had = set(sys.modules); import effdet; print({late!r} & (set(sys.modules) - had))"
    assert run(code).strip() == "set()"


@pytest.mark.slow
def test_time():
    """Seconds in new processes, alternating; the median of eleven."""
    seconds: dict[str, list[float]] = {"torch": [], "effdet": []}
    for _ in range(11):
        for module, taken in seconds.items():
            start = time.perf_counter()
            run(f"import {module}")
            taken.append(time.perf_counter() - start)
    torch, ours = (statistics.median(taken) for taken in seconds.values())
    assert ours <= MOST * torch, f"import effdet {ours:.2f} s, import torch {torch:.2f} s"
