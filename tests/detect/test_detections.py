"""The forms of `effdet.Detections`."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from effdet import Detection, Detections
from effdet.draw import class_colour


def some(source=None) -> Detections:
    boxes = torch.tensor([[10.0, 20, 40, 60], [5, 6, 30.5, 70.25], [0, 0, 8, 8]])
    scores, labels = torch.tensor([0.9, 0.75, 0.5]), torch.tensor([2, 1, 2])
    return Detections(boxes, scores, labels, ["cat", "dog"], [17, 18], (100, 80), source)


def test_objects_one_by_one():
    found = some()
    assert len(found) == 3 and found.names == ["dog", "cat", "dog"]
    first = next(iter(found))
    assert first == Detection((10, 20, 40, 60), pytest.approx(0.9), 2, "dog")
    assert repr(found) == "Detections(100x80: 2 dog, 1 cat)"
    assert repr(found[:0]) == "Detections(100x80: nothing)"


def test_selection():
    found = some()
    assert found[found.scores > 0.6].names == ["dog", "cat"]
    assert found[1:].names == ["cat", "dog"]
    assert found[[2, 0]].scores.tolist() == pytest.approx([0.5, 0.9])
    assert found[::-1].names == ["dog", "cat", "dog"] and len(found[[]]) == 0
    assert found[np.array([True, False, True])].scores.tolist() == pytest.approx([0.9, 0.5])
    for one in (1, np.int64(1), torch.tensor(1)):
        with pytest.raises(TypeError, match="index: got"):
            found[one]
    for wrong in ([3], [0.5], [True, False], torch.tensor([0.0])):
        with pytest.raises(IndexError):
            found[wrong]


def test_coco():
    entry = some().to_coco(42)[1]
    assert entry == {
        "image_id": 42,
        "category_id": 17,
        "bbox": [5, 6, 25.5, 64.25],
        "score": 0.75,
    }
    assert some()[:0].to_coco() == []


def test_supervision():
    supervision = pytest.importorskip("supervision")
    found = some().to_supervision()
    assert isinstance(found, supervision.Detections)
    np.testing.assert_allclose(found.xyxy[1], [5, 6, 30.5, 70.25])
    assert found.class_id.tolist() == [1, 0, 1] and found["class_name"].tolist()[0] == "dog"
    np.testing.assert_allclose(found.confidence, [0.9, 0.75, 0.5])
    assert len(some()[:0].to_supervision()) == 0
    scene = np.zeros((80, 100, 3), np.uint8)
    assert supervision.BoxAnnotator().annotate(scene.copy(), found).any()


def test_without_supervision_the_message_says_what_to_install():
    code = """
import sys
sys.modules["supervision"] = None
import torch, effdet
empty = effdet.Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=int), [], [], (1, 1))
try:
    empty.to_supervision()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install supervision" in done.stdout


def test_drawn_on_the_picture_or_its_file(tmp_path):
    image = Image.new("RGB", (100, 80))
    path = tmp_path / "a.png"
    image.save(path)
    forms = [image, path, str(path), np.asarray(image)]
    for drawn in (some(image).draw(), some(path).draw(), *map(some().draw, forms)):
        assert drawn.getpixel((20, 60)) == class_colour(2)
    assert not np.asarray(image).any()


def test_no_picture_or_another_one_is_named(tmp_path):
    with pytest.raises(ValueError, match="image: got None"):
        some().draw()
    with pytest.raises(ValueError, match=r"image: got \(10, 10\) pixels"):
        some().draw(Image.new("RGB", (10, 10)))
    with pytest.raises(TypeError, match="image: got int"):
        some().draw(3)
    with pytest.raises(FileNotFoundError):
        some(tmp_path / "gone.png").draw()
