"""How each call becomes steps: one function per op of `effdet_kernels`, one for everything of torch.

What is read leaves out the vectors of batch norms, biases and fusion weights: at the published sizes they are below
0.2 % of the bytes, at batch 1 and in the most fused model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.floors.trace import Operand, Tape, tensors

Arguments = dict[str, Any]
Rule = Callable[[Tape, Arguments, "list[Tensor]"], None]

_TORCH = {
    "aten::native_batch_norm": "norm",
    "aten::_native_batch_norm_legit_no_training": "norm",
    "aten::mean": "pool",
    "aten::sum": "pool",
    "aten::max_pool2d_with_indices": "resample",
    "aten::avg_pool2d": "resample",
    "aten::upsample_nearest2d": "resample",
    "aten::_upsample_nearest_exact2d": "resample",
    "aten::upsample_bilinear2d": "resample",
    "aten::upsample_bicubic2d": "resample",
}
_ACTIVATIONS = ("aten::hardswish",)  # elementwise, but not tagged so by torch
_COPIES = ("aten::constant_pad_nd", "aten::clone", "aten::_to_copy")  # a kernel reads the original


def decompose(tape: Tape, func: Any, arguments: Arguments, outputs: list[Tensor]) -> None:
    """Writes the steps of one call on ``tape``; ``arguments`` by the names of the op's schema."""
    name = func._schema.name
    if name in _OPS:
        _OPS[name](tape, arguments, outputs)
    else:
        elementwise = torch.Tag.pointwise in func.tags or name in _ACTIVATIONS
        _torch(tape, name, elementwise, arguments, outputs)


def _torch(
    tape: Tape, name: str, elementwise: bool, arguments: Arguments, outputs: list[Tensor]
) -> None:
    """A copy and elementwise work on vectors are no steps: they ride with their neighbours."""
    maps = [t for t in tensors(list(arguments.values())) if tape.depends(t)]
    reads, out = [tape.operand(t) for t in maps], outputs[0]
    if name in _COPIES or (elementwise and out.dim() <= 2):
        result = reads[0]
    elif elementwise:
        result = tape.step("residual" if len(maps) > 1 else "act", reads, out.numel())
    elif name in _TORCH:  # statistics or indices may follow the map; nobody reads them
        result = tape.step(_TORCH[name], reads, out.numel())
    else:
        result = tape.step("other", reads, sum(t.numel() for t in outputs))
    for tensor in outputs:
        tape.name(tensor, result)


def _convolution(tape: Tape, arguments: Arguments, outputs: list[Tensor]) -> None:
    weight, out = arguments["weight"], outputs[0]
    if weight.shape[1] == 1 and arguments["groups"] > 1:
        kind = "depthwise"
    else:
        kind = "pointwise" if weight[0, 0].numel() == 1 else "dense"
    y = tape.step(kind, [tape.operand(arguments["input"])], out.numel(), weight)
    folded = not tape.is_parameter(weight)  # the weight was scaled: a batch norm is in it
    tape.name(out, _norm_act(tape, y, folded, "none"))


def _matrix_product(tape: Tape, arguments: Arguments, outputs: list[Tensor]) -> None:
    x = tape.operand(arguments["mat1" if "mat1" in arguments else "self"])
    tape.name(outputs[0], tape.step("fc", [x], outputs[0].numel(), arguments["mat2"].t()))


def _dense_conv(tape: Tape, arguments: Arguments, outputs: list[Tensor]) -> None:
    weight = arguments["weight"]
    kind = "pointwise" if weight[0, 0].numel() == 1 else "dense"
    y = tape.step(kind, [tape.operand(arguments["x"])], outputs[0].numel(), weight)
    tape.name(outputs[0], _norm_act(tape, y, arguments["scale"] is not None, arguments["act"]))


def _squeeze_excite(tape: Tape, arguments: Arguments, outputs: list[Tensor]) -> None:
    reduce, expand = arguments["reduce_weight"], arguments["expand_weight"]
    batch, channels = arguments["sums"].shape
    hidden = tape.step("fc", [tape.operand(arguments["sums"])], batch * len(reduce), reduce)
    tape.name(outputs[0], tape.step("fc", [hidden], batch * channels, expand))


def _depthwise_conv(tape: Tape, arguments: Arguments, outputs: list[Tensor]) -> None:
    _depthwise(tape, tape.operand(arguments["x"]), arguments["weight"], arguments, outputs)


def _expand_depthwise(tape: Tape, arguments: Arguments, outputs: list[Tensor]) -> None:
    x, weight = arguments["x"], arguments["expand_weight"]
    wide = tape.step("expand", [tape.operand(x)], _mapped(x, weight), weight)
    wide = _norm_act(tape, wide, True, arguments["act"])
    _depthwise(tape, wide, arguments["dw_weight"], arguments, outputs)


