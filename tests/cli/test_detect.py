from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from effdet import Detector


def _picture(path, size=(80, 60), mode="RGB", **save):
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(levels).convert(mode).save(path, **save)
    return path


def _detect(cli, weights, out, *images, options=()):
    return cli("detect", *images, "--checkpoint", weights, "--score", 0, "--out", out, *options)


def test_boxes_are_drawn_listed_and_counted(cli, weights, tmp_path):
    image = _picture(tmp_path / "a.png", (100, 50))
    out = tmp_path / "out"
    result = _detect(cli, weights, out, image, options=["--max-det", 7])
    assert result.code == 0, result.err
    document = json.loads((out / "detections.json").read_text())
    assert document["images"] == [{"id": 1, "file_name": str(image), "width": 100, "height": 50}]
    assert len(document["annotations"]) == 7
    for row in document["annotations"]:
        x, y, width, height = row["bbox"]
        assert x >= 0 and y >= 0 and x + width <= 100.02 and y + height <= 50.02
        assert row["image_id"] == 1 and 1 <= row["category_id"] <= 5 and 0 <= row["score"] <= 1
    assert document["categories"][0]["name"] == "circle"
    with Image.open(out / "a.png") as drawn:
        assert drawn.size == (100, 50)
        assert np.asarray(drawn).tobytes() != np.asarray(Image.open(image)).tobytes()
    line = next(x for x in result.out.splitlines() if x.startswith(str(image)))
    assert line.split()[1:3] == ["100x50", "7"]


def _rows(out):
    """Per detection (class, box, score)."""
    annotations = json.loads((out / "detections.json").read_text())["annotations"]
    return [(a["category_id"], a["bbox"], a["score"]) for a in annotations]


def _iou(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    width = min(ax + aw, bx + bw) - max(ax, bx)
    height = min(ay + ah, by + bh) - max(ay, by)
    common = max(width, 0) * max(height, 0)
    return common / (aw * ah + bw * bh - common)


def test_suppression_options_reach_the_detections(cli, weights, tmp_path):
    image = _picture(tmp_path / "a.png")

    def rows(*options):
        out = tmp_path / "out"
        assert _detect(cli, weights, out, image, options=["--no-pictures", *options]).code == 0
        return _rows(out)

    def largest(found, agnostic=False):
        """The largest overlap of two boxes of a class; coordinates are rounded to 1 / 100."""
        found = [row for row in found if min(row[1][2:]) > 2]
        return max(
            _iou(a[1], b[1])
            for i, a in enumerate(found)
            for b in found[:i]
            if agnostic or a[0] == b[0]
        )

    plain = rows()
    assert len(plain) == 100
    assert 0.2 < largest(plain) <= 0.51 < largest(plain, agnostic=True)
    assert largest(rows("--iou", 0.2)) <= 0.21
    assert largest(rows("--class-agnostic"), agnostic=True) <= 0.51
    labels = [row[0] for row in rows("--max-per-class", 2)]
    assert sorted(labels) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len(rows("--max-det", 140)) == 140
    soft, softer = rows("--soft-nms"), rows("--soft-nms", "--sigma", 0.05)
    assert soft != plain and sum(row[2] for row in softer) < sum(row[2] for row in soft)


@pytest.mark.parametrize("soft", [False, True])
def test_the_lowest_score_only_filters(cli, weights, tmp_path, soft):
    torch.manual_seed(0)
    picture = Image.open(_picture(tmp_path / "a.png"))
    options = {"checkpoint": weights, "device": "cpu", "max_det": 1000, "soft_nms": soft}
    every = Detector(score=0.0, **options)(picture)
    score = every.scores[37].item()
    for least, kept in ((score, every.scores >= score), (np.nextafter(score, 1), None)):
        found = Detector(score=least, **options)(picture)
        kept = every.scores >= least if kept is None else kept
        assert 0 < len(found.scores) < len(every.scores)
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(found, name), getattr(every, name)[kept])


