"""DetBenchPredict, DetBenchTrain and their parts, on a model that returns given maps."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from effdet import create_model
from effdet.anchors import Anchors, generate_detections
from effdet.bench import (
    DetBenchPredict,
    DetBenchTrain,
    _batch_detection,
    _post_process,
    unwrap_bench,
)
from effdet.config import default_detection_model_configs
from effdet.postprocess import decode_box_outputs
from effdet.soft_nms import pairwise_iou

SIZE = (64, 96)
QUIET = -9.0


class Maps(nn.Module):
    """A model whose maps are parameters: background everywhere until a test writes to them."""

    def __init__(self, num_classes: int = 2, size: tuple[int, int] = SIZE, batch: int = 1) -> None:
        super().__init__()
        self.config = default_detection_model_configs()
        self.config.update({"num_classes": num_classes, "image_size": size})
        self.levels = Anchors.from_config(self.config).level_sizes(size)
        self.cls_maps = nn.ParameterList(
            torch.full((batch, 9 * num_classes, *level), QUIET) for level in self.levels
        )
        self.box_maps = nn.ParameterList(torch.zeros(batch, 36, *level) for level in self.levels)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.cls_maps), list(self.box_maps)

    def see(self, image: int, row: int, column: int, label: int, logit: float, anchor: int = 0):
        """Put a detection at a location of the first level."""
        channel = anchor * self.config.num_classes + label
        self.cls_maps[0].data[image, channel, row, column] = logit


def predict(model: Maps, img_info: dict | None = None, **settings) -> Tensor:
    bench = DetBenchPredict(model)
    for name, value in settings.items():
        setattr(bench, name, value)
    batch = model.cls_maps[0].shape[0]
    with torch.no_grad():
        return bench(torch.zeros(batch, 3, *SIZE), img_info)


def confident(rows: Tensor) -> Tensor:
    return rows[rows[:, 4] > 0.1]


def test_row_format():
    model = Maps()
    model.see(0, row=3, column=5, label=1, logit=2.0)
    rows = predict(model)
    assert rows.shape == (1, 100, 6) and rows.dtype == torch.float32
    score = torch.tensor(2.0).sigmoid().item()
    # location (3, 5) of stride 8 has its centre at y 28, x 44; anchor 0 is 32 x 32
    expected = torch.tensor([28.0, 12.0, 60.0, 44.0, score, 2.0])
    torch.testing.assert_close(confident(rows[0]), expected[None])


def test_rows_are_sorted_and_padded_with_zeros():
    model = Maps()
    rows = predict(model, max_detection_points=7, max_det_per_image=40)[0]
    found = int((rows[:, 5] > 0).sum())
    assert 0 < found <= 7
    assert (rows[found:] == 0).all()
    assert (rows[:, 4].diff() <= 0).all()


def test_images_of_a_batch_do_not_mix():
    model = Maps(batch=3)
    model.see(0, 2, 2, label=0, logit=3.0)
    model.see(2, 5, 9, label=1, logit=1.0)
    together = predict(model)
    for image in range(3):
        alone = Maps()
        for mine, every in zip(alone.cls_maps, model.cls_maps, strict=True):
            mine.data = every.data[image : image + 1]
        torch.testing.assert_close(predict(alone)[0], together[image])
    assert [len(confident(rows)) for rows in together] == [1, 0, 1]


def test_overlapping_boxes_of_a_class_are_suppressed():
    model = Maps()
    model.see(0, 3, 5, label=0, logit=3.0)
    model.see(0, 3, 6, label=0, logit=2.0)  # IoU 0.6
    model.see(0, 3, 7, label=0, logit=1.0)  # IoU 1 / 3 with the first
    model.see(0, 3, 6, label=1, logit=0.0)
    rows = confident(predict(model)[0])
    assert rows[:, 5].tolist() == [1, 1, 2]
    assert rows[:, 0].tolist() == [28, 44, 36]


def test_soft_nms_decays_instead():
    model = Maps()
    model.see(0, 3, 5, label=0, logit=3.0)
    model.see(0, 3, 6, label=0, logit=2.0)
    rows = confident(predict(model, soft_nms=True)[0])
    decay = torch.exp(torch.tensor(-(0.6**2) / 0.5))
    expected = torch.tensor([3.0, 2.0]).sigmoid() * torch.stack([torch.tensor(1.0), decay])
    torch.testing.assert_close(rows[:, 4], expected)


def test_image_info_clips_and_scales():
    model = Maps()
    model.see(0, 0, 11, label=0, logit=2.0)  # 76..108 x -12..20 before clipping
    info = {"img_scale": torch.tensor([2.0]), "img_size": torch.tensor([[180.0, 120.0]])}
    rows = confident(predict(model, info)[0])
    torch.testing.assert_close(rows[:, :4], torch.tensor([[152.0, 0.0, 180.0, 40.0]]))
    unclipped = predict(model, {**info, "img_size": None, "other": "ignored"})
    torch.testing.assert_close(
        confident(unclipped[0])[:, :4], torch.tensor([[152.0, -24.0, 216.0, 40.0]])
    )
    plain = predict(model)
    assert torch.equal(predict(model, dict.fromkeys(info)), plain)
    assert torch.equal(predict(model, {**info, "img_scale": None}), plain)


@pytest.mark.parametrize("missing", ["img_scale", "img_size"])
def test_image_info_without_a_key(missing):
    info = {"img_scale": torch.ones(1), "img_size": torch.ones(1, 2)}
    del info[missing]
    with pytest.raises(KeyError, match=missing):
        predict(Maps(), info)


@pytest.mark.parametrize(
    "info",
    [
        {"img_scale": torch.ones(2), "img_size": torch.ones(1, 2)},
        {"img_scale": torch.ones(1), "img_size": torch.ones(2)},
    ],
)
def test_image_info_of_another_batch_is_refused(info):
    with pytest.raises(ValueError, match="img_s"):
        predict(Maps(), info)


def test_fewer_candidates_than_detection_points():
    model = Maps(num_classes=1)
    for cls in model.cls_maps:
        cls.data = torch.randn_like(cls)
    total = sum(cls.numel() for cls in model.cls_maps)
    assert total < 5000
    every = predict(model, max_detection_points=10**6)
    assert torch.equal(every, predict(model, max_detection_points=total))
    cls, box, indices, classes = _post_process(model.cls_maps, model.box_maps, 5, 1)
    assert cls.shape == (1, total, 1) and box.shape == (1, total, 4)
    assert indices.shape == classes.shape == (1, total)
    assert indices[0].sort().values.tolist() == list(range(total))


def test_non_finite_boxes_are_left_out_and_suppress_nothing():
    model = Maps()
    model.see(0, 3, 5, label=0, logit=2.0)
    model.see(0, 3, 5, label=0, logit=1.9, anchor=1)
    for row, value in enumerate((torch.inf, torch.nan, 200.0)):
        model.see(0, row, 0, label=0, logit=4.0)
        model.box_maps[0].data[0, 2:4, row, 0] = value
    rows = predict(model)[0]
    assert rows.isfinite().all()
    assert confident(rows)[:, 4].tolist() == [pytest.approx(0.8808, abs=1e-4)]


def test_an_exploding_box_is_kept_where_it_is_clipped():
    model = Maps()
    model.see(0, 0, 0, label=0, logit=4.0)
    model.box_maps[0].data[0, 2:4, 0, 0] = 200.0
    info = {"img_scale": torch.ones(1), "img_size": torch.tensor([[96.0, 64.0]])}
    assert confident(predict(model, info)[0])[:, :4].tolist() == [[0, 0, 96, 64]]


@pytest.mark.parametrize("size", [(64, 64), (33, 200), (8, 8)])
def test_any_input_size(size):
    built, called = Maps(size=SIZE), Maps(size=size)
    built.cls_maps, built.box_maps = called.cls_maps, called.box_maps
    for cls, box in zip(built.cls_maps, built.box_maps, strict=True):
        cls.data, box.data = torch.randn_like(cls), torch.randn_like(box)
    x = torch.zeros(1, 3, *size)
    assert torch.equal(DetBenchPredict(built)(x), DetBenchPredict(called)(x))


def test_half_bench_has_exact_anchors():
    model = Maps()
    model.see(0, 3, 5, label=1, logit=2.0)
    exact = predict(model)
    bench = DetBenchPredict(model).half()
    assert bench.anchors.boxes.dtype == torch.float32
    rows = bench(torch.zeros(1, 3, *SIZE, dtype=torch.float16))
    assert rows.dtype == torch.float32
    assert torch.equal(confident(rows[0])[:, :4], confident(exact[0])[:, :4])


class AnySize(Maps):
    """Maps of the size of the images, always the same."""

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        levels = Anchors.from_config(self.config).level_sizes(tuple(x.shape[2:]))
        draw = [torch.randn(len(x), 54, *level, generator=generator) for level in levels]
        return [level[:, :18] for level in draw], [level[:, 18:] for level in draw]


@pytest.mark.parametrize("size", [SIZE, (128, 128), (100, 333), (33, 7)])
def test_anchors_of_a_grid_give_what_stored_ones_give(size, monkeypatch):
    bench = DetBenchPredict(AnySize())
    x = torch.zeros(2, 3, *size)
    info = {"img_scale": torch.ones(2), "img_size": torch.tensor([[size[1] - 5.0, size[0]]] * 2)}
    computed = bench(x), bench(x, info)
    assert bench.anchors._grids
    monkeypatch.setattr(bench.anchors, "grid", lambda size: None)
    for rows, stored in zip(computed, (bench(x), bench(x, info)), strict=True):
        torch.testing.assert_close(rows, stored, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_replaced_anchors_are_honoured(used, in_place):
    model = Maps()
    model.see(0, 3, 5, label=1, logit=2.0)
    exact = confident(predict(model)[0])
    bench = DetBenchPredict(model)
    x = torch.zeros(1, 3, *SIZE)
    if used:
        bench(x)
    if in_place:
        bench.anchors.boxes += torch.tensor([3.0, 1.0, 3.0, 1.0])  # y, x, y, x
    else:
        state = bench.state_dict()
        state["anchors.boxes"] = state["anchors.boxes"] + torch.tensor([3.0, 1.0, 3.0, 1.0])
        bench.load_state_dict(state)
    moved = exact.clone()
    moved[:, :4] += torch.tensor([1.0, 3.0, 1.0, 3.0])  # x, y, x, y
    for each in (bench, copy.deepcopy(bench), pickle.loads(pickle.dumps(bench))):
        torch.testing.assert_close(confident(each(x)[0]), moved)
    bench.load_state_dict(DetBenchPredict(model).state_dict())
    assert torch.equal(confident(bench(x)[0]), exact)


def test_parts_give_what_the_bench_gives():
    model = Maps(batch=2, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    for cls, box in zip(model.cls_maps, model.box_maps, strict=True):
        cls.data = torch.randn(cls.shape, generator=generator)
        box.data = torch.randn(box.shape, generator=generator)
    info = {
        "img_scale": torch.tensor([1.5, 0.5]),
        "img_size": torch.tensor([[100.0, 90.0], [40.0, 30.0]]),
    }
    bench = DetBenchPredict(model)
    whole = bench(torch.zeros(2, 3, *SIZE), info)
    cls, box, indices, classes = _post_process(model.cls_maps, model.box_maps, 5, 3)
    anchors = bench.anchors.boxes
    rows = _batch_detection(2, cls, box, anchors, indices, classes, *info.values())
    torch.testing.assert_close(rows, whole)
    last = generate_detections(
        cls[1],
        box[1],
        anchors,
        indices[1],
        classes[1],
        info["img_scale"][1],
        info["img_size"][1],
        max_det_per_image=20,
    )
    torch.testing.assert_close(last, whole[1, :20])


def crowd() -> Maps:
    """Boxes that overlap, of three classes, with scores on both sides of 1 / 2."""
    model = Maps(num_classes=3)
    generator = torch.Generator().manual_seed(0)
    for cls, box in zip(model.cls_maps, model.box_maps, strict=True):
        cls.data = torch.randn(cls.shape, generator=generator) * 1.5
        box.data = torch.randn(box.shape, generator=generator) * 0.3
    return model


def suppressed(
    model: Maps,
    points: int,
    max_det=100,
    score_threshold=None,
    iou_threshold=0.5,
    sigma=0.5,
    soft_nms=False,
    class_agnostic=False,
    max_per_class=10**6,
) -> list[list[float]]:
    """The rows of an image, a pick at a time."""
    cls, box, indices, classes = (t[0] for t in _post_process(*model(None), 5, 3, points))
    anchors = Anchors.from_config(model.config).boxes[indices]
    boxes, scores = decode_box_outputs(box, anchors, output_xyxy=True), cls[:, 0].sigmoid()
    if score_threshold is None:
        score_threshold = 0.001 if soft_nms else 0.0
    rows: list[list[float]] = []
    while len(rows) < max_det:
        best = int(scores.argmax())
        if scores[best] <= score_threshold:
            break
        label = classes[best]
        rows.append([*boxes[best].tolist(), scores[best].item(), label.item() + 1])
        iou = pairwise_iou(boxes[best, None], boxes)[0]
        factor = (-(iou**2) / sigma).exp() if soft_nms else (iou <= iou_threshold).float()
        alike = torch.ones_like(label == classes) if class_agnostic else label == classes
        scores = torch.where(alike, scores * factor, scores)
        scores[best] = 0
        if sum(row[5] == label + 1 for row in rows) == max_per_class:
            scores[label == classes] = 0
    return rows


OPTIONS = [
    {"max_det": 7},
    {"max_det": 170},
    {"score_threshold": 0.97},
    {"iou_threshold": 0.2},
    {"soft_nms": True},
    {"soft_nms": True, "sigma": 0.1},
    {"soft_nms": True, "score_threshold": 0.9},
    {"class_agnostic": True},
    {"max_per_class": 5},
    {"soft_nms": True, "max_per_class": 20},
]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_options_of_a_call_and_of_the_bench(options):
    model, x = crowd(), torch.zeros(1, 3, *SIZE)
    bench = DetBenchPredict(model)
    bench.max_detection_points = 400
    expected = torch.tensor(suppressed(model, 400, **options))
    plain = bench(x)
    rows = bench(x, **options)[0]
    assert len(rows) == options.get("max_det", 100)
    torch.testing.assert_close(rows[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    assert (rows[len(expected) :] == 0).all()
    for name in options:  # each counts
        others = {k: v for k, v in options.items() if k != name}
        assert suppressed(model, 400, **others) != expected.tolist()
    assert torch.equal(bench(x), plain)  # of that call only
    train = DetBenchTrain(model).eval()
    train.max_detection_points = 400
    for name, value in options.items():
        for either in (bench, train):
            setattr(either, "max_det_per_image" if name == "max_det" else name, value)
    assert torch.equal(bench(x)[0], rows)
    assert torch.equal(train(x, TARGET)["detections"][0], rows)
    defaults = {"max_det": 100, "soft_nms": False, "class_agnostic": False}
    numbers = {"score_threshold": 0.0, "iou_threshold": 0.5, "sigma": 0.5, "max_per_class": 1000}
    if "class_agnostic" not in options:
        assert torch.equal(bench(x, **defaults, **numbers), plain)


@torch.no_grad()
def test_more_detections_than_candidates():
    model = crowd()
    rows = predict(model, max_detection_points=30, max_det_per_image=200)[0]
    expected = torch.tensor(suppressed(model, 30, max_det=200))
    assert rows.shape == (200, 6) and len(expected) <= 30
    torch.testing.assert_close(rows[: len(expected)], expected)
    assert (rows[len(expected) :] == 0).all()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_det": -1}, ValueError, "max_det: got -1, takes an integer >= 0"),
        ({"max_det": 2.5}, TypeError, "max_det: got 2.5, takes an integer >= 0"),
        ({"score_threshold": 30}, ValueError, r"score_threshold: got 30, takes .* in \[0, 1\]"),
        ({"score_threshold": float("nan")}, ValueError, "score_threshold: got nan"),
        ({"iou_threshold": "0.5"}, TypeError, "iou_threshold: got '0.5', takes a number"),
        ({"iou_threshold": 1.5}, ValueError, "iou_threshold: got 1.5"),
        ({"sigma": 0}, ValueError, "sigma: got 0, takes a number above 0"),
        ({"max_per_class": 0}, ValueError, "max_per_class: got 0, takes an integer >= 1"),
        ({"max_per_class": True}, TypeError, "max_per_class: got True"),
        (
            {"max_per_class": 2, "class_agnostic": True},
            ValueError,
            "max_per_class: got 2 with class_agnostic, takes None",
        ),
    ],
)
def test_bad_options_are_named(options, error, says):
    bench, x = DetBenchPredict(Maps()), torch.zeros(1, 3, *SIZE)
    with pytest.raises(error, match=says):
        bench(x, **options)
    for name, value in options.items():
        setattr(bench, "max_det_per_image" if name == "max_det" else name, value)
    with pytest.raises(error, match=says):
        bench(x)


def test_scales_in_place_of_img_info_are_named():
    """As `DetBenchEval` of old took them."""
    with pytest.raises(TypeError, match=r"img_info must be a dictionary .* got Tensor"):
        DetBenchPredict(Maps())(torch.zeros(1, 3, *SIZE), torch.ones(1))


def test_candidates_of_equal_logits_are_in_order():
    model = Maps(num_classes=3)
    model.see(0, 3, 5, label=1, logit=QUIET + 1, anchor=2)
    _, _, indices, classes = _post_process(model.cls_maps, model.box_maps, 5, 3, 50)
    best = (3 * 12 + 5) * 9 + 2
    assert (indices[0] * 3 + classes[0]).tolist() == [best * 3 + 1, *range(49)]


def test_candidates_are_differentiable_and_their_codes_are_not_decoded():
    model = Maps(num_classes=3)
    model.see(0, 3, 5, label=1, logit=QUIET + 1)
    model.box_maps[0].data[0, :4, 3, 5] = torch.tensor([1.0, 2.0, 300.0, 4.0])
    cls, box, _, _ = _post_process(model.cls_maps, model.box_maps, 5, 3, 1)
    assert cls.tolist() == [[[QUIET + 1]]] and box.tolist() == [[[1, 2, 300, 4]]]
    (cls.sum() + (box * torch.arange(4)).sum()).backward()
    for maps, at, value in (
        (model.cls_maps, slice(1, 2), [1]),
        (model.box_maps, slice(0, 4), [0, 1, 2, 3]),
    ):
        assert maps[0].grad[0, at, 3, 5].tolist() == value
        assert sum(level.grad.abs().sum() for level in maps) == sum(value)


def test_generate_detections_without_candidates():
    none = torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(0).long(), torch.zeros(0).long()
    rows = generate_detections(torch.zeros(0, 1), *none, None, None, max_det_per_image=5)
    assert rows.tolist() == [[0.0] * 6] * 5


def test_batch_detection_checks_the_batch_size():
    candidates = _post_process(Maps().cls_maps, Maps().box_maps, 5, 2, 10)
    with pytest.raises(ValueError, match="batch_size=3"):
        _batch_detection(3, *candidates[:2], torch.zeros(9, 4), *candidates[2:])


TARGET = {
    "bbox": torch.tensor([[[8.0, 8, 40, 40], [20, 30, 60, 90]]]),
    "cls": torch.tensor([[1.0, 2.0]]),
    "img_scale": None,
    "img_size": None,
}


def test_train_bench_in_train_mode():
    model = Maps()
    bench = DetBenchTrain(model)
    output = bench(torch.zeros(1, 3, *SIZE), {key: TARGET[key] for key in ("bbox", "cls")})
    assert set(output) == {"loss", "class_loss", "box_loss"}
    assert all(value.ndim == 0 and value.dtype == torch.float32 for value in output.values())
    torch.testing.assert_close(output["loss"], output["class_loss"] + 50 * output["box_loss"])
    output["loss"].backward()
    assert model.cls_maps[0].grad.abs().sum() > 0 and model.box_maps[0].grad.abs().sum() > 0


def test_train_bench_in_eval_mode_detects_too():
    model = Maps()
    model.see(0, 3, 5, label=1, logit=2.0)
    output = DetBenchTrain(model).eval()(torch.zeros(1, 3, *SIZE), TARGET)
    assert torch.equal(output["detections"], predict(model))


def test_train_bench_with_labelled_targets():
    model = Maps()
    x = torch.zeros(1, 3, *SIZE)
    labelled = DetBenchTrain(model)
    expected = labelled(x, TARGET)
    cls, box, positives = labelled.anchor_labeler.batch_label_anchors(TARGET["bbox"], TARGET["cls"])
    target = {"label_num_positives": positives}
    target |= {f"label_cls_{i}": level for i, level in enumerate(cls)}
    target |= {f"label_bbox_{i}": level for i, level in enumerate(box)}
    bench = DetBenchTrain(model, create_labeler=False)
    assert bench.anchor_labeler is None
    assert bench(x, target) == expected
    del target["label_bbox_3"]
    with pytest.raises(KeyError, match="label_bbox_3"):
        bench(x, target)


@pytest.mark.parametrize("change", ["list", "half", "integer classes"])
def test_train_bench_takes_other_forms_of_ground_truth(change):
    bench = DetBenchTrain(Maps())
    x = torch.zeros(1, 3, *SIZE)
    expected = bench(x, TARGET)
    target = dict(TARGET)
    if change == "list":
        target |= {"bbox": [TARGET["bbox"][0]], "cls": [TARGET["cls"][0]]}
    elif change == "half":
        target["bbox"] = TARGET["bbox"].half()
    else:
        target["cls"] = TARGET["cls"].long()
    assert bench(x, target) == expected


def test_train_bench_without_any_box():
    bench = DetBenchTrain(Maps(batch=2))
    target = {"bbox": [torch.zeros(0, 4)] * 2, "cls": [torch.zeros(0)] * 2}
    output = bench(torch.zeros(2, 3, *SIZE), target)
    assert output["loss"].isfinite() and output["box_loss"] == 0


@pytest.mark.parametrize("missing", ["bbox", "cls", "img_scale", "img_size"])
def test_train_target_without_a_key(missing):
    target = {key: value for key, value in TARGET.items() if key != missing}
    with pytest.raises(KeyError, match=missing):
        DetBenchTrain(Maps()).eval()(torch.zeros(1, 3, *SIZE), target)


def test_train_target_as_a_list_of_dictionaries_is_refused():
    with pytest.raises(TypeError, match=r"one dictionary.*list"):
        DetBenchTrain(Maps())(torch.zeros(1, 3, *SIZE), [TARGET])


def test_train_bench_at_another_input_size():
    size = (96, 64)
    built, called = Maps(size=SIZE), Maps(size=size)
    expected = DetBenchTrain(called)(torch.zeros(1, 3, *size), TARGET)
    built.cls_maps, built.box_maps = called.cls_maps, called.box_maps
    assert DetBenchTrain(built)(torch.zeros(1, 3, *size), TARGET) == expected


def test_benches_follow_a_changed_head():
    model = Maps(num_classes=2)
    train, predictor = DetBenchTrain(model), DetBenchPredict(model)
    other = Maps(num_classes=4)
    other.config.aspect_ratios = [1.0, 2.0, 0.5]
    model.config.update({"num_classes": 4, "aspect_ratios": [1.0, 2.0, 0.5]})
    model.cls_maps, model.box_maps = other.cls_maps, other.box_maps
    x = torch.zeros(1, 3, *SIZE)
    target = {**TARGET, "cls": torch.tensor([[4.0, 3.0]])}
    assert train(x, target) == DetBenchTrain(other)(x, target)
    assert torch.equal(predictor(x), DetBenchPredict(other)(x))
    assert (train.num_classes, train.anchor_labeler.num_classes) == (4, 4)


def test_settings_come_from_the_config():
    model = Maps()
    model.config.update({"max_det_per_image": 7, "max_detection_points": 50, "soft_nms": True})
    bench = DetBenchPredict(model)
    assert (bench.max_det_per_image, bench.max_detection_points, bench.soft_nms) == (7, 50, True)
    assert (bench.num_classes, bench.num_levels) == (2, 5)
    assert bench.config is model.config
    assert bench(torch.zeros(1, 3, *SIZE)).shape == (1, 7, 6)


def test_state_dict_keys():
    model = Maps()
    expected = {f"model.{key}" for key in model.state_dict()} | {"anchors.boxes"}
    assert set(DetBenchPredict(model).state_dict()) == expected
    assert set(DetBenchTrain(model).state_dict()) == expected


def test_unwrap_bench():
    model = Maps()
    wrapped = nn.DataParallel(DetBenchTrain(nn.DataParallel(model)))
    assert unwrap_bench(wrapped) is model
    assert unwrap_bench(model) is model
    assert DetBenchPredict(nn.DataParallel(model)).config is model.config


def test_a_model_without_config_is_refused():
    with pytest.raises(TypeError, match=r"\.config.*Linear"):
        DetBenchPredict(nn.Linear(1, 1))


def test_copies_predict_the_same():
    model = Maps()
    model.see(0, 3, 5, label=1, logit=2.0)
    bench = DetBenchPredict(model)
    x = torch.zeros(1, 3, *SIZE)
    for copied in (copy.deepcopy(bench), pickle.loads(pickle.dumps(bench))):
        assert torch.equal(copied(x), bench(x))


def test_scores_and_boxes_are_differentiable():
    model = Maps()
    model.see(0, 3, 5, label=1, logit=2.0)
    DetBenchPredict(model)(torch.zeros(1, 3, *SIZE))[0, 0, :5].sum().backward()
    p = torch.tensor(2.0).sigmoid()
    torch.testing.assert_close(model.cls_maps[0].grad[0, 1, 3, 5], p * (1 - p))
    assert model.box_maps[0].grad[0, :2, 3, 5].tolist() == [64, 64]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_bench_can_be_traced_and_exported():
    model = Maps()
    model.see(0, 3, 5, label=1, logit=2.0)
    bench, x = DetBenchPredict(model).eval(), torch.zeros(1, 3, *SIZE)
    with torch.no_grad():
        expected = bench(x)
        assert torch.equal(torch.jit.trace(bench, x, check_trace=False)(x), expected)
        assert torch.equal(torch.export.export(bench, (x,)).module()(x), expected)


def test_benches_follow_reset_head_of_a_real_model():
    bench = create_model(
        "efficientdet_nano", "train", pretrained_backbone=False, bench_labeler=True, num_classes=2
    )
    x = torch.zeros(1, 3, 128, 128)
    bench.eval()(x, TARGET)
    bench.model.reset_head(num_classes=5, aspect_ratios=[1.0, 2.0])
    output = bench.eval()(x, {**TARGET, "cls": torch.tensor([[5.0, 4.0]])})
    assert output["loss"].isfinite() and output["detections"].shape == (1, 100, 6)
    assert (bench.num_classes, bench.anchors.get_anchors_per_location()) == (5, 6)


def test_traced_bench_survives_saving(tmp_path):
    """torch.jit.trace records the registered ops; a process that imports effdet can load the file."""
    bench = create_model("efficientdet_nano", "predict", pretrained_backbone=False).eval()
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants, and trace is deprecated
        traced = torch.jit.trace(bench, images, check_trace=False)
        traced.save(str(tmp_path / "bench.pt"))
        loaded = torch.jit.load(str(tmp_path / "bench.pt"))
        assert torch.equal(loaded(images), bench(images))
