"""Peers: the process and its protocol, what is refused, and PyPI effdet itself where --oracle gives it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from bench import detect, loss, model, peers, train
from bench.peers import PeerError, Peers, Remote, contest

TASKS = """
import os
import sys

import torch


def doubled(device, x):
    print("this goes to no one")
    return lambda: [2 * x]


def shifted(device, x):
    return lambda: [2 * x + 1]


def threads(device):
    return lambda: [torch.tensor(torch.get_num_threads())]


def finished(device):
    return lambda: "raw", lambda raw: [torch.tensor(len(raw))]


def failing(device):
    raise ValueError("no good")


def missing(device):
    import no_such_package


def dying(device):
    print("out of luck", file=sys.stderr)
    os._exit(3)


def imported(device):
    import effdet

    return lambda: [torch.tensor(effdet.MARK)]
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small calls on a busy machine wait for threads, not for work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Peers:
    """This interpreter, the tasks above, and a folder with an ``effdet`` that is not ours."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "planted.py").write_text(TASKS)
    (folder / "packages" / "effdet").mkdir(parents=True)
    (folder / "packages" / "effdet" / "__init__.py").write_text("MARK = 41\n")
    return Peers(Path(sys.executable), folder / "packages", tasks=folder)


@pytest.fixture(scope="module")
def remote(planted):
    with Remote(planted, threads=3) as remote:
        yield remote


def test_outputs_time_and_memory(remote):
    x = torch.arange(6.0).reshape(3, 2)
    remote.load("planted:doubled", x=x)
    assert remote.versions["torch"] == torch.__version__
    assert torch.equal(remote.outputs()[0], 2 * x)
    assert torch.equal(remote.outputs([0, -1])[0], 2 * x[[0, -1]])
    assert 0 < remote.time(3) < 1
    assert remote.peak_memory() is None or remote.peak_memory() >= 0
    assert remote.graph is False


def test_threads_are_those_asked_for(remote):
    remote.load("planted:threads")
    assert int(remote.outputs()[0]) == 3


def test_what_a_call_returns_can_be_finished_outside_of_the_clock(remote):
    remote.load("planted:finished")
    assert int(remote.outputs()[0]) == len("raw")


def test_an_error_comes_back_as_text_and_the_process_lives_on(remote):
    with pytest.raises(PeerError, match=r"^ValueError: no good$"):
        remote.load("planted:failing")
    with pytest.raises(PeerError, match="No module named 'no_such_package'"):
        remote.load("planted:missing")
    remote.load("planted:threads")
    assert int(remote.outputs()[0]) == 3


def test_the_peers_folder_comes_before_an_installed_effdet(remote):
    remote.load("planted:imported")
    assert int(remote.outputs()[0]) == 41


def test_a_dead_process_says_how_it_died(planted):
    with Remote(planted) as remote:
        with pytest.raises(PeerError, match=r"died with status 3 at 'load'.*out of luck"):
            remote.load("planted:dying")
        with pytest.raises(PeerError, match="died with status 3 at 'time'"):
            remote.time(1)


def test_wrong_and_absent_engines_are_not_timed(planted):
    x = torch.randn(4, 3)

    def engine(name: str, task: str, **inputs) -> contest.Engine:
        return contest.peer(name, planted, task, device="cpu", **inputs)

    def broken():
        raise RuntimeError("cannot run here\nin many words")

    engines = [
        contest.here("ours", lambda: lambda: [2 * x], "cpu", graph=False),
        engine("effdet nchw", "planted:doubled", x=x),
        engine("effdet compiled", "planted:shifted", x=x),
        engine("gone", "planted:missing"),
        contest.Engine("broken", broken),
    ]
    check = contest.Check(
        lambda found: contest.relative_to_std(found, [2 * x], torch.inf), 1e-3, "itself"
    )
    rows = contest.compete(engines, check, {"bytes": 48, "floor_s": 1e-9}, "4x3", "cpu", smoke=True)
    ours, right, wrong, gone, cannot = rows
    assert ours["status"] == right["status"] == "timed"
    assert ours["median_s"] > 0 and ours["error"] == 0 and ours["gb_s"] > 0
    assert ours["vs_eager"] == right["median_s"] / ours["median_s"]
    assert ours["versions"] == {} and right["versions"].keys() == {"torch"}
    assert ours["vs_compile"] is None  # that one is wrong
    assert wrong["status"] == "wrong" and wrong["error"] > 1e-3 and "median_s" not in wrong
    assert gone["status"] == "absent" and "no_such_package" in gone["reason"]
    assert cannot["reason"] == "RuntimeError: cannot run here" and "median_s" not in cannot


def test_outputs_that_cannot_be_compared_are_infinitely_wrong():
    x = torch.randn(4, 3)
    assert contest.relative_to_std([x[:2]], [x], torch.inf) == torch.inf
    assert contest.relative_to_std([x * torch.nan], [x], 2) == torch.inf
    assert contest.relative_to_std([x], [x], 2) == 0


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser)
    return parser.parse_args(words)


def test_options(tmp_path):
    assert peers.chosen(options("--no-peers")) is None
    assert peers.chosen(options("--peer-path", str(tmp_path))).path == tmp_path
    with pytest.raises(ValueError, match=r"--peer-python: got .*nowhere"):
        peers.chosen(options("--peer-python", str(tmp_path / "nowhere")))


@pytest.fixture
def oracle_python(request) -> str:
    python = request.config.getoption("--oracle")
    if python is None:
        pytest.skip("needs PyPI effdet 0.4.1: pass --oracle=PYTHON (make peers builds one)")
    return str(python)


@pytest.mark.parametrize(
    "suite", [model, train, loss, detect], ids=["model", "train", "loss", "detect"]
)
def test_pypi_effdet_passes_the_checks(suite, oracle_python):
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    args = parser.parse_args(["--batch", "2", "--peer-python", oracle_python])
    args.device, args.dtype, args.smoke = "cpu", ["fp32"], True
    jobs = [job for job in suite.jobs(args) if job.direction != "postprocess"]
    rows = [row for job in jobs for row in job.run()]
    found = {row["engine"]: row for row in rows}
    effdet = [row for name, row in found.items() if name.startswith("effdet ")]
    assert effdet and all(row["status"] == "timed" for row in effdet)
    assert all(row["status"] in ("timed", "absent") for row in rows)
