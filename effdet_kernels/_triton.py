"""The only importer of triton: says whether Triton kernels can run here, and why not."""

from __future__ import annotations

import torch


def _find_reason() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return 'triton is not installed: pip install "effdet-kernels" on Linux x86-64 brings it'
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return None


REASON = _find_reason()
