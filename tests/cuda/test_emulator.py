"""The emulator of CUDA sees what kernels do wrong: tests/planted/kernels.cu has kernels with a bug each."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

BLOCKS = 5
ORDERS = (0, 1, 2, 3)  # of visits: up, down, drawn
# What AddressSanitizer stops, with the process: these run in one of their own.
STOPPED = ("past_shared", "past_end")
RAISED = {
    "left_copy": "ended before its asynchronous copies",
    "divergent_barrier": "wait at different barriers: .*kernels.cu:.* and .*kernels.cu:",
    "missed_barrier": "thread 63 of block .* ended before the barrier",
    "divergent_warp": "in different warp operations: __shfl_xor_sync and __shfl_xor_sync",
    "too_much_shared": "takes more shared memory than the 272 bytes of its launch",
    "misaligned": "a vector of 16 bytes at a misaligned address",
}
# Results that differ: from what is right, or from one order of visits to another.
WRONG = (
    "no_barrier",
    "no_syncwarp",
    "unwritten_shared",
    "unwritten_register",
    "no_wait",
    "block_order",
)


@pytest.fixture(scope="module")
def planted(planted_path):
    spec = importlib.util.spec_from_file_location("_planted", planted_path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module, bug, order):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 100, (BLOCKS, 64), generator=generator).float()  # sums are exact
    sums = torch.zeros(BLOCKS)
    module.run(bug, numbers.data_ptr(), sums.data_ptr(), BLOCKS, order)
    return sums, numbers.sum(1)


def test_every_bug_is_in_one_list(planted):
    assert {"none", *STOPPED, *RAISED, *WRONG} == set(planted.BUGS)


@pytest.mark.parametrize("order", ORDERS)
def test_the_right_kernel_is_right(planted, order):
    sums, expected = run(planted, "none", order)
    assert torch.equal(sums, expected)


@pytest.mark.parametrize("bug", RAISED)
def test_a_broken_rule_is_an_error_that_says_where(planted, bug):
    with pytest.raises(RuntimeError, match=RAISED[bug]):
        run(planted, bug, 0)


@pytest.mark.parametrize("bug", WRONG)
def test_a_race_or_an_unwritten_value_shows_in_the_result(planted, bug):
    found = [run(planted, bug, order) for order in ORDERS]
    assert any(not torch.equal(sums, expected) for sums, expected in found)


@pytest.mark.parametrize("bug", STOPPED)
def test_an_access_out_of_bounds_is_reported(bug, planted_path):
    program = (
        "import importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location('_planted', {str(planted_path)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "numbers, sums = torch.ones(2, 64), torch.zeros(2)\n"
        "module.run(sys.argv[1], numbers.data_ptr(), sums.data_ptr(), 2, 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, bug], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr and "planted_kernel" in done.stderr, done.stderr[-800:]
