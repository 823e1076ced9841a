"""The suites model, train, loss and detect with the engines of this process, and the check of suppression."""

from __future__ import annotations

import argparse

import pytest
import torch

import effdet
from bench import detect, detect_checks, loss, model, train
from bench.peers import candidates
from bench.peers.replay import Rule, worst_share
from effdet_kernels.ops.soft_nms import reference
from effdet_kernels.ops.soft_nms.spec import SPEC
from effdet_kernels.spec import Case

FIELDS = {"engine", "shape", "status", "median_s", "min_s", "spread", "calls", "peak_bytes"}
FIELDS |= {"error", "error_of", "gb_s", "gflop_s", "of_roofline", "vs_eager", "vs_compile"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small calls on a busy machine wait for threads, not for work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def jobs(suite, *words: str, dtype: tuple[str, ...] = ("fp32",)) -> list:
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    args = parser.parse_args(["--no-peers", *words])
    args.device, args.dtype, args.smoke = "cpu", list(dtype), True
    return list(suite.jobs(args))


@pytest.mark.parametrize(
    ("suite", "words", "dtype"),
    [
        (model, ["--batch", "2"], ("fp32", "bf16")),
        (train, [], ("fp32",)),
        (loss, ["--boxes", "12"], ("fp32", "bf16")),
        (detect, ["--batch", "1"], ("fp32",)),
        (detect, ["--direction", "predict", "--batch", "2"], ("bf16",)),
    ],
    ids=["model", "train", "loss", "detect", "detect bf16"],
)
def test_smoke(suite, words, dtype):
    found = jobs(suite, *words, dtype=dtype)
    assert len({job.key for job in found}) == len(found) > 0
    for job in found:
        rows = list(job.run())
        assert rows[0]["engine"] == "effdet_kernels"
        for row in rows:
            assert row["status"] == "timed", row
            assert row.keys() >= FIELDS and row["median_s"] > 0


def test_model_rows_know_the_floors():
    (row, *_) = jobs(model)[0].run()
    assert 0 < row["floors"]["c2"] < row["floors"]["a"] and row["floor_s"] == row["floors"]["c2"]
    assert row["of_roofline"] == row["floor_s"] / row["median_s"]
    assert row["bytes"] > 0 and row["flops"] > 0


@pytest.mark.parametrize(
    ("suite", "words", "dtype", "named"),
    [
        (model, ["--model", "efficientdet_d99"], ("fp32",), "--model"),
        (model, ["--size", "0"], ("fp32",), "--size"),
        (train, ["--batch", "-1"], ("fp32",), "--batch"),
        (train, [], ("fp16",), "--dtype"),
        (loss, ["--boxes", "0"], ("fp32",), "--boxes"),
        (loss, [], ("fp16",), "--dtype"),
        (detect, ["--batch", "0"], ("fp32",), "--batch"),
        (detect, [], ("bf16",), "--dtype: got bf16, .* --direction predict alone"),
        (detect, ["--direction", "nms", "--direction", "predict"], ("bf16",), "--dtype"),
        (detect, ["--direction", "predict"], ("fp16",), "--dtype"),
    ],
)
def test_errors_name_the_option(suite, words, dtype, named):
    with pytest.raises(ValueError, match=named):
        jobs(suite, *words, dtype=dtype)


def test_directions_may_be_chosen():
    chosen = {job.direction for job in jobs(detect, "--direction", "predict")}
    assert chosen == {"predict"}
    assert {job.direction for job in jobs(detect)} == {"nms", "postprocess", "predict"}
    both = jobs(detect, "--direction", "predict", "--batch", "1", dtype=("fp32", "bf16"))
    assert [(job.direction, job.dtype) for job in both] == [
        ("predict", "fp32"),
        ("predict", "bf16"),
    ]
    assert [job.direction for job in jobs(loss)] == ["labels", "loss"]
    assert [job.direction for job in jobs(loss, "--direction", "labels")] == ["labels"]


def test_missing_data_is_an_error(tmp_path):
    found = jobs(detect, "--data", str(tmp_path))
    photos = next(job for job in found if "photos" in job.case)
    with pytest.raises(ValueError, match=r"--data: there is no .*raw_candidates\.npz"):
        list(photos.run())


# Weights and inputs ----------------------------------------------------------------------------------


def test_weights_are_the_same_again():
    name = "tf_efficientdet_d0"
    first = {key: value.clone() for key, value in model.weights(name).items()}
    model.weights.cache_clear()
    assert all(torch.equal(first[key], value) for key, value in model.weights(name).items())


def test_candidates_lie_on_the_grid_and_scores_differ():
    drawn = candidates.synthetic(2, 300, 90)
    steps = drawn["boxes"] / candidates.GRID
    assert torch.equal(steps, steps.round()) and bool((drawn["boxes"] >= 0).all())
    assert all(len(row.unique()) == 300 for row in drawn["scores"])


def test_head_maps_have_no_equal_logits():
    config = effdet.get_efficientdet_config("tf_efficientdet_d0")
    classes, boxes = candidates.head_maps(config, 1, 64)
    logits = torch.cat([m.flatten() for m in classes])
    assert len(logits.unique()) == len(logits)
    assert [m.shape[1] for m in (classes[0], boxes[0])] == [810, 36]


# The check of suppression ----------------------------------------------------------------------------


def scene(method: str) -> tuple[Rule, dict]:
    """Candidates of which fewer than ``max_det`` outlive the threshold."""
    drawn = candidates.synthetic(1, 400, 3)
    inputs = SPEC.inputs(Case("scene", lambda g: _arguments(drawn, method)), torch.float32)
    return Rule(method == "hard", 0.5, 0.3, 0.001, 400), inputs


def _arguments(drawn: dict, method: str) -> dict:
    return {
        **{name: t.double() if t.is_floating_point() else t for name, t in drawn.items()},
        "num_valid": None,
        "max_det": 400,
        "method": method,
        "sigma": 0.5,
        "iou_threshold": 0.3,
        "score_threshold": 0.001,
        "max_per_class": None,
    }


def share(rule: Rule, inputs: dict, outputs) -> float:
    image = (inputs[name][0] for name in ("boxes", "scores", "classes"))
    return worst_share(rule, *image, outputs[0][0], outputs[1][0])


@pytest.mark.parametrize("method", ["gaussian", "hard"])
def test_the_reference_is_right(method):
    rule, inputs = scene(method)
    assert share(rule, inputs, reference.soft_nms(**inputs)) < 1


@pytest.mark.parametrize("mutant", [m for m in SPEC.mutants if "max_per_class" not in m])
def test_wrong_suppression_is_refused(mutant):
    rule, inputs = scene("gaussian")
    assert share(rule, inputs, SPEC.mutants[mutant](**inputs)) > 1


def test_picks_in_wrong_order_or_missing_are_refused():
    rule, inputs = scene("hard")
    index, score, *_ = reference.soft_nms(**inputs)
    swapped = [torch.cat([t[:, 1:2], t[:, :1], t[:, 2:]], 1) for t in (index, score)]
    assert share(rule, inputs, swapped) == torch.inf
    last = int((index >= 0).sum()) - 1
    cut = index.clone()
    cut[0, last] = -1
    assert share(rule, inputs, [cut, score]) == torch.inf
    twice = index.clone()
    twice[0, last] = twice[0, last - 1]
    assert share(rule, inputs, [twice, score]) == torch.inf


def test_wrong_rows_are_refused():
    config = effdet.get_efficientdet_config("tf_efficientdet_d0")
    config.image_size, config.soft_nms = (64, 64), True
    maps = candidates.head_maps(config, 1, 64)
    engine = detect._own_benches(config, maps, 64, "cpu")[0]
    rows = engine.start().outputs()[0]
    exact = detect_checks.exact_candidates(config, maps, torch.tensor([[64.0, 64.0]]))
    rule = Rule(False, 0.5, 0.5, 0.001, 100, 0.0025)
    assert detect_checks.rows_share(rule, rows, *exact) < 1
    for column, change in ((0, 1.0), (4, 1e-3), (5, 1.0)):
        changed = rows.clone()
        changed[0, 3, column] += change
        assert detect_checks.rows_share(rule, changed, *exact) > 1


@pytest.fixture(scope="module")
def in_bf16():
    """A bench whose network is in bf16, the images, its check, and outputs that pass it."""
    x = model.images(2, 128)
    state = model.weights("tf_efficientdet_d0")
    bench = effdet.DetBenchPredict(model.build("tf_efficientdet_d0", 128, state)).eval()
    bench.soft_nms = True
    check = detect._check_of_maps_and_rows(bench, x, [0, 1])
    bench.model.bfloat16()
    x = x.bfloat16()
    outputs = detect._own_predictor("ours", bench, x, None).start().outputs(check.images)
    assert [t.dtype for t in outputs[:2]] == [torch.float32, torch.bfloat16]
    assert check.error(outputs) < 1
    return bench, x, check, outputs


@pytest.mark.parametrize(
    "options",
    [{"sigma": 0.4}, {"soft_nms": False}, {"class_agnostic": True}, {"score_threshold": 0.7}],
    ids=str,
)
def test_rows_by_another_rule_are_refused_in_bf16(in_bf16, options):
    bench, x, check, (_, *maps) = in_bf16
    with torch.inference_mode():
        assert check.error([bench(x, **options), *maps]) > 1


def test_wrong_rows_and_wrong_networks_are_refused_in_bf16(in_bf16):
    bench, x, check, (rows, *maps) = in_bf16
    for column, change in ((0, 1.0), (4, 5e-3), (5, 1.0)):
        changed = rows.clone()
        changed[1, 3, column] += change
        assert check.error([changed, *maps]) > 1
    assert check.error([rows.flip(0), *maps]) > 1
    assert check.error([rows * torch.nan, *maps]) == torch.inf
    other = effdet.DetBenchPredict(bench.model).eval()
    other.soft_nms, other.max_detection_points = True, 50
    with torch.inference_mode():
        assert check.error([other(x), *maps]) > 1
        bias = bench.model.class_net.predict.conv_pw.bias
        before = bias.clone()
        bias += 0.2  # its rows are what its maps give, and its maps are wrong
        try:
            found = detect._own_predictor("shifted", bench, x, None).start().outputs()
        finally:
            bias.copy_(before)
        assert check.error(found) > 1


# The checks of labels and loss -----------------------------------------------------------------------


def labelled(batch: int) -> tuple:
    config = loss._config("tf_efficientdet_d0", 128)
    return config, loss._labels(config, *train.ground_truth(batch, 128, 12))


def test_wrong_labels_are_refused():
    expected = loss._flat(labelled(2)[1])
    assert loss._strays(expected, expected) == 0
    for place, change in ((0, 1), (5, 1e-3), (-1, 1)):
        found = [t.clone() for t in expected]
        found[place] += change
        assert loss._strays(found, expected) > loss._STRAY
    assert loss._strays([t[:1] for t in expected], expected) == torch.inf


def test_a_repeated_batch_has_the_loss_that_is_expected_and_others_are_refused():
    config, targets = labelled(1)
    maps = loss._head_maps(config, targets, torch.float32)
    shared = dict(zip(("class_targets", "box_targets", "positives"), targets, strict=True))
    call = loss.own_loss(config, "cpu", None, maps=maps, times=3, **shared)
    found = [t.detach()[-1:] for t in loss.per_image(call())]
    assert [len(t) for t in found] == [1] * 11
    check = loss._loss_check(loss._expected(config, maps, targets, 3), "fp32", [-1])
    assert check.error(found) < 1
    for place in (0, 1, 6):  # losses, a class and a box map's gradient
        wrong = [t * 1.001 if n == place else t for n, t in enumerate(found)]
        assert check.error(wrong) > 1
        wrong[place] = wrong[place] * torch.nan
        assert check.error(wrong) == torch.inf
    assert check.error(found[:-1]) == torch.inf


def test_the_memory_of_a_loss_has_its_gradients():
    config, targets = labelled(1)
    maps = loss._head_maps(config, targets, torch.float32)
    shared = dict(zip(("class_targets", "box_targets", "positives"), targets, strict=True))
    engine = loss._own_losses(config, {"maps": maps, "times": 8, **shared}, "cpu", "")[0]
    held, gradients = engine.start().peak_memory(), 8 * sum(m.nbytes for m in maps)
    assert held is None or 0.8 * gradients < held