def test_folders_patterns_and_duplicates(cli, weights, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.png", "a.jpg", "c.bmp"):
        _picture(folder / name)
    (folder / "notes.txt").write_text("no picture")
    result = _detect(cli, weights, tmp_path / "out", folder, folder / "*.jpg", folder / "a.jpg")
    assert result.code == 0, result.err
    document = json.loads((tmp_path / "out" / "detections.json").read_text())
    names = [os.path.basename(i["file_name"]) for i in document["images"]]
    assert names == ["a.jpg", "b.png", "c.bmp"]
    written = sorted(os.listdir(tmp_path / "out"))
    assert written == ["a.jpg", "b.png", "c.png", "detections.json"]


def test_equal_names_from_two_folders_are_both_kept(cli, weights, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        _picture(tmp_path / name / "a.png")
    result = _detect(cli, weights, tmp_path / "out", tmp_path / "x", tmp_path / "y")
    assert result.code == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "a_2.png", "detections.json"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16", "1", "LA"])
def test_any_colour_mode(cli, weights, tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    image = tmp_path / f"a.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13).save(image)
    else:
        _picture(image, mode=mode)
    assert _detect(cli, weights, tmp_path / "out", image).code == 0


def test_exif_rotation_is_applied(cli, weights, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = _picture(tmp_path / "a.jpg", (80, 60), exif=exif)
    assert _detect(cli, weights, tmp_path / "out", image).code == 0
    document = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert (document["images"][0]["width"], document["images"][0]["height"]) == (60, 80)


def test_a_very_long_picture(cli, weights, tmp_path):
    image = _picture(tmp_path / "a.png", (20000, 20))
    assert _detect(cli, weights, tmp_path / "out", image).code == 0


def test_bad_files_are_named_and_the_others_processed(cli, weights, tmp_path):
    good = _picture(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    whole = _picture(tmp_path / "cut.jpg", (300, 300))
    whole.write_bytes(whole.read_bytes()[:2000])
    bad = [tmp_path / n for n in ("text.png", "empty.jpg", "cut.jpg", "missing.png")]
    result = _detect(cli, weights, tmp_path / "out", *bad, good)
    assert result.code == 1
    for path in bad:
        assert any(str(path) in line for line in result.err.splitlines())
    assert "4 of the inputs failed" in result.err
    document = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [i["file_name"] for i in document["images"]] == [str(good)]
    assert sorted(os.listdir(tmp_path / "out")) == ["detections.json", "good.png", "parts"]


def test_an_empty_folder_is_named_and_nothing_written(cli, weights, tmp_path):
    (tmp_path / "in").mkdir()
    result = _detect(cli, weights, tmp_path / "out", tmp_path / "in")
    assert result.code == 1
    assert str(tmp_path / "in") in result.err and "holds no pictures" in result.err
    assert not (tmp_path / "out").exists()


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("created-by-a-checkpoint",)


def _bad_checkpoint(kind, weights, path):
    content = torch.load(weights, weights_only=True)
    if kind == "truncated":
        path.write_bytes(weights.read_bytes()[:5000])
        return
    if kind == "code":
        content["state_dict"]["backbone.conv_stem.weight"] = _RunsCode()
    elif kind == "nan":
        content["state_dict"]["backbone.conv_stem.weight"].fill_(float("nan"))
    elif kind == "other model":
        content["model"] = "tf_efficientdet_d0"
    elif kind == "no model":
        del content["model"]
    elif kind == "unknown model":
        content["model"] = "efficientdet_d00"
    elif kind == "no weights":
        content["state_dict"] = {"w": torch.zeros(1)}
    torch.save(content, path)


@pytest.mark.parametrize(
    "kind",
    ["truncated", "code", "nan", "other model", "no model", "unknown model", "no weights"],
)
def test_a_bad_checkpoint_is_named_and_nothing_written(cli, weights, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    image = _picture(tmp_path / "a.png")
    _bad_checkpoint(kind, weights, tmp_path / "bad.pth")
    result = _detect(cli, tmp_path / "bad.pth", tmp_path / "out", image)
    assert result.code == 1
    assert result.err.startswith("effdet detect: error:")
    assert "bad.pth" in result.err or (kind == "unknown model" and "efficientdet_d00" in result.err)
    assert len(result.err.splitlines()) <= 8
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "created-by-a-checkpoint").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "efficientdet_dO"], "efficientdet_dO"),
        (["--checkpoint", "none.pth"], "none.pth"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--device", "cuda:99"], "device: got 'cuda:99'"),
        (
            ["--max-per-class", "2", "--class-agnostic"],
            "max_per_class: got 2 with class_agnostic, takes None",
        ),
    ],
)
def test_bad_options_are_named(cli, weights, tmp_path, options, says):
    image = _picture(tmp_path / "a.png")
    checkpoint = [] if "--checkpoint" in options else ["--checkpoint", weights]
    result = cli("detect", image, *checkpoint, *options, "--out", tmp_path / "out")
    assert result.code == 1
    assert says in result.err
    assert not (tmp_path / "out").exists()
