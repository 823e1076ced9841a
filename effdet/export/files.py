"""Detection as a file: ONNX, or a program of `torch.export`. It is checked before it appears."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from effdet.bench import DetBenchPredict
from effdet.data.input_config import resolve_input_config
from effdet.engine.weights import default_class_names
from effdet.files import replacing
from effdet.version import __version__

from .checks import Check, ExportError, Run, compare
from .onnx_model import OLDEST_OPSET, onnx_model, onnx_nodes
from .pictures import batches
from .program import ExportOptions, export_program, image_size, predict_bench

EXTRA = "effdet.json"  # what a .pt2 file says about itself


@dataclass(frozen=True)
class ExportReport:
    """A file that was written.

    Attributes:
        path: the file.
        size: its bytes.
        nodes: operations in it, those of loops' bodies included.
        check: what it was compared on; None with check=False.
    """

    path: Path
    size: int
    nodes: int
    check: Check | None

    def __str__(self) -> str:
        check = "not checked" if self.check is None else str(self.check)
        return f"{self.path} ({self.size:,} bytes, {self.nodes} operations)\n{check}"


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    opset: int = OLDEST_OPSET,
    check: bool = True,
    images: Sequence[str | os.PathLike[str]] | None = None,
    class_names: Sequence[str] | None = None,
) -> ExportReport:
    """Write detection as ONNX, in the standard's own operators, and compare it with the model.

    Inputs are ``images`` [B, 3, H, W] (and ``img_scale``, ``img_size``); outputs ``detections``
    [B, max_det, 6], or ``boxes`` and ``scores``. The file's metadata say what `metadata` returns.

    Args:
        model: `EfficientDet` or `DetBenchPredict`, whose settings go into the file. It is put in eval mode.
        path: the file; it appears complete and checked, or not at all.
        options: what the file takes and returns; None: `ExportOptions()`.
        opset: version of ONNX's operators, 18 to 23.
        check: run the file in ONNX Runtime on pictures, and compare with the model.
        images: files of pictures for that; None: scenes are drawn.
        class_names: name of label 1, 2, ...; None: COCO's for 90 classes, else "class 1", ...

    Raises:
        ExportError: the file does not compute what the model does.
        ImportError: a package is missing; the message says how to install it.
        ValueError: an argument out of range, or weights that are not float32.
        OSError: the file cannot be written, or a picture not read.
    """
    options = options or ExportOptions()
    bench = _checked(model)
    facts = metadata(bench, options, class_names)
    if check:
        _onnxruntime()
    samples = batches(bench, options, images) if check else None
    with _begun(path) as partial:
        proto = onnx_model(bench, options, opset)
        for name, value in facts.items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value)
        partial.write_bytes(proto.SerializeToString())
        seen = compare(*_load_onnx(partial), bench, options, samples) if samples else None
    return ExportReport(Path(path), Path(path).stat().st_size, onnx_nodes(proto), seen)


def export_pt2(
    model: nn.Module,
    path: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    check: bool = True,
    images: Sequence[str | os.PathLike[str]] | None = None,
    class_names: Sequence[str] | None = None,
) -> ExportReport:
    """Write detection as a program for `torch.export.load`, of torch's own ops; the rest as `export_onnx`.

    What `metadata` returns is in it as the extra file ``effdet.json``. The program computes on the model's device.
    """
    options = options or ExportOptions()
    bench = _checked(model)
    facts = metadata(bench, options, class_names)
    samples = batches(bench, options, images) if check else None
    with _begun(path) as partial:
        program = _without_traces(export_program(bench, options))
        content = io.BytesIO()  # torch ends the process where its own writing of a file fails
        torch.export.save(program, content, extra_files={EXTRA: json.dumps(facts)})
        partial.write_bytes(content.getbuffer())
        seen = compare(*_load_pt2(partial), bench, options, samples) if samples else None
    nodes = sum(node.op == "call_function" for node in _nodes(program))
    return ExportReport(Path(path), Path(path).stat().st_size, nodes, seen)


def check_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    options: ExportOptions | None = None,
    *,
    images: Sequence[str | os.PathLike[str]] | None = None,
) -> Check:
    """Compare an ONNX file with the model that it was made of, on pictures: see `export_onnx`.

    Boxes are to agree to 0.05 pixels, scores to 1e-4, classes entirely; rows whose scores are that close may come in
    another order.

    Raises:
        ExportError: it cannot be loaded, or differs; the message says where, and by how much.
        ImportError: onnxruntime is missing.
    """
    return _check(_load_onnx, path, model, options, images)


def check_pt2(
    path: str | os.PathLike[str],
    model: nn.Module,
    options: ExportOptions | None = None,
    *,
    images: Sequence[str | os.PathLike[str]] | None = None,
) -> Check:
    """Compare a file of `export_pt2` with the model that it was made of: see `check_onnx`."""
    return _check(_load_pt2, path, model, options, images)


def metadata(
    model: nn.Module, options: ExportOptions, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """What a file says about itself: the model, its classes, how images enter it and which boxes are kept.

    Raises:
        ValueError: as many `class_names` as the model has classes are wanted.
    """
    bench = predict_bench(model)
    names = list(class_names or default_class_names(bench.num_classes))
    if len(names) != bench.num_classes:
        raise ValueError(f"class_names: got {len(names)}, takes {bench.num_classes}")
    inputs = resolve_input_config({}, bench.config)
    facts = {
        "model": bench.config.name,
        "effdet_kernels": __version__,
        "classes": names,
        "image_size": list(image_size(bench, options)),
        "mean": list(inputs["mean"]),
        "std": list(inputs["std"]),
        **{k: v for k, v in dataclasses.asdict(options).items() if k != "size"},
    }
    if options.outputs == "detections":
        facts |= dataclasses.asdict(bench.suppression())
        facts["score_threshold"] = bench.suppression().least_score
    return facts


@contextlib.contextmanager
def _begun(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`replacing`, which finds at once, and not after minutes, that no file can be there."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    with replacing(path) as partial:
        partial.touch()
        yield partial


def _without_traces(program: ExportedProgram) -> ExportedProgram:
    """`program`, without lines of this package, with paths of this machine, at each node, and without the example."""
    for node in _nodes(program):
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def _nodes(program: ExportedProgram) -> Iterator[torch.fx.Node]:
    """Nodes of a program, those of the bodies of loops included."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def _check(
    load: Callable[[str | os.PathLike[str]], tuple[Run, str]],
    path: str | os.PathLike[str],
    model: nn.Module,
    options: ExportOptions | None,
    images: Sequence[str | os.PathLike[str]] | None,
) -> Check:
    options = options or ExportOptions()
    bench = predict_bench(model)
    return compare(*load(path), bench, options, batches(bench, options, images))


