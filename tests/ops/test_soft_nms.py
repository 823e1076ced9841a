"""Random batches through the C++ kernel and the reference: awkward boxes and scores, every option."""

from __future__ import annotations

import math
import random

import pytest
import torch

import effdet_kernels
from effdet_kernels.ops.soft_nms import reference, spec

LABELS = torch.tensor([0, 1, 7, -1, 89, 1 << 40, -(1 << 63), (1 << 63) - 1])


def awkward_boxes(generator, images, count, dtype, grid):
    """Clusters; some boxes without area, reversed, huge or not finite. On a grid overlaps are simple fractions."""

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=dtype)

    objects = 1 + int(torch.randint(1 + count // 4, (), generator=generator))
    owner = torch.randint(objects, (images, count), generator=generator)
    rows = torch.arange(images)[:, None]
    center = (uniform(images, objects, 2) * 300)[rows, owner] + uniform(images, count, 2) * 20
    half = (uniform(images, objects, 2) * 60)[rows, owner] * (0.8 + 0.4 * uniform(images, count, 2))
    boxes = torch.cat([center - half, center + half], -1)
    boxes = (boxes / 32).round() * 32 if grid else boxes
    huge = torch.full_like(boxes, torch.finfo(dtype).max) * torch.tensor([-1, -1, 1, 1])
    kinds = [
        boxes[..., [0, 1, 0, 3]],
        boxes[..., [0, 1, 0, 1]],
        boxes[..., [2, 1, 0, 3]],
        boxes[..., [2, 3, 0, 1]],
        boxes * 1e30,
        huge,
        boxes.where(uniform(images, count, 4) < 0.7, math.nan),
        boxes.where(uniform(images, count, 4) < 0.7, math.inf),
    ]
    kind = torch.randint(len(kinds) * 12, (images, count), generator=generator)
    for i, odd in enumerate(kinds):
        boxes = torch.where(kind[..., None] == i, odd, boxes)
    return boxes


def problem(seed, dtype, images=10):
    """Arguments of a call."""
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    count = draw.choice([draw.randint(0, 10), draw.randint(10, 100), draw.randint(100, 300)])
    method = draw.choice(["gaussian", "linear", "hard"])
    # Ties of unlike products of simple fractions are no ties once exponentials are rounded.
    grid = method != "gaussian" and draw.random() < 0.4
    boxes = awkward_boxes(generator, images, count, dtype, grid)
    scores = torch.rand(images, count, generator=generator, dtype=dtype)
    threshold = draw.choice([-math.inf, 0.0, 0.001, 0.3])
    kind = draw.choice(["any", "levels", "equal", "descending", "ascending", "signed", "huge"])
    if kind == "levels":
        scores = ((scores * 4).floor() + 1) / 8
    elif kind == "equal":
        scores = torch.full_like(scores, 0.75)
    elif kind.endswith("scending"):
        scores = scores.sort(1, descending=kind == "descending").values
    elif kind == "signed":
        scores, threshold = scores - draw.choice([0.5, 1.0]), draw.choice([-math.inf, -0.25])
    elif kind == "huge":
        scores = scores * 1e30
    twice = draw.randint(0, count // 3)
    boxes[:, count - twice :] = boxes[:, :twice]
    if draw.random() < 0.5:
        scores[:, count - twice :] = scores[:, :twice]
    scores[torch.rand(scores.shape, generator=generator) < 0.02] = draw.choice(
        [math.nan, math.inf, -math.inf]
    )
    labels = torch.randint(1 << 40, scores.shape, generator=generator)
    classes = draw.choice([None, LABELS[labels % len(LABELS)], labels % 3, labels % 90, labels])
    num_valid = torch.randint(-3, count + 4, (images,), generator=generator)
    sigma = draw.choice([0.001, 0.1, 0.5, 2.0])
    max_det = draw.choice([0, 1, 7, 40, 100, 400, 400])
    if method == "gaussian" and threshold <= 0:  # what is left of a score must not be subnormal
        sigma, max_det = max(sigma, 0.5), min(max_det, 30 if dtype == torch.float32 else 400)
    return {
        "boxes": boxes,
        "scores": scores,
        "classes": classes,
        "num_valid": draw.choice([None, num_valid]),
        "max_det": max_det,
        "method": method,
        "sigma": sigma,
        "iou_threshold": draw.choice([0.0, 0.25, 0.5, draw.random(), 1.0]),
        "score_threshold": threshold,
        "max_per_class": draw.choice([None, None, draw.randint(1, 5)]),
    }


def assert_as_the_reference(given, outputs):
    """Linear and hard: equal. Gaussian: close, in another order only where a replay has ties but for rounding."""
    expected = reference.soft_nms(**given)
    if given["method"] != "gaussian":
        for got, want in zip(outputs, expected, strict=True):
            assert torch.equal(got, want)
        return
    index, score, _, dropped = outputs
    assert torch.equal(dropped, expected[3])
    dtype = score.dtype
    same = (index == expected[0]).all(1)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(score[same], expected[1][same], rtol=rtol, atol=0)
    for image in (~same).nonzero().flatten().tolist():
        row = slice(image, image + 1)
        one = {name: v[row] if isinstance(v, torch.Tensor) else v for name, v in given.items()}
        assert spec.compare(one, [out[row] for out in outputs], dtype) <= 1


@pytest.mark.parametrize(
    ("batches", "images"), [(100, 10), pytest.param(1000, 50, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_batches(dtype, batches, images):
    for seed in range(batches):
        given = problem(seed, dtype, images)
        with effdet_kernels.use_backend("cpu"):
            outputs = effdet_kernels.soft_nms(**given)
        assert_as_the_reference(given, outputs)


@pytest.mark.parametrize("method", ["gaussian", "linear", "hard"])
@pytest.mark.parametrize("order", ["descending", "random"])
def test_picks_beyond_a_crowd_that_has_all_the_best_scores(method, order):
    """Few picks, for which the kernel looks at the best 8 candidates for each of them first."""
    crowd, count, max_det = 100, 300, 7
    generator = torch.Generator().manual_seed(0)
    corner = torch.arange(count).float()[:, None] * 50
    boxes = torch.cat([corner, corner + 40], -1)[:, [0, 0, 1, 1]]
    boxes[:crowd] = boxes[0] + 20 * torch.rand(crowd, 4, generator=generator)
    scores = torch.linspace(1, 0.1, count)
    if order == "random":
        places = torch.randperm(count, generator=generator)
        boxes, scores = boxes[places], scores[places]
    given = {
        "boxes": boxes[None],
        "scores": scores[None],
        "max_det": max_det,
        "method": method,
        "classes": None,
        "num_valid": None,
        "sigma": 0.5,
        "iou_threshold": 0.1,
        "score_threshold": 0.001,
        "max_per_class": None,
    }
    with effdet_kernels.use_backend("cpu"):
        outputs = effdet_kernels.soft_nms(**given)
    beyond = scores.sort(descending=True).values[8 * max_det]
    assert (scores[outputs[0]] < beyond).any()
    assert_as_the_reference(given, outputs)
