"""The kernels of `python -m bench limits` on Triton's interpreter: their numbers, and the suite with them."""

from __future__ import annotations

import argparse
import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import limits, limits_loops, machine, runner
from bench import limits_kernels as kernels

BLOCK = kernels.BLOCK


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(count: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32)


@pytest.mark.quick
@pytest.mark.parametrize("early", [False, True])
def test_a_chain_counts(early):
    counts = torch.zeros(3, dtype=torch.int32)
    kernels.chain(counts, 5, early)
    assert counts.tolist() == [5, 5, 5]


@pytest.mark.quick
@pytest.mark.parametrize("programs", [1, 3, 8])  # as many as tiles, fewer, and no divisor
def test_a_copy_is_its_source(programs):
    source = numbers(8 * BLOCK)
    target = torch.full_like(source, -1)
    kernels.copy(source, target, 1, programs)
    assert torch.equal(source, target)


def test_a_copy_is_made_again_in_each_pass():
    """Where the target begins a tile before the source, each pass moves all tiles forward by one."""
    before = numbers(5 * BLOCK)
    tiles = before.clone()
    kernels.copy(tiles[BLOCK:], tiles[: 4 * BLOCK], 3, 1)
    assert torch.equal(tiles[: 2 * BLOCK], before[3 * BLOCK :])


@pytest.mark.quick
@pytest.mark.parametrize("passes", [1, 3])
def test_sums_are_of_all_that_was_read(passes):
    source, sums = numbers(4 * BLOCK), torch.full((3,), -1, dtype=torch.int32)
    kernels.read(source, sums, passes)
    assert (int(sums.sum()) - passes * int(source.sum())) % 2**32 == 0
    kernels.read(source + (torch.arange(4 * BLOCK) == 3 * BLOCK).int(), sums, passes)
    assert (int(sums.sum()) - passes * (int(source.sum()) + 1)) % 2**32 == 0


def test_the_kinds_are_those_of_the_kernels():
    assert tuple(kernels.STEPS) == limits_loops.KINDS
    assert tuple(kernels.TILES) == limits_loops.TILES


@pytest.mark.quick
@pytest.mark.parametrize("kind", kernels.STEPS)
def test_a_rate_takes_every_step_of_every_trip(kind):
    inputs = torch.rand(3, 2 * kernels.VALUES) * torch.tensor([1.0, 0.01, 0.1])[:, None]
    inputs += torch.tensor([0.5, 0.99, 0.1])[:, None]
    result, clocks = torch.empty(2 * kernels.VALUES), torch.zeros(2, 2, dtype=torch.int64)
    kernels.rate(kind, inputs, result, clocks, 2)
    want = limits_loops.expected(kind, inputs, 2 * kernels.STEPS[kind])
    error = ((result - want).abs() / want.abs()).max()
    assert error == 0 if kind == "to_bf16" else error < 1e-4
    assert not clocks.any()  # a CPU's are not read


@pytest.mark.parametrize("tile", kernels.TILES)
def test_products_add_up(tile):
    rows, columns, depth, _ = kernels.TILES[tile]
    a, b = torch.randn(rows, depth).half(), torch.randn(depth, columns).half()
    c = torch.empty(2, rows, columns)
    kernels.product(a, b, c, torch.zeros(2, 2, dtype=torch.int64), 3)
    want = 3 * (a.double() @ b.double())
    assert float((c - want).norm() / want.norm()) < 1e-3


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    limits.add_arguments(parser)
    args = parser.parse_args(words)
    args.device, args.dtype, args.smoke = "cpu", ["fp32"], True
    return args


def jobs(*words: str) -> list:
    return list(limits.jobs(arguments(*words)))


def test_smoke():
    rows = {(job.name, row["engine"]): row for job in jobs() for row in job.run()}
    assert {name for name, engine in rows if engine == "triton"} == {
        *("copy", "read", "hgmma", "hmma", "graph node"),
        *limits_loops.KINDS,
    }
    assert ("graph node", "triton early") in rows
    for row in rows.values():
        if row["status"] == "skipped":  # interpreted loops of two trips
            assert "noise" in row["reason"]
            continue
        assert row["status"] == "timed", row
        assert row["value"] > 0 and row["unit"] and "per_clock" not in row


