"""Runtimes of ONNX files on the CPU: ONNX Runtime and OpenVINO, with as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PACKAGES = ("onnxruntime", "openvino")
Call = Callable[[], list[Tensor]]


def onnxruntime(device: str, path: str, x: Tensor, times: int) -> Call:
    """float32 on the CPU, all graph optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.repeat(times, 1, 1, 1).numpy()}
    return lambda: [torch.from_numpy(y) for y in session.run(None, feed)]


def openvino(device: str, path: str, x: Tensor, times: int, precision: str) -> Call:
    """On the CPU; ``precision`` "f32" or "bf16" of the arithmetic, inputs and outputs are float32."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(path, "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != precision:
        raise RuntimeError(f"OpenVINO computes in {used} here, {precision} was asked for")
    request = compiled.create_infer_request()
    feed = x.repeat(times, 1, 1, 1).numpy()

    def call() -> list[Tensor]:
        request.infer({0: feed})
        return [torch.from_numpy(t.data) for t in request.output_tensors]

    return call
