from __future__ import annotations

import pytest

from effdet.cli import demo_command


@pytest.mark.parametrize(("required", "code", "word"), [(0.0, 0, "at least"), (1.1, 1, "BELOW")])
def test_demo_draws_detects_measures_and_judges(cli, tmp_path, monkeypatch, required, code, word):
    monkeypatch.setattr(demo_command, "_SCENES", 2)
    monkeypatch.setattr(demo_command, "REQUIRED_AP50", required)
    result = cli("demo", "--out", tmp_path)
    assert result.code == code, result.err
    assert word in result.out and "AP50" in result.out
    picture = tmp_path / "detections" / "val_000000.png"
    assert f"annotated picture: {picture}" in result.out
    assert picture.is_file() and (tmp_path / "detections" / "detections.json").is_file()
