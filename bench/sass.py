"""Reads a compiled kernel: what its machine code takes (registers, shared memory, spills) and what it is made of."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ARCHITECTURES = {80: 163, 86: 99, 90: 227, 120: 99}  # and their shared memory per block, KB
WARP = 32
REGISTERS = 65536  # of a multiprocessor
_MOST_WARPS = {80: 64, 86: 48, 90: 64, 120: 48}  # that a multiprocessor holds
_WIDE = re.compile(r"\.(64|128)(\.|$)")  # of a load's opcode: addresses have a ".64" too
_MATRIX = ("HGMMA", "HMMA", "DMMA")


@dataclasses.dataclass(frozen=True)
class Code:
    """The machine code of one kernel for one architecture."""

    registers: int  # per thread
    shared: int  # bytes per block
    local: int  # bytes of stack and spills per thread
    warps: int
    outside: int  # instructions that are in no loop
    loops: tuple[int, ...]  # instructions of each loop, in order, without those of loops inside it
    vector_loads: int  # of 8 and 16 bytes
    scalar_loads: int
    matrix: str  # HGMMA, HMMA, DMMA or ""
    special: tuple[int, ...]  # MUFU instructions outside of loops and in each loop

    def resident_warps(self, architecture: int) -> int:
        """Warps of whole programs that a multiprocessor holds at a time."""
        by_registers = REGISTERS // (max(self.registers, 24) * WARP * self.warps)
        by_shared = (ARCHITECTURES[architecture] + 1) * 1024 // (self.shared + 1024)
        by_warps = _MOST_WARPS[architecture] // self.warps
        return self.warps * min(by_registers, by_shared, by_warps)

    def issued(self, trips: Sequence[int]) -> int:
        """Instructions of a warp whose loops run ``trips`` times, each; loops beyond those: once."""
        return _run_through((self.outside, *self.loops), trips)

    def transcendental(self, trips: Sequence[int]) -> int:
        """Of these, exponentials, reciprocals and the like."""
        return _run_through(self.special, trips)


def _run_through(counts: Sequence[int], trips: Sequence[int]) -> int:
    outside, *loops = counts
    pairs = itertools.zip_longest(loops, trips[: len(loops)], fillvalue=1)
    return outside + sum(count * times for count, times in pairs)


@functools.lru_cache(maxsize=4096)
def examined(cubin: bytes, shared: int, warps: int) -> Code:
    """The code of a kernel that uses ``shared`` bytes a block, read with the cuobjdump that triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    code = instructions(sass)
    (outside, *loops), special = by_loop(code, ("", "MUFU"))
    vector, scalar = vector_and_scalar_loads(code)
    return Code(
        registers=found["REG"],
        shared=shared,
        local=found["STACK"] + found["LOCAL"],
        warps=warps,
        outside=outside,
        loops=tuple(loops),
        vector_loads=vector,
        scalar_loads=scalar,
        matrix=next((n for n in _MATRIX if any(text.startswith(n) for _, text in code)), ""),
        special=tuple(special),
    )


def instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of each instruction in cuobjdump's listing of a kernel."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", sass)
    return [(int(address, 16), text) for address, text in lines if not text.startswith("NOP")]


def vector_and_scalar_loads(code: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """How many loads from global memory take 8 or 16 bytes, and how many fewer."""
    loads = [text for _, text in code if text.startswith(("LDG", "LDGSTS"))]
    vector = sum(_WIDE.search(text.split()[0]) is not None for text in loads)
    return vector, len(loads) - vector


def by_loop(code: Sequence[tuple[int, str]], beginnings: Sequence[str]) -> list[list[int]]:
    """For each of ``beginnings``: instructions that begin so, outside of loops and in each.

    A loop ends where the code branches back; an instruction counts in the innermost.
    """
    bounds: dict[int, int] = {}  # first address of a loop: its last
    for address, text in code:
        branch = re.match(r"BRA(?:\.\w+)* .*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            bounds[int(branch[1], 16)] = address
    spans = sorted(bounds.items(), key=lambda span: (span[0], -span[1]))
    counts = [[0] * (len(spans) + 1) for _ in beginnings]
    for address, text in code:
        inside = [i for i, (first, last) in enumerate(spans, 1) if first <= address <= last]
        for count, beginning in zip(counts, beginnings, strict=True):
            count[inside[-1] if inside else 0] += text.startswith(beginning)
    return counts


def cuobjdump(flag: str, path: str, *options: str) -> str:
    """What triton's cuobjdump says of a cubin, or of a module with some in it."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run(
        [tool, flag, *options, path], capture_output=True, text=True, check=True
    ).stdout
