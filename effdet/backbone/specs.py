"""Which blocks each backbone has.

A network is a list of stages, a stage a list of rows, a row `repeats` equal blocks of which the
first of the stage carries the stride. Sources: EfficientNet arXiv:1905.11946 (table 1, compound
scaling), EfficientNet-Lite and EfficientNet-EdgeTPU (Google's published variants), EfficientNetV2
arXiv:2104.00298 (the "rw" variants differ and follow their published weights), MobileNetV2
arXiv:1801.04381, MobileNetV3 arXiv:1905.02244 (table 1), MixNet arXiv:1907.09595 (figure 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial


@dataclass(frozen=True)
class Row:
    """`repeats` blocks; `kind` is "ds", "ir", "er" or "cn" (see blocks.py)."""

    kind: str
    repeats: int
    kernel: int | tuple[int, ...]
    stride: int
    out_channels: int
    expand: float = 1.0
    mid_channels: int | None = None
    se: float = 0.0
    act: str | None = None
    skip: bool = True
    pw_splits: int = 1
    pwl_splits: int = 1


@dataclass(frozen=True)
class Spec:
    """A backbone; `se_of_mid` takes the squeeze-excite ratio of the expanded width."""

    stem: int
    stages: tuple[tuple[Row, ...], ...]
    act: str = "swish"
    stem_act: str | None = None
    pad_type: str = ""
    bn_eps: float = 1e-5
    se_of_mid: bool = False
    se_act: str | None = None
    se_gate: str = "sigmoid"


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, but never less than 90 % of `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _mbconv(se: float) -> tuple[tuple[Row, ...], ...]:
    return (
        (Row("ds", 1, 3, 1, 16, se=se),),
        (Row("ir", 2, 3, 2, 24, 6, se=se),),
        (Row("ir", 2, 5, 2, 40, 6, se=se),),
        (Row("ir", 3, 3, 2, 80, 6, se=se),),
        (Row("ir", 3, 5, 1, 112, 6, se=se),),
        (Row("ir", 4, 5, 2, 192, 6, se=se),),
        (Row("ir", 1, 3, 1, 320, 6, se=se),),
    )


def _scale(
    stages: tuple[tuple[Row, ...], ...], width: float, depth: float, fixed_ends: bool = False
) -> tuple[tuple[Row, ...], ...]:
    """Compound scaling; `fixed_ends` keeps the depth of the first and the last stage."""
    scaled = []
    for i, rows in enumerate(stages):
        keep = fixed_ends and i in (0, len(stages) - 1)
        scaled.append(
            tuple(
                replace(
                    row,
                    repeats=row.repeats if keep else math.ceil(row.repeats * depth),
                    out_channels=round_channels(row.out_channels * width),
                )
                for row in rows
            )
        )
    return tuple(scaled)


def _efficientnet(width: float, depth: float, tf: bool) -> Spec:
    stages = _scale(_mbconv(se=0.25), width, depth)
    stem = round_channels(32 * width)
    if tf:
        return Spec(stem, stages, pad_type="same", bn_eps=1e-3)
    return Spec(stem, stages)


def _lite(width: float, depth: float, tf: bool) -> Spec:
    stages = _scale(_mbconv(se=0.0), width, depth, fixed_ends=True)
    if tf:
        return Spec(32, stages, act="relu6", pad_type="same", bn_eps=1e-3)
    return Spec(32, stages, act="relu6")


def _edgetpu(depth: float) -> Spec:
    stages = (
        (Row("er", 1, 3, 1, 24, mid_channels=96, skip=False),),
        (Row("er", 2, 3, 2, 32, 8),),
        (Row("er", 4, 3, 2, 48, 8),),
        (Row("ir", 5, 5, 2, 96, 8),),
        (Row("ir", 4, 5, 1, 144, 8),),
        (Row("ir", 2, 5, 2, 192, 8),),
    )
    return Spec(32, _scale(stages, 1.0, depth), act="relu")


def _efficientnet_v2(first: str, depths: tuple[int, ...], widths: tuple[int, ...]) -> Spec:
    kinds = (first, "er", "er", "ir", "ir", "ir")
    rows = zip(kinds, depths, (1, 2, 2, 2, 1, 2), widths, (1, 4, 4, 4, 6, 6), strict=True)
    stages = tuple(
        (Row(kind, depth, 3, stride, out, expand, se=0.25 if kind == "ir" else 0.0),)
        for kind, depth, stride, out, expand in rows
    )
    return Spec(24, stages)


def _mobilenet_v2(width: float, depth: float) -> Spec:
    stages = (
        (Row("ds", 1, 3, 1, 16),),
        (Row("ir", 2, 3, 2, 24, 6),),
        (Row("ir", 3, 3, 2, 32, 6),),
        (Row("ir", 4, 3, 2, 64, 6),),
        (Row("ir", 3, 3, 1, 96, 6),),
        (Row("ir", 3, 3, 2, 160, 6),),
        (Row("ir", 1, 3, 1, 320, 6),),
    )
    return Spec(32, _scale(stages, width, depth, fixed_ends=True), act="relu6")


def _mobilenet_v3_large() -> Spec:
    stages = (
        (Row("ds", 1, 3, 1, 16, act="relu"),),
        (Row("ir", 1, 3, 2, 24, 4, act="relu"), Row("ir", 1, 3, 1, 24, 3, act="relu")),
        (Row("ir", 3, 5, 2, 40, 3, se=0.25, act="relu"),),
        (
            Row("ir", 1, 3, 2, 80, 6),
            Row("ir", 1, 3, 1, 80, 2.5),
            Row("ir", 2, 3, 1, 80, 2.3),
        ),
        (Row("ir", 2, 3, 1, 112, 6, se=0.25),),
        (Row("ir", 3, 5, 2, 160, 6, se=0.25),),
        (Row("cn", 1, 1, 1, 960, skip=False),),
    )
    return Spec(
        16,
        stages,
        act="hard_swish",
        se_of_mid=True,
        se_act="relu",
        se_gate="hard_sigmoid",
    )


def _mixnet(width: float) -> Spec:
    split = partial(Row, pw_splits=2, pwl_splits=2)
    k2, k3, k4 = (3, 5), (3, 5, 7), (3, 5, 7, 9)
    stages = (
        (Row("ds", 1, 3, 1, 24, act="relu"),),
        (
            split("ir", 1, k3, 2, 32, 6, act="relu"),
            split("ir", 1, 3, 1, 32, 3, act="relu"),
        ),
        (Row("ir", 1, k4, 2, 40, 6, se=0.5), split("ir", 3, k2, 1, 40, 6, se=0.5)),
        (Row("ir", 1, k3, 2, 80, 6, se=0.25), split("ir", 3, k4, 1, 80, 6, se=0.25)),
        (Row("ir", 1, 3, 1, 120, 6, se=0.5), split("ir", 3, k4, 1, 120, 3, se=0.5)),
        (
            Row("ir", 1, k4, 2, 200, 6, se=0.5),
            Row("ir", 3, k4, 1, 200, 6, se=0.5, pwl_splits=2),
        ),
    )
    return Spec(round_channels(24 * width), _scale(stages, width, 1.0), stem_act="relu")


# width and depth multipliers of EfficientNet-B0..B7
_COMPOUND = (
    (1.0, 1.0),
    (1.0, 1.1),
    (1.1, 1.2),
    (1.2, 1.4),
    (1.4, 1.8),
    (1.6, 2.2),
    (1.8, 2.6),
    (2.0, 3.1),
)

SPECS: dict[str, Spec] = {
    **{f"tf_efficientnet_b{i}": _efficientnet(w, d, True) for i, (w, d) in enumerate(_COMPOUND)},
    **{f"efficientnet_b{i}": _efficientnet(w, d, False) for i, (w, d) in enumerate(_COMPOUND[:6])},
    **{f"tf_efficientnet_lite{i}": _lite(w, d, True) for i, (w, d) in enumerate(_COMPOUND[:5])},
    **{f"efficientnet_lite{i}": _lite(w, d, False) for i, (w, d) in enumerate(_COMPOUND[:5])},
    "efficientnet_es": _edgetpu(1.0),
    "efficientnet_em": _edgetpu(1.1),
    "efficientnetv2_rw_t": _efficientnet_v2("cn", (2, 4, 4, 6, 9, 14), (24, 40, 48, 104, 128, 208)),
    "efficientnetv2_rw_s": _efficientnet_v2("er", (2, 4, 4, 6, 9, 15), (24, 48, 64, 128, 160, 272)),
    "mobilenetv2_110d": _mobilenet_v2(1.1, 1.2),
    "mobilenetv2_120d": _mobilenet_v2(1.2, 1.4),
    "mobilenetv3_large_100": _mobilenet_v3_large(),
    "mixnet_m": _mixnet(1.0),
    "mixnet_l": _mixnet(1.3),
    # For the model efficientdet_nano, whose config says why these numbers.
    "efficientnet_nano": _efficientnet(0.45, 0.6, tf=True),
}
