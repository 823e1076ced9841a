"""BoxList, Match, ArgMaxMatcher, FasterRcnnBoxCoder, IouSimilarity, TargetAssigner."""

from __future__ import annotations

import pytest
import torch

from effdet.object_detection import (
    ArgMaxMatcher,
    BoxList,
    FasterRcnnBoxCoder,
    IouSimilarity,
    Match,
    TargetAssigner,
)
from effdet.object_detection.argmax_matcher import one_hot_bool
from effdet.object_detection.box_coder import batch_decode

ANCHORS = torch.tensor([[0.0, 0, 10, 20], [5, 5, 16, 17], [90, 90, 99, 99], [0, 0, 10, 21]])
TRUTH = torch.tensor([[1.0, 1, 10, 20], [5, 5, 16, 16]])


def test_box_list_fields():
    boxes = BoxList(ANCHORS)
    boxes.add_field("score", torch.arange(4))
    assert boxes.num_boxes() == 4
    assert boxes.get_all_fields() == ["boxes", "score"]
    assert boxes.get_extra_fields() == ["score"]
    assert boxes.has_field("score") and not boxes.has_field("label")
    boxes.set_field("score", torch.ones(4))
    assert boxes.get_field("score").sum() == 4
    assert set(boxes.as_tensor_dict()) == {"boxes", "score"}
    assert set(boxes.as_tensor_dict(["score"])) == {"score"}
    assert boxes.device() == torch.device("cpu")
    for missing in (boxes.get_field, lambda name: boxes.set_field(name, torch.ones(4))):
        with pytest.raises(ValueError, match=r"'label'.*boxes.*score"):
            missing("label")


def test_box_list_geometry():
    boxes = BoxList(torch.tensor([[0.0, 2, 10, 22]]))
    y, x, height, width = boxes.get_center_coordinates_and_sizes()
    assert (y.item(), x.item(), height.item(), width.item()) == (5, 12, 10, 20)
    boxes.transpose_coordinates()
    assert boxes.boxes().tolist() == [[2, 0, 22, 10]]
    boxes.set_boxes(ANCHORS)
    assert boxes.num_boxes() == 4


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(3, 5), torch.ones(2, 3, 4)])
def test_box_list_refuses_other_shapes(bad):
    with pytest.raises(ValueError, match=r"\[N, 4\]"):
        BoxList(bad)


def test_box_list_refuses_other_dtypes():
    with pytest.raises(ValueError, match="float16"):
        BoxList(ANCHORS.half())


def test_match_views():
    match = Match(torch.tensor([3, 1, -1, 0, -2, 5]))
    assert match.matched_column_indices().tolist() == [0, 1, 3, 5]
    assert match.matched_row_indices().tolist() == [3, 1, 0, 5]
    assert match.unmatched_column_indices().tolist() == [2]
    assert match.ignored_column_indices().tolist() == [4]
    assert match.unmatched_or_ignored_column_indices().tolist() == [2, 4]
    counts = match.num_matched_columns(), match.num_unmatched_columns(), match.num_ignored_columns()
    assert counts == (4, 1, 1)
    indicators = torch.stack(
        [
            match.matched_column_indicator(),
            match.unmatched_column_indicator(),
            match.ignored_column_indicator(),
        ]
    )
    assert (indicators.sum(0) == 1).all()


def test_match_gathers_rows_and_fillers():
    match = Match(torch.tensor([1, -1, -2, 0]))
    assert match.gather_based_on_match(torch.tensor([7, 8]), -1, -2).tolist() == [8, -1, -2, 7]
    rows = torch.tensor([[1.0, 2], [3, 4]])
    gathered = match.gather_based_on_match(rows, torch.zeros(2), torch.full((1, 2), 9.0))
    assert gathered.tolist() == [[3, 4], [0, 0], [9, 9], [1, 2]]


def test_match_refuses_other_results():
    with pytest.raises(ValueError, match="rank 1"):
        Match(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="float32"):
        Match(torch.zeros(2))


SIMILARITY = torch.tensor(
    [[0.6, 0.2, 0.3, 0.0, 0.55], [0.6, 0.1, 0.4, 0.9, 0.55], [0.1, 0.05, 0.45, 0.2, 0.1]]
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.5,), [0, -1, -1, 1, 0]),
        ((0.5, 0.3), [0, -1, -2, 1, 0]),
        ((0.5, 0.3, False), [0, -2, -1, 1, 0]),
        ((0.5, 0.5, True, True), [0, -1, 2, 1, 0]),
    ],
)
def test_argmax_matcher(arguments, expected):
    matcher = ArgMaxMatcher(*arguments)
    assert matcher.match(SIMILARITY).match_results.tolist() == expected
    assert matcher.match(SIMILARITY[:0]).match_results.tolist() == [-1] * 5
    assert matcher.match(SIMILARITY[:, :0]).match_results.tolist() == []


