"""CocoParser on awkward and unusable annotation files."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from effdet.data import AnnotationError, create_parser
from effdet.data.parsers import CocoParserCfg
from effdet.data.parsers.coco_json import load_coco_json

IMAGES = [
    {"id": 1, "file_name": "1.png", "width": 64, "height": 48},
    {"id": 2, "file_name": "2.png", "width": 64, "height": 48},
]
CATEGORIES = [{"id": 9, "name": "jar"}, {"id": 4, "name": "cup"}]


def annotation(image_id: int, box: list, category_id: int, **fields) -> dict:
    """Without the fields that may be absent."""
    return {"image_id": image_id, "bbox": box, "category_id": category_id, **fields}


def _parser(tmp_path, annotations, images=IMAGES, categories=CATEGORIES, **settings):
    path = tmp_path / "instances.json"
    data = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(data))
    return create_parser("coco", cfg=CocoParserCfg(ann_filename=str(path), **settings))


def test_ids_as_labels_or_numbered(tmp_path):
    annotations = [annotation(1, [1, 2, 20, 30], 9), annotation(1, [3, 4, 5, 6], 4)]
    parser = _parser(tmp_path, annotations)
    assert parser.get_ann_info(0)["cls"].tolist() == [9, 4]
    assert parser.max_label == 9
    assert parser.label_to_cat_id(9) == 9
    parser = _parser(tmp_path, annotations, cat_ids_as_labels=False)
    assert parser.cat_names == ["cup", "jar"]
    assert parser.get_ann_info(0)["cls"].tolist() == [2, 1]
    assert parser.max_label == 2
    assert [parser.label_to_cat_id(label) for label in (1, 2)] == [4, 9]
    for label in (0, 3, -1):
        with pytest.raises(ValueError, match=f"class {label}: .* classes 1..2"):
            parser.label_to_cat_id(label)


def test_unusable_boxes_are_counted_once(tmp_path):
    annotations = [
        annotation(1, [1, 2, 20, 30], 4),
        annotation(1, [10, 10, 0, 5], 4),
        annotation(1, [10, 10, 5, -3], 4),
        annotation(1, [100, 10, 5, 5], 4),
        annotation(2, [-8, 40, 20, 30], 4),
        annotation(2, [0, 0, 64.5, 48], 4),
    ]
    with pytest.warns(UserWarning) as caught:
        parser = _parser(tmp_path, annotations)
    assert len(caught) == 1
    assert "of 6 boxes 3 left out" in str(caught[0].message)
    assert "1 clipped" in str(caught[0].message)
    assert parser.get_ann_info(0)["bbox"].tolist() == [[2, 1, 32, 21]]
    assert parser.get_ann_info(1)["bbox"].tolist() == [[40, 0, 48, 12], [0, 0, 48, 64]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parser.get_ann_info(0)


def test_no_boxes_at_all(tmp_path):
    ann = _parser(tmp_path, []).get_ann_info(0)
    assert ann["bbox"].shape == (0, 4) and ann["bbox"].dtype == np.float32
    assert ann["cls"].shape == (0,) and ann["cls"].dtype == np.int64


def test_small_images_are_left_out_with_a_warning(tmp_path):
    images = [*IMAGES, {"id": 3, "file_name": "3.png", "width": 500, "height": 20}]
    with pytest.warns(UserWarning, match="1 of 3 images left out .*min_img_size=32"):
        parser = _parser(tmp_path, [], images)
    assert parser.img_ids == [1, 2] and parser.img_ids_invalid == [3]


def test_absent_fields_are_filled_in(tmp_path):
    annotations = [
        annotation(1, [1, 2, 20, 30], 4),
        annotation(2, [1, 2, 3, 4], 9, iscrowd=None, area=None),
    ]
    parser = _parser(tmp_path, annotations, [{**IMAGES[0], "width": 64.0}, IMAGES[1]])
    assert parser.img_infos[0]["width"] == 64
    entries = parser.coco.loadAnns(parser.coco.getAnnIds())
    assert [(entry["id"], entry["area"], entry["iscrowd"]) for entry in entries] == [
        (1, 600, 0),
        (2, 12, 0),
    ]


@pytest.mark.parametrize("ids", [(0, 1), (7, 7)])
def test_ids_that_evaluation_cannot_use_are_renumbered(tmp_path, ids):
    annotations = [annotation(1, [1, 2, 20, 30], 4, id=number) for number in ids]
    assert sorted(_parser(tmp_path, annotations).coco.anns) == [1, 2]


def test_good_ids_stay(tmp_path):
    annotations = [annotation(1, [1, 2, 20, 30], 4, id=number) for number in (30, 12)]
    assert sorted(_parser(tmp_path, annotations).coco.anns) == [12, 30]


GOOD = annotation(1, [1, 2, 3, 4], 4, id=77)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([{**GOOD, "category_id": 5}], r"annotation 77: category_id 5 is not in .*\[4, 9\]"),
        ([{**GOOD, "image_id": 3}], "annotation 77: image_id 3 is not in the images"),
        ([{**GOOD, "bbox": [1, 2, 3]}], r"annotation 77: bbox is \[1, 2, 3\]; takes four numbers"),
        ([{**GOOD, "bbox": [1, 2, float("nan"), 4]}], "annotation 77: bbox"),
        ([{**GOOD, "bbox": "1 2 3 4"}], "annotation 77: bbox"),
        ([{**GOOD, "bbox": [1, 2, 10**400, 4]}], "annotation 77: bbox"),
        ([{**GOOD, "iscrowd": "0"}], "annotation 77: iscrowd is '0'; takes 0 or 1"),
        ([{**GOOD, "ignore": "no"}], "annotation 77: ignore is 'no'; takes 0 or 1"),
        ([{**GOOD, "id": [3]}], r"annotation \[3\]: id is \[3\]; takes an id"),
        ([{"image_id": 1, "category_id": 4}], "annotation .* lacks bbox"),
        (["box"], "annotation box lacks image_id"),
        ([{**GOOD, "category_id": [4]}], r"annotation 77: category_id is \[4\]; takes an id"),
    ],
)
def test_unusable_annotation_is_named(tmp_path, annotations, message):
    with pytest.raises(AnnotationError, match=rf"instances\.json: {message}"):
        _parser(tmp_path, annotations)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([{"id": 1, "file_name": "1.png"}], "image .*1.png.* lacks width, height"),
        ([{**IMAGES[0], "width": 0}], r"image 1 \(1.png\): width=0"),
        ([{**IMAGES[0], "height": "48"}], "height='48'; takes positive whole numbers"),
        ([{**IMAGES[0], "width": 64.5}], "width=64.5"),
        ([{**IMAGES[0], "id": None}], "takes a number or text as id"),
        ([IMAGES[0], IMAGES[0]], "image id 1 occurs twice"),
    ],
)
def test_unusable_image_is_named(tmp_path, images, message):
    with pytest.raises(AnnotationError, match=message):
        _parser(tmp_path, [], images)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": "4", "name": "cup"}], "category 'cup' has id '4'"),
        ([{"id": 4}], "category .* lacks name"),
        ([{"id": 4, "name": None}], "category 4 has name None; takes text"),
        ([{"id": 4, "name": "cup"}, {"id": 4, "name": "jar"}], "two categories share an id"),
    ],
)
def test_unusable_category_is_named(tmp_path, categories, message):
    with pytest.raises(AnnotationError, match=message):
        _parser(tmp_path, [], categories=categories)


def test_repeated_file_name_warns(tmp_path):
    with pytest.warns(UserWarning, match="1 file names are listed under several .*1.png"):
        _parser(tmp_path, [], [IMAGES[0], {**IMAGES[0], "id": 2}])


def test_names_of_categories_may_be_numbers_and_repeated_ones_warn(tmp_path):
    categories = [{"id": 1, "name": 7}, {"id": 2, "name": "7"}]
    with pytest.warns(
        UserWarning, match=r"1 category names are listed under several ids, e\.g\. 7"
    ):
        parser = _parser(tmp_path, [], categories=categories)
    assert parser.cat_names == ["7", "7"] and len(parser.cat_dicts) == 2


def test_category_zero_as_a_label_warns(tmp_path):
    categories = [{"id": 0, "name": "jar"}, {"id": 4, "name": "cup"}]
    with pytest.warns(
        UserWarning, match=r"category ids \[0\] are no labels.*cat_ids_as_labels=False"
    ):
        _parser(tmp_path, [], categories=categories)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parser = _parser(tmp_path, [], categories=categories, cat_ids_as_labels=False)
    assert parser.max_label == 2


def test_an_area_that_is_not_finite_is_that_of_the_box(tmp_path):
    parser = _parser(tmp_path, [annotation(1, [1, 2, 3, 4], 4, area=float("nan"))])
    assert parser.coco.loadAnns(parser.coco.getAnnIds())[0]["area"] == 12


def test_byte_order_mark(tmp_path):
    """As programs on Windows write it."""
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"images": IMAGES}), encoding="utf-8-sig")
    assert len(load_coco_json(path).imgs) == 2


@pytest.mark.parametrize("content", ["", "{", "[" * 10**5, "[1, 2]", '{"images": 3}', "\x00\x01"])
def test_not_a_coco_file(tmp_path, content):
    path = tmp_path / "labels.json"
    path.write_text(content)
    with pytest.raises(AnnotationError, match=r"labels\.json: not (valid JSON|a COCO file)"):
        load_coco_json(path)


def test_not_even_text(tmp_path):
    path = tmp_path / "labels.json"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(AnnotationError, match=r"labels\.json: not valid JSON"):
        load_coco_json(path)


def test_image_list_without_annotations(tmp_path):
    (tmp_path / "info.json").write_text(json.dumps({"images": IMAGES}))
    cfg = CocoParserCfg(ann_filename=str(tmp_path / "info.json"), has_labels=False)
    assert create_parser("coco", cfg=cfg).img_ids == [1, 2]


def test_nothing_is_printed(tmp_path, capsys):
    _parser(tmp_path, [GOOD])
    assert capsys.readouterr().out == ""
