"""The loops of `python -m bench limits` compiled for Hopper without one: each holds what it claims to measure.

A compiler that sees through a loop would make a measurement of nothing: ptxas takes 1 / (1 / x) for x.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this run", allow_module_level=True)

from bench import launches, sass  # noqa: E402
from bench import limits_kernels as kernels  # noqa: E402
from bench.predict import ISSUED, SPECIAL  # noqa: E402
from effdet_kernels import _triton  # noqa: E402

HOPPER = 90
MULTIPROCESSORS = 132
RESIDENT_WARPS = 64  # that a multiprocessor has threads for
PROGRAMS = MULTIPROCESSORS * RESIDENT_WARPS // kernels.WARPS
VALUES_A_THREAD = kernels.VALUES // (kernels.WARPS * sass.WARP)
MEMORY = ("LD", "ST", "ATOM", "RED", "UTMA")


@dataclasses.dataclass(frozen=True)
class Compiled:
    code: sass.Code
    text: list[tuple[int, str]]

    def loop(self, beginning: str) -> int:
        """Instructions of the longest loop that begin so."""
        every, chosen = sass.by_loop(self.text, ("", beginning))
        return chosen[max(range(1, len(every)), key=every.__getitem__)]

    def anywhere(self, beginning: str) -> int:
        return sum(text.startswith(beginning) for _, text in self.text)


def compiled(call, *arguments) -> Compiled:
    """What the first launch of a call is on Hopper."""
    with _triton.recorded() as noted:
        call(*arguments)
    launch = noted[0]
    kernel = launches.kernel_for(launch.kernel, launch.arguments, launch.options, HOPPER)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = sass.instructions(sass.cuobjdump("-sass", file.name))
    metadata = kernel.metadata
    return Compiled(sass.examined(kernel.asm["cubin"], metadata.shared, metadata.num_warps), text)


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rate(kind: str, trips: int = 257) -> Compiled:
    inputs = empty(3, PROGRAMS * kernels.VALUES, dtype=torch.float32)
    clocks = empty(PROGRAMS, 2, dtype=torch.int64)
    return compiled(kernels.rate, kind, inputs, inputs[0], clocks, trips)


def product(tile: str) -> Compiled:
    rows, columns, depth, resident = kernels.TILES[tile]
    programs = MULTIPROCESSORS * resident
    half = torch.bfloat16
    return compiled(
        kernels.product,
        empty(rows, depth, dtype=half),
        empty(depth, columns, dtype=half),
        empty(programs, rows, columns, dtype=torch.float32),
        empty(programs, 2, dtype=torch.int64),
        257,
    )


def fills(code: sass.Code) -> bool:
    """Whether a multiprocessor holds as many programs as it has threads for."""
    return code.resident_warps(HOPPER) == RESIDENT_WARPS and not code.local


EACH = {
    "ffma": {"FFMA": 1},
    "ex2": {"MUFU.EX2": 1},
    "tanh": {"MUFU.TANH": 1},
    "rcp": {"MUFU.RCP": 1},
    "swish": {"MUFU.EX2": 1, "MUFU.RCP": 1},
    "swish_tanh": {"MUFU.TANH": 1},
    "to_bf16": {"F2FP.BF16": 1},
}


@pytest.mark.parametrize("kind", kernels.STEPS)
def test_a_trip_has_every_step_and_little_else(kind):
    made = rate(kind)
    steps = kernels.STEPS[kind] * VALUES_A_THREAD
    for instruction, times in EACH[kind].items():
        assert made.loop(instruction) == times * steps
    special = made.loop("MUFU")
    assert special == steps * sum(n for name, n in EACH[kind].items() if "MUFU" in name)
    assert not any(made.loop(name) for name in MEMORY)
    assert fills(made.code)
    if special:  # what is issued besides takes little more than half of the time
        assert made.loop("") / ISSUED < 0.6 * special / SPECIAL
    else:
        assert made.loop("") <= 1.05 * steps


def test_few_ffma_read_three_registers_of_one_bank():
    """Those take two cycles: of a trip the first four at most, one for each number."""
    pattern = re.compile(r"FFMA R\d+, R(\d+)\S*, R(\d+)\S*, R(\d+)")
    found = [match for _, text in rate("ffma").text if (match := pattern.match(text))]
    assert len(found) == kernels.STEPS["ffma"] * VALUES_A_THREAD
    banks = [{int(register) % 2 for register in match.groups()} for match in found]
    assert sum(len(of_one) == 1 for of_one in banks) <= VALUES_A_THREAD


@pytest.mark.parametrize(("tile", "instruction"), [("hgmma", "HGMMA.64x256x16"), ("hmma", "HMMA")])
def test_products_are_of_matrix_units(tile, instruction):
    made, (rows, columns, depth, resident) = product(tile), kernels.TILES[tile]
    own = 64 * 256 * 16 if tile == "hgmma" else 16 * 8 * 16  # multiplications of an instruction
    of_whom = kernels.WARPS / 4 if tile == "hgmma" else kernels.WARPS
    needed = rows * columns * depth // own / of_whom
    assert made.loop(instruction) % needed == 0 < made.loop(instruction)  # ptxas may unroll
    assert not any(made.loop(name) for name in ("LDG", "STG", "STS", "LDL", "STL"))
    assert tile == "hmma" or not made.loop("LDS")
    assert made.code.local == 0
    assert made.code.resident_warps(HOPPER) == resident * kernels.WARPS


def test_memory_is_touched_16_bytes_at_a_time_past_l1():
    large = empty(1 << 20)
    copy = compiled(kernels.copy, large, large, 3, PROGRAMS)
    read = compiled(kernels.read, large, empty(PROGRAMS), 3)
    for made in (copy, read):
        loads = made.loop("LDG.E.128.STRONG.GPU")
        assert loads == made.loop("LD") == made.anywhere("LDG") == 2
        assert made.loop("") <= 20 and fills(made.code)
    assert copy.loop("STG.E.128 ") == copy.anywhere("ST") == 2
    assert read.loop("ST") == 0
    # An addition for each of 2 * 4 numbers: nothing that was loaded is left out.
    assert read.loop("IADD3") + read.loop("IMAD.IADD") >= 8


@pytest.mark.parametrize("early", [False, True])
def test_early_launches_let_the_next_begin_and_wait_before_they_read(early):
    made = compiled(kernels.chain, empty(MULTIPROCESSORS), 1, early)
    names = [text.split()[0] for _, text in made.text]
    assert ("PREEXIT" in names) == ("ACQBULK" in names) == early
    if early:
        assert names.index("PREEXIT") < names.index("ACQBULK") < names.index("LDG.E")
    assert made.anywhere("LDG") == made.anywhere("STG") == 1


def test_few_and_many_trips_are_the_same_code():
    assert rate("ex2", 1).text == rate("ex2", 257).text == rate("ex2", 16).text
    made = [compiled(kernels.read, empty(1 << 20), empty(PROGRAMS), n).text for n in (1, 4097)]
    assert made[0] == made[1]


@pytest.mark.parametrize("make", [lambda: rate("ffma"), lambda: product("hgmma")])
def test_the_clock_is_read_around_the_loop(make):
    made = make()
    bounds = [
        (int(match[1], 16), address)
        for address, text in made.text
        if (match := re.match(r"BRA(?:\.\w+)* .*?(0x[0-9a-f]+)", text))
        and int(match[1], 16) < address
    ]
    for register in ("SR_CLOCKLO", "SR_GLOBALTIMERLO"):
        before, after = (address for address, text in made.text if register in text)
        assert bounds and all(before < first and last < after for first, last in bounds)
