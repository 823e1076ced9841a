"""Anchors, labels, losses, suppression and benches against PyPI effdet."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effdet import create_model
from effdet import loss as losses
from effdet.anchors import (
    AnchorLabeler,
    Anchors,
    clip_boxes_xyxy,
    decode_box_outputs,
    generate_detections,
)
from effdet.bench import DetBenchPredict, DetBenchTrain, _batch_detection, _post_process
from effdet.config import default_detection_model_configs, get_efficientdet_config
from effdet.config.model_config import efficientdet_model_param_dict
from effdet.object_detection import (
    ArgMaxMatcher,
    BoxList,
    FasterRcnnBoxCoder,
    IouSimilarity,
    TargetAssigner,
)
from effdet.soft_nms import batched_soft_nms, soft_nms
from effdet_kernels import soft_nms as soft_nms_op

PAIRS = [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)]
SMALL = {
    "min_level": 3,
    "max_level": 7,
    "num_scales": 3,
    "aspect_ratios": PAIRS,
    "anchor_scale": 4.0,
    "image_size": (128, 160),
}
OUR_OWN = {"efficientdet_nano"}  # configs that the peer does not have
LOSS = {
    "num_classes": 7,
    "alpha": 0.25,
    "gamma": 1.5,
    "delta": 0.1,
    "box_loss_weight": 50.0,
}


class Maps(nn.Module):
    """Stands in for a model: returns the maps it was given."""

    def __init__(self, config: dict, cls_outputs: list[Tensor], box_outputs: list[Tensor]) -> None:
        super().__init__()
        self.config = default_detection_model_configs()
        self.config.update(config)
        self.outputs = cls_outputs, box_outputs

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.outputs


def model_maps(seed: int, batch: int, num_classes: int) -> tuple[list[Tensor], list[Tensor]]:
    """Class maps without two equal logits in an image, and box maps, for ``SMALL``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = Anchors(**SMALL).level_sizes()
    counts = [9 * num_classes * height * width for height, width in sizes]
    spread = torch.linspace(-6, 4, sum(counts))
    logits = torch.stack(
        [spread[torch.randperm(sum(counts), generator=generator)] for _ in range(batch)]
    )
    cls_outputs = [
        part.reshape(batch, 9 * num_classes, *size)
        for part, size in zip(logits.split(counts, dim=1), sizes, strict=True)
    ]
    box_outputs = [0.4 * torch.randn(batch, 36, *size, generator=generator) for size in sizes]
    return cls_outputs, box_outputs


def image_info(batch: int) -> dict[str, Tensor]:
    return {
        "img_scale": torch.linspace(0.7, 2.3, batch),
        "img_size": torch.tensor([[150.0, 90.0], [100.0, 200.0], [260.0, 130.0]])[:batch],
    }


def ground_truth(kind: str) -> tuple[Tensor, Tensor]:
    """[M, 4] yxyx boxes and [M] classes for images of 128 x 160."""
    generator = torch.Generator().manual_seed(len(kind))
    corner = torch.rand(30, 2, generator=generator) * torch.tensor([110.0, 140.0])
    size = torch.rand(30, 2, generator=generator) * 60 + 1
    boxes = torch.cat([corner, corner + size], dim=1)
    classes = torch.randint(1, 91, (30,), generator=generator)
    if kind == "tiny":
        boxes[:, 2:] = boxes[:, :2] + 0.3
    elif kind == "outside":
        boxes = boxes - torch.tensor([150.0, 90.0, 150.0, 90.0])
    elif kind == "duplicate":
        boxes = boxes[:10].repeat(3, 1)
    elif kind == "degenerate":
        boxes[::2, 2] = boxes[::2, 0]
        boxes[1::4, 3] = boxes[1::4, 1]
    elif kind == "ties":  # on the anchor grid: equal overlaps with several anchors
        boxes = (boxes / 8).round() * 8
    elif kind == "padded":
        boxes[20:], classes[20:] = -1, -1
    elif kind == "none":
        boxes, classes = boxes[:0], classes[:0]
    return boxes, classes


