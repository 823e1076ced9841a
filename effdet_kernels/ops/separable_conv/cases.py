"""The cases of ``separable_conv``: pyramids of one and two nets, and BiFPN nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from effdet_kernels.ops._cases import ACTS, BENCH, BLOCKS, FAR, GPU, VECTORS, normal, uniform
from effdet_kernels.ops._cases import weights as draw_weights
from effdet_kernels.spec import Case, Inputs

Sizes = Sequence[tuple[int, int]]


def _case(
    name: str,
    sizes: Sizes,
    outs: Sequence[int],
    *,
    batch: int = 2,
    channels: int = 4,
    k: int = 3,
    shared: bool = True,
    scaled: bool = True,
    shifted: bool = True,
    pre_act: str = "none",
    act: str = "none",
    std: float = 1.0,
    statistics: bool = False,
    fused: Callable[[], Inputs] | None = None,
    tags: frozenset[str] = frozenset(),
    times: int = 1,
) -> Case:
    """Maps of ``sizes`` (H, W), one net per entry of ``outs`` (its output channels); ``fused`` into one map."""

    def make(g) -> Inputs:
        copies = 1 if shared else len(outs)
        levels = 1 if fused else len(sizes)
        widths = [out for out in outs for _ in range(levels)]
        return {
            "x": [normal(g, batch, channels, *size, std=std) for size in list(sizes) * copies],
            "dw_weight": [draw_weights(g, channels, 1, k, k) for _ in outs],
            "pw_weight": [draw_weights(g, out, channels, 1, 1) for out in outs],
            "scale": [uniform(g, width, low=0.5, high=1.5) for width in widths] if scaled else [],
            "shift": [normal(g, width) for width in widths] if shifted else [],
            "pre_act": pre_act,
            "act": act,
            **(fused() if fused else _not_fused),
            "statistics": statistics,
        }

    return Case(name, make, tags, times=times)


_vectors = functools.partial(_case, tags=VECTORS)


def _node(
    name: str,
    *maps: tuple[int, int, str],
    method: str = "fastattn",
    channels: int = 4,
    pool_padding: Sequence[int] | None = None,
    **options,
) -> Case:
    """A BiFPN node: ``maps`` are (H, W, resampling), the first of the output's size."""
    odd = any(how == "max" and height % 2 for height, _, how in maps)

    def fused() -> Inputs:
        weight = torch.tensor((0.9, 1.4, 0.3)[: len(maps)], dtype=torch.float64)
        return {
            "method": method,
            "fusion_weight": None if method == "sum" else weight,
            "resample": [how for *_, how in maps],
            "size": list(maps[0][:2]),
            "pool_padding": pool_padding or ((1, 1, 1, 1) if odd else (0, 1, 0, 1)),
        }

    sizes = [size[:2] for size in maps]
    return _case(name, sizes, [channels + 1 if channels == 4 else channels], fused=fused,
                 channels=channels, pre_act="swish", **options)  # fmt: skip


_not_fused: Inputs = {
    "method": None, "fusion_weight": None, "resample": None, "size": None,
    "pool_padding": (0, 0, 0, 0),
}  # fmt: skip


def _pyramid(largest: int) -> Sizes:
    return [(largest >> level, largest >> level) for level in range(5)]


_heads: Inputs = {"shared": False, "act": "swish", "tags": BENCH}
_training: Inputs = {"scaled": False, "shifted": False, "statistics": True}  # BN is another op
_raw: Inputs = {"shared": False, "scaled": False, "shifted": False}
_predict: Inputs = {"shared": False, "scaled": False, "tags": BENCH}

