"""PyPI's effdet 0.4.1: network, ONNX file, training step, labels, loss, suppression, post-processing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torchvision_or_stub
from torch import Tensor, nn

COMPILED_OPS = torchvision_or_stub.prepare()
import effdet  # noqa: E402  after torchvision's operators are declared
from effdet.anchors import AnchorLabeler, Anchors, generate_detections  # noqa: E402
from effdet.bench import DetBenchPredict, _batch_detection, _post_process  # noqa: E402
from effdet.config import get_efficientdet_config  # noqa: E402
from effdet.loss import DetectionLoss  # noqa: E402
from effdet.soft_nms import batched_soft_nms  # noqa: E402
from effdet.version import __version__  # noqa: E402

PACKAGES = ("effdet", "timm", "torchvision")
if __version__ != "0.4.1":
    raise ImportError(f"effdet here is version {__version__}, not PyPI's 0.4.1 ({effdet.__file__})")

Call = Callable[[], list[Tensor]]


class _Flat(nn.Module):
    """The model with its class and box maps in one tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        classes, boxes = self.model(x)
        return (*classes, *boxes)


def _model(name: str, size: list[int], state: dict[str, Tensor]) -> nn.Module:
    model = effdet.create_model(name, pretrained_backbone=False, image_size=tuple(size))
    model.load_state_dict(state)
    return model


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def network(
    device: str,
    name: str,
    state: dict[str, Tensor],
    x: Tensor,
    times: int,
    dtype: str,
    channels_last: bool,
    compile_mode: str,
) -> Call:
    """Class and box maps of ``times`` times the images ``x`` in eval mode.

    ``compile_mode``: "" for eager, else torch.compile's.
    """
    kind = {"device": device, "memory_format": _format(channels_last)}
    model = _Flat(_model(name, list(x.shape[2:]), state)).eval()
    model = model.to(dtype=getattr(torch, dtype), **kind)
    x = x.repeat(times, 1, 1, 1).to(dtype=getattr(torch, dtype), **kind)
    if compile_mode:
        model = torch.compile(model, mode=compile_mode, dynamic=False)

    def call() -> list[Tensor]:
        with torch.inference_mode():
            return list(model(x))

    return call


def onnx_file(
    device: str, name: str, state: dict[str, Tensor], x: Tensor, times: int, path: str
) -> Call:
    """Writes the network as an ONNX file of the fixed shape of the input; the call does nothing."""
    model = _Flat(_model(name, list(x.shape[2:]), state)).eval()
    with torch.no_grad():
        torch.onnx.export(model, (x.repeat(times, 1, 1, 1),), path, dynamo=True)
    return list


def training_step(
    device: str,
    name: str,
    state: dict[str, Tensor],
    x: Tensor,
    boxes: Tensor,
    classes: Tensor,
    times: int,
    autocast: str,
    learning_rate: float,
    channels_last: bool,
    compile_mode: str,
) -> Call:
    """Labels, forward, loss, backward, SGD step, without stochastic depth.

    ``autocast``: "" for none, else a dtype.
    """
    kind = {"device": device, "memory_format": _format(channels_last)}
    model = _model(name, list(x.shape[2:]), state)
    for module in model.modules():
        if hasattr(module, "drop_path"):
            module.drop_path = nn.Identity()
    bench = effdet.DetBenchTrain(model).to(**kind).train()
    step: Any = torch.compile(bench, mode=compile_mode, dynamic=False) if compile_mode else bench
    optimizer = torch.optim.SGD(bench.parameters(), lr=learning_rate, momentum=0.9)
    target = {
        "bbox": boxes.repeat(times, 1, 1).to(device),
        "cls": classes.repeat(times, 1).to(device),
    }
    stem = next(bench.parameters())
    x = x.repeat(times, 1, 1, 1).to(**kind)

    def call() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(device, autocast):
            result = step(x, target)
        result["loss"].backward()
        optimizer.step()
        return [result["loss"], result["class_loss"], result["box_loss"], stem.grad]

    return call


def labels(device: str, name: str, size: list[int], boxes: Tensor, classes: Tensor) -> Call:
    """Class and box targets of every level, and the number of positives, of boxes ``[B, M, 4]`` (yxyx)."""
    config = get_efficientdet_config(name)
    config.image_size = tuple(size)
    labeler = AnchorLabeler(Anchors.from_config(config).to(device), config.num_classes)
    boxes, classes = boxes.to(device), classes.to(device)

    def call() -> list[Tensor]:
        label, code, positives = labeler.batch_label_anchors(boxes, classes)
        return [*label, *code, positives]

    return call