def _depthwise(
    tape: Tape, x: Operand, weight: Tensor, arguments: Arguments, outputs: list[Tensor]
) -> None:
    y = tape.step("depthwise", [x], outputs[0].numel(), weight)
    y = _norm_act(tape, y, arguments["scale"] is not None, arguments["act"])
    tape.name(outputs[0], y)
    if arguments["squeeze"]:
        tape.name(outputs[1], tape.step("pool", [y], outputs[1].numel()))


def _pointwise_conv(tape: Tape, arguments: Arguments, outputs: list[Tensor]) -> None:
    x, out = tape.operand(arguments["x"]), outputs[0]
    if arguments["gate"] is not None:
        x = tape.step("gate", [x, tape.operand(arguments["gate"])], x.elements)
    y = tape.step("pointwise", [x], out.numel(), arguments["weight"])
    y = _norm_act(tape, y, arguments["scale"] is not None, arguments["act"])
    if arguments["residual"] is not None:
        y = tape.step("residual", [y, tape.operand(arguments["residual"])], out.numel())
    tape.name(out, y)


def _mbconv(tape: Tape, arguments: Arguments, outputs: list[Tensor]) -> None:
    x, out, act = tape.operand(arguments["x"]), outputs[0], arguments["act"]
    expand, depthwise = arguments["expand_weight"], arguments["dw_weight"]
    wide = x
    if expand is not None:
        wide = tape.step("expand", [x], _mapped(arguments["x"], expand), expand)
        wide = _norm_act(tape, wide, True, act)
    elements = out.numel() // len(arguments["weight"]) * len(depthwise)
    y = _norm_act(tape, tape.step("depthwise", [wide], elements, depthwise), True, act)
    reduce, batch = arguments["se_reduce_weight"], len(out)
    sums = tape.step("pool", [y], batch * len(depthwise))
    hidden = tape.step("fc", [sums], batch * len(reduce), reduce)
    gates = tape.step("fc", [hidden], batch * len(depthwise), arguments["se_expand_weight"])
    y = tape.step("gate", [y, gates], y.elements)
    y = _norm_act(tape, tape.step("pointwise", [y], out.numel(), arguments["weight"]), True, "none")
    if arguments["residual"]:
        y = tape.step("residual", [y, x], out.numel())
    tape.name(out, y)


def _weighted_fusion(tape: Tape, arguments: Arguments, outputs: list[Tensor]) -> None:
    fused = _fused(tape, arguments)
    tape.name(outputs[0], _norm_act(tape, fused, False, arguments["act"]))


def _separable_conv(tape: Tape, arguments: Arguments, outputs: list[Tensor]) -> None:
    x, nets = arguments["x"], len(arguments["dw_weight"])
    fuses = arguments["method"] != "none"
    maps = [_fused(tape, arguments)] if fuses else [tape.operand(level) for level in x]
    maps = [_norm_act(tape, level, False, arguments["pre_act"]) for level in maps]
    for i, out in enumerate(outputs):
        net = i * nets // len(outputs)
        depthwise, pointwise = arguments["dw_weight"][net], arguments["pw_weight"][net]
        source = maps[i % len(maps)]
        y = tape.step("depthwise", [source], source.elements, depthwise)
        y = tape.step("pointwise", [y], out.numel(), pointwise)
        tape.name(out, _norm_act(tape, y, bool(arguments["scale"]), arguments["act"]))


def _fused(tape: Tape, arguments: Arguments) -> Operand:
    """The steps of a weighted fusion of the maps ``x``; with one map and no weight only its resampling."""
    x, (height, width) = arguments["x"], arguments["size"]
    elements = x[0].shape[0] * x[0].shape[1] * height * width
    maps = [tape.operand(level) for level in x]
    for i, how in enumerate(arguments["resample"].split(",")):
        if how != "identity":
            maps[i] = tape.step("resample", [maps[i]], elements)
    if len(maps) == 1 and arguments["method"] == "sum":
        return maps[0]
    return tape.step("sum", maps, elements)


def _norm_act(tape: Tape, y: Operand, norm: bool, act: str) -> Operand:
    for kind, there in (("norm", norm), ("act", act != "none")):
        if there:
            y = tape.step(kind, [y], y.elements)
    return y


def _mapped(x: Tensor, weight: Tensor) -> int:
    """Elements of a pointwise convolution's result."""
    return x.numel() // x.shape[1] * weight.shape[0]


_OPS: dict[str, Rule] = {
    "aten::convolution": _convolution,
    "aten::addmm": _matrix_product,
    "aten::mm": _matrix_product,
    "effdet_kernels::dense_conv": _dense_conv,
    "effdet_kernels::depthwise_conv": _depthwise_conv,
    "effdet_kernels::expand_depthwise": _expand_depthwise,
    "effdet_kernels::mbconv": _mbconv,
    "effdet_kernels::pointwise_conv": _pointwise_conv,
    "effdet_kernels::separable_conv": _separable_conv,
    "effdet_kernels::squeeze_excite": _squeeze_excite,
    "effdet_kernels::weighted_fusion": _weighted_fusion,
}