CASES = (
    _case("node", [(5, 6)], [5], pre_act="swish"),
    _case("levels", [(5, 4), (3, 2), (1, 1)], [6], act="swish"),
    _case("two_nets_shared", [(4, 3), (2, 2)], [5, 5], act="relu6"),
    _case("two_nets", [(4, 3), (2, 2)], [3, 3], shared=False, act="hard_swish"),
    _case("predict", [(3, 3), (2, 1)], [7, 2], batch=1, shared=False, scaled=False),
    _case("raw_5x5", [(5, 3), (2, 2)], [3, 3], k=5, shared=False, scaled=False, shifted=False),
    _case("no_images", [(3, 3), (1, 2)], [4], batch=0),
    _case("pyramid", [(9, 8), (5, 4), (3, 2), (2, 1), (1, 1)], [5, 3], act="swish"),
    _case("scale_only", [(3, 4)], [3], shifted=False, k=5, pre_act="relu", act="swish"),
    *[_case(f"far_{act}", [(3, 4)], [3], pre_act=act, act=act, std=FAR) for act in ACTS],
    _node("fused_any_ratio", (7, 5, "identity"), (3, 2, "nearest"), k=5, batch=1),
    _node("fused_pool_padded", (4, 3, "identity"), (6, 4, "max"), pool_padding=(2, 2, 2, 2)),
    _node("fused_top_down", (5, 4, "identity"), (3, 2, "nearest")),
    _node("fused_three", (3, 4, "identity"), (3, 4, "identity"), (5, 7, "max"), act="relu"),
    _node("fused_softmax", (3, 5, "identity"), (2, 2, "bilinear"), method="attn", batch=1),
    _node("fused_sum", (4, 3, "nearest"), (8, 6, "max"), method="sum", scaled=False),
    _case("statistics", [(5, 4), (3, 2), (1, 2)], [5, 3], shared=False, **_training),
    _case("statistics_5x5", [(4, 3)], [5], k=5, pre_act="swish", act="swish", statistics=True),
    _node("fused_statistics", (5, 4, "identity"), (3, 2, "nearest"), **_training),
    _node("fused_one_pixel", (1, 1, "identity"), (2, 2, "max")),
    _vectors("vectors", [(9, 17), (4, 3), (1, 1)], [40], channels=24, act="swish"),
    _vectors("vectors_two_nets", [(3, 18), (2, 2)], [36, 8], channels=8, act="relu6"),
    _vectors("vectors_predict", [(3, 3), (2, 1)], [70, 9], channels=16, shared=False, scaled=False),
    _vectors(
        "vectors_raw", [(3, 4)], [130], channels=16, scaled=False, shifted=False, pre_act="relu"
    ),
    _vectors("vectors_slices", [(3, 5)], [72], batch=1, channels=72, shifted=False, act="mish"),
    _vectors("vectors_nine_levels", [(1, i + 1) for i in range(9)], [8, 8], batch=1, channels=8),
    *[
        _vectors(f"vectors_far_{act}", [(3, 4)], [8], channels=8, pre_act=act, act=act, std=FAR)
        for act in ACTS
    ],
    _vectors("vectors_plain", [(9, 17), (4, 3), (1, 1)], [40], channels=24, **_raw),
    _vectors("vectors_plain_two_nets", [(10, 19), (2, 2)], [72, 8], channels=8, **_raw),
    _vectors("vectors_plain_wide", [(3, 5)], [128], batch=1, channels=88, **_raw),
    _vectors(
        "vectors_two_sizes", [(4, 3), (2, 2)], [8, 8], channels=8, scaled=False, shifted=False
    ),
    _node(
        "fused_vectors_plain",
        (9, 18, "identity"),
        (5, 9, "nearest"),
        channels=16,
        batch=1,
        tags=VECTORS,
        **_raw,
    ),
    _node("fused_vectors", (4, 17, "identity"), (2, 9, "nearest"), channels=16, tags=VECTORS),
    _node(
        "fused_vectors_three",
        (3, 4, "identity"),
        (2, 2, "nearest"),
        (5, 7, "max"),
        channels=8,
        act="relu",
        tags=VECTORS,
    ),
    _node(
        "fused_vectors_softmax",
        (3, 5, "identity"),
        (2, 2, "bilinear"),
        channels=64,
        method="attn",
        tags=VECTORS,
    ),
    _node(
        "fused_vectors_sum",
        (2, 3, "identity"),
        (4, 6, "max"),
        channels=72,
        batch=1,
        method="sum",
        scaled=False,
        tags=VECTORS,
    ),
    _case(
        "blocks",
        [(19, 37), (10, 19), (5, 10)],
        [83],
        channels=77,
        act="swish",
        tags=BLOCKS,
    ),
    _case(
        "blocks_two_nets",
        [(16, 32), (8, 16)],
        [64, 64],
        channels=64,
        batch=1,
        **{**_heads, "tags": BLOCKS},
    ),
    _case(
        "blocks_predict",
        [(9, 17), (5, 9)],
        [530, 36],
        channels=64,
        batch=1,
        **{**_predict, "tags": BLOCKS},
    ),
    _case(
        "blocks_statistics",
        [(19, 37), (10, 19), (5, 10)],
        [83],
        channels=77,
        **_training,
        tags=BLOCKS,
    ),
    _case("blocks_plain", [(18, 35), (2, 3)], [64, 40], channels=64, tags=BLOCKS, **_raw),
    _case(
        "blocks_channels",
        [(5, 6), (3, 3), (2, 2), (1, 1)],
        [147, 9],
        channels=147,
        shared=False,
        act="swish",
        tags=BLOCKS,
    ),
    _node(
        "fused_blocks_top_down",
        (18, 36, "identity"),
        (9, 18, "nearest"),
        channels=77,
        method="attn",
        tags=BLOCKS,
    ),
    _node(
        "fused_blocks",
        *[(19, 37, "identity")] * 2,
        (38, 74, "max"),
        channels=77,
        tags=BLOCKS,
    ),
    _node(
        "d0_top_down",
        (64, 64, "identity"),
        (32, 32, "nearest"),
        channels=64,
        batch=1,
        tags=BENCH,
    ),
    _node(
        "d0_bottom_up",
        *[(32, 32, "identity")] * 2,
        (64, 64, "max"),
        channels=64,
        batch=1,
        tags=BENCH,
    ),
    _node(
        "d0_top_down_batch128",
        (64, 64, "identity"),
        (32, 32, "nearest"),
        channels=64,
        times=64,
        tags=GPU,
    ),
    _node(
        "d4_top_down",
        (128, 128, "identity"),
        (64, 64, "nearest"),
        channels=224,
        batch=1,
        tags=BENCH,
    ),
    _node(
        "d7_bottom_up",
        *[(96, 96, "identity")] * 2,
        (192, 192, "max"),
        method="sum",
        channels=384,
        batch=1,
        tags=BENCH,
    ),
    _case(
        "d0_heads_first",
        _pyramid(64),
        [64, 64],
        batch=1,
        channels=64,
        **{**_heads, "shared": True},
    ),
    _case("d0_heads", _pyramid(64), [64, 64], batch=1, channels=64, **_heads),
    _case(
        "d0_heads_training",
        _pyramid(64),
        [64, 64],
        batch=1,
        channels=64,
        **{**_heads, **_training, "act": "none"},
    ),
    _case("d0_heads_batch8", _pyramid(64), [64, 64], batch=8, channels=64, **_heads),
    _case(
        "d0_heads_batch128",
        _pyramid(64),
        [64, 64],
        channels=64,
        times=64,
        **{**_heads, "tags": GPU},
    ),
    _case(
        "d0_heads_training_batch128",
        _pyramid(64),
        [64, 64],
        channels=64,
        times=64,
        **{**_heads, **_training, "act": "none", "tags": GPU},
    ),
    _case(
        "d1_heads_batch64",
        _pyramid(80),
        [88, 88],
        channels=88,
        times=32,
        **{**_heads, "tags": GPU},
    ),
    _case(
        "d3_heads_batch32",
        _pyramid(112),
        [160, 160],
        channels=160,
        times=16,
        **{**_heads, "tags": GPU},
    ),
    _case("d4_heads", _pyramid(128), [224, 224], batch=1, channels=224, **_heads),
    _case(
        "d4_heads_batch32",
        _pyramid(128),
        [224, 224],
        channels=224,
        times=16,
        **{**_heads, "tags": GPU},
    ),
    _case("d7_heads", _pyramid(192), [384, 384], batch=1, channels=384, **_heads),
    _case("d0_predict", _pyramid(64), [810, 36], batch=1, channels=64, **_predict),
    _case("d4_predict", _pyramid(128), [810, 36], batch=1, channels=224, **_predict),
)
