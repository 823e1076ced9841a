"""VOC and OpenImages: what the files may hold, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from effdet.data import AnnotationError, create_dataset, create_parser
from effdet.data.parsers import OpenImagesParserCfg, VocParserCfg

BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>20.5</xmax><ymax>30</ymax></bndbox>"
DOG = f"<object><name>dog</name>{BOX}<part><name>head</name>{BOX}</part></object>"
SIZE = "<size><width>60</width><height>50</height></size>"


def _voc(tmp_path: Path, xml: str, **settings):
    (tmp_path / "split.txt").write_text("a1 -1\n\n")
    (tmp_path / "a1.xml").write_text(f"<annotation>{xml}</annotation>")
    cfg = VocParserCfg(str(tmp_path / "split.txt"), str(tmp_path / "%s.xml"), **settings)
    return create_parser("voc", cfg=cfg)


def test_voc_boxes_count_from_zero(tmp_path):
    parser = _voc(tmp_path, SIZE + DOG)
    assert parser.get_ann_info(0)["bbox"].tolist() == [[1, 0, 29, 19.5]]
    assert parser.get_ann_info(0)["cls"].tolist() == [12]
    assert parser.img_infos[0]["file_name"] == "a1.jpg"
    assert parser.max_label == 20


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (DOG, "takes <size> with positive"),
        ("<size><width>x</width><height>5</height></size>", "takes <size>"),
        ("<size><width>60</width><height>0</height></size>", "takes <size>"),
        (SIZE + DOG.replace("dog", "unicorn"), "object 1 is of class 'unicorn'"),
        (SIZE + DOG.replace("20.5", "wide"), r"object 1 has the box \['1', '2', 'wide', '30'\]"),
        (SIZE + "<object><name>dog</name></object>", "object 1 has the box"),
        (
            SIZE + DOG.replace("<bnd", "<difficult>no</difficult><bnd", 1),
            "object 1 .* 'no'; takes 0",
        ),
        ("<size>", "not valid XML"),
    ],
)
def test_unusable_voc_file_is_named(tmp_path, xml, message):
    with pytest.raises(AnnotationError, match=rf"a1\.xml: {message}"):
        _voc(tmp_path, xml)


def test_byte_order_marks(tmp_path):
    """As programs on Windows write them."""
    _voc(tmp_path, SIZE + DOG)
    (tmp_path / "split.txt").write_text("a1\n", encoding="utf-8-sig")
    cfg = VocParserCfg(str(tmp_path / "split.txt"), str(tmp_path / "%s.xml"))
    assert create_parser("voc", cfg=cfg).img_ids == ["a1"]
    _open_images(tmp_path, rows=BBOX_ROWS[1:2])
    for path in tmp_path.glob("annotations/*.csv"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    with pytest.warns(UserWarning, match="1 of 2 images left out"):
        dataset = create_dataset("openimages", tmp_path, "train")
    assert dataset.parser.cat_ids[0] == "/m/01" and dataset.parser.img_ids == ["ab1"]


def test_missing_voc_annotation_is_named(tmp_path):
    (tmp_path / "split.txt").write_text("a1\n")
    with pytest.raises(FileNotFoundError, match=r"a1\.xml"):
        create_parser("voc", cfg=VocParserCfg(str(tmp_path / "split.txt"), f"{tmp_path}/%s.xml"))


def test_voc_merge_wants_equal_classes(tmp_path):
    parser = _voc(tmp_path, SIZE + DOG)
    with pytest.raises(ValueError, match="other: its classes"):
        parser.merge(_voc(tmp_path, SIZE + DOG, classes=["dog"]))


BBOX_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
BBOX_ROWS = (
    "ab2,x,/m/01,1,-0.1,0.5,0.2,0.8,0,0,0,0,0",
    "ab1,x,/m/02,1,0.1,0.5,0.25,0.5,0,0,0,0,0",
    "ab1,x,/m/03,1,0.0,1.0,0.0,1.0,0,0,1,0,0",
    "ab2,x,/m/03,1,0.5,0.5,0.2,0.8,0,0,0,0,0",
)


def _open_images(root: Path, header: str = BBOX_HEADER, rows: tuple = BBOX_ROWS) -> None:
    folder = root / "annotations"
    folder.mkdir(exist_ok=True)
    (folder / "class-descriptions-boxable.csv").write_text('/m/01,Dog\n/m/02,Cat\n/m/03,"Car, red"')
    (folder / "train-info.csv").write_text(
        "id,width,height\nab1,50,40\nab2,100,40\nab3,60,60\nab4,10,10\n"
    )
    bbox_file = folder / "train-annotations-bbox.csv"
    bbox_file.write_text("\n".join([header, *rows, "ab4,x,/m/03,1,0,1,0,1,0,0,0,0,0"]))


def test_open_images(tmp_path):
    _open_images(tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name, size in (("ab1", (50, 40)), ("ab2", (100, 40))):
        Image.new("RGB", size).save(tmp_path / "train" / "a" / f"{name}.jpg")
    with pytest.warns(UserWarning) as caught:
        dataset = create_dataset("openimages", tmp_path, "train")
    messages = " ".join(str(warning.message) for warning in caught)
    assert "1 of 3 images left out" in messages and "of 4 boxes 1 left out" in messages
    parser = dataset.parser
    assert parser.cat_names == ["Dog", "Cat", "Car, red"]
    assert parser.img_ids == ["ab1", "ab2"]
    image, target = dataset[0]
    assert image.size == target["img_size"] == (50, 40)
    assert target["bbox"].tolist() == [[10, 5, 20, 25]]  # without the group
    assert target["cls"].tolist() == [2]
    truth = parser.get_ground_truth(0)
    assert truth["bbox"].tolist() == [[10, 5, 20, 25], [0, 0, 40, 50]]
    assert truth["cls"].tolist() == [2, 3] and truth["group_of"].tolist() == [False, True]
    assert dataset[1][1]["bbox"].tolist() == [[8, 0, 32, 50]]


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("ImageID,LabelName", (), "lacks the columns XMin, XMax, YMin, YMax, IsGroupOf"),
        (BBOX_HEADER, ("zz,x,/m/01,1,0,1,0,1,0,0,0,0,0",), "line 2: image 'zz' is not in"),
        (BBOX_HEADER, ("ab1,x,/m/99,1,0,1,0,1,0,0,0,0,0",), "line 2: class '/m/99' is not in"),
        (BBOX_HEADER, ("ab1,x,/m/01,1,0,wide,0,1,0,0,0,0,0",), "line 2: XMax is 'wide'"),
        (BBOX_HEADER, ("ab1,x,/m/01,1,0",), "line 2: IsGroupOf is None"),
        (BBOX_HEADER, ("ab1,x,/m/01,1,0,nan,0,1,0,0,0,0,0",), "line 2: XMax is 'nan'"),
    ],
)
def test_unusable_open_images_row_is_named(tmp_path, header, rows, message):
    _open_images(tmp_path, header, rows)
    with pytest.raises(AnnotationError, match=rf"bbox\.csv.*{message}"):
        create_dataset("openimages", tmp_path, "train")


def test_open_images_segmentation_is_refused():
    with pytest.raises(NotImplementedError, match="task: got 'seg'"):
        create_parser("openimages", cfg=OpenImagesParserCfg("c", "i", "b", task="seg"))


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("cooc", "train", "name: got 'cooc'; takes a name starting with coco2014"),
        ("coco", "vla", "splits: got 'vla'; takes train, val, test, testdev"),
        ("coco2014", "test", "'test' of COCO 2014 has no annotation file"),
        ("openimages", "test", "'test' of openimages has no list of image sizes"),
    ],
)
def test_unknown_data_set(tmp_path, name, split, message):
    with pytest.raises(ValueError, match=message):
        create_dataset(name, tmp_path, split)


def test_unknown_parser():
    with pytest.raises(ValueError, match="name: got 'yolo'; takes one of coco, voc, openimages"):
        create_parser("yolo")
