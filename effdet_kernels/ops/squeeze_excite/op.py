"""Squeeze-excite between the sums of a map and the gates of its channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_kernels import _checks, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu, _gradients
from effdet_kernels.ops.squeeze_excite import reference

GATES = tuple(reference.GATES)


def squeeze_excite(
    sums: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    *,
    count: int,
    act: str = "swish",
    gate: str = "sigmoid",
) -> Tensor:
    """gates = gate(expand_weight act(reduce_weight sums / count + reduce_bias) + expand_bias).

    Source: squeeze-and-excitation, arXiv:1709.01507, section 3. ``depthwise_conv`` and
    ``expand_depthwise`` give the sums, ``pointwise_conv`` takes the gates.

    Args:
        sums: [B, C] float32 or float64: of each channel over the pixels of its map.
        reduce_weight: [R, C, 1, 1], any floating dtype, the same for the four parameters.
        reduce_bias: [R].
        expand_weight: [C, R, 1, 1].
        expand_bias: [C].
        count: pixels of a map, at least 1.
        act: "none", "swish", "relu", "relu6", "hard_swish", "leaky_relu" (slope 0.01) or "mish".
        gate: "sigmoid" or "hard_sigmoid".

    Returns:
        gates [B, C], dtype of ``sums``, in which everything is computed.

    Under autocast all arguments are cast to float32. Differentiable in every tensor.
    Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "squeeze_excite"
    dtypes = (torch.float32, torch.float64)
    _checks.tensor(op, "sums", sums, ("B", "C"), dtypes=dtypes)
    channels = sums.shape[1]
    parameters = reduce_weight, reduce_bias, expand_weight, expand_bias
    check_parameters(op, "", parameters, channels, sums)
    _arguments.integer(op, "count", count, least=1)
    _arguments.activation(op, "act", act)
    _checks.choice(op, "gate", gate, GATES)
    return _squeeze_excite(sums, *parameters, count, act, gate)


def check_parameters(
    op: str, prefix: str, parameters: Sequence[Tensor], channels: int, like: Tensor
) -> None:
    """Checks reduce_weight, reduce_bias, expand_weight and expand_bias, whose names begin with ``prefix``."""
    first = parameters[0]
    _checks.tensor(op, f"{prefix}reduce_weight", first, ("R", channels, 1, 1), device=like.device)
    reduced = first.shape[0]
    if min(channels, reduced) < 1:
        got = _checks.describe(first)
        raise ValueError(
            f"{op}: {prefix}reduce_weight: got {got}, takes at least one channel on each side"
        )
    names = "reduce_bias", "expand_weight", "expand_bias"
    shapes = (reduced,), (channels, reduced, 1, 1), (channels,)
    for name, value, shape in zip(names, parameters[1:], shapes, strict=True):
        _checks.tensor(op, prefix + name, value, shape, device=like.device)
        if value.dtype != first.dtype:
            want = str(first.dtype).removeprefix("torch.")
            got = _checks.describe(value)
            raise TypeError(
                f"{op}: {prefix}{name}: got {got}, takes {want} as {prefix}reduce_weight has"
            )


def _out_spec(sums, *_) -> list[TensorSpec]:
    return [TensorSpec(tuple(sums.shape), sums.dtype, sums.device)]


def _fields(sums, reduce_weight, reduce_bias, expand_weight, expand_bias, count, act, gate):
    parameters = reduce_weight.flatten(1), reduce_bias, expand_weight.flatten(1).t(), expand_bias
    reduce, reduce_bias, expand, expand_bias = (p.to(sums.dtype).contiguous() for p in parameters)
    return {
        "dtype": _cpu.code(sums.dtype),
        "act": _cpu.act_code(act),
        "hard": int(gate == "hard_sigmoid"),
        "batch": sums.shape[0],
        "channels": sums.shape[1],
        "reduced": len(reduce),
        "count": count,
        "sums": _cpu.vectors(sums, sums.dtype),
        "reduce_weight": reduce,
        "reduce_bias": reduce_bias,
        "expand_weight": expand,
        "expand_bias": expand_bias,
    }


def _run_cpu(sums, *rest):
    gates = torch.empty(sums.shape, dtype=sums.dtype)
    if gates.shape[0]:
        _native.launch("squeeze_excite", **_fields(sums, *rest), gates=gates)
    return gates


def _backward_cpu(grads, *rest) -> list[Tensor]:
    *args, needs = rest
    sums, parameters = args[0], args[1:5]
    (batch, channels), reduced = sums.shape, len(parameters[0])
    shapes = (batch, channels), (reduced, channels), (reduced,), (reduced, channels), (channels,)
    if batch == 0:
        found = [sums.new_zeros(shape) for shape in shapes]
    else:
        found = [torch.empty(shape, dtype=sums.dtype) for shape in shapes]
        _native.launch(
            "squeeze_excite_backward",
            **_fields(*args),
            grad=_cpu.vectors(grads[0], sums.dtype),
            grad_sums=found[0],
            grad_reduce_weight=found[1],
            grad_reduce_bias=found[2],
            grad_expand_weight=found[3],
            grad_expand_bias=found[4],
            partial=torch.empty(batch, 2 * reduced + channels, dtype=sums.dtype),
        )
    found[1] = found[1][:, :, None, None]
    found[3] = found[3].t()[:, :, None, None]
    return _gradients.chosen(found, needs)


_squeeze_excite = _library.define(
    "squeeze_excite(Tensor sums, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight,"
    " Tensor expand_bias, SymInt count, str act, str gate) -> Tensor",
    out_spec=_out_spec,
    impls={
        "cpu": _run_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.squeeze_excite.triton_fwd"),
        "reference": reference.squeeze_excite,
    },
    backwards={
        "cpu": _backward_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.squeeze_excite.triton_bwd"),
    },
    differentiable=("sums", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias"),
    autocast="float32",
)
