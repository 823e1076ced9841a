"""The goals on an H200, and which rows say whether they are reached: what ``python -m bench targets`` compares."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from bench.columns import significant
from bench.results import KEY, Row
from bench.setups import number, plain, timed
from bench.table import duration

KERNELS, NETWORK = ("cuda", "triton"), ("effdet_kernels",)  # engines
_EAGER = ("effdet nchw", "effdet channels_last")
Run = Mapping[str, Row]  # the rows of one job that were written together, by engine


@dataclasses.dataclass(frozen=True)
class Measure:
    """What of a row is compared: ``of(row, run)`` is a positive number, or None where the row does not say."""

    of: Callable[[Row, Run], float | None]
    text: Callable[[float], str]
    more: bool = True  # is better
    options: str = ""  # of the command that measures it


def _share(row: Row, run: Run) -> float | None:
    moved, rate = number(row, "gb_s"), number(row, "bandwidth")
    return None if moved is None or not rate else moved * 1e9 / rate


def _images_per_second(row: Row, run: Run) -> float | None:
    batch = re.search(r" b(\d+)\b", plain(row["case"]))
    return int(batch[1]) / row["median_s"] if batch else None


def _of_eager_memory(row: Row, run: Run) -> float | None:
    """The peak over that of PyPI effdet, in the layout that takes less."""
    eager = [run[name] for name in _EAGER if name in run and timed(run[name])]
    peaks = (number(row, "peak_bytes") for row in eager)
    least, own = min(filter(None, peaks), default=None), number(row, "peak_bytes")
    return None if own is None or least is None else own / least


def _over_autotuned(row: Row, run: Run) -> float | None:
    return number(row, "vs_compile") if row.get("compile_mode") == "max-autotune" else None


def _over_separate(row: Row, run: Run) -> float | None:
    separate = run.get("separate")
    return separate["median_s"] / row["median_s"] if separate and timed(separate) else None


def _percent(value: float) -> str:
    return f"{significant(100 * value)} %"


def _times(value: float) -> str:
    return f"{significant(value)}×"


_NO_COMPILE, _NO_PEERS = "--no-compile", "--no-peers"
SHARE = Measure(_share, _percent, options=_NO_COMPILE)  # compulsory bytes / time / copy bandwidth
KERNEL_TIME = Measure(lambda row, _: row["median_s"], duration, more=False, options=_NO_COMPILE)
VS_SEPARATE = Measure(_over_separate, _times, options=_NO_COMPILE)
TIME = Measure(lambda row, _: row["median_s"], duration, more=False, options=_NO_PEERS)
RATE = Measure(_images_per_second, lambda value: f"{value:,.0f} img/s", options=_NO_PEERS)
VS_EAGER = Measure(lambda row, _: number(row, "vs_eager"), _times)
VS_AUTOTUNED = Measure(_over_autotuned, _times, options="--max-autotune")
VS_COMPILE = Measure(lambda row, _: number(row, "vs_compile"), _times, options="--compile")
MEMORY = Measure(_of_eager_memory, _percent, more=False)


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is wanted, and which rows say whether it is reached."""

    what: str
    measure: Measure
    goal: float
    stretch: float | None
    suite: str
    name: str
    cases: tuple[str, ...]
    direction: str = "forward"
    dtype: str = "bf16"
    engines: tuple[str, ...] = NETWORK
    first: bool = False  # of the cases the first that was measured counts alone
    graph: bool = False  # a CUDA graph's time only

    def selects(self, row: Row) -> bool:
        """Whether a row, or a job's key, is of one of the cases, by any engine."""
        wanted = (self.suite, self.name, row["case"], self.direction, self.dtype, "cuda")
        return row["case"] in self.cases and tuple(row[field] for field in KEY) == wanted

    def value(self, row: Row, run: Run) -> float | None:
        """What is compared with the goal; None where the row has no usable figure."""
        if not timed(row) or (self.graph and row.get("cuda_graph") is not True):
            return None
        found = self.measure.of(row, run)
        return found if found is not None and found > 0 else None

    def reaches(self, value: float, wanted: float | None) -> bool:
        return wanted is not None and (value >= wanted if self.measure.more else value <= wanted)


