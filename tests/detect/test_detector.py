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


def test_stream_goes_on_past_whatever_a_reader_raises(detector, pictures, monkeypatch, tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(pictures[0].read_bytes()[:-2000] + b"?" * 2000)

    def read(path):
        raise RuntimeError("a decoder's own")

    monkeypatch.setattr("effdet.pictures.load_image", read)
    failures = []
    inputs = [tmp_path / "a.avif", Image.open(cut), Image.open(pictures[1])]
    assert len(list(detector.stream(inputs, lambda image, error: failures.append(error)))) == 1
    assert len(failures) == 2 and "a decoder's own" in str(failures[0])


def test_stream_takes_a_folder_and_no_single_picture(detector, pictures):
    assert [f.source for f in detector.stream(pictures[0].parent)] == pictures
    image = Image.open(pictures[0]).convert("RGB")
    tensor = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for one in (str(pictures[0]), pictures[0], image, np.asarray(image), tensor):
        with pytest.raises(TypeError, match=r"images: got one .*, takes several"):
            next(detector.stream(one))


def test_results_may_be_written_to_and_take_part_in_autograd(detector, pictures):
    found = detector(pictures[0])
    scores = found.scores.clone()
    found.boxes.add_(5)
    assert torch.equal(found.scores, scores)
    weight = torch.ones(1, requires_grad=True)
    (found.boxes * weight).sum().backward()
    assert weight.grad is not None


def test_the_score_may_be_changed(pictures):
    detector = Detector(device="cpu", score=0.9)
    few = len(detector(pictures[0]))
    detector.score = 0.01
    same(detector(pictures[0]), Detector(device="cpu", score=0.01)(pictures[0]))
    assert len(detector(pictures[0])) > few
    detector.score = float("nan")
    with pytest.raises(ValueError, match="score: got nan"):
        detector(pictures[0])


def test_a_model_that_goes_on_training_is_not_changed_by_detection(pictures):
    model = effdet.create_model("efficientdet_nano", num_classes=5, pretrained_backbone=False)
    own = Detector(model, size=(64, 64), score=0.0)
    want = own(pictures[0])
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same(own(pictures[0]), want, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
        ({"class_names": []}, ValueError, "class_names: got 0 names, takes 5"),
        ({"class_names": "abcde"}, TypeError, "class_names: got 'abcde', takes a list"),
        ({"class_names": dict(enumerate("abcde"))}, TypeError, "class_names: got {0"),
        ({"score": "0.5"}, TypeError, "score: got '0.5'"),
        ({"score": float("nan")}, ValueError, "score: got nan"),
        ({"max_det": None}, TypeError, "max_det: got None"),
        ({"batch_size": 2.5}, TypeError, "batch_size: got 2.5"),
        ({"workers": True}, TypeError, "workers: got True"),
        ({"size": 256}, TypeError, r"size: got 256, takes \(height, width\)"),
        ({"size": (256.0, 256.0)}, ValueError, r"size: got \(256.0, 256.0\)"),
        ({"size": ()}, ValueError, r"size: got \(\)"),
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
        (torch.full((3, 8, 8), 1 + 1e-6), ValueError, "values from 1.000001"),
        (Image.new("F", (8, 8)), ValueError, "image: got one of mode F"),
    ],
)
def test_what_is_no_picture_is_named(detector, image, error, says):
    with pytest.raises(error, match=says):
        detector(image)


def test_of_a_folder_only_pictures_are_taken(detector, pictures, tmp_path):
    (tmp_path / "below.png").mkdir()
    (tmp_path / "._a.png").write_text("what macOS leaves")
    (tmp_path / "a.png").write_bytes(pictures[0].read_bytes())
    assert [found.source.name for found in detector(tmp_path)] == ["a.png"]


def test_an_empty_path_is_no_folder(detector, pictures, monkeypatch):
    monkeypatch.chdir(pictures[0].parent)
    with pytest.raises(OSError):
        detector("")


def test_warming_up_for_nothing_is_named(detector):
    with pytest.raises(ValueError, match="batch: got 0"):
        detector.warmup(0)


def test_an_empty_folder_is_named(detector, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        detector(tmp_path)
