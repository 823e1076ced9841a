from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from effdet.draw import class_colour, draw_detections


def test_the_box_is_drawn_in_the_colour_of_its_class_on_a_copy():
    image = Image.new("RGB", (200, 200))
    drawn = draw_detections(image, [[20, 60, 120, 160]], [3])
    assert not np.asarray(image).any()
    assert drawn.getpixel((70, 160)) == class_colour(3)
    assert drawn.getpixel((20, 110)) == class_colour(3)
    assert drawn.getpixel((70, 110)) == (0, 0, 0)


def test_neighbouring_classes_have_distinct_colours():
    colours = [np.array(class_colour(i), float) for i in range(1, 11)]
    distances = [np.abs(a - b).sum() for i, a in enumerate(colours) for b in colours[:i]]
    assert min(distances) > 60


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_any_mode_becomes_rgb(mode):
    assert draw_detections(Image.new(mode, (50, 50)), [[1, 1, 9, 9]], [1]).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000), (30, 30)])
@pytest.mark.parametrize("box", [[-50, -50, 9000, 9000], [5, 5, 2, 2], [0, 0, 0, 0]])
def test_boxes_and_tags_that_stick_out_are_no_problem(size, box):
    drawn = draw_detections(Image.new("RGB", size), [box], [1], [0.5], ["a long class name"])
    assert drawn.size == size


def test_no_tag_hides_another():
    """Two boxes with the same corner: both tags are there, each in its colour."""
    size, box = (200, 200), [60, 60, 160, 160]
    one = np.asarray(draw_detections(Image.new("RGB", size), [box], [1], [0.9], ["first"]))
    both = draw_detections(Image.new("RGB", size), [box, box], [1, 2], [0.9, 0.8], ["first", "2nd"])
    both = np.asarray(both)
    assert (one[:60] == both[:60]).all() and one[:60].any()
    inside = (both[62:90, 62:158] == class_colour(2)).all(-1)
    assert inside.sum() > 200


def test_lengths_that_differ_are_named():
    with pytest.raises(ValueError, match="got 1, 2 and none"):
        draw_detections(Image.new("RGB", (9, 9)), [[0, 0, 1, 1]], [1, 2])
