"""What a user is told when Triton cannot serve a call: absent, too old, no GPU, no compiler, tensors elsewhere."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import torch

import effdet_kernels as ek
from effdet_kernels import BackendError, _dispatch, _triton, use_backend
from effdet_kernels.bound import tensors_of
from effdet_kernels.spec import iter_specs, map_tensors

BOXES, SCORES = torch.rand(1, 5, 4), torch.rand(1, 5)


def arguments_of(spec) -> list[str]:
    """The names of all arguments that are tensors or lists of them, but the first, which names the device."""
    inputs = spec.inputs(spec.cases[0], torch.float32)
    return [name for name, value in inputs.items() if tensors_of(value)][1:]


MIXED = [(spec, name) for spec in iter_specs() for name in arguments_of(spec)]


# Devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "name"), MIXED, ids=[f"{s.name}-{n}" for s, n in MIXED])
def test_an_argument_on_another_device_is_named(spec, name):
    inputs = spec.inputs(spec.cases[0], torch.float32)
    inputs[name] = map_tensors(inputs[name], lambda t: t.to("meta"))
    with pytest.raises(ValueError) as caught:
        spec.op(**inputs)
    message = str(caught.value)
    assert message.startswith(f"{spec.name}: {name}"), message
    assert "on meta, takes a tensor on cpu" in message


@pytest.mark.parametrize(
    "op", ["decode_topk", "detection_loss", "separable_conv", "weighted_fusion"]
)
def test_the_last_map_of_a_list_on_another_device_is_named(op):
    spec = next(spec for spec in iter_specs() if spec.name == op)
    lists = (spec.inputs(case, torch.float32) for case in spec.cases)
    inputs = next(i for i in lists if len(next(iter(i.values()))) > 1)
    name, maps = next(iter(inputs.items()))
    inputs[name] = [*maps[:-1], maps[-1].to("meta")]
    with pytest.raises(
        ValueError, match=rf"{op}: {name}\[{len(maps) - 1}\]: got .* on meta, takes"
    ):
        spec.op(**inputs)


class OnCuda(torch.Tensor):
    """Says that it lies on the second GPU."""

    is_cuda = True
    device = torch.device("cuda:1")


def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device(of):
        current.append(of)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []
    x = torch.zeros(3).as_subclass(OnCuda)
    _triton.launch({(7,): lambda *a, **o: seen.append((list(current), a, o))}, 7, x, 3, BLOCK=16)
    options = {"BLOCK": 16, "enable_fp_fusion": True}
    assert seen == [([torch.device("cuda:1")], (x, 3), options)]
    assert not current


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs, torch sees fewer")
def test_a_kernel_runs_on_a_device_that_is_not_current():
    x, weight = torch.randn(2, 5, 4, 4, device="cuda:1"), torch.randn(7, 5, 1, 1, device="cuda:1")
    with torch.cuda.device(0), use_backend("triton"):
        y = ek.pointwise_conv(x, weight)
    with use_backend("reference"):
        torch.testing.assert_close(y, ek.pointwise_conv(x, weight))


def test_more_programs_than_a_grid_has_are_refused():
    def kernel(): ...

    with pytest.raises(ValueError, match="kernel: a call takes 2147483648 programs, CUDA at most"):
        _triton.launch(kernel, 2**31, torch.zeros(1))


# Availability ------------------------------------------------------------------------------------


@pytest.mark.skipif(_triton.INTERPRET, reason="TRITON_INTERPRET=1: here Triton takes CPU tensors")
def test_triton_by_name_on_cpu_tensors(monkeypatch):
    x, weight = torch.rand(2, 5, 4, 4), torch.rand(7, 5, 1, 1)
    monkeypatch.setattr(_triton, "REASON", None)  # as on a machine with a GPU
    with (
        use_backend("triton"),
        pytest.raises(
            BackendError,
            match="pointwise_conv: backend 'triton' runs on cuda, tensors are on cpu",
        ),
    ):
        ek.pointwise_conv(x, weight)


@pytest.mark.skipif(_triton.INTERPRET, reason="TRITON_INTERPRET=1: here Triton needs no GPU")
def test_no_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _triton._find_reason() == "no CUDA device is visible to torch"


@pytest.mark.parametrize("version", ["2.3.1", "3.5.9+git1234"])
def test_triton_that_is_too_old(monkeypatch, version):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "__version__", version)
    reason = _triton._find_reason()
    assert reason == f"triton {version} is too old: pip install 'triton>=3.6'"
    monkeypatch.setattr(_triton, "REASON", reason)
    with pytest.raises(BackendError) as caught, use_backend("triton"):
        pass
    assert str(caught.value) == f"use_backend('triton'): {reason}"
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(BackendError) as caught:
        ek.soft_nms(BOXES, SCORES)
    assert str(caught.value) == f"soft_nms: backend 'triton' was asked for, but {reason}"


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0"])
def test_triton_that_is_new_enough(monkeypatch, version):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "__version__", version)
    assert _triton._find_reason() is None


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it is an ImportError
import torch, effdet, effdet_kernels as ek
x, weight = torch.rand(2, 5, 4, 4), torch.rand(7, 5, 1, 1, requires_grad=True)
ek.pointwise_conv(x, weight).sum().backward()
model = effdet.create_model("efficientdet_nano", pretrained_backbone=False).eval()
with torch.no_grad():
    model(torch.zeros(1, 3, 64, 64))
torch.cuda.is_available = lambda: True
from effdet_kernels import _triton
print(_triton._find_reason())
"""


def test_everything_else_works_without_triton():
    environment = {**os.environ, "TRITON_INTERPRET": ""}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("triton is not installed: pip install")


# The compiler of Triton's launchers --------------------------------------------------------------


def launch(fails):
    """A call of a kernel whose first launch calls `fails`, as Triton's does to compile its launcher."""
    _triton.launch({(1,): lambda *arguments, **options: fails()}, 1, torch.zeros(1))


@pytest.fixture
def build(monkeypatch, tmp_path):
    """What Triton compiles launchers with, having compiled none."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if hasattr(build, "_find_compiler"):  # of a later release than the oldest that is supported
        build._find_compiler.cache_clear()
    return build


def test_no_c_compiler(monkeypatch, build):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError) as caught:
        launch(lambda: build.compile_module_from_src("int x;", "launcher"))
    message = str(caught.value)
    assert message.startswith("triton: found no C compiler; it takes gcc or clang"), message
    assert "apt-get install gcc python3-dev" in message
    assert "Failed to find C compiler" in str(caught.value.__cause__)


def test_a_compiler_that_fails(monkeypatch, build):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(RuntimeError, match=r"triton: false failed .* the headers of Python"):
        launch(lambda: build.compile_module_from_src("int x;", "launcher"))


def test_other_errors_stay_what_they_are():
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError) as caught:
        launch(fails)
    assert str(caught.value).startswith("CUDA error") and caught.value.__cause__ is None