def loss(
    device: str,
    name: str,
    maps: list[Tensor],
    class_targets: list[Tensor],
    box_targets: list[Tensor],
    positives: Tensor,
    times: int,
    channels_last: bool,
    compile_mode: str,
) -> tuple[Callable[[], list[Tensor]], Callable[[list[Tensor]], list[Tensor]]]:
    """Loss of ``times`` times the images, its two parts, and its gradients in the ``maps``, classes before boxes.

    In the form that the default config asks for. Losses come as ``[batch, 3]``.
    """
    function: Any = DetectionLoss(get_efficientdet_config(name))
    if compile_mode:
        function = torch.compile(function, mode=compile_mode, dynamic=False)

    def on_device(tensors: list[Tensor]) -> list[Tensor]:
        return [t.repeat(times, *[1] * (t.dim() - 1)).to(device) for t in tensors]

    layout = _format(channels_last)
    leaves = [m.contiguous(memory_format=layout).requires_grad_() for m in on_device(maps)]
    levels = len(maps) // 2
    classes, codes, (count,) = map(on_device, (class_targets, box_targets, [positives]))

    def call() -> list[Tensor]:
        losses = function(leaves[:levels], leaves[levels:], classes, codes, count)
        return [*losses, *torch.autograd.grad(losses[0], leaves)]

    def finish(found: list[Tensor]) -> list[Tensor]:
        losses = torch.stack([t.float() for t in found[:3]])
        return [losses.expand(len(found[3]), 3), *found[3:]]

    return call, finish


def soft_nms(
    device: str, boxes: Tensor, scores: Tensor, classes: Tensor, max_det: int, sigma: float
) -> tuple[Callable[[], Any], Callable[[Any], list[Tensor]]]:
    """Gaussian soft-NMS, image by image; it picks until nothing is left, then ``max_det`` are kept.

    On a GPU it fails as shipped, for its table of indices is on the CPU: there it runs with the device as default.
    """
    images = [t.to(device) for t in (boxes, scores, classes)]

    def call() -> list[tuple[Tensor, Tensor]]:
        with _tensors_on(device):
            return [
                batched_soft_nms(*image, sigma=sigma, score_threshold=0.001)
                for image in zip(*images, strict=True)
            ]

    def finish(found: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        index, score = zip(*found, strict=True)
        return [_padded(index, -1, max_det), _padded(score, 0, max_det)]

    return call, finish


def postprocess(
    device: str,
    name: str,
    size: list[int],
    class_maps: list[Tensor],
    box_maps: list[Tensor],
    points: int,
    soft: bool,
) -> Call:
    """From head outputs to rows, boxes clipped to the image.

    Soft-NMS on a GPU: see ``soft_nms``; there the scripted loop over images is a loop in Python.
    """
    if not soft and not COMPILED_OPS:
        raise ImportError(
            "torchvision's compiled operators do not load beside this torch: its NMS is not timed"
        )
    config = get_efficientdet_config(name)
    config.image_size = tuple(size)
    anchors = Anchors.from_config(config).boxes.to(device)
    class_maps, box_maps = ([m.to(device) for m in maps] for maps in (class_maps, box_maps))
    batch = len(class_maps[0])
    scale = torch.ones(batch, device=device)
    limits = torch.tensor([[float(size[1]), float(size[0])]] * batch, device=device)
    in_python = soft and device == "cuda"

    def call() -> list[Tensor]:
        candidates = _post_process(
            class_maps, box_maps, config.num_levels, config.num_classes, points
        )
        logits, codes, indices, classes = candidates
        if not in_python:
            arguments = (logits, codes, anchors, indices, classes, scale, limits)
            return [_batch_detection(batch, *arguments, soft_nms=soft)]
        with _tensors_on(device):
            rows = [
                generate_detections(
                    logits[i],
                    codes[i],
                    anchors,
                    indices[i],
                    classes[i],
                    scale[i],
                    limits[i],
                    100,
                    True,
                )
                for i in range(batch)
            ]
        return [torch.stack(rows)]

    return call


def predict(device: str, name: str, state: dict[str, Tensor], x: Tensor, times: int) -> Call:
    """Rows of ``times`` times the images ``x``, with soft-NMS."""
    if device == "cuda":
        raise ImportError("PyPI effdet's soft-NMS fails on CUDA with this torch: it is not timed")
    bench = DetBenchPredict(_model(name, list(x.shape[2:]), state)).eval()
    bench.soft_nms = True
    x = x.repeat(times, 1, 1, 1)

    def call() -> list[Tensor]:
        with torch.inference_mode():
            return [bench(x)]

    return call


def _autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, getattr(torch, dtype)) if dtype else contextlib.nullcontext()


def _tensors_on(device: str) -> contextlib.AbstractContextManager:
    return torch.device(device) if device == "cuda" else contextlib.nullcontext()


def _padded(found: tuple[Tensor, ...], value: float, width: int) -> Tensor:
    rows = torch.full((len(found), width), value, dtype=found[0].dtype, device=found[0].device)
    for row, values in zip(rows, found, strict=True):
        row[: min(width, len(values))] = values[:width]
    return rows