KINDS = ("random", "tiny", "outside", "duplicate", "degenerate", "ties", "padded", "none")


def assert_labels_equal(ours, theirs: dict) -> None:
    cls, box, positives = ours
    assert torch.equal(positives, theirs["positives"])
    for mine, its in zip(cls, theirs["cls"], strict=True):
        assert torch.equal(mine, its)
    for mine, its in zip(box, theirs["box"], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(efficientdet_model_param_dict) - OUR_OWN))
def test_anchors_of_every_config(oracle, name):
    anchors = Anchors.from_config(get_efficientdet_config(name))
    theirs = oracle.call("config_anchors", name=name)
    assert torch.equal(anchors.boxes, theirs["boxes"])
    assert anchors.feat_sizes == [tuple(size) for size in theirs["feat_sizes"]]
    assert anchors.config == theirs["config"]


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": (33, 257)},
        {"image_size": (100, 1333)},
        {"image_size": (1, 1)},
        {"aspect_ratios": [1.0, 2.0, 0.5], "num_scales": 2},
        {"anchor_scale": [4.0, 4.0, 3.0, 3.0, 2.5]},
        {"min_level": 2, "max_level": 8, "image_size": (640, 333)},
    ],
)
def test_custom_anchors(oracle, changes):
    arguments = SMALL | changes
    theirs = oracle.call("custom_anchors", arguments=arguments)["boxes"]
    assert torch.equal(Anchors(**arguments).boxes, theirs)


def test_anchors_of_another_size_equal_anchors_built_for_it(oracle):
    size = (96, 224)
    theirs = oracle.call("custom_anchors", arguments=SMALL | {"image_size": size})["boxes"]
    assert torch.equal(Anchors(**SMALL).boxes_for(size), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_one_image(oracle, kind):
    boxes, classes = ground_truth(kind)
    ours = AnchorLabeler(Anchors(**SMALL), 90).label_anchors(boxes, classes)
    theirs = oracle.call("label_one", anchors=SMALL, gt_boxes=boxes, gt_classes=classes)
    assert_labels_equal(ours, theirs)


@pytest.mark.parametrize("filter_valid", [True, False])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_labels_of_a_batch(oracle, filter_valid, threshold):
    boxes, classes = (torch.stack(t) for t in zip(*map(ground_truth, KINDS[:-1]), strict=True))
    inputs = {
        "gt_boxes": boxes,
        "gt_classes": classes.float(),
        "filter_valid": filter_valid,
    }
    ours = AnchorLabeler(Anchors(**SMALL), 90, threshold).batch_label_anchors(*inputs.values())
    theirs = oracle.call("label_batch", anchors=SMALL, threshold=threshold, **inputs)
    assert_labels_equal(ours, theirs)


def test_labels_of_lists(oracle):
    boxes, classes = (list(t) for t in zip(*map(ground_truth, KINDS), strict=True))
    ours = AnchorLabeler(Anchors(**SMALL), 90).batch_label_anchors(boxes, classes)
    theirs = oracle.call(
        "label_batch",
        anchors=SMALL,
        gt_boxes=boxes,
        gt_classes=classes,
        filter_valid=True,
        threshold=0.5,
    )
    assert_labels_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["random", "ties", "duplicate", "none"])
