"""The columns that tables of results have, in Markdown and on the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bench.results import Row
from bench.setups import number, plain, timed
from bench.table import duration


@dataclasses.dataclass(frozen=True)
class Column:
    """A field of a row: its text, and its number where it is one."""

    title: str
    field: str
    meaning: str
    text: Callable[[float], str] | None = None  # None: the field is text

    @property
    def numeric(self) -> bool:
        return self.text is not None

    def value(self, row: Row) -> float | None:
        """The number; None where the row has none or was not timed."""
        return number(row, self.field) if self.numeric and timed(row) else None

    def cell(self, row: Row) -> str:
        """What a reader sees; empty where there is nothing to see."""
        if self.text is None:
            value = row.get(self.field)
            return ("yes" if value else "") if isinstance(value, bool) else plain(value)
        value = self.value(row)
        return "" if value is None else self.text(value)


def significant(value: float) -> str:
    """Three significant digits, without an exponent where a reader needs none."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


CASE = Column("case", "case", "which of the op's or model's cases")
DIRECTION = Column("direction", "direction", "forward, backward, a training step, …")
DTYPE = Column("dtype", "dtype", "of inputs and outputs")
DEVICE = Column("device", "device", "where it ran")
ENGINE = Column("engine", "engine", "a backend of effdet_kernels, or a peer")
GRAPH = Column(
    "CUDA graph", "cuda_graph", "replayed as one; where not, the time of launching counts"
)
SHAPE = Column("shape", "shape", "of the first input")
ROOFLINE = Column(
    "% roofline",
    "of_roofline",
    "the time that the machine's measured ceilings allow, over the median; of a model, for the fusion model c2; of a"
    " training step, for its arithmetic alone",
    _percent,
)
FIGURES = (
    Column("median", "median_s", "time of a call: the median of the rounds", duration),
    Column("spread", "spread", "interquartile range of the rounds over their median", _percent),
    Column("GB/s", "gb_s", "bytes that the call must move, over the median", significant),
    Column("GFLOP/s", "gflop_s", "operations of the case, over the median", significant),
    ROOFLINE,
    Column(
        "× eager",
        "vs_eager",
        "the median of eager PyTorch over this one: of the op in plain PyTorch, or of PyPI effdet; the faster layout",
        significant,
    ),
    Column(
        "× compile",
        "vs_compile",
        "the median of torch.compile of the same over this one",
        significant,
    ),
    Column(
        "after network",
        "after_network",
        "of the time from images to rows, the share that is not the network's",
        _percent,
    ),
    Column(
        "peak MB",
        "peak_bytes",
        "memory of a call above its inputs or model",
        lambda value: significant(value / 1e6),
    ),
    Column("error", "error", "share of the error bound, or what is said beside it", significant),
)
