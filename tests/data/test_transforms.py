"""Transforms keep boxes on what they mark, at every size."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from effdet.data import (
    Compose,
    ImageToNumpy,
    ImageToTensor,
    RandomFlip,
    RandomResizePad,
    ResizePad,
    clip_boxes,
    resolve_fill_color,
    transforms_coco_eval,
    transforms_coco_train,
)

GREEN, RED = (0, 255, 0), (255, 0, 0)


def _scene(width: int, height: int, box: tuple[int, int, int, int]) -> tuple[Image.Image, dict]:
    """A red rectangle on black, marked by its yxyx box."""
    top, left, bottom, right = box
    image = Image.new("RGB", (width, height))
    image.paste(RED, (left, top, right, bottom))
    return image, {"bbox": np.array([box], dtype=np.float32), "cls": np.array([3])}


def _red_box(pixels: np.ndarray) -> np.ndarray:
    """yxyx box of the red pixels of [3, H, W]."""
    rows, columns = np.nonzero(pixels[0] > 127)
    return np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])


@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("horizontal", [False, True])
def test_flip_moves_box_with_picture(horizontal, vertical):
    image, target = _scene(50, 30, (2, 5, 12, 25))
    flip = RandomFlip(horizontal=horizontal, vertical=vertical, prob=1.0)
    pixels, target = Compose([flip, ImageToNumpy()])(image, target)
    assert np.array_equal(target["bbox"][0], _red_box(pixels))
    assert np.array_equal(
        pixels[0] > 0,
        np.pad(
            np.ones((10, 20)),
            ((18, 2) if vertical else (2, 18), (25, 5) if horizontal else (5, 25)),
        ),
    )


def test_flip_probability():
    random.seed(0)
    flip = RandomFlip(prob=0.25)
    count = sum(flip._get_params()[0] for _ in range(2000))
    assert 420 < count < 580


@pytest.mark.parametrize("size", [(64, 64), (40, 200), (500, 80)])
def test_letterbox(size):
    image, target = _scene(120, 90, (30, 20, 70, 100))
    letterbox = Compose([ResizePad(size, "bicubic", GREEN), ImageToNumpy()])
    pixels, target = letterbox(image, target)
    scale = min(size[0] / 90, size[1] / 120)
    assert pixels.shape == (3, *size)
    assert target["img_scale"] == pytest.approx(1 / scale)
    assert abs(target["bbox"][0] - _red_box(pixels)).max() <= 1.5
    padding = pixels[:, int(90 * scale) :, :].reshape(3, -1)
    assert np.array_equal(padding, np.tile(np.array(GREEN)[:, None], padding.shape[1]))


@pytest.mark.parametrize("seed", range(12))
def test_scale_jitter_moves_box_with_picture(seed):
    random.seed(seed)
    image, target = _scene(120, 90, (30, 20, 70, 100))
    jitter = Compose([RandomResizePad((64, 80), (0.3, 2.5), "bilinear"), ImageToNumpy()])
    pixels, target = jitter(image, target)
    assert pixels.shape == (3, 64, 80)
    assert abs(target["bbox"][0] - _red_box(pixels)).max() <= 1.5 * max(1, 1 / target["img_scale"])


def test_boxes_outside_of_the_crop_are_dropped_with_their_class():
    image = Image.new("RGB", (100, 100))
    corners = np.array([[0, 0, 3, 3], [97, 97, 100, 100], [40, 40, 60, 60]], dtype=np.float32)
    classes = np.array([1, 2, 3])
    jitter = RandomResizePad(50, (4.0, 4.0))
    seen = set()
    for seed in range(30):
        random.seed(seed)
        _, target = jitter(image, {"bbox": corners.copy(), "cls": classes})
        boxes, labels = target["bbox"], target["cls"]
        assert len(boxes) == len(labels)
        assert (boxes[:, :2] < boxes[:, 2:]).all() and boxes.min(initial=0) >= 0
        assert boxes.max(initial=0) <= 50
        seen |= {tuple(labels.tolist())}
    assert any(1 not in labels for labels in seen) and any(3 in labels for labels in seen)


@pytest.mark.parametrize("size", [(20_000, 20), (20, 20_000), (1, 3000), (1, 1)])
def test_extreme_shapes_keep_a_pixel(size):
    for seed in range(3):
        random.seed(seed)
        for make in (transforms_coco_eval, transforms_coco_train):
            boxes = np.array([[0, 0, size[1], size[0]]], dtype=np.float32)
            target = {"bbox": boxes, "cls": np.array([1])}
            pixels, target = make(64, use_prefetcher=True, fill_color=0)(
                Image.new("RGB", size, GREEN), target
            )
            assert pixels.shape == (3, 64, 64)
            assert pixels[1].any()


def test_targets_without_boxes():
    for transform in (ResizePad(32), RandomResizePad(32), RandomFlip(prob=1.0)):
        transform(Image.new("RGB", (10, 20)), {})
        empty = {"bbox": np.zeros((0, 4), np.float32), "cls": np.zeros(0, np.int64)}
        _, target = transform(Image.new("RGB", (10, 20)), empty)
        assert target["bbox"].shape == (0, 4)


def test_without_prefetcher_is_normalised():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    image, _ = _scene(64, 64, (10, 10, 30, 50))
    ours, _ = transforms_coco_eval(64, mean=mean, std=std)(image, {})
    uint8, _ = transforms_coco_eval(64, use_prefetcher=True)(image, {})
    expected = (uint8 / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_to_tensor_dtype_and_greyscale():
    tensor, _ = ImageToTensor(torch.float64)(Image.new("L", (4, 3), 7), {})
    assert tensor.shape == (1, 3, 4) and tensor.dtype == torch.float64 and (tensor == 7).all()


def test_clip_boxes_copies():
    boxes = np.array([[-1, -2, 100, 200]], dtype=np.float32)
    assert clip_boxes(boxes, (30, 40)).tolist() == [[0, 0, 30, 40]]
    assert boxes[0, 0] == -1


def test_fill_color():
    assert resolve_fill_color("mean", (0.5, 0.25, 1)) == (128, 64, 255)
    assert resolve_fill_color(9) == (9, 9, 9)
    assert resolve_fill_color([1, 2, 3]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resolve_fill_color("pink"), "fill_color: got 'pink'"),
        (lambda: resolve_fill_color((1, 2)), "fill_color: got"),
        (lambda: ResizePad(64, "cubic"), "interpolation: got 'cubic'; takes one of .*bicubic"),
        (lambda: ResizePad(0), "image size: got 0"),
        (lambda: ResizePad((3, 64, 64)), "image size: got"),
        (lambda: RandomResizePad(64, (2.0, 0.1)), "scale: got"),
        (lambda: RandomResizePad(64, (0.0, 1.0)), "scale: got"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
