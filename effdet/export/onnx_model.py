"""A program of `torch.export` as an ONNX model with names, in the standard's own operators."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from effdet.bench import DetBenchPredict
from effdet_kernels.export import decompositions

from .checks import ExportError
from .program import ExportOptions, decomposed, export_program

OLDEST_OPSET, NEWEST_OPSET = 18, 23
_ANY = 2**31
_SIDES = {0: "batch", 2: "height", 3: "width"}  # of images [B, 3, H, W]


def onnx_model(bench: DetBenchPredict, options: ExportOptions, opset: int) -> Any:
    """An `onnx.ModelProto` of detection.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: `opset` is out of range.
        ExportError: an operator that is not the standard's is in it.
    """
    if opset not in range(OLDEST_OPSET, NEWEST_OPSET + 1):
        raise ValueError(f"opset: got {opset!r}, takes {OLDEST_OPSET} to {NEWEST_OPSET}")
    _require_onnx()
    table = decompositions()
    translations: dict[Any, Any] = {}
    if options.outputs == "detections" and not bench.soft_nms:
        from .nms import hard_nms

        kept = torch.ops.effdet_kernels.soft_nms.default
        del table[kept]
        translations[kept] = hard_nms(bench.num_classes)
    raw = options.outputs == "raw"
    with _quiet():
        program = decomposed(export_program(bench, options, decompose=False), table)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=translations,
            input_names=["images", *(["img_scale", "img_size"] if options.img_info else [])],
            output_names=["boxes", "scores"] if raw else ["detections"],
            verbose=False,
        )
        assert exported is not None
        from onnx import helper
        from onnxscript import optimizer

        # The exporter leaves constants of more than a few thousand numbers to whoever loads the file.
        optimizer.optimize(exported.model, input_size_limit=_ANY, output_size_limit=_ANY)
    proto = exported.model_proto
    others = {node.domain for node in _nodes(proto.graph) if node.domain}
    if others or len(proto.functions):
        raise ExportError(f"operators of {', '.join(others) or 'its own'} are in the model")
    _name_dimensions(proto.graph)
    _remove_traces(proto.graph)
    proto.ir_version = helper.find_min_ir_version_for(proto.opset_import)
    return proto


def onnx_nodes(proto: Any) -> int:
    """Operations in a model, those of the bodies of loops included."""
    return sum(1 for _ in _nodes(proto.graph))


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)


def _remove_traces(graph: Any) -> None:
    """Without what the exporter says of each node: lines of this package, with paths of this machine."""
    bodies = [a.g for node in _nodes(graph) for a in node.attribute if a.HasField("g")]
    for part in (graph, *bodies):
        values = (part.input, part.output, part.value_info)
        for entry in (part, *part.node, *part.initializer, *itertools.chain(*values)):
            del entry.metadata_props[:]


def _name_dimensions(graph: Any) -> None:
    """Names for the exporter's symbols: s34 and 128*s91 become "batch" and "height", 64*s91 64*(height/128)."""
    new = {}
    for axis, dim in enumerate(graph.input[0].type.tensor_type.shape.dim):
        if dim.dim_param:
            factor, _, symbol = dim.dim_param.rpartition("*")
            new[symbol] = f"({_SIDES[axis]}/{factor})" if factor else _SIDES[axis]
            new[dim.dim_param] = _SIDES[axis]
    if not new:
        return
    longest_first = sorted(map(re.escape, new), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)({'|'.join(longest_first)})(?!\w)")
    bodies = [a.g for node in _nodes(graph) for a in node.attribute if a.HasField("g")]
    for part in (graph, *bodies):
        for value in (*part.input, *part.output, *part.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = pattern.sub(lambda found: new[found[0]], dim.dim_param)


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"writing ONNX needs {name}: pip install 'effdet-kernels[export]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of torchvision, which is not needed, and of its own deprecated calls."""

    def is_news(record: logging.LogRecord) -> bool:
        return "torchvision is not installed" not in record.getMessage()

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(is_news)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.removeFilter(is_news)
