"""coco_folder finds what people have, and says what it looked for."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from effdet.data import AnnotationError, DetectionDataset, coco_folder


@pytest.mark.parametrize("folder", ["images", "train", "train2017", "."])
@pytest.mark.parametrize(
    ("annotations", "split"),
    [
        ("instances_train.json", "train"),
        ("annotations/instances_train2017.json", "train"),
        ("annotations/instances_train2017.json", "train2017"),
        ("train.json", "train"),
        ("instances.json", "train"),
    ],
)
def test_layouts(make_coco, folder, annotations, split):
    root = make_coco(folder=folder)
    (root / annotations).parent.mkdir(exist_ok=True)
    (root / "instances_train.json").rename(root / annotations)
    if folder == "train" and split == "train2017":
        with pytest.raises(FileNotFoundError, match="3 of 3 pictures are missing"):
            coco_folder(root, split)
        return
    dataset = coco_folder(root, split)
    assert isinstance(dataset, DetectionDataset)
    assert [dataset[i][0].size for i in range(len(dataset))] == [(64, 48)] * 3


def test_pictures_beside_the_annotations(make_coco):
    root = make_coco(folder="valid")
    (root / "instances_train.json").rename(root / "valid" / "_annotations.coco.json")
    assert len(coco_folder(root, "valid")) == 3


def test_labels_are_numbered_by_id(make_coco):
    dataset = coco_folder(make_coco(), "train")
    assert dataset.parser.cat_dicts == [{"name": "cup", "id": 1}, {"name": "jar", "id": 2}]
    assert [dataset[i][1]["cls"].tolist() for i in range(3)] == [[1], [2], [1]]
    assert dataset.parser.label_to_cat_id(2) == 5


@pytest.mark.parametrize(
    ("num_classes", "labels"), [(None, [1, 2]), (2, [1, 2]), (5, [1, 5]), (90, [1, 5])]
)
def test_ids_are_labels_for_a_larger_model(make_coco, num_classes, labels):
    parser = coco_folder(make_coco(), "train", num_classes).parser
    assert sorted(category["id"] for category in parser.cat_dicts) == labels


@pytest.mark.parametrize("num_classes", [1, 3, 4])
def test_model_that_does_not_fit(make_coco, num_classes):
    with pytest.raises(AnnotationError, match=f"num_classes: got {num_classes}; .* 2 categories"):
        coco_folder(make_coco(), "train", num_classes)


def test_id_zero_is_no_label_of_a_larger_model(make_coco):
    root = make_coco(2, [], categories=[{"id": 0, "name": "jar"}, {"id": 1, "name": "cup"}])
    with pytest.raises(AnnotationError, match=r"num_classes: got 90; .* ids from 0 up to 1"):
        coco_folder(root, "train", 90)
    assert coco_folder(root, "train", 2).parser.max_label == 2


def test_no_size_is_left_out(make_coco):
    images = [{"id": "thin", "file_name": "t.png", "width": 900, "height": 3}]
    dataset = coco_folder(make_coco(images, []), "train")
    assert dataset[0][0].size == (900, 3)


def test_a_split_is_no_pattern(make_coco):
    with pytest.raises(FileNotFoundError, match=r"no annotations of the split 'tr\*'"):
        coco_folder(make_coco(), "tr*")
    assert len(coco_folder(make_coco(split="fold[1]"), "fold[1]")) == 3


def test_ambiguous_split(make_coco):
    root = make_coco(split="train2014")
    make_coco(split="train2017")
    with pytest.raises(
        AnnotationError, match=r"'train' fits instances_train2014\.json, .* 'train201"
    ):
        coco_folder(root, "train")
    assert len(coco_folder(root, "train2014")) == 3


def test_exact_name_wins(make_coco):
    make_coco(1, split="train_small")
    assert len(coco_folder(make_coco(2), "train")) == 2


def test_no_annotations(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"split 'val'; looked for .*instances_val\.json"):
        coco_folder(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        coco_folder(tmp_path / "absent", "val")


def test_missing_pictures_are_counted_and_named(make_coco):
    root = make_coco(9)
    for name in ("2.png", "4.png", "6.png", "8.png"):
        (root / "images" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"4 of 9 .* in .*images: 2.png, 4.png, 6.png, \.+"):
        coco_folder(root, "train")


@pytest.mark.parametrize("key", ["images", "categories"])
def test_nothing_listed(make_coco, key):
    path = make_coco(1, []) / "instances_train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: []}))
    with pytest.raises(AnnotationError, match=f"lists no {key}"):
        coco_folder(path.parent, "train")


def test_orientation_follows_the_annotated_size(make_coco):
    root = make_coco(2)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(root / "images" / "1.png", exif=exif)
    Image.new("RGB", (64, 48)).save(root / "images" / "2.png", exif=exif)
    dataset = coco_folder(root, "train")
    assert dataset[0][0].size == dataset[1][0].size == (64, 48)


def test_wrong_annotated_size_warns_once(make_coco):
    root = make_coco(2)
    for name in ("1.png", "2.png"):
        Image.new("RGB", (32, 24)).save(root / "images" / name)
    dataset = coco_folder(root, "train")
    with pytest.warns(UserWarning) as caught:
        dataset[0], dataset[1]
    assert len(caught) == 1
    assert "1.png: is 32x24, the annotations say 64x48" in str(caught[0].message)


def test_broken_picture_is_named(make_coco):
    root = make_coco(1)
    (root / "images" / "1.png").write_bytes(b"\x89PNG")
    dataset = coco_folder(root, "train")
    with pytest.raises(ValueError, match=r"1\.png"):
        dataset[0]
