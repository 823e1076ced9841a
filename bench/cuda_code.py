"""The machine code of the CUDA kernels in the installed ``_C``: what each takes and is made of, and what was recorded.

``python -m bench cuda`` prints it, ``--record tests/aot/cuda-<release>.json`` writes the table that
tests/test_cuda_code.py compares with. Neither needs a GPU: the module has the code of every architecture in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import subprocess
from pathlib import Path

from bench.sass import REGISTERS, WARP, by_loop, cuobjdump, instructions, vector_and_scalar_loads
from effdet_kernels import _native

# Of which the module has machine code, beside PTX for those to come.
ARCHITECTURES = ("sm_80", "sm_90a")

# What a thread makes of its result in one turn of the largest loop, for kernels that walk down maps: by kernel and the
# template's arguments but the activation. Where that is -1 the loop has the code of all of them, of which one is run.
# depthwise_conv's live rows times columns, two channels each, or four of float32 (csrc/depthwise_conv/matrix.h and
# cuda.cu, cuda_bwd.cu); weighted_fusion's vectors of 16 bytes.
_MADE = {
    "depthwise_conv_fwd_matrix_kernel": {"3, 1": 24, "3, 2": 8, "5, 1": 40, "5, 2": 12},
    "depthwise_conv_fwd_taps_kernel": {"3, 1": 48, "3, 2": 16, "5, 1": 80, "5, 2": 24},
    "depthwise_conv_bwd_matrix_kernel": {"3, 1": 24, "3, 2": 32, "5, 1": 40, "5, 2": 48},
    "weighted_fusion_fwd_kernel": {"16": 8, "float": 4},
    "weighted_fusion_fwd_halved_kernel": {"16": 32, "float": 16},
    "weighted_fusion_fwd_pooled_kernel": {"16": 8, "float": 4},
    "weighted_fusion_bwd_kernel": {"16": 8, "float": 4},
    "weighted_fusion_bwd_halved_kernel": {"16": 32, "float": 16},
    "weighted_fusion_bwd_pooled_kernel": {"16": 8, "float": 4},
}

Table = dict[str, dict[str, str]]  # a line by architecture and kernel


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel."""

    registers: int  # per thread
    local: int  # bytes of stack and spills per thread
    instructions: int
    largest_loop: int  # instructions of the loop that has most, without those of loops inside it
    matrix: int  # matrix instructions
    vector_loads: int  # of 8 and 16 bytes, asynchronous copies among them
    scalar_loads: int
    made: int  # elements of the result that a thread makes in a turn of that loop; 0: not told

    @property
    def most_warps(self) -> int:
        """Warps that a multiprocessor has registers for."""
        return REGISTERS // (-(-max(self.registers, 24) // 8) * 8 * WARP)

    def __str__(self) -> str:
        return (
            f"{self.registers} registers, {self.local} local, {self.instructions} instructions,"
            f" {self.largest_loop} of them in the largest loop{self._per_element}, {self.matrix} matrix,"
            f" {self.vector_loads} vector and {self.scalar_loads} scalar loads"
        )

    @property
    def _per_element(self) -> str:
        return f" ({self.largest_loop / self.made:.1f} an element)" if self.made else ""


def release() -> str | None:
    """The release of CUDA that the installed module was built with ("13.0"); None without CUDA kernels."""
    module = None if _native.REASON else _native.module()
    if module is None or not module.BUILT_WITH_CUDA:
        return None
    built = module.CUDA_RELEASE
    return f"{built // 1000}.{built % 1000 // 10}"


@functools.cache
def kernels(architecture: str) -> dict[str, Kernel]:
    """Every kernel of the installed module, by name with its template's arguments, as compiled for ``architecture``."""
    path = _native.module().__file__
    usage = cuobjdump("-res-usage", path, "-arch", architecture)
    found = {
        mangled: {
            name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", line)
        }
        for mangled, line in re.findall(r"Function (\w+):\n\s*(.*)", usage)
    }
    readable = dict(zip(found, _readable(list(found)), strict=True))
    made = {}
    for part in cuobjdump("-sass", path, "-arch", architecture).split("Function : ")[1:]:
        mangled, _, sass = part.partition("\n")
        code = instructions(sass)
        (_, *loops), _ = by_loop(code, ("", "MUFU"))
        vector, scalar = vector_and_scalar_loads(code)
        uses, name = found[mangled.strip()], readable[mangled.strip()]
        assert name not in made
        made[name] = Kernel(
            registers=uses["REG"],
            local=uses["STACK"] + uses["LOCAL"],
            instructions=len(code),
            largest_loop=max(loops, default=0),
            matrix=sum(text.startswith(("HMMA", "HGMMA")) for _, text in code),
            vector_loads=vector,
            scalar_loads=scalar,
            made=_made(name),
        )
    return {name: made[name] for name in sorted(made)}


def _made(name: str) -> int:
    """Elements of the result that a thread of this kernel makes in a turn of its largest loop; 0: not told."""
    kernel, _, arguments = name.partition("<")
    shapes = _MADE.get(kernel, {})
    found = re.search(r"\b\d, \d\b", arguments)
    if kernel.startswith("weighted_fusion"):
        return shapes.get("float" if arguments.startswith("float") else "16", 0)
    return shapes.get(found.group(), 0) if found else 0


def _readable(mangled: list[str]) -> list[str]:
    """Without namespaces and parameters: ``name<template arguments>``."""
    listed, strip = "\n".join(mangled), ["c++filt", "--no-params"]
    done = subprocess.run(strip, input=listed, capture_output=True, text=True, check=True)
    return [
        re.sub(r"\w+::", "", line.replace("(anonymous namespace)::", ""))
        for line in done.stdout.splitlines()
    ]


def table() -> Table:
    """The table of the installed module."""
    return {
        arch: {name: str(kernel) for name, kernel in kernels(arch).items()}
        for arch in ARCHITECTURES
    }


def faults() -> list[str]:
    """What is wrong, whatever was recorded."""
    return [
        f"{name} {arch}: {kernel.local} bytes of local memory"
        for arch in ARCHITECTURES
        for name, kernel in kernels(arch).items()
        if kernel.local
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", type=Path, metavar="PATH", help="write the table to this file")


def run(args: argparse.Namespace) -> int:
    if release() is None:
        print("the installed effdet_kernels._C has no CUDA kernels")
        return 2
    for arch in ARCHITECTURES:
        for name, kernel in kernels(arch).items():
            print(f"{arch:<7}{name:<70}{kernel}; at most {kernel.most_warps} warps")
    if args.record is not None:
        args.record.write_text(json.dumps(table(), indent=1, sort_keys=True) + "\n")
    for fault in faults():
        print(fault)
    return 1 if faults() else 0
