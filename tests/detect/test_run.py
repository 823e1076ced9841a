"""Detection on many files: the same result by one process or two, stopped and continued, or with one killed."""

from __future__ import annotations

import io
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
from PIL import Image

from effdet.cli import main
from effdet.data import AnnotationError, listed_pictures
from effdet.engine.detect_run import DetectionRun, Picture, only_run
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
    inputs = [pictures[0], bad, *pictures[1:]]  # the second process looks at the bad one
    code, _, err = finish(start(out, inputs, "--no-pictures", two=True))
    assert code != 0 and "bad.png" in err
    assert (
        err.count("effdet detect: 1 of the inputs failed") == 1
    )  # the first process waits and knows
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


@pytest.fixture
def stopped(tmp_path, pictures):
    """A run that is not complete: it has seen the first picture, and one that is none."""
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    first = tmp_path / "in" / "a.png"
    first.parent.mkdir()
    shutil.copy(pictures[0], first)
    assert run(first, bad, "--out", tmp_path / "out") == 1
    shutil.copy(pictures[1], bad)
    return first, bad, tmp_path / "out"


def test_a_picture_that_has_changed_is_looked_at_again(stopped, pictures, capsys):
    first, bad, out = stopped
    shutil.copy(pictures[2], first)
    assert run(first, bad, "--out", out, "--resume") == 0
    assert "done before" not in capsys.readouterr().out
    assert run(first, bad, "--out", out.with_name("new")) == 0
    assert result(out) == result(out.with_name("new"))


def test_pictures_wanted_later_are_drawn(stopped):
    first, bad, out = stopped
    assert main(["detect", str(first), str(bad), "--out", str(out), "--resume"]) == 0
    assert sorted(os.listdir(out)) == ["a.png", "bad.png", "detections.json"]


def test_a_picture_added_in_front_takes_no_name_from_those_drawn(stopped, pictures):
    first, bad, out = stopped
    other = bad.parent / "other" / "a.png"
    other.parent.mkdir()
    shutil.copy(pictures[3], other)
    bad.write_text("no picture")
    assert main(["detect", str(first), str(bad), "--out", str(out)]) == 1
    assert main(["detect", str(other), str(first), str(bad), "--out", str(out), "--resume"]) == 1
    assert main(["detect", str(first), "--out", str(out.with_name("new"))]) == 0
    drawn = (out.with_name("new") / "a.png").read_bytes()
    assert (out / "a_2.png").read_bytes() == drawn != (out / "a.png").read_bytes()


def test_two_runs_do_not_share_a_folder(tmp_path, pictures, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with only_run(out):
        assert run(pictures[0], "--out", out) == 1
    assert f"out: another run is writing to {out}" in capsys.readouterr().err
    assert not list(out.iterdir())
    assert run(pictures[0], "--out", out) == 0


def test_results_that_another_run_took_away_are_no_empty_result(tmp_path, pictures, detector):
    alone = Processes(0, 1, torch.device("cpu"))
    work = DetectionRun(detector, [Picture(pictures[0], None)], tmp_path, alone)
    work.run(lambda *_: None, pytest.fail)
    shutil.rmtree(tmp_path / "parts")
    (tmp_path / "detections.json").write_text("the other's")
    with pytest.raises(RuntimeError, match="another run writes to the same folder"):
        work.merge()
    assert (tmp_path / "detections.json").read_text() == "the other's"


@pytest.mark.parametrize("name", ["a.png", "a.bmp"])
def test_inputs_are_not_overwritten(tmp_path, pictures, capsys, monkeypatch, name):
    """A copy of a.bmp would be a.png, which is another input."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures[0], "a.png")
    Image.open(pictures[1]).save("b.bmp")
    before = Path("a.png").read_bytes()
    shutil.copy(pictures[0], name)
    assert main(["detect", *{"a.png", name}, "--out", str(tmp_path)]) == 1
    assert "out: a.png is one of the inputs" in capsys.readouterr().err
    assert Path("a.png").read_bytes() == before and not Path("parts").exists()
    assert main(["detect", "b.bmp", "--out", "."]) == 0


def test_a_listing_is_not_overwritten(tmp_path, pictures, capsys):
    listing = tmp_path / "detections.json"
    shutil.copy(pictures[0], tmp_path / "a.png")
    listing.write_text('{"images": [{"id": 7, "file_name": "a.png"}]}')
    assert run(listing, "--out", tmp_path) == 1
    assert "detections.json is one of the inputs" in capsys.readouterr().err


def test_numbers_of_other_pictures_are_not_those_of_a_data_set(tmp_path, pictures, capsys):
    listings = []
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        shutil.copy(pictures[number], tmp_path / folder / "x.png")
        listings.append(tmp_path / folder / "list.json")
        listings[-1].write_text('{"images": [{"id": 1, "file_name": "x.png"}]}')
    listed = tmp_path / "a" / "x.png"
    assert run(pictures[2], listed, listings[0], "--out", tmp_path / "out") == 0
    assert [i["id"] for i in result(tmp_path / "out")["images"]] == [2, 1]
    assert run(*listings, "--out", tmp_path / "out") == 1  # of the second none is taken
    assert f"the id 1 of {tmp_path / 'b' / 'x.png'} is that of {listed}" in capsys.readouterr().err
    assert len(result(tmp_path / "out")["images"]) == 1


def test_names_that_the_terminal_has_no_letters_for(tmp_path, pictures, monkeypatch):
    named = tmp_path / "\u732b \udcff.png"
    shutil.copy(pictures[0], named)
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert run(named, "--out", tmp_path / "out") == 0
    sys.stdout.flush()
    assert b"\\u732b \\udcff.png" in printed.getvalue()
    assert result(tmp_path / "out")["images"][0]["file_name"] == str(named)


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
