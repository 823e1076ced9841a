"""Detection on many files: the same result by one process or two, stopped and continued, or with one killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from effdet.cli import main
from effdet.data import AnnotationError, listed_pictures
from effdet.engine.detect_run import DetectionRun, Picture
from effdet.engine.processes import Processes

_ROOT = Path(__file__).resolve().parents[2]
_TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(out, inputs, *options, two=False, restarts=0) -> subprocess.Popen[str]:
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [
        sys.executable,
        *([*_TWO, f"--max-restarts={restarts}"] if two else []),
        "-m",
        "effdet",
        "detect",
        *inputs,
    ]
    command += ["--device", "cpu", "--out", out, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [str(c) for c in command], text=True, env=environment, start_new_session=True, **pipes
    )


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def result(out: Path) -> dict:
    return json.loads((out / "detections.json").read_text())


def lines(out: Path) -> int:
    return sum(len(p.read_bytes().splitlines()) for p in (out / "parts").glob("*.jsonl"))


@pytest.fixture(scope="module")
def many(tmp_path_factory, pictures):
    """A folder of 300 small pictures, and what one run without a stop finds on them."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(300):
        shutil.copy(pictures[number % len(pictures)], folder / f"{number:04}.png")
    out = tmp_path_factory.mktemp("whole")
    assert main(["detect", str(folder), "--device", "cpu", "--out", str(out), "--no-pictures"]) == 0
    return folder, result(out)


def test_two_processes_find_what_one_does(tmp_path, pictures):
    folder = pictures[0].parent
    code, out, err = finish(start(tmp_path / "two", [folder], two=True))
    assert code == 0, err
    assert main(["detect", str(folder), "--device", "cpu", "--out", str(tmp_path / "one")]) == 0
    assert result(tmp_path / "two") == result(tmp_path / "one")
    for name in [p.name for p in pictures]:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    assert out.count("objects on 6 pictures") == 1


def test_each_picture_is_looked_at_once(tmp_path, pictures):
    bad = tmp_path / "bad.png"  # one that fails leaves the parts to be looked at
    bad.write_text("no picture")
    out = tmp_path / "out"
    code, _, err = finish(start(out, [*pictures, bad], "--no-pictures", two=True))
    assert code != 0 and "bad.png" in err
    shares = [part.read_text().splitlines() for part in sorted((out / "parts").glob("*.jsonl"))]
    assert sorted(map(len, shares)) == [3, 4]
    files = [json.loads(line)["file"] for share in shares for line in share]
    assert sorted(files) == sorted(map(str, [*pictures, bad]))
    assert len(result(out)["images"]) == 6


def test_a_folder_that_not_all_processes_see_is_named(tmp_path, pictures, detector):
    other = Processes(1, 1, torch.device("cpu"))  # not the one that begins
    with pytest.raises(RuntimeError, match="process 1 is not the folder of process 0"):
        DetectionRun(detector, [Picture(pictures[0], "a.png")], tmp_path, other)


def test_a_killed_worker_loses_nothing(tmp_path, many):
    """One of two processes is killed; the next run, of one process, does what is left and no more."""
    folder, whole = many
    out = tmp_path / "out"
    process = start(out, [folder], "--no-pictures", two=True)
    wait_for(lambda: lines(out) >= 20, process)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    code, _, _ = finish(process)
    assert code != 0 and not (out / "detections.json").exists()
    kept = lines(out)
    assert 20 <= kept < 300
    code, printed, err = finish(start(out, [folder], "--no-pictures", "--resume"))
    assert code == 0, err
    done = int(printed.partition(" of 300 pictures were done before")[0].split()[-1])
    assert kept - 2 <= done <= kept
    rows = [line for line in printed.splitlines() if line.startswith(str(folder))]
    assert len(rows) == 300 - done
    assert result(out) == whole


def test_torchrun_restarts_it(tmp_path, many):
    """With --max-restarts nobody has to do anything."""
    folder, whole = many
    out = tmp_path / "out"
    process = start(out, [folder], "--no-pictures", "--resume", two=True, restarts=2)
    wait_for(lambda: lines(out) >= 20, process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err[-2000:]
    assert result(out) == whole


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """The worker processes of a launcher."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True
    )
    return [int(line) for line in found.stdout.split()]


def run(*arguments) -> int:
    return main(["detect", *map(str, arguments), "--device", "cpu", "--no-pictures"])


def test_a_line_cut_off_is_done_again(tmp_path, pictures, capsys):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    out = tmp_path / "out"
    inputs = [pictures[0], bad, pictures[1]]
    assert run(*inputs, "--out", out) == 1
    part = next((out / "parts").glob("*.jsonl"))
    records = part.read_text().splitlines()
    part.write_text("\n".join([*records[:-1], records[-1][:30]]))
    shutil.copy(pictures[2], bad)  # what failed is tried again
    capsys.readouterr()
    assert run(*inputs, "--out", out, "--resume") == 0
    assert "1 of 3 pictures were done before" in capsys.readouterr().out
    assert [i["file_name"] for i in result(out)["images"]] == [str(p) for p in inputs]
    assert not (out / "parts").exists()


def test_without_resume_all_is_done_again(tmp_path, pictures, capsys):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    for _ in range(2):
        assert run(pictures[0], bad, "--out", tmp_path / "out") == 1
        assert "done before" not in capsys.readouterr().out


def test_other_settings_are_not_mixed(tmp_path, pictures, capsys):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    assert run(pictures[0], bad, "--out", tmp_path / "out") == 1
    assert run(pictures[0], bad, "--out", tmp_path / "out", "--resume", "--score", "0.5") == 1
    err = capsys.readouterr().err
    assert "holds results with score 0.3, this run has 0.5" in err


def test_pictures_of_a_data_set_keep_their_ids(tmp_path, pictures):
    source = pictures[0].parent.parent / "instances_val.json"
    truth = json.loads(source.read_text())
    for image in truth["images"]:
        image["id"] += 1000
    folder = tmp_path / "data"
    (folder / "annotations").mkdir(parents=True)
    shutil.copytree(pictures[0].parent, folder / "images")
    listing = folder / "annotations" / "instances_val.json"
    listing.write_text(json.dumps({"images": truth["images"]}))
    assert run(listing, "--out", tmp_path / "out") == 0
    found = result(tmp_path / "out")
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    assert {Path(i["file_name"]).name: i["id"] for i in found["images"]} == ids
    assert {a["image_id"] for a in found["annotations"]} <= set(ids.values())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": []}', '{"images": [{"id": 1}]}'])
def test_what_lists_no_pictures_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(AnnotationError, match=r"a\.json"):
        listed_pictures(path)


def test_two_processes_measure_what_one_does(tmp_path, pictures, capsys):
    data = pictures[0].parent.parent
    arguments = ["eval", str(data), "--device", "cpu", "--workers", "0", "--results"]
    assert main([*arguments, str(tmp_path / "one.json")]) == 0
    alone = capsys.readouterr().out
    command = [sys.executable, *_TWO, "-m", "effdet", *arguments, str(tmp_path / "two.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone

    def rows(name):
        return sorted(json.dumps(row) for row in json.loads((tmp_path / name).read_text()))

    assert rows("two.json") == rows("one.json")