def test_forced_match_goes_to_the_first_of_equal_claims():
    matcher = ArgMaxMatcher(0.5, force_match_for_each_row=True)
    assert matcher.match(torch.zeros(3, 4)).match_results.tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("arguments", [(0.5, 0.6), (0.5, 0.5, False), (None, 0.5)])
def test_argmax_matcher_refuses_contradictions(arguments):
    with pytest.raises(ValueError, match=r"matched_threshold|negatives_lower"):
        ArgMaxMatcher(*arguments)


def test_one_hot_bool():
    assert one_hot_bool(torch.tensor([0, 2]), 3).tolist() == [
        [True, False, False],
        [False, False, True],
    ]


@pytest.mark.parametrize("factors", [None, [10.0, 10.0, 5.0, 5.0]])
def test_decode_undoes_encode(factors):
    coder = FasterRcnnBoxCoder(factors)
    boxes = ANCHORS + torch.tensor([1.0, 2, 3, 5])
    codes = coder.encode(BoxList(boxes), BoxList(ANCHORS))
    torch.testing.assert_close(coder.decode(codes, BoxList(ANCHORS)).boxes(), boxes)
    batch = batch_decode(torch.stack([codes, 0 * codes]), coder, BoxList(ANCHORS))
    torch.testing.assert_close(batch, torch.stack([boxes, ANCHORS]))
    assert coder.code_size() == 4


def test_coder_and_batch_decode_refuse_bad_arguments():
    with pytest.raises(ValueError, match="scale_factors"):
        FasterRcnnBoxCoder([1.0, 2.0])
    with pytest.raises(ValueError, match="encoded_boxes"):
        batch_decode(torch.zeros(1, 3, 4), FasterRcnnBoxCoder(), BoxList(ANCHORS))


def test_empty_boxes_have_finite_codes():
    empty = BoxList(torch.tensor([[5.0, 5, 5, 5]]))
    codes = FasterRcnnBoxCoder().encode(empty, BoxList(ANCHORS[:1]))
    assert codes.isfinite().all()


def test_iou():
    iou = IouSimilarity().compare(BoxList(ANCHORS), BoxList(TRUTH))
    assert iou[0, 0] == pytest.approx(171 / 200)
    assert (iou[2] == 0).all()
    empty = BoxList(torch.zeros(1, 4))
    assert IouSimilarity().compare(empty, empty).item() == 0


def test_target_assigner():
    assigner = TargetAssigner(
        IouSimilarity(),
        ArgMaxMatcher(0.5, force_match_for_each_row=True),
        FasterRcnnBoxCoder(),
        negative_class_weight=0.3,
        unmatched_cls_target=-1.0,
    )
    labels = torch.tensor([3, 4])
    cls, box, match = assigner.assign(BoxList(ANCHORS), BoxList(TRUTH), labels)
    assert match.match_results.tolist() == [0, 1, -1, 0]
    assert cls.tolist() == [3, 4, -1, 3]
    decoded = assigner.box_coder().decode(box, BoxList(ANCHORS)).boxes()
    torch.testing.assert_close(decoded[[0, 1, 3]], TRUTH[[0, 1, 0]])
    assert (box[2] == 0).all()
    weights = torch.tensor([0.5, 0.7])
    expected = [0.5, 0.7, 0.3, 0.5]
    assert assigner._create_classification_weights(match, weights).tolist() == pytest.approx(
        expected
    )
    expected[2] = 0
    assert assigner._create_regression_weights(match, weights).tolist() == pytest.approx(expected)


def test_target_assigner_without_truth_or_labels():
    assigner = TargetAssigner(IouSimilarity(), ArgMaxMatcher(0.5), FasterRcnnBoxCoder())
    cls, box, match = assigner.assign(BoxList(ANCHORS), BoxList(TRUTH[:0]), torch.zeros(0))
    assert (cls == 0).all() and (box == 0).all() and match.num_matched_columns() == 0
    cls, _, _ = assigner.assign(BoxList(ANCHORS), BoxList(TRUTH))
    assert cls.tolist() == [1, 1, 0, 1]


def test_target_assigner_refuses_bad_arguments():
    assigner = TargetAssigner(IouSimilarity(), ArgMaxMatcher(0.5), FasterRcnnBoxCoder())
    with pytest.raises(ValueError, match="anchors must be a BoxList"):
        assigner.assign(ANCHORS, BoxList(TRUTH))
    with pytest.raises(ValueError, match="groundtruth_labels must have 2 rows"):
        assigner.assign(BoxList(ANCHORS), BoxList(TRUTH), torch.ones(3))