class OnCpu(TorchFunctionMode):
    """Puts on the CPU what is to be on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture
def gpu(monkeypatch):
    """A CPU that says it is a GPU of two multiprocessors; loops are short."""
    facts = argparse.Namespace(multi_processor_count=2, max_threads_per_multi_processor=512)
    for module, name, value in [
        (torch.cuda, "get_device_capability", lambda: (9, 0)),
        (limits_loops, "_properties", lambda: facts),
        (machine, "gpu_clocks", lambda: {"clocks.sm": "1980 MHz"}),
        (runner, "on_stream", lambda device: contextlib.nullcontext()),
        (runner, "captured", lambda call: call),
        (runner.Local, "_time_gpu", runner.Local._time_cpu),
        (limits, "_EFFORT", runner.SMOKE),
        (limits, "_MEGABYTES", {"cuda": (1,)}),
        (limits, "_SIDE", {"cuda": 64}),
        (limits_loops, "_MOVED", {"cuda": 2 << 20}),
        (limits_loops, "_NODES", (1, 3, 9)),
        *((limits_loops, name, 1) for name in ("_TRIPS", "_PRODUCTS", "_MOST_NODES")),
    ]:
        monkeypatch.setattr(module, name, value)
    with OnCpu():
        yield


def test_all_that_a_gpu_will_run(gpu):
    args = arguments()
    args.device, args.smoke = "cuda", False
    rows = [(job, row) for job in limits.jobs(args) for row in job.run()]
    assert len(rows) == 3 + len(limits_loops.KINDS) + 3 + 2 * 3
    for job, row in rows:
        assert row["status"] in ("timed", "skipped"), row
        rated = job.name in (*limits_loops.KINDS, *limits_loops.TILES, "product")
        assert row["status"] == "skipped" or ("clocks.sm" in row) == rated


def test_early_launches_are_absent_before_hopper(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    args = arguments("--only", "graph")
    args.device = "cuda"
    rows = {row["engine"]: row for job in limits.jobs(args) for row in job.run()}
    assert rows["triton early"]["status"] == "absent"
    assert "capability 9.0" in rows["triton early"]["reason"]
    assert rows["triton"]["status"] in ("timed", "skipped")


BROKEN = {
    "chain": (lambda counts, times, early: counts.add_(times - 1), "graph node", "counts are"),
    "copy": (lambda *_: None, "copy", "differs"),
    "read": (lambda source, sums, passes: sums.fill_(0), "read", "sum is off"),
    "rate": (lambda kind, inputs, result, *_: result.copy_(inputs[0]), "rcp", "relative error"),
    "product": (lambda a, b, c, *_: c.fill_(0), "hmma", "of the product's norm"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_results_are_not_timed(name, monkeypatch):
    function, quantity, reason = BROKEN[name]
    monkeypatch.setattr(kernels, name, function)
    job = next(job for job in jobs() if job.name == quantity)
    rows = [row for row in job.run() if row["engine"].startswith("triton")]
    for row in rows:
        assert row["status"] == "wrong" and reason in row["reason"] and "median_s" not in row


def test_without_triton_a_gpu_still_runs_what_torch_does(gpu, monkeypatch):
    monkeypatch.setattr(limits_loops._triton, "REASON", "triton is not installed")
    args = arguments("--only", "graph", "--only", "products")
    args.device = "cuda"
    for job in limits.jobs(args):
        for row in job.run():
            assert (row["status"] == "absent") == (row["engine"] != "torch")
            assert row["engine"] == "torch" or row["reason"] == "triton is not installed"


@pytest.mark.parametrize(
    ("loops", "words"),
    [
        (limits_loops.copies, (64 << 10,)),
        (limits_loops.reads, (64 << 10,)),
        (limits_loops.rates, ("ex2",)),
        (limits_loops.products, ("hmma",)),
        (limits_loops.torch_products, (16,)),
        (limits_loops.chains, (2,)),
    ],
)
def test_results_are_spoiled_before_they_are_made_again(loops, words):
    for loop in loops(arguments(), *words):
        fewest = min(loop.calls)
        loop.reset()
        assert loop.wrong(fewest)
        loop.calls[fewest]()
        assert not loop.wrong(fewest)
        loop.reset()
        assert loop.wrong(fewest)


@pytest.mark.parametrize(("kind", "each"), [("ffma", 1), ("to_bf16", 2)])
def test_cycles_over_nanoseconds_are_the_clock(kind, each, monkeypatch):
    def rate(kind, inputs, result, clocks, trips):
        clocks[:] = torch.tensor([3500, 2000])

    monkeypatch.setattr(kernels, "rate", rate)
    (loop,) = limits_loops.rates(arguments(), kind)
    each *= kernels.STEPS[kind] * kernels.VALUES * 2  # programs
    assert loop.figures(2.0) == {
        "value": each / 2.0,
        "unit": "1/s",
        "clock_hz": 1.75e9,
        "multiprocessors": 2,
        "per_clock": each / 2.0 / 1.75e9 / 2,
    }
