"""The only importer of the compiled module ``_C``: its absence with the reason, dtype codes, status codes."""

from __future__ import annotations

import torch  # before _C: the loader then resolves libgomp to torch's copy, so that there is one thread pool

try:
    from effdet_kernels import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C = None  # type: ignore[assignment]
    REASON: str | None = (
        f"the compiled module effdet_kernels._C is missing ({error}); "
        "install a wheel, or build it: pip install . (CMake and a C++17 compiler are needed)"
    )
else:
    REASON = None

DTYPE_CODES = {torch.float32: 0, torch.float64: 1}
_STATUS = {
    1: "a pointer is null or misaligned",
    2: "a size is negative or too large",
    3: "the dtype is not supported",
    4: "a parameter is out of range",
    5: "out of memory",
}


def cuda_reason() -> str | None:
    """Why CUDA C++ kernels cannot run here, or None when they can."""
    if REASON is not None:
        return REASON
    if not _C.BUILT_WITH_CUDA:
        return "this build of effdet_kernels._C has no CUDA kernels"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return None


def check(status: int, op: str) -> None:
    """Turns a status returned by ``_C`` into an exception."""
    if status:
        raise RuntimeError(f"{op}: the native kernel refused the call: {_STATUS[status]}")


def module():
    """The compiled module; only called where REASON is None."""
    return _C
