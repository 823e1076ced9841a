"""The ops' launch.json as a table that can be changed: its rows, what else a row could say, and how it is written.

What else: neighbours of the present configuration. One of its numbers is halved or doubled (``num_stages`` and
``STAGES``: one less or more), or one block is halved and another doubled, or a block and the warps change alike, so
that a warp's work stays. ``LEAST_AND_MOST``, ``FIXED`` and ``RULES`` say what kernels and launchers take; ``RESIDENT``
follows from the compiled kernel (``bench.tune``).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effdet_kernels import _triton

Config = dict[str, Any]
Table = dict[str, list[dict[str, Any]]]  # a launch.json: kernel to its rows
OPS = Path(_triton.__file__).with_name("ops")

WARPS = "num_warps"
_STEPWISE = ("num_stages", "STAGES")
# Sizes are powers of 2, from and to. Those of products are at least 16: what matrix units take.
LEAST_AND_MOST = {
    "BLOCK": (32, 16384),
    "BLOCK_B": (16, 128),
    "BLOCK_C": (16, 512),
    "BLOCK_K": (16, 512),
    "BLOCK_M": (16, 512),
    "BLOCK_N": (16, 256),
    "BLOCK_P": (4, 256),
    "BLOCK_R": (16, 64),
    "BLOCK_T": (32, 1024),
    "BLOCK_W": (2, 64),
    "COLUMNS": (32, 512),
    "LANES": (1, 64),
    "PATCH_H": (1, 16),
    "PATCH_W": (1, 16),
    "ROWS": (4, 256),
    "STEPS": (1, 8),
    "TILE": (512, 32768),
    WARPS: (1, 32),
    "num_stages": (1, 5),
    "STAGES": (1, 5),
}
# Of an op, or of one of its kernels, other bounds than these.
_BOUNDS = {
    ("decode_topk", "runs"): {"BLOCK": (1024, 16384)},  # a run has up to 1024 logits
    ("decode_topk", "parts"): {"BLOCK": (1024, 16384)},
    ("label_anchors", "fwd"): {"LANES": (32, 64)},
}
# Numbers that are no choice.
FIXED = {
    ("separable_conv", "bwd_dpw"): ("STEPS",),  # the kernel has one step
    ("separable_conv", "bwd_dpw_wide"): ("STEPS",),
}
# Kernels whose loops Triton pipelines: num_stages does nothing for the others.
_PIPELINED = {
    "pointwise_conv": ("fwd", "fwd_few", "bwd_delta", "bwd_dx", "product"),
    "dense_conv": (
        "fwd",
        "bwd_patch",
        "bwd_patch_plain",
        "bwd_delta",
        "bwd_dx_cell",
        "bwd_dx",
        "bwd_weight",
    ),
    "squeeze_excite": ("bwd_weight",),
}


def _patch(config: Config) -> bool:
    """A patch is at most 16 pixels, and the product takes at least 16 rows of them."""
    pixels = config["PATCH_H"] * config["PATCH_W"]
    return pixels <= 16 <= pixels * config["LANES"]


def _pairs_of_taps(config: Config) -> bool:
    """Matrix units take 16 rows at least; of channels those kernels have 16."""
    return not config["MATRIX"] or (config["BLOCK_W"] >= 16 and config["BLOCK_C"] == 16)


# Of an op, or of one of its kernels: what must hold between numbers.
RULES: dict[str | tuple[str, str], Callable[[Config], bool]] = {
    "depthwise_conv": _pairs_of_taps,
    "separable_conv": _patch,
    ("decode_topk", "select"): lambda config: config["ROWS"] * config["COLUMNS"] <= 16384,
}  # ^ counts of a tile are halves of an integer


@dataclasses.dataclass(frozen=True, eq=False)
class TableRow:
    """A row of a launch.json."""

    op: str
    kernel: str
    number: int  # among the kernel's rows
    fields: Mapping[str, Any]

    @property
    def place(self) -> _triton.Place:
        return self.op, self.kernel, self.number

    @property
    def config(self) -> Config:
        return self.fields["config"]

    @property
    def shared_kb(self) -> int:
        return self.fields["shared_kb"]

    @property
    def name(self) -> str:
        """What it is for: "pointwise_conv fwd, itemsize 2, 99 KB"."""
        sizes = " ".join(map(str, self.fields["itemsize"]))
        up_to = f", up to {self.fields['up_to']}" if "up_to" in self.fields else ""
        return f"{self.op} {self.kernel}, itemsize {sizes}{up_to}, {self.shared_kb} KB"


def ops() -> list[str]:
    """The ops with a launch.json."""
    return sorted(path.parent.name for path in OPS.glob("*/launch.json"))


def read(op: str) -> Table:
    return json.loads((OPS / op / "launch.json").read_text())


def rows(op: str) -> list[TableRow]:
    return [
        TableRow(op, kernel, number, fields)
        for kernel, found in read(op).items()
        for number, fields in enumerate(found)
    ]


def text(table: Table) -> str:
    """The table as launch.json has it: a line per row."""
    kernels = (
        f'  "{kernel}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in found) + "\n  ]"
        for kernel, found in table.items()
    )
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def write(op: str, table: Table) -> None:
    """Replaces the op's launch.json: all of it, or nothing if this is ended halfway."""
    path = OPS / op / "launch.json"
    written = path.with_suffix(".new")
    written.write_text(text(table))
    written.replace(path)


