"""Detection as a `torch.export` program: pictures in, detections or candidates out, any batch and any size.

A program is traced through the ops' decompositions into plain PyTorch (`effdet_kernels.export`): it runs where this
package is not installed, and none of its kernels is in it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from effdet.bench import DetBenchPredict, unwrap_bench
from effdet.data.input_config import resolve_input_config
from effdet.padding import Size, spatial_size
from effdet.postprocess import decode_box_outputs, swap_xy
from effdet_kernels.export import decompositions
from effdet_kernels.ops.decode_topk.reference import grid, rows

Outputs = Literal["detections", "raw"]
OUTPUTS = ("detections", "raw")
MOST_IMAGES, MOST_PIXELS = 1024, 8192  # of dynamic dimensions: the solver wants an end


@dataclass(frozen=True)
class ExportOptions:
    """What a program takes and returns.

    Attributes:
        outputs: "detections", rows [B, max_det, 6] as `DetBenchPredict` returns them, NMS or soft-NMS included; "raw",
            boxes [B, N, 4] (x_min, y_min, x_max, y_max) of all anchors, not clipped, and their scores [B, N, classes]
            in [0, 1], for an NMS that comes after (TensorRT's EfficientNMS: corner boxes, no activation).
        size: (height, width) of the images; None: the model's, with `any_size` enlarged to a size that fits.
        batch: images per call; None: any number.
        any_size: `size` is an example; any height and width that are multiples of 2 ** max_level, from twice that, do.
        normalise: images are RGB in [0, 255], and mean and deviation are in the program; else they come normalised.
        img_info: detections take `img_scale` [B] and `img_size` [B, 2] too, as `DetBenchPredict` does.
    """

    outputs: Outputs = "detections"
    size: Size | None = None
    batch: int | None = None
    any_size: bool = False
    normalise: bool = True
    img_info: bool = False

    def __post_init__(self) -> None:
        if self.outputs not in OUTPUTS:
            raise ValueError(f"outputs: got {self.outputs!r}, takes one of {', '.join(OUTPUTS)}")
        if self.size is not None and not (
            isinstance(self.size, (tuple, list))
            and len(self.size) == 2
            and all(map(_whole, self.size))
        ):
            raise ValueError(f"size: got {self.size!r}, takes (height, width), or None")
        if self.batch is not None and not _whole(self.batch):
            raise ValueError(f"batch: got {self.batch!r}, takes an integer >= 1, or None")
        if self.img_info and self.outputs == "raw":
            raise ValueError("img_info: got True with raw outputs, takes False: nothing is clipped")


def _whole(value: object) -> bool:
    return isinstance(value, int) and value >= 1


class ExportedDetector(nn.Module):
    """What is traced: the bench with its input's and its outputs' form around it.

    Args:
        bench: a `DetBenchPredict`; its settings (soft-NMS, thresholds, detections per image) go into the program.
        options: what it takes and returns.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, bench: DetBenchPredict, options: ExportOptions) -> None:
        super().__init__()
        self.bench = bench
        self.options = options
        inputs = resolve_input_config({}, bench.config)
        for name in ("mean", "std"):
            value = torch.tensor(inputs[name]) * 255
            self.register_buffer(name, value.view(1, 3, 1, 1).to(bench.anchors.boxes))

    def forward(
        self, images: Tensor, img_scale: Tensor | None = None, img_size: Tensor | None = None
    ) -> Any:
        """Detections [B, max_det, 6], or boxes [B, N, 4] and scores [B, N, classes], of images [B, 3, H, W]."""
        if self.options.any_size:
            images = _of_units(images, 2**self.bench.config.max_level)
        if self.options.normalise:
            images = (images - self.mean) / self.std
        if self.options.outputs == "raw":
            return self._raw(images)
        info = {"img_scale": img_scale, "img_size": img_size} if self.options.img_info else None
        return self.bench(images, info)

    def _raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cls_outputs, box_outputs = self.bench.model(images)
        anchors, strides = self.bench.anchors_for(spatial_size(images))
        if strides is not None:
            anchors = grid(anchors, strides, box_outputs)
        boxes = decode_box_outputs(rows(box_outputs, 4), swap_xy(anchors), output_xyxy=True)
        return boxes, rows(cls_outputs, self.bench.num_classes).sigmoid()