def _load_onnx(path: str | os.PathLike[str]) -> tuple[Run, str]:
    """A call of the file, and the name of what runs it."""
    runtime = _onnxruntime()
    try:
        session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # kinds of its own
        raise ExportError(f"{path}: ONNX Runtime cannot load it: {error}") from error
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: tuple[torch.Tensor, ...]) -> list[Any]:
        arrays = [x.cpu().numpy() for x in inputs]
        return session.run(None, dict(zip(names, arrays, strict=True)))

    return run, f"ONNX Runtime {runtime.__version__}"


def _load_pt2(path: str | os.PathLike[str]) -> tuple[Run, str]:
    with open(path, "rb") as file:
        try:
            program = torch.export.load(file).module()
        except Exception as error:
            raise ExportError(f"{path}: torch.export cannot load it: {error}") from error

    def run(inputs: tuple[torch.Tensor, ...]) -> list[Any]:
        with torch.no_grad():
            return [x.float().cpu().numpy() for x in tree_leaves(program(*inputs))]

    return run, f"torch {torch.__version__}"


def _checked(model: nn.Module) -> DetBenchPredict:
    """A bench to export: in float32, as files are checked to the precision of that."""
    bench = predict_bench(model)
    other = {p.dtype for p in bench.parameters()} - {torch.float32}
    if other:
        raise ValueError(f"model: got weights of {', '.join(map(str, other))}, takes torch.float32")
    return bench


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "checking an ONNX file needs onnxruntime: pip install 'effdet-kernels[export]', or pass"
            " check=False"
        ) from None
    return onnxruntime