@pytest.mark.parametrize(
    "matcher",
    [
        {"matched_threshold": 0.5, "unmatched_threshold": 0.3},
        {
            "matched_threshold": 0.5,
            "unmatched_threshold": 0.3,
            "negatives_lower_than_unmatched": False,
        },
        {"matched_threshold": 0.4, "force_match_for_each_row": True},
    ],
)
def test_target_assigner(oracle, kind, matcher):
    anchors = Anchors(**SMALL).boxes[:2000]
    boxes, classes = ground_truth(kind)
    factors = [10.0, 10.0, 5.0, 5.0]
    assigner = TargetAssigner(
        IouSimilarity(), ArgMaxMatcher(**matcher), FasterRcnnBoxCoder(factors)
    )
    cls, box, match = assigner.assign(BoxList(anchors), BoxList(boxes), classes)
    theirs = oracle.call(
        "assign", anchors=anchors, boxes=boxes, labels=classes, matcher=matcher, factors=factors
    )
    assert torch.equal(match.match_results, theirs["match"])
    assert torch.equal(cls, theirs["cls"])
    torch.testing.assert_close(box, theirs["box"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"label_smoothing": 0.1}, {"legacy_focal": True}, {"gamma": 2.0, "delta": 1.0}],
)
@pytest.mark.parametrize("kind", ["random", "none"])
def test_loss_and_gradients(oracle, settings, kind):
    settings = LOSS | settings
    boxes, classes = ground_truth(kind)
    labeler = AnchorLabeler(Anchors(**SMALL), 7)
    cls, box, positives = labeler.batch_label_anchors(
        [boxes, boxes[:3]], [(classes % 7) + 1, (classes[:3] % 7) + 1]
    )
    cls[0][:, :2] = -2  # ignored anchors
    labels = {"cls_targets": cls, "box_targets": box, "num_positives": positives}
    cls_outputs, box_outputs = model_maps(1, 2, 7)
    leaves = [output.requires_grad_() for output in (*cls_outputs, *box_outputs)]
    result = losses.loss_fn(cls_outputs, box_outputs, **labels, **settings)
    gradients = torch.autograd.grad(result[0], leaves)
    theirs = oracle.call(
        "loss_and_gradients",
        cls_outputs=[c.detach() for c in cls_outputs],
        box_outputs=[b.detach() for b in box_outputs],
        labels=labels,
        settings=settings,
    )
    for mine, its in zip(result, theirs["losses"], strict=True):
        torch.testing.assert_close(mine.detach(), its, rtol=1e-6, atol=0)
    for mine, its in zip(gradients, theirs["gradients"], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6 * its.abs().max().item())