def _of_units(images: Tensor, unit: int) -> Tensor:
    """`images`, cropped to multiples of `unit`: sizes that stay simple while they are symbols."""
    height, width = (side // unit * unit for side in images.shape[2:])
    return images.narrow(2, 0, height).narrow(3, 0, width)


def _remove_crops(program: ExportedProgram) -> None:
    """Take what `_of_units` did out of a program whose sizes are such multiples, or it would crop others unseen."""
    graph = program.graph
    images = next(node for node in graph.nodes if node.name == "images")
    crops = (torch.ops.aten.narrow.default, torch.ops.aten.slice.Tensor)
    for node in list(graph.nodes):
        if node.target in crops and node.args[0] is images:
            node.replace_all_uses_with(images)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def image_size(bench: DetBenchPredict, options: ExportOptions) -> Size:
    """(height, width) of the images that a program is traced with.

    Raises:
        ValueError: `options.size` does not fit `any_size`.
    """
    unit = 2**bench.config.max_level
    if options.size is None:
        height, width = bench.config.image_size
        if options.any_size:
            height, width = (max(2, -(-side // unit)) * unit for side in (height, width))
        return height, width
    if options.any_size and any(side % unit or side < 2 * unit for side in options.size):
        raise ValueError(
            f"size: got {options.size} with any_size, takes multiples of {unit} from {2 * unit}"
        )
    return options.size


def example_inputs(bench: DetBenchPredict, options: ExportOptions) -> tuple[Tensor, ...]:
    """Arguments of such a program: random images of two pictures, or of `options.batch`."""
    height, width = image_size(bench, options)
    batch = options.batch or 2
    like = next(bench.parameters())
    images = torch.rand(batch, 3, height, width).to(like)
    images = images * 255 if options.normalise else images * 4 - 2
    if not options.img_info:
        return (images,)
    scale = torch.linspace(1, 1.5, batch).to(like.device)
    limits = torch.tensor([[width, height]]).to(scale) * scale[:, None] - 8
    return images, scale, limits


def export_program(
    model: nn.Module, options: ExportOptions | None = None, *, decompose: bool = True
) -> ExportedProgram:
    """Trace detection into a program of `torch.export`.

    Args:
        model: `EfficientDet` or `DetBenchPredict`, whose settings go into the program. It is put in eval mode.
        options: what the program takes and returns; None: `ExportOptions()`.
        decompose: into ops of torch. Otherwise the ops of `effdet_kernels` are in it, and with them, where it runs, the
            kernels.

    Returns:
        A program of ``images`` [B, 3, H, W] (and ``img_scale``, ``img_size``).

    Raises:
        ValueError: an option out of range, or a size that does not fit `any_size`.
    """
    options = options or ExportOptions()
    bench = predict_bench(model)
    example = example_inputs(bench, options)
    bench.anchors_for(spatial_size(example[0]))  # kept, so that a trace need not
    with torch.no_grad():
        program = torch.export.export(
            ExportedDetector(bench, options),
            example,
            dynamic_shapes=_dynamic_shapes(bench, options, len(example)),
            strict=False,
        )
        if options.any_size:
            _remove_crops(program)
        return decomposed(program, decompositions()) if decompose else program


def decomposed(program: ExportedProgram, table: dict[Any, Any]) -> ExportedProgram:
    """`run_decompositions`, without torch's warning of a call of its own that is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        return program.run_decompositions(table)


def predict_bench(model: nn.Module) -> DetBenchPredict:
    """`model`, or a bench around it, in eval mode.

    Raises:
        TypeError: it is neither an `EfficientDet` nor a bench of one.
    """
    if isinstance(model, DetBenchPredict):
        return model.eval()
    bare = unwrap_bench(model)
    if not hasattr(bare, "config"):
        raise TypeError(f"model: got {type(model).__name__}, takes EfficientDet or a bench of it")
    return DetBenchPredict(bare).eval()


def _dynamic_shapes(
    bench: DetBenchPredict, options: ExportOptions, inputs: int
) -> tuple[dict[int, Dim], ...]:
    sides = {}
    if options.any_size:
        unit = 2**bench.config.max_level
        for dim, name in ((2, "height"), (3, "width")):
            sides[dim] = unit * Dim(f"{name}_{unit}", min=2, max=MOST_PIXELS // unit)
    batch = {} if options.batch else {0: Dim("batch", min=1, max=MOST_IMAGES)}
    return ({**batch, **sides}, *[batch] * (inputs - 1))
