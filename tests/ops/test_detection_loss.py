"""detection_loss against its formula written out, and at the edges of its arguments."""

from __future__ import annotations

import math

import pytest
import torch

from effdet_kernels import detection_loss


def loss(logits, label, *, codes=(0.0,) * 4, targets=(0.0,) * 4, positives=1, **options):
    """Both losses, in float64, of one anchor with classes ``logits``."""
    cls = torch.tensor(logits, dtype=torch.float64).reshape(1, -1, 1, 1).requires_grad_()
    box = torch.tensor(codes, dtype=torch.float64).reshape(1, 4, 1, 1).requires_grad_()
    box_target = torch.tensor(targets, dtype=torch.float64).reshape(1, 1, 1, 4)
    losses = detection_loss(
        [cls],
        [box],
        [torch.tensor([[[[label]]]])],
        [box_target],
        torch.tensor([positives]),
        num_classes=len(logits),
        **options,
    )
    return *losses, cls, box


def focal(x, target, alpha, gamma, smoothing):
    p = 1 / (1 + math.exp(-x))
    soft = target * (1 - smoothing) + smoothing / 2
    entropy = -(soft * math.log(p) + (1 - soft) * math.log(1 - p))
    if target:
        return alpha * (1 - p) ** gamma * entropy
    return (1 - alpha) * p**gamma * entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_focal_loss_is_the_formula(gamma, smoothing):
    logits = [0.3, -1.2, 2.5]
    got = loss(logits, 2, alpha=0.3, gamma=gamma, label_smoothing=smoothing)[0]
    terms = [focal(x, i == 2, 0.3, gamma, smoothing) for i, x in enumerate(logits)]
    assert float(got.detach()) == pytest.approx(sum(terms) / 2, rel=1e-12)


def test_the_older_form_ignores_label_smoothing():
    plain = loss([0.3, -1.2], 0)[0]
    assert loss([0.3, -1.2], 0, label_smoothing=0.2)[0] != plain
    assert loss([0.3, -1.2], 0, label_smoothing=0.2, legacy_focal=True)[0] == plain


def test_ignored_anchors_have_no_class_loss():
    value, _box, cls, _ = loss([0.3, -1.2], -2)
    value.backward()
    assert value == 0
    assert not cls.grad.any()


def test_no_positives_divides_by_one():
    alone = loss([0.3], -1, positives=0)[0]
    assert float(alone.detach()) == pytest.approx(focal(0.3, 0, 0.25, 1.5, 0))


def test_huber_and_the_untrained_zero():
    codes, targets = (0.5, 0.13, -0.4, 9.0), (0.1, 0.1, -0.2, 0.0)
    _cls, value, _, box = loss([0.0], 0, codes=codes, targets=targets, positives=2)
    value.backward()
    linear = sum(0.1 * (abs(c - t) - 0.05) for c, t in ((0.5, 0.1), (-0.4, -0.2)))
    assert float(value.detach()) == pytest.approx((linear + 0.03**2 / 2) / 12)
    expected = torch.tensor([0.1, 0.03, -0.1, 0.0], dtype=torch.float64) / 12
    torch.testing.assert_close(box.grad.flatten(), expected)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 1.5])
@pytest.mark.parametrize("x", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_logits_have_a_finite_loss_and_gradient(x, gamma, legacy):
    for label in (0, -1):
        value, _box, cls, _ = loss([x], label, gamma=gamma, legacy_focal=legacy)
        value.backward()
        assert value.isfinite()
        assert cls.grad.isfinite().all()
    # A confident miss costs alpha * |x|, a hit nothing.
    assert float(loss([x], 0, positives=0, legacy_focal=legacy)[0].detach()) == pytest.approx(
        max(-x, 0) * 0.25
    )


@pytest.mark.parametrize("label", [-3, 2])
def test_a_class_out_of_range_is_an_error(label):
    with pytest.raises(ValueError, match=r"detection_loss: cls_targets: .* takes -2 to 1"):
        loss([0.0, 0.0], label)
