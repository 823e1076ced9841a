"""Which calls the CUDA kernels take, and what they say of others."""

from __future__ import annotations

import pytest
import torch

import effdet_kernels as ek
from effdet_kernels import BackendError, _cuda, _native, guards, testing, use_backend
from effdet_kernels.bound import differentiable, flatten, vector_jacobian, with_leaves
from effdet_kernels.spec import iter_specs

SPECS = [spec for spec in iter_specs() if "cuda" in testing.operator(spec).impls]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Small cases, in each of the dtypes above, that forward and backward take: a kernel that comes to refuse what it took
# is seen here, where test_kernels.py would skip it.
TAKEN = {
    "decode_topk": (69, 0),
    "depthwise_conv": (73, 15),
    "expand_depthwise": (57, 0),
    "mbconv": (43, 0),
    "pointwise_conv": (48, 0),
    "separable_conv": (88, 10),
    "soft_nms": (24, 0),
    "weighted_fusion": (39, 39),
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_calls_that_kernels_take_are_those_of_the_table(spec, monkeypatch):
    monkeypatch.setattr(_cuda, "launch", lambda *args, **fields: None)  # outputs hold anything
    op = testing.operator(spec)
    names = [argument.name for argument in op.schema.arguments] + ["grads"]
    taken = {"forward": 0, "backward": 0}
    refuses = _cuda.Implementation.refuses

    def noted(implementation, args):
        reason = refuses(implementation, args)
        assert reason is None or reason.split(":")[0].split("[")[0] in names, reason
        way = "forward" if implementation is op.impls["cuda_emu"] else "backward"
        taken[way] += reason is None
        return reason

    monkeypatch.setattr(_cuda.Implementation, "refuses", noted)
    for case in spec.cases:
        for dtype in DTYPES:
            if "bench" in case.tags or dtype not in spec.dtypes:
                continue
            inputs = testing.arranged(spec.inputs(case, dtype), guards.channels_last)
            with use_backend("cuda_emu"), testing.through_registration(op):
                try:
                    with torch.no_grad():
                        spec.op(**inputs)
                except BackendError:
                    continue
                if "cuda_emu" not in op.backwards or "not_differentiable_here" in case.tags:
                    continue
                forwards = taken["forward"]
                inputs = with_leaves(spec, inputs)
                outputs = flatten(spec.op(**inputs))
                taken["forward"] = forwards
                drawn = testing.random_gradients(outputs)
                grads = [None if g is None else guards.channels_last(g) for g in drawn]
                vector_jacobian(outputs, [t for _, t in differentiable(spec, inputs)], grads)
    assert (taken["forward"], taken["backward"]) == TAKEN[spec.name]


def depthwise(x, **changed):
    weight = torch.rand(x.shape[1], 1, changed.pop("side", 3), 3, dtype=x.dtype)
    weight = weight.expand(-1, -1, -1, weight.shape[2])[..., : weight.shape[2]].contiguous()
    with use_backend("cuda_emu"):
        return ek.depthwise_conv(x, weight, padding=(1, 1, 1, 1), **changed)


def map_of(channels, dtype=torch.float32):
    return torch.rand(1, channels, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (map_of(6), "x: has 6 channels, takes a multiple of 4 in float32"),
        (map_of(12, torch.bfloat16), "x: has 12 channels, takes a multiple of 8 in bfloat16"),
        (map_of(8, torch.float64), "x: is float64, takes float32, bfloat16 or float16"),
        (torch.rand(1, 8, 6, 6), r"x: has strides \(288, 36, 6, 1\), takes channels_last"),
        (map_of(10)[:, :8], r"x: has strides \(360, 1, 60, 10\), takes multiples of 4"),
        (map_of(12)[:, 1:9], "x: its address is not a multiple of 16 bytes"),
    ],
    ids=["channels", "channels_bf16", "float64", "layout", "strides", "address"],
)
def test_a_map_that_vectors_cannot_read_is_refused_by_name(x, says):
    with pytest.raises(BackendError, match=f"^depthwise_conv: backend 'cuda_emu' .* {says}$"):
        depthwise(x)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"stride": 3}, "stride: got 3, takes 1 or 2"),
        ({"statistics": True}, "statistics: got True, takes False"),
    ],
)
def test_an_option_that_the_kernel_lacks_is_refused_by_name(changed, says):
    with pytest.raises(BackendError, match=says):
        depthwise(map_of(8), **changed)


def test_what_is_refused_runs_on_the_next_backend_when_none_was_asked_for():
    x = torch.rand(1, 5, 6, 6)
    weight = torch.rand(5, 1, 3, 3)
    assert ek.depthwise_conv(x, weight).shape == (1, 5, 4, 4)


def test_the_module_itself_refuses_a_misaligned_vector():
    x = map_of(8)
    counts = {"batch": 1, "channels": 8, "kernel": 3, "stride": 1, "left": 1, "top": 1, "rows": 6}
    fields = {"dtype": 0, **counts, "x": (x.data_ptr() + 4, 6, 6, 288, 48, 8)}
    with pytest.raises(ValueError, match="x: the address or a stride is not a multiple of 16"):
        _cuda._emulator.depthwise_conv_cuda(fields, 0)


def test_more_shared_memory_than_a_block_has_is_an_error():
    with (
        _cuda.emulated_shared_memory(4),
        pytest.raises(RuntimeError, match=r"takes \d+ bytes of shared memory, there are 4096"),
    ):
        depthwise(map_of(64, torch.bfloat16))


# What depends on a GPU and its driver, on stand-ins -------------------------------------------------


def test_an_old_driver_is_named():
    assert _cuda._driver_reason(13000, 13000) is None
    assert _cuda._driver_reason(13000, 14010) is None
    says = "the driver is of CUDA 12.4, the kernels need 13.0: update the NVIDIA driver"
    assert _cuda._driver_reason(13000, 12040) == says


def test_an_old_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    says = "device 0 (Tesla T4) has compute capability 7.5, the kernels need 8.0"
    reason = _cuda.device_reason.__wrapped__(0)
    assert reason == says


def test_a_status_of_cuda_becomes_an_error_that_names_it(monkeypatch):
    class Module:
        @staticmethod
        def cuda_error(code):
            return {2: "cudaErrorMemoryAllocation: out of memory"}[code]

    monkeypatch.setattr(_native, "module", lambda: Module)
    with pytest.raises(RuntimeError, match="depthwise_conv: CUDA: cudaErrorMemoryAllocation"):
        _cuda.check(-2, "depthwise_conv")