# Neighbours ----------------------------------------------------------------------------------------


def neighbours(row: TableRow) -> list[Config]:
    """Other configurations of a row, in an order that depends on its own alone."""
    present = row.config
    free = [name for name in present if name in LEAST_AND_MOST and not _is_fixed(row, name)]
    sizes = [name for name in free if name != WARPS and name not in _STEPWISE]
    moves: list[dict[str, int]] = [{name: by} for name in free for by in (-1, 1)]
    moves += [{smaller: -1, larger: 1} for smaller, larger in itertools.permutations(sizes, 2)]
    if WARPS in free:
        moves += [{name: by, WARPS: by} for name in sizes for by in (-1, 1)]
    found = (_moved(present, move) for move in moves)
    return [config for config in found if allowed(row, config)]


def _is_fixed(row: TableRow, name: str) -> bool:
    if name == "num_stages":
        return row.kernel not in _PIPELINED.get(row.op, ())
    return name in FIXED.get((row.op, row.kernel), ())


def _moved(present: Config, move: Mapping[str, int]) -> Config:
    """Numbers of ``move`` one step smaller (-1) or larger (1)."""
    changed = dict(present)
    for name, by in move.items():
        if name in _STEPWISE:
            changed[name] += by
        else:
            changed[name] = changed[name] * 2 if by > 0 else changed[name] // 2
    return changed


def allowed(row: TableRow, config: Config) -> bool:
    """Whether the row's kernel and its launcher take the configuration."""
    bounds = {**LEAST_AND_MOST, **_BOUNDS.get((row.op, row.kernel), {})}
    for name, value in config.items():
        if name in LEAST_AND_MOST and value != row.config[name]:
            least, most = bounds[name]
            power_of_2 = value & (value - 1) == 0
            if not least <= value <= most or not (power_of_2 or name in _STEPWISE):
                return False
    rules = (RULES.get(row.op), RULES.get((row.op, row.kernel)))
    return all(rule(config) for rule in rules if rule is not None)


def difference(present: Config, config: Config) -> str:
    """What is changed: "BLOCK_M 64 > 128, num_warps 4 > 8"."""
    changed = (f"{n} {present[n]} > {config[n]}" for n in present if config[n] != present[n])
    return ", ".join(changed)


def chosen_rows(only: Sequence[str] | None, kernels: Sequence[str] | None) -> list[TableRow]:
    """The rows of some ops (None: all) and of some kernels.

    Raises:
        ValueError: there is no such op, or none of them has a kernel of that name.
    """
    known = ops()
    if unknown := set(only or ()) - set(known):
        raise ValueError(f"--op: got {', '.join(sorted(unknown))}, takes {', '.join(known)}")
    found = [row for op in only or known for row in rows(op)]
    names = dict.fromkeys(row.kernel for row in found)
    if missing := [kernel for kernel in kernels or () if kernel not in names]:
        raise ValueError(f"--kernel: got {', '.join(missing)}, takes {', '.join(names)}")
    return [row for row in found if not kernels or row.kernel in kernels]


def selectors(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a row is chosen by, without its configuration and where that is from."""
    return {name: value for name, value in fields.items() if name not in ("config", "provenance")}