def test_elementwise_losses(oracle):
    torch.manual_seed(0)
    logits, codes = 4 * torch.randn(50, 7), torch.randn(50, 4)
    targets = torch.nn.functional.one_hot(torch.arange(50) % 7, 7).float()
    goals = torch.randn(50, 4) * (torch.rand(50, 4) > 0.5)
    theirs = oracle.call(
        "elementwise_losses", logits=logits, targets=targets, codes=codes, goals=goals
    )
    weights = goals.abs()
    ours = {
        "new": losses.new_focal_loss(logits, targets, 0.25, 1.5, 3.0),
        "unsmoothed": losses.new_focal_loss(logits, targets, 0.25, 2.0, 3.0, 0.0),
        "legacy": losses.focal_loss_legacy(logits, targets, 0.25, 1.5, 3.0),
        "huber": losses.huber_loss(codes, goals, 0.1),
        "huber_sum": losses.huber_loss(codes, goals, 0.1, weights, size_average=False),
        "smooth_l1": losses.smooth_l1_loss(codes, goals),
        "smooth_l1_sum": losses.smooth_l1_loss(codes, goals, 0.5, weights, size_average=False),
        "l1": losses.smooth_l1_loss(codes, goals, 0.0),
        "box": losses._box_loss(codes, goals, torch.tensor(5.0), 0.1),
        "one_hot": losses.one_hot(torch.tensor([[0, -1], [2, -2]]), 3),
    }
    for name, value in ours.items():
        # the peer's 1 - p_t cancels where p_t is near 1: absolute there
        torch.testing.assert_close(value, theirs[name], rtol=2e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("k", [1, 100, 5000])
def test_post_process(oracle, k):
    cls_outputs, box_outputs = model_maps(2, 2, 3)
    ours = _post_process(cls_outputs, box_outputs, 5, 3, k)
    theirs = oracle.call(
        "post_process", cls_outputs=cls_outputs, box_outputs=box_outputs, num_classes=3, k=k
    )
    for mine, its in zip(ours, theirs["result"], strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("info", [{}, {"img_scale"}, {"img_size"}, {"img_scale", "img_size"}])
def test_batch_detection_and_generate_detections(oracle, info):
    candidates = list(_post_process(*model_maps(3, 2, 3), 5, 3, 400))
    inputs = {key: value if key in info else None for key, value in image_info(2).items()}
    theirs = oracle.call(
        "batch_detection", candidates=candidates, anchors=SMALL, max_det=60, **inputs
    )
    cls, box, indices, classes = candidates
    boxes = Anchors(**SMALL).boxes
    batch = _batch_detection(
        2, cls, box, boxes, indices, classes, *inputs.values(), max_det_per_image=60
    )
    assert_rows_equal(batch, theirs["batch"])
    first = [None if value is None else value[0] for value in inputs.values()]
    rows = generate_detections(cls[0], box[0], boxes, indices[0], classes[0], *first, 60)
    assert_rows_equal(rows, theirs["first"])


def assert_rows_equal(ours: Tensor, theirs: Tensor, pixels: float = 1e-4) -> None:
    assert torch.equal(ours[..., 5], theirs[..., 5])
    torch.testing.assert_close(ours[..., :4], theirs[..., :4], rtol=1e-6, atol=pixels)
    torch.testing.assert_close(ours[..., 4], theirs[..., 4], rtol=0, atol=1e-6)


CONFIG = SMALL | {"num_classes": 3, "max_detection_points": 1000, "num_levels": 5}


@pytest.mark.parametrize("with_info", [True, False])
@pytest.mark.parametrize("seed", [4, 5, 6])
def test_predict_hard(oracle, with_info, seed):
    maps = model_maps(seed, 3, 3)
    info = image_info(3) if with_info else None
    ours = DetBenchPredict(Maps(CONFIG, *maps))(torch.zeros(3, 3, 128, 160), info)
    theirs = oracle.call(
        "predict_maps", config=CONFIG, cls_outputs=maps[0], box_outputs=maps[1], img_info=info
    )
    assert_rows_equal(ours, theirs["rows"])


@pytest.mark.parametrize("seed", [7, 8])
def test_predict_soft_equals_the_peer_given_float64_boxes(oracle, seed):
    """The peer shifts classes apart in float32, which alone moves scores; float64 does not."""
    maps, info = model_maps(seed, 1, 3), image_info(1)
    bench = DetBenchPredict(Maps(CONFIG | {"soft_nms": True}, *maps))
    ours = bench(torch.zeros(1, 3, 128, 160), info)[0]
    cls, box, indices, classes = _post_process(*maps, 5, 3, 1000)
    boxes = decode_box_outputs(box[0], bench.anchors.boxes[indices[0]], output_xyxy=True)
    boxes = clip_boxes_xyxy(boxes, (info["img_size"] / info["img_scale"][:, None])[0])
    settings = {"method_gaussian": True, "iou_threshold": 0.3, "score_threshold": 0.001}
    theirs = oracle.call(
        "suppress",
        boxes=boxes.double(),
        scores=cls[0, :, 0].sigmoid(),
        classes=classes[0],
        settings=settings,
    )
    index = theirs["index"][:100]
    expected = torch.cat(
        [
            boxes[index] * info["img_scale"][0],
            theirs["score"][:100, None].float(),
            classes[0, index, None] + 1.0,
        ],
        dim=1,
    )
    assert_rows_equal(ours, expected)


def test_train_bench_in_eval_mode(oracle):
    maps = model_maps(9, 2, 3)
    boxes, classes = ground_truth("random")
    target = {
        "bbox": torch.stack([boxes, boxes.roll(1, 0)]),
        "cls": (classes % 3 + 1).repeat(2, 1).float(),
        **image_info(2),
    }
    ours = DetBenchTrain(Maps(CONFIG, *maps)).eval()(torch.zeros(2, 3, 128, 160), target)
    theirs = oracle.call(
        "train_maps", config=CONFIG, cls_outputs=maps[0], box_outputs=maps[1], target=target
    )
    assert ours.keys() == theirs.keys()
    assert_rows_equal(ours.pop("detections"), theirs.pop("detections"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("gaussian", [True, False])
def test_soft_nms(oracle, by_class, gaussian):
    generator = torch.Generator().manual_seed(11)
    corner = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 80
    size = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 40 + 5
    boxes = torch.cat([corner, corner + size], dim=1)
    scores = torch.rand(200, generator=generator)
    classes = torch.arange(200) % 3 if by_class else None
    settings = {"method_gaussian": gaussian, "iou_threshold": 0.4, "score_threshold": 0.01}
    theirs = oracle.call("suppress", boxes=boxes, scores=scores, classes=classes, settings=settings)
    if by_class:
        index, score = batched_soft_nms(boxes, scores, classes, **settings)
    else:
        index, score = soft_nms(boxes, scores, **settings)
    assert torch.equal(index, theirs["index"])
    torch.testing.assert_close(score, theirs["score"], rtol=1e-6, atol=1e-7)


METHODS = ("gaussian", "linear", "hard")
SIDE = 512.0


def random_set(seed: int) -> dict[str, Tensor]:
    """Up to 120 float64 boxes in an image, clustered, some of them twice, of up to 6 classes."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    count, objects, classes = integer(0, integer(0, 120)), integer(1, 12), integer(1, 6)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    owner = torch.randint(objects, (count,), generator=generator)
    center = (uniform(objects, 2) * SIDE)[owner] + uniform(count, 2) * 30
    half = (uniform(objects, 2) * 60 + 5)[owner] * (0.8 + 0.4 * uniform(count, 2))
    boxes = torch.cat([center - half, center + half], dim=1).clamp(0, SIDE)
    boxes[: count // 10] = boxes[count - count // 10 :]
    labels = torch.randint(classes, (count,), generator=generator)
    return {"boxes": boxes, "scores": uniform(count), "classes": labels}


def real_sets(data_dir, most: int | None) -> list[dict[str, Tensor]]:
    """Per photo its candidates; the ``most`` best of them."""
    raw = dict(np.load(data_dir / "detections" / "raw_candidates.npz"))
    sets = []
    for image in np.unique(raw["image_id"]):
        rows = np.flatnonzero(raw["image_id"] == image)
        rows = rows[np.argsort(-raw["scores"][rows], kind="stable")[:most]]
        names = {"boxes": "boxes_xyxy", "scores": "scores", "classes": "category_id"}
        values = {name: torch.from_numpy(raw[key][rows]) for name, key in names.items()}
        sets.append(
            {**values, "boxes": values["boxes"].double(), "scores": values["scores"].double()}
        )
    return sets


def assert_suppressed_alike(oracle, method: str, sets: list[dict], options: list[dict]) -> None:
    """The same picks in the same order, but for scores that differ by less than 1e-9 of them.

    In float64, as the peer keeps classes apart by a shift.
    """
    names = {"gaussian": ("sigma",), "linear": ("iou_threshold",), "hard": ("iou_threshold",)}
    questions = []
    for given, chosen in zip(sets, options, strict=True):
        settings = {name: chosen[name] for name in names[method]}
        if method != "hard":
            settings["score_threshold"] = chosen["score_threshold"]
            settings["method_gaussian"] = method == "gaussian"
        questions.append({**given, "settings": settings})
    answers = oracle.call("suppress_each", sets=questions)
    for given, chosen, theirs in zip(sets, options, answers, strict=True):
        if method == "hard":
            chosen = {**chosen, "score_threshold": -math.inf}
        boxes, scores, classes = given.values()
        index, score, count, _ = soft_nms_op(
            boxes[None], scores[None], classes[None], None, len(scores), method=method, **chosen
        )
        index, score = index[0, : int(count)], score[0, : int(count)]
        if not (scores > chosen["score_threshold"]).any():
            assert len(index) == 0 and len(theirs["index"]) <= 1  # the peer's first pick
            continue
        assert torch.equal(index.sort().values, theirs["index"].sort().values)
        its = torch.empty(len(scores), dtype=score.dtype)  # our scores in the peer's order
        its[index] = score
        torch.testing.assert_close(its[theirs["index"]], score, rtol=1e-9, atol=0)
        torch.testing.assert_close(score, theirs["score"].double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_suppression_of_random_candidates(oracle, method):
    draw = random.Random(12)
    options = [
        {
            "sigma": draw.choice([0.1, 0.5, 1.0]),
            "iou_threshold": draw.uniform(0, 0.9),
            "score_threshold": draw.choice([0.0, 0.001, 0.05, 0.5]),
        }
        for _ in range(1000)
    ]
    assert_suppressed_alike(oracle, method, [random_set(i) for i in range(1000)], options)


REAL = {"sigma": 0.5, "iou_threshold": 0.5, "score_threshold": 0.001}


@pytest.mark.parametrize("most", [60, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_suppression_of_real_candidates(oracle, data_dir, method, most):
    sets = real_sets(data_dir, most)
    assert_suppressed_alike(oracle, method, sets, [REAL] * len(sets))


LARGEST_CODE = 0.5


def make_realistic(model: nn.Module, x: Tensor) -> None:
    """Batch norm statistics of noise images; logits and codes on ``x`` as those of a trained model."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        model.train()(torch.randn(2, 3, 256, 256))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        logits, codes = (torch.cat([m.flatten() for m in maps]) for maps in model.eval()(x))
        model.class_net.predict.conv_pw.weight *= 2 / logits.std()
        model.box_net.predict.conv_pw.weight *= LARGEST_CODE / codes.abs().max()


@pytest.mark.parametrize("size", [(256, 256), (192, 320), (512, 512)])
def test_d0_from_image_to_rows_and_losses(oracle, size):
    """In float64, so that rounding does not reorder candidates of nearly equal score."""
    torch.manual_seed(0)
    bench = create_model(
        "tf_efficientdet_d0", "predict", image_size=size, pretrained_backbone=False
    )
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    make_realistic(bench.model, x.float())
    state_dict = {name: value.clone() for name, value in bench.model.state_dict().items()}
    boxes, classes = ground_truth("random")
    target = {
        "bbox": boxes[None],
        "cls": classes[None].float(),
        "img_scale": torch.tensor([1.7]),
        "img_size": torch.tensor([[400.0, 300.0]]),
    }
    theirs = oracle.call(
        "d0_benches", image_size=size, state_dict=state_dict, x=x, target=target, points=500
    )
    train = DetBenchTrain(bench.model)
    bench.max_detection_points = train.max_detection_points = 500
    bench.double().eval()
    train.double().eval()
    # Given float64 codes the peer decodes in float32, ours in float64: four roundings of the largest box apart.
    sides = bench.anchors.boxes[:, 2:] - bench.anchors.boxes[:, :2]
    largest = float(sides.max()) * math.exp(LARGEST_CODE) * 1.7
    pixels = 4 * torch.finfo(torch.float32).eps / 2 * largest
    with torch.no_grad():
        assert_rows_equal(bench(x), theirs["rows"], pixels)
        output = train(x, target)
    assert_rows_equal(output.pop("detections"), theirs["train"].pop("detections"), pixels)
    for name, value in output.items():
        torch.testing.assert_close(
            value.double(), theirs["train"][name].double(), rtol=1e-6, atol=0
        )