def _kernel(
    what: str,
    measure: Measure,
    goal: float,
    stretch: float,
    name: str,
    *cases: str,
    direction: str = "forward",
    dtype: str = "bf16",
) -> Goal:
    return Goal(
        what, measure, goal, stretch, "kernels", name, cases, direction, dtype, engines=KERNELS
    )


# Shares of bandwidth are of cases that fill the GPU, and its cache several times. Expansions of more than 112 channels
# (5 x 5) are separate kernels in any case.
_SEPARABLE = (
    *("d0_heads_batch128", "d0_heads_training_batch128", "d0_top_down_batch128"),
    *("d1_heads_batch64", "d3_heads_batch32"),
)
_D0, _D4, _D7 = (f"tf_efficientdet_d{size}" for size in (0, 4, 7))
_D0_BATCH = ("512x512 b128",)
# fmt: off
GOALS = (
    _kernel("separable_conv of 64 to 160 channels, share of copy bandwidth", SHARE, 0.80, 0.88,
            "separable_conv", *_SEPARABLE),
    _kernel("separable_conv of 64 to 160 channels, backward, share of copy bandwidth", SHARE, 0.65, 0.75,
            "separable_conv", *_SEPARABLE, direction="backward"),
    _kernel("depthwise_conv 3×3, share of copy bandwidth", SHARE, 0.85, 0.90,
            "depthwise_conv", "d0_first_batch128", "d7_first", "d7_3x3_stride2"),
    _kernel("depthwise_conv 5×5, share of copy bandwidth", SHARE, 0.68, 0.74,
            "depthwise_conv", "d0_5x5_batch128", "d4_late_batch32"),
    _kernel("weighted_fusion alone, share of copy bandwidth", SHARE, 0.88, 0.92,
            "weighted_fusion", "d0_top_down_batch128", "d4_top_down_batch32"),
    _kernel("expand_depthwise, over separate kernels", VS_SEPARATE, 1.4, 1.7,
            "expand_depthwise", "d0_early_batch128", "d4_early", "d7_early", "d7_middle"),
    _kernel("soft_nms, 128 images × 5,000 → 100, 90 classes, fp32", KERNEL_TIME, 60e-6, 40e-6,
            "soft_nms", "d0_batch128", dtype="fp32"),
    Goal("D0 network, batch 1", TIME, 0.40e-3, 0.25e-3, "model", _D0, ("512x512 b1",), graph=True),
    Goal("D0 images to rows, soft-NMS, batch 1", TIME, 0.55e-3, 0.35e-3,
         "detect", _D0, ("512x512 b1 soft",), "predict"),
    Goal("D0 network, batch 128", RATE, 14e3, 20e3, "model", _D0, _D0_BATCH),
    Goal("D4 network, batch 1", TIME, 1.1e-3, 0.8e-3, "model", _D4, ("1024x1024 b1",), graph=True),
    Goal("D4 network, batch 128", RATE, 1.25e3, 1.7e3, "model", _D4, ("1024x1024 b128",)),
    Goal("D7 network, batch 1", TIME, 3.6e-3, 2.6e-3, "model", _D7, ("1536x1536 b1",), graph=True),
    Goal("D7 network, largest batch", RATE, 290, 390,
         "model", _D7, tuple(f"1536x1536 b{batch}" for batch in (128, 32, 8, 2)), first=True),
    Goal("D0 network, batch 128, over PyPI effdet", VS_EAGER, 3, 4, "model", _D0, _D0_BATCH),
    Goal("D0 network, batch 128, over PyPI effdet, max-autotune", VS_AUTOTUNED, 1.5, 2,
         "model", _D0, _D0_BATCH),
    Goal("D0 training, batch 128", RATE, 3e3, 4e3, "train", _D0, _D0_BATCH, "train"),
    Goal("D0 training, batch 128, over PyPI effdet", VS_EAGER, 2, None, "train", _D0, _D0_BATCH, "train"),
    Goal("D0 training, batch 128, over PyPI effdet, compiled", VS_COMPILE, 1.4, None,
         "train", _D0, _D0_BATCH, "train"),
    Goal("D0 training, batch 128, memory, of PyPI effdet's", MEMORY, 0.45, None,
         "train", _D0, _D0_BATCH, "train"),
)
# fmt: on
