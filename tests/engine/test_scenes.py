from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from effdet.scenes import CLASS_NAMES, draw_scene, generate_scenes

_PINNED_DIGEST = "0e841fda36f35568"
_PINNED_OBJECTS = [
    (3, [27.0, 8.0, 19.0, 18.0], 169),
    (3, [39.0, 11.0, 17.0, 18.0], 128),
    (4, [40.0, 13.0, 11.0, 11.0], 54),
    (4, [21.0, 25.0, 13.0, 13.0], 60),
    (4, [47.0, 38.0, 8.0, 10.0], 40),
    (2, [27.0, 40.0, 20.0, 20.0], 389),
    (5, [13.0, 14.0, 19.0, 18.0], 168),
]


def test_a_scene_depends_on_seed_split_index_and_size_only(tmp_path):
    short = json.loads(generate_scenes(tmp_path / "a", 2, seed=5, size=96).read_text())
    long = json.loads(generate_scenes(tmp_path / "b", 4, seed=5, size=96).read_text())
    for index in range(2):
        name = short["images"][index]["file_name"]
        first, second = (np.asarray(Image.open(tmp_path / d / "images" / name)) for d in "ab")
        assert np.array_equal(first, second)
    ids = {i["id"] for i in short["images"]}
    assert short["annotations"] == [a for a in long["annotations"] if a["image_id"] in ids]


def test_seeds_splits_and_indices_give_different_scenes():
    pictures = [
        np.asarray(draw_scene(seed, index, 64, split)[0]).tobytes()
        for seed, index, split in [(0, 0, "train"), (1, 0, "train"), (0, 1, "train"), (0, 0, "val")]
    ]
    assert len(set(pictures)) == 4


def test_pixels_are_pinned():
    picture, objects = draw_scene(7, 3, 64)
    digest = hashlib.sha256(np.asarray(picture).tobytes()).hexdigest()
    assert (digest[:16], objects) == (_PINNED_DIGEST, _PINNED_OBJECTS)


def test_annotations_are_valid_and_tight(tmp_path):
    size = 128
    document = json.loads(generate_scenes(tmp_path, 20, seed=0, size=size).read_text())
    assert [c["name"] for c in document["categories"]] == list(CLASS_NAMES)
    counts = {i["id"]: 0 for i in document["images"]}
    for annotation in document["annotations"]:
        counts[annotation["image_id"]] += 1
        x, y, width, height = annotation["bbox"]
        assert 0 <= x < x + width <= size and 0 <= y < y + height <= size
        assert 4 <= annotation["area"] <= width * height
        assert 1 <= annotation["category_id"] <= len(CLASS_NAMES)
    assert all(1 <= n <= 8 for n in counts.values())
    assert {a["category_id"] for a in document["annotations"]} == {1, 2, 3, 4, 5}
    ids = [a["id"] for a in document["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


@pytest.mark.parametrize(
    ("argument", "value"), [("count", 0), ("seed", -1), ("size", 63), ("split", "a/b")]
)
def test_bad_arguments_are_named_and_write_nothing(tmp_path, argument, value):
    arguments = {"count": 1, "seed": 0, "size": 64, "split": "train", argument: value}
    with pytest.raises(ValueError, match=f"{argument}: got"):
        generate_scenes(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
