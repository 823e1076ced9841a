"""OpSpec of ``squeeze_excite``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.bound import envelope
from effdet_kernels.ops._cases import (
    ACTS,
    BENCH,
    BLOCKS,
    FAR,
    GPU,
    mutant,
    nbytes,
    normal,
    weights,
)
from effdet_kernels.ops.squeeze_excite import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec


def _case(
    name: str,
    batch: int,
    channels: int,
    reduced: int,
    side: int = 4,
    std: float = 1.0,
    tags: frozenset[str] = frozenset(),
    times: int = 1,
    **options: Any,
) -> Case:
    """A case on sums over maps of ``side`` by ``side`` pixels."""

    def make(g) -> Inputs:
        return {
            "sums": normal(g, batch, channels, std=std) * side**2,
            "reduce_weight": weights(g, reduced, channels, 1, 1),
            "reduce_bias": normal(g, reduced),
            "expand_weight": weights(g, channels, reduced, 1, 1),
            "expand_bias": normal(g, channels),
            "count": side**2,
            "act": "swish",
            "gate": "sigmoid",
            **options,
        }

    return Case(name, make, tags, times=times)


def _magnitude(
    sums, reduce_weight, reduce_bias, expand_weight, expand_bias, count, act, gate
) -> list[Tensor]:
    reduce, expand = reduce_weight.flatten(1).abs(), expand_weight.flatten(1).abs()
    hidden = envelope(F.linear(sums.abs() / count, reduce, reduce_bias.abs()), act)
    # A gate is steep at most as an identity, and bends less than a swish.
    return [envelope(F.linear(hidden, expand, expand_bias.abs()), gate)]


def _bytes(**a: Any) -> int:
    return nbytes(*a.values(), a["sums"])


def _backward_bytes(**a: Any) -> int:
    """Reads the inputs and the gates' gradient, writes a gradient for each input."""
    return nbytes(*a.values(), *a.values(), a["sums"])


def _flops(sums, reduce_weight, **_) -> int:
    return 4 * sums.shape[0] * reduce_weight.numel()


def _backward_flops(**a: Any) -> int:
    return 3 * _flops(**a)  # both derivatives need the forward's products once more


def _mean_of_gates(**a: Any) -> Tensor:
    return reference.squeeze_excite(**{**a, "sums": a["sums"] / a["count"]})


_reference = reference.squeeze_excite

SPEC = OpSpec(
    name="squeeze_excite",
    op=op.squeeze_excite,
    reference=_reference,
    cases=(
        _case("small", 2, 7, 3),
        _case("one", 1, 1, 1),
        _case("hard", 2, 9, 2, act="relu", gate="hard_sigmoid"),
        _case("hard_swish", 3, 5, 4, act="hard_swish"),
        _case("relu6", 1, 6, 2, act="relu6"),
        _case("linear", 2, 4, 3, act="none"),
        *[_case(f"far_{act}", 1, 5, 3, act=act, std=FAR) for act in ACTS],
        _case("no_images", 0, 5, 2),
        _case("blocks", 3, 147, 19, tags=BLOCKS),
        _case("blocks_whole", 2, 64, 16, tags=BLOCKS),
        _case("d0_first", 1, 32, 8, side=256, tags=BENCH),
        _case("d0_late_batch8", 8, 1152, 48, side=16, tags=BENCH),
        _case("d0_late_batch128", 2, 1152, 48, side=16, tags=GPU, times=64),
        _case("d4_late", 1, 1632, 68, side=32, tags=BENCH),
        _case("d7_late", 1, 3456, 144, side=48, tags=BENCH),
    ),
    mutants={
        "divided by the count twice": _mean_of_gates,
        "first bias forgotten": mutant(
            _reference, lambda a: {"reduce_bias": torch.zeros_like(a["reduce_bias"])}
        ),
        "gate of the next channel": lambda **a: reference.squeeze_excite(**a).roll(1, 1),
        "weights rounded to bfloat16": mutant(
            _reference, lambda a: {"expand_weight": a["expand_weight"].bfloat16()}
        ),
        "hidden values rounded to bfloat16": mutant(
            _reference, lambda a: {"sums": a["sums"].bfloat16().to(a["sums"].dtype)}
        ),
    },
    diff_args=("sums", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias"),
    keep_wide=("sums",),
    batched=("sums",),
    nonfinite=("sums", "expand_bias"),
    magnitude=_magnitude,
    reduction=lambda reduce_weight, **_: max(reduce_weight.shape[:2]),
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=_backward_flops,
)
