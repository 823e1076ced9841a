"""`effdet.Detector`: the same objects whatever the form of the picture, in its pixels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import effdet
from effdet import Detector
from effdet.data.image import ImageError
from effdet.engine.weights import load_model


def same(a, b, atol=1e-3):
    assert len(a) == len(b) > 0
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=atol)


def test_every_form_of_a_picture(detector, pictures):
    want = detector(pictures[0])
    image = Image.open(pictures[0]).convert("RGB")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for form in (str(pictures[0]), image, array, array[::-1][::-1], tensor, tensor / 255):
        same(detector(form), want)
    grey = np.asarray(image.convert("L"))
    same(detector(grey), detector(image.convert("L")))


def test_several_pictures_are_what_each_is_alone(detector, pictures):
    alone = [detector(p) for p in pictures]
    for several in (list(pictures), tuple(map(str, pictures)), pictures[0].parent):
        found = detector(several)
        assert isinstance(found, list) and len(found) == len(pictures)
        for a, b in zip(found, alone, strict=True):
            same(a, b)
    batch = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1)
            for p in pictures
        ]
    )
    for a, b in zip(detector(batch), alone, strict=True):
        same(a, b)
    assert detector([]) == []


def test_batches_change_nothing_and_the_last_may_be_small(detector, pictures):
    batched = Detector(device="cpu", batch_size=4)
    for a, b in zip(batched(pictures), detector(pictures), strict=True):
        same(a, b)


def test_boxes_are_in_pixels_of_the_picture(detector, pictures):
    """A picture twice as large has boxes twice as large; one with a margin has them moved."""
    image = Image.open(pictures[0]).convert("RGB")
    plain = detector(image)
    doubled = detector(image.resize((512, 512), Image.Resampling.NEAREST))
    assert doubled.size == (512, 512)
    torch.testing.assert_close(doubled.boxes, 2 * plain.boxes, rtol=0, atol=8)
    # The letterbox fills what a wide picture lacks: nothing is stretched, nothing found there.
    wide = Image.new("RGB", (512, 256), (124, 116, 104))
    wide.paste(image, (256, 0))
    moved = Detector(device="cpu", size=(256, 512))(wide)
    at = moved.boxes[:1] - torch.tensor([256.0, 0, 256, 0])
    torch.testing.assert_close(at, plain.boxes[:1], rtol=0, atol=4)


def test_the_truth_is_found(detector, pictures):
    truth = json.loads((pictures[0].parent.parent / "instances_val.json").read_text())
    objects = [a for a in truth["annotations"] if a["image_id"] == truth["images"][0]["id"]]
    found = detector(pictures[0])
    names = {c["id"]: c["name"] for c in truth["categories"]}
    assert found.names[0] in {names[o["category_id"]] for o in objects}
    x, y, width, height = min(
        (o["bbox"] for o in objects),
        key=lambda b: abs(b[0] - found.boxes[0, 0]) + abs(b[1] - found.boxes[0, 1]),
    )
    want = torch.tensor([x, y, x + width, y + height], dtype=torch.float32)
    torch.testing.assert_close(found.boxes[0], want, rtol=0, atol=6)


def test_stream_reads_on_past_what_is_no_picture(detector, pictures, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    failures = []
    inputs = [bad, pictures[0], tmp_path / "missing.png", 3.5, pictures[1]]
    found = list(detector.stream(inputs, on_error=lambda image, e: failures.append((image, e))))
    assert [f.source for f in found] == pictures[:2]
    assert [image for image, _ in failures] == [bad, tmp_path / "missing.png", 3.5]
    assert [type(e) for _, e in failures] == [ImageError, FileNotFoundError, TypeError]
    with pytest.raises(ImageError, match=r"bad\.png"):
        list(detector.stream(inputs))


def test_stream_does_not_read_far_ahead(detector, pictures):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield pictures[0]

    stream = detector.stream(endless())
    next(stream)
    stream.close()
    assert len(taken) <= detector.batch_size + 2 * detector.workers


def test_a_model_of_ones_own(pictures):
    torch.manual_seed(0)
    bundled = load_model().model
    model = effdet.create_model("efficientdet_nano", num_classes=5, pretrained_backbone=False)
    model.load_state_dict(bundled.state_dict())
    size = tuple(bundled.config.image_size)
    names = ["a", "b", "c", "d", "e"]
    own = Detector(model, class_names=names, size=size)
    assert own.bench.model is model
    want = Detector(device="cpu")(pictures[0])
    found = own(pictures[0])
    same(found, want)
    assert found.names == [names[label - 1] for label in want.labels.tolist()]
    half = Detector(effdet.DetBenchPredict(model), size=size, dtype="bfloat16")
    assert half.bench.model is not model and next(model.parameters()).dtype == torch.float32
    torch.testing.assert_close(half(pictures[0]).boxes[0], want.boxes[0], rtol=0, atol=4)


def test_warmup_changes_nothing(pictures):
    detector = Detector(device="cpu")
    detector.warmup()
    same(detector(pictures[0]), Detector(device="cpu")(pictures[0]))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"score": 1.5}, ValueError, "score: got 1.5"),
        ({"max_det": 0}, ValueError, "max_det: got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"dtype": "int8"}, ValueError, "dtype: got 'int8'"),
        ({"device": "tpu"}, ValueError, "device: got 'tpu'"),
        ({"model": "efficientdet_dO"}, KeyError, "efficientdet_dO"),
        ({"model": 3}, TypeError, "model: got int"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model: got Linear"),
        ({"class_names": ["one"]}, ValueError, "class_names: got 1 names, takes 5"),
        ({"checkpoint": "none.pth"}, OSError, r"none\.pth"),
    ],
)
def test_bad_arguments_are_named(options, error, says):
    with pytest.raises(error, match=says):
        Detector(**{"device": "cpu", **options})


@pytest.mark.parametrize(
    ("image", "error", "says"),
    [
        (3.5, TypeError, "image: got float"),
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"uint8 \[8, 8, 4\]"),
        (np.zeros((8, 8, 3)), ValueError, r"float64 \[8, 8, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"uint8 \[0, 8, 3\]"),
        (torch.zeros(8, 8, 3), ValueError, r"a tensor \[8, 8, 3\]"),
        (torch.full((3, 8, 8), 200.0), ValueError, "values from 200 to 200"),
        (torch.full((3, 8, 8), torch.nan), ValueError, "values from nan to nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), ValueError, "int32"),
    ],
)
def test_what_is_no_picture_is_named(detector, image, error, says):
    with pytest.raises(error, match=says):
        detector(image)


def test_an_empty_folder_is_named(detector, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        detector(tmp_path)
