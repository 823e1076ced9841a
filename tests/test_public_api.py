"""The public functions of effdet_kernels: complete, documented, and clear about bad arguments."""

from __future__ import annotations

import inspect

import pytest
import torch

import effdet_kernels as ek
from effdet_kernels.spec import iter_specs

OPS = {
    "batch_norm_act",
    "batch_norm_grad",
    "decode_topk",
    "dense_conv",
    "depthwise_conv",
    "detection_loss",
    "expand_depthwise",
    "label_anchors",
    "mbconv",
    "pointwise_conv",
    "separable_conv",
    "soft_nms",
    "squeeze_excite",
    "weighted_fusion",
}


def test_every_op_is_public_and_has_a_spec():
    assert set(ek.__all__) >= OPS
    assert {spec.name for spec in iter_specs()} == OPS


@pytest.mark.parametrize("name", sorted(OPS))
def test_documented(name):
    doc = inspect.getdoc(getattr(ek, name))
    for word in ("Args:", "Returns:", "Raises:", "eterministic", "ifferentiable"):
        assert word in doc, f"{name}: its docstring has no {word!r}"
    for parameter in inspect.signature(getattr(ek, name)).parameters:
        assert f"{parameter}" in doc, f"{name}: {parameter} is not documented"


@pytest.mark.parametrize("spec", list(iter_specs()), ids=lambda spec: spec.name)
def test_every_tensor_argument_is_checked(spec):
    """A list in place of a tensor, a tensor of another rank: an error that names the op and the argument."""
    inputs = spec.inputs(spec.cases[0], torch.float32)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            for wrong in ("wrong", value[None, None, None]):
                with pytest.raises((TypeError, ValueError), match=f"{spec.name}: {name}: got"):
                    spec.op(**{**inputs, name: wrong})


SOFT_NMS = {"boxes": torch.rand(2, 5, 4), "scores": torch.rand(2, 5)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"boxes": torch.rand(2, 5, 5)},
            ValueError,
            r"boxes: got float32\[2, 5, 5\].*takes a tensor \[B, N, 4\]",
        ),
        ({"scores": torch.rand(2, 6)}, ValueError, "scores: got"),
        ({"boxes": torch.ones(2, 5, 4, dtype=torch.int32)}, TypeError, "boxes: got int32"),
        ({"classes": torch.rand(2, 5)}, TypeError, "classes: got float32"),
        ({"num_valid": torch.ones(3, dtype=torch.int64)}, ValueError, "num_valid: got"),
        ({"max_det": -1}, ValueError, "max_det: got -1"),
        ({"method": "gausian"}, ValueError, "method: got 'gausian', takes one of 'gaussian'"),
        ({"sigma": 0.0}, ValueError, "sigma: got 0.0"),
        ({"sigma": float("nan")}, ValueError, "sigma: got nan"),
        ({"iou_threshold": "0.5"}, TypeError, "iou_threshold: got str"),
        ({"score_threshold": float("nan")}, ValueError, "score_threshold: got nan"),
    ],
)
def test_soft_nms_names_the_bad_argument(changes, error, message):
    with pytest.raises(error, match=f"soft_nms: {message}"):
        ek.soft_nms(**{**SOFT_NMS, **changes})
