"""What the table of machine code says of a kernel, and what counts as a fault; nothing is compiled."""

from __future__ import annotations

import dataclasses
import types

import pytest

from bench import golden, sass
from effdet_kernels._triton import Launch
from effdet_kernels.spec import iter_specs

CODE = sass.Code(
    registers=64,
    shared=1024,
    local=0,
    warps=4,
    outside=10,
    loops=(5,),
    vector_loads=2,
    scalar_loads=1,
    matrix="HGMMA",
    special=(0, 0),
)
KERNEL = types.SimpleNamespace(__name__="some_kernel")


def launch(flops=1.0, **options):
    return Launch(KERNEL, 1, (), options, (), flops)


def call(dtype="bf16", architecture=90):
    spec = next(iter_specs())
    return golden.Call(spec, "forward", spec.cases[0], dtype, architecture, False)


def test_good_code_has_no_faults():
    assert golden.faults(call(), [(launch(BLOCK_M=64, IN_UNIT=8), CODE)]) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"local": 8}, "has 8 bytes of local memory"),
        ({"shared": 228 * 1024}, "takes 233472 bytes of shared memory, a block has 232448"),
        ({"registers": 255, "warps": 12}, "leaves a multiprocessor 0 warps, 8 are wanted"),
        ({"matrix": "HMMA"}, "has no HGMMA"),
        ({"vector_loads": 0}, "loads nothing in vectors"),
    ],
)
def test_a_fault_is_named(changed, fault):
    tile = launch(BLOCK_M=64, BLOCK_C=32, UNIT=8)
    made = [(tile, dataclasses.replace(CODE, **changed))]
    assert f"some_kernel {fault}" in golden.faults(call(), made)


def test_a_tile_with_few_elements_for_a_thread_is_not_loaded_in_vectors():
    made = [(launch(BLOCK_M=64, BLOCK_C=4, UNIT=8), dataclasses.replace(CODE, vector_loads=0))]
    assert golden.faults(call(), made) == []


def test_what_holds_for_half_precision_holds_for_it_only():
    plain = dataclasses.replace(CODE, matrix="", vector_loads=0)
    made = [(launch(BLOCK_M=64, BLOCK_C=32, UNIT=8), plain)]
    assert golden.faults(call("fp32"), made) == []
    older = [(launch(BLOCK_M=64), dataclasses.replace(CODE, matrix="HMMA"))]
    assert golden.faults(call("fp16", 80), older) == []


def test_launches_that_are_alike_stand_once_in_the_table():
    made = [(launch(B=1), CODE), (launch(B=2), CODE), (launch(B=1), CODE)]
    assert golden.lines(made) == [
        f"some_kernel(B={b}): 64 registers, 1024 bytes shared, 0 local, 2 vector and 1 scalar"
        " loads, HGMMA matrix instructions"
        for b in (1, 2)
    ]


def test_a_call_that_does_not_compile_is_a_fault(monkeypatch):
    def refuse(self):
        raise RuntimeError("PassManager::run failed\nand more")

    name = golden.plan()[0].name
    monkeypatch.setattr(golden.Call, "measured", refuse)
    assert golden._compile(name) == (
        [],
        ["does not compile: RuntimeError: PassManager::run failed"],
    )


def test_recording_takes_at_least_one_process(tmp_path):
    with pytest.raises(ValueError, match="--jobs: got 0"):
        golden.record(tmp_path / "table.json", 0)


def test_instructions_count_in_their_innermost_loop():
    code = [
        (0x00, "MOV R1, R2"),
        (0x10, "MUFU.EX2 R3, R4"),  # the outer loop begins
        (0x20, "FADD R1, R1, R3"),  # the inner one
        (0x30, "MUFU.RCP R3, R4"),
        (0x40, "BRA 0x20"),
        (0x50, "BRA.U !UP0, 0x10"),
        (0x60, "BRA 0x80"),  # forward
        (0x80, "EXIT"),
    ]
    assert sass.by_loop(code, ("", "MUFU")) == [[3, 2, 3], [0, 1, 1]]
    counted = dataclasses.replace(CODE, outside=3, loops=(2, 3), special=(0, 1, 1))
    assert counted.issued((4,)) == 3 + 2 * 4 + 3 and counted.transcendental((4, 8)) == 4 + 8
