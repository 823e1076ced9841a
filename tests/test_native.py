"""The compiled module: checks its arguments again, shares torch's thread pool, survives fork and threads."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import effdet_kernels as ek
from effdet_kernels import _native

GOOD = {
    "dtype": 0, "boxes": 64, "scores": 64, "classes": 0, "num_valid": 0, "index": 64, "score": 64, "found": 64,
    "dropped": 64, "batch": 0, "count": 0, "max_det": 0, "method": 0, "sigma": 0.5, "iou": 0.3, "threshold": 0.0,
    "max_per_class": 0, "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 7}, "dtype"),
        ({"batch": -1}, "size"),
        ({"batch": 1 << 40, "count": 1 << 40}, "size"),
        ({"batch": 1, "max_det": 1 << 62}, "size"),
        ({"batch": 1, "count": 1 << 31}, "size"),
        ({"max_per_class": -1}, "out of range"),
        ({"method": 3}, "out of range"),
        ({"sigma": 0.0}, "out of range"),
        ({"sigma": float("nan")}, "out of range"),
        ({"threads": 0}, "out of range"),
        ({"batch": 1, "count": 1, "boxes": 0}, "null or misaligned"),
        ({"batch": 1, "count": 1, "scores": 66}, "null or misaligned"),
        ({"batch": 1, "found": 0}, "null or misaligned"),
        ({"num_valid": 4}, "null or misaligned"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    status = _native.module().soft_nms_cpu(*{**GOOD, **changes}.values())
    with pytest.raises(RuntimeError, match=message):
        _native.check(status, "soft_nms")


def test_an_empty_call_is_fine():
    _native.check(_native.module().soft_nms_cpu(*GOOD.values()), "soft_nms")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_mapped():
    code = """
import effdet_kernels, torch
effdet_kernels.soft_nms(torch.rand(4, 50, 4), torch.rand(4, 50))
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
    assert run_python(code) == "1"


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_works_in_a_forked_worker_after_use_in_the_parent():
    code = """
import effdet_kernels, torch
from torch.utils.data import DataLoader

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return effdet_kernels.soft_nms(torch.rand(4, 50, 4), torch.rand(4, 50), max_det=3)[0]

if __name__ == "__main__":
    effdet_kernels.soft_nms(torch.rand(4, 50, 4), torch.rand(4, 50))
    print(sum(len(batch) for batch in DataLoader(Items(), num_workers=2, multiprocessing_context="fork")))
"""
    assert run_python(code) == "4"


def test_threads_get_their_own_results():
    generator = torch.Generator().manual_seed(0)
    problems = [
        (torch.rand(2, 200, 4, generator=generator) * 50, torch.rand(2, 200, generator=generator))
        for _ in range(16)
    ]
    expected = [ek.soft_nms(*problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda problem: ek.soft_nms(*problem), problems * 4))
    for got, want in zip(found, expected * 4, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_kernels_import_without_the_compiled_module():
    code = """
import sys
sys.modules["effdet_kernels._C"] = None
import effdet_kernels, torch
from effdet_kernels import _native
print(effdet_kernels.soft_nms(torch.rand(1, 5, 4), torch.rand(1, 5))[0].shape)
try:
    with effdet_kernels.use_backend("cpu"):
        pass
except effdet_kernels.BackendError as error:
    print(error)
"""
    out = run_python(code)
    assert "torch.Size([1, 100])" in out and "pip install ." in out
