"""``summary.md`` of a run's folder."""

from __future__ import annotations

import pytest

from effdet.engine.config import TrainConfig
from effdet.engine.log import JsonLog
from effdet.engine.summary import write_summary


def lines_of(folder, *records: dict, **settings) -> list[str]:
    config = TrainConfig(data="photos", out=str(folder), epochs=3, **settings)
    log = JsonLog(folder / "log.jsonl")
    log.write("config", **config.to_dict(), images=1234, parameters=657948, torch="2.13.0")
    for record in records:
        log.write(**record)
    log.close()
    path = write_summary(folder, folder / "log.jsonl")
    assert path == folder / "summary.md" and not list(folder.glob("*.part"))
    return path.read_text(encoding="utf-8").splitlines()


def epoch(number: int, ap: float, **of_class) -> dict:
    per_class = {
        name: {"AP": value, "AP50": value and 2 * value} for name, value in of_class.items()
    }
    figures = {"AP": ap, "AP50": 2 * ap, "APsmall": -1, "per_class": per_class}
    return {"kind": "epoch", "epoch": number, "step": 10 * number, **figures}


def test_figures_of_the_best_and_the_last_epoch(tmp_path):
    (tmp_path / "best.pth").touch()
    (tmp_path / "epoch-9.pth").touch()
    (tmp_path / "epoch-10.pth").touch()
    found = lines_of(
        tmp_path,
        *({"kind": "step", "step": n, "images_per_second": float(n)} for n in (10, 20, 40)),
        epoch(1, 0.9),
        epoch(1, 0.1, cup=0.1),  # the run was resumed
        epoch(2, 0.4, cup=0.4, jar=None),
        epoch(3, 0.3, cup=0.3, jar=None),
    )
    assert found[0] == "# efficientdet_nano"
    assert "| parameters | 657,948 |" in found
    assert "| data | photos, 1,234 images to train on |" in found
    assert "| epochs | 3 of 3 |" in found
    assert "| speed | 20 images a second, median |" in found
    assert "|  | best: epoch 2 | last: epoch 3 |" in found
    assert "| AP | 0.4000 | 0.3000 |" in found
    assert "| APsmall | no objects | no objects |" in found
    assert "| cup | 0.4000 | 0.8000 |" in found and "| jar | no objects | no objects |" in found
    names = [line.split("`")[1] for line in found if line.startswith("| `")]
    assert names == ["best.pth", "epoch-9.pth", "epoch-10.pth", "log.jsonl"]


def test_only_settings_that_differ_are_listed(tmp_path):
    assert "The defaults." in lines_of(tmp_path)
    found = lines_of(tmp_path, optimizer="adamw", lr=0.003, checkpoint="a|b.pth")
    shown = [line for line in found if line.startswith("| `") and "jsonl" not in line]
    assert shown == [
        r"| `checkpoint` | a\|b.pth | – |",
        "| `optimizer` | adamw | sgd |",
        "| `lr` | 0.003 | 0.0005 |",
    ]
    assert "| times resumed | 1 |" in found


def test_without_an_evaluation(tmp_path):
    found = lines_of(tmp_path, {"kind": "epoch", "epoch": 1, "step": 10, "best_ap": -1.0})
    assert "Nothing was evaluated." in found and "| epochs | 1 of 3 |" in found
    assert "| speed | not known |" in found


def test_a_log_without_a_configuration_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"log .*log\.jsonl: has no record of kind config"):
        write_summary(tmp_path, tmp_path / "log.jsonl")
