"""Losses: values by hand, extreme logits, ignored anchors, the settings of a config."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from effdet import loss as losses
from effdet.config import default_detection_model_configs

SETTINGS = {"num_classes": 3, "alpha": 0.25, "gamma": 1.5, "delta": 0.1, "box_loss_weight": 50.0}


def batch(seed: int = 0) -> dict:
    """Two levels, two images, two anchors per location."""
    torch.manual_seed(seed)
    sizes = [(3, 4), (2, 2)]
    cls_targets = [torch.randint(-1, 3, (2, h, w, 2)) for h, w in sizes]
    positive = [(target >= 0).repeat_interleave(4, dim=-1) for target in cls_targets]
    return {
        "cls_outputs": [torch.randn(2, 6, h, w) for h, w in sizes],
        "box_outputs": [torch.randn(2, 8, h, w) for h, w in sizes],
        "cls_targets": cls_targets,
        "box_targets": [
            torch.randn(2, h, w, 8) * p for (h, w), p in zip(sizes, positive, strict=True)
        ],
        "num_positives": torch.tensor([5.0, 7.0]),
    }


def by_elements(inputs: dict, focal) -> tuple[torch.Tensor, torch.Tensor]:
    """Class and box loss from the elementwise functions, level by level."""
    normalizer = inputs["num_positives"].sum() + 1
    cls_loss = box_loss = torch.zeros(())
    for cls, box, label, code in zip(*list(inputs.values())[:4], strict=True):
        target = losses.one_hot(label, 3).flatten(-2)
        seen = (label != -2).repeat_interleave(3, dim=-1)
        loss = focal(cls.permute(0, 2, 3, 1), target, 0.25, 1.5, normalizer)
        cls_loss = cls_loss + (loss * seen).sum()
        box_loss = box_loss + losses._box_loss(box.permute(0, 2, 3, 1), code, normalizer, 0.1)
    return cls_loss, box_loss


@pytest.mark.parametrize(
    ("settings", "focal"),
    [
        ({}, lambda *a: losses.new_focal_loss(*a, label_smoothing=0.0)),
        ({"label_smoothing": 0.2}, lambda *a: losses.new_focal_loss(*a, label_smoothing=0.2)),
        ({"legacy_focal": True}, losses.focal_loss_legacy),
    ],
)
def test_batch_loss_is_the_sum_of_its_elements(settings, focal):
    inputs = batch()
    inputs["cls_targets"][0][0, 0] = -2
    total, cls_loss, box_loss = losses.loss_fn(**inputs, **SETTINGS, **settings)
    expected_cls, expected_box = by_elements(inputs, focal)
    torch.testing.assert_close(cls_loss, expected_cls)
    torch.testing.assert_close(box_loss, expected_box)
    torch.testing.assert_close(total, cls_loss + 50 * box_loss)
    assert total.dtype == torch.float32 and total.ndim == 0


def test_ignored_anchors_do_not_count():
    inputs = batch()
    inputs["cls_targets"][1][:] = -2
    cls_outputs = [output.requires_grad_() for output in inputs["cls_outputs"]]
    losses.loss_fn(**inputs, **SETTINGS)[1].backward()
    assert cls_outputs[0].grad.abs().min() > 0
    assert (cls_outputs[1].grad == 0).all()


def test_box_elements_with_target_zero_are_not_trained():
    inputs = batch()
    inputs["box_targets"][0][..., 0] = 0
    box_outputs = [output.requires_grad_() for output in inputs["box_outputs"]]
    losses.loss_fn(**inputs, **SETTINGS)[2].backward()
    assert (box_outputs[0].grad[:, 0] == 0).all()
    assert (box_outputs[0].grad[:, 1] != 0).any()


def test_without_positives_the_background_is_divided_by_one():
    inputs = batch()
    for target, code in zip(inputs["cls_targets"], inputs["box_targets"], strict=True):
        target[:], code[:] = -1, 0
    inputs["num_positives"] = torch.zeros(2)
    _, cls_loss, box_loss = losses.loss_fn(**inputs, **SETTINGS)
    logits = torch.cat([output.flatten() for output in inputs["cls_outputs"]])
    expected = 0.75 * logits.sigmoid() ** 1.5 * F.softplus(logits)
    torch.testing.assert_close(cls_loss, expected.sum())
    assert box_loss == 0


def test_half_precision_outputs_give_a_float32_loss():
    inputs = batch()
    exact = losses.loss_fn(**inputs, **SETTINGS)[0]
    for key in ("cls_outputs", "box_outputs"):
        inputs[key] = [output.bfloat16() for output in inputs[key]]
    rounded = losses.loss_fn(**inputs, **SETTINGS)[0]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize("focal", [losses.focal_loss_legacy, losses.new_focal_loss])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_focal_losses_are_finite_for_extreme_logits(focal, gamma, target):
    logits = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], requires_grad=True)
    loss = focal(logits, torch.full_like(logits, target), 0.25, gamma, 1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_legacy_focal_of_a_badly_missed_positive():
    logit, target = torch.tensor([-100.0]), torch.ones(1)
    assert losses.focal_loss_legacy(logit, target, 0.25, 1.5, 1.0).item() == pytest.approx(25)


def test_focal_forms_agree_without_smoothing():
    torch.manual_seed(0)
    logits = 3 * torch.randn(40, 3, dtype=torch.float64)
    targets = losses.one_hot(torch.arange(40) % 4 - 1, 3).double()
    new = losses.new_focal_loss(logits, targets, 0.25, 1.5, 2.0, label_smoothing=0.0)
    torch.testing.assert_close(new, losses.focal_loss_legacy(logits, targets, 0.25, 1.5, 2.0))
    p = logits.sigmoid()
    p_t = torch.where(targets == 1, p, 1 - p)
    by_hand = torch.where(targets == 1, 0.25, 0.75) * (1 - p_t) ** 1.5 * -p_t.log() / 2
    torch.testing.assert_close(new, by_hand)


def test_focal_gradients():
    logits = torch.linspace(-5, 5, 12, dtype=torch.float64, requires_grad=True)
    targets = (torch.arange(12) % 3 == 0).double()
    for focal in (losses.focal_loss_legacy, losses.new_focal_loss):
        assert torch.autograd.gradcheck(lambda x, f=focal: f(x, targets, 0.25, 1.5, 3.0), logits)


def test_huber_and_smooth_l1_by_hand():
    value, target = torch.tensor([0.05, 1.0]), torch.zeros(2)
    elements = torch.tensor([0.5 * 0.05**2, 0.1 * (1.0 - 0.05)])
    torch.testing.assert_close(losses.huber_loss(value, target, 0.1), elements.mean())
    weights = torch.tensor([3.0, 0.5])
    torch.testing.assert_close(
        losses.huber_loss(value, target, 0.1, weights, size_average=False),
        (elements * weights).sum(),
    )
    torch.testing.assert_close(
        losses.smooth_l1_loss(value, target, 0.1, size_average=False), elements.sum() / 0.1
    )
    torch.testing.assert_close(losses.smooth_l1_loss(value, target, 0.0), value.mean())


def test_box_loss_by_hand():
    codes, targets = torch.tensor([[2.0, 5.0]]), torch.tensor([[1.0, 0.0]])
    expected = 0.1 * (1 - 0.05) / (4 * 3)
    assert losses._box_loss(codes, targets, 3.0).item() == pytest.approx(expected)


def test_one_hot():
    encoded = losses.one_hot(torch.tensor([[0, -1], [2, -2]]), 3)
    assert encoded.tolist() == [[[1, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]]]
    assert encoded.dtype == torch.float32
    with pytest.raises(RuntimeError):
        losses.one_hot(torch.tensor([3]), 3)


def test_detection_loss_takes_its_settings_from_the_config():
    config = default_detection_model_configs()
    changes = {"num_classes": 3, "alpha": 0.4, "gamma": 2.0, "delta": 0.3, "box_loss_weight": 7.0}
    config.update(changes | {"label_smoothing": 0.1, "jit_loss": True})
    inputs = batch()
    module = losses.DetectionLoss(config)
    assert not module.state_dict()
    expected = losses.loss_fn(**inputs, **changes, label_smoothing=0.1)
    assert module(**inputs) == expected
    assert math.isfinite(expected[0])
    config.legacy_focal = True
    legacy = losses.DetectionLoss(config)(**inputs)
    assert legacy == losses.loss_fn(**inputs, **changes, legacy_focal=True)


def test_wrong_shapes_are_named():
    inputs = batch()
    inputs["cls_targets"] = [target[..., :1] for target in inputs["cls_targets"]]
    with pytest.raises(ValueError, match="cls_"):
        losses.loss_fn(**inputs, **SETTINGS)
