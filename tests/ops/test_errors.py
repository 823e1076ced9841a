"""Every bad argument is refused with the op, the argument, what it got and what it takes."""

from __future__ import annotations

import pytest
import torch

import effdet_kernels
from effdet_kernels.spec import iter_specs

MAP = torch.zeros(2, 3, 4, 4)
INTEGERS = torch.zeros(2, 3, 4, 4, dtype=torch.int64)

# op, the argument that is wrong (and the name in the message, where longer), a wrong value
BAD = [
    ("depthwise_conv", "x", [1.0]),
    ("depthwise_conv", "x", INTEGERS),
    ("depthwise_conv", "x", torch.zeros(3, 4, 4)),
    ("depthwise_conv", "weight", torch.zeros(5, 1, 3, 2)),
    ("depthwise_conv", "weight", torch.zeros(4, 1, 3, 3)),
    ("depthwise_conv", "weight", torch.zeros(5, 1, 3, 3, dtype=torch.float64)),
    ("depthwise_conv", "scale", torch.zeros(4)),
    ("depthwise_conv", "scale", torch.zeros(5, dtype=torch.bfloat16)),
    ("depthwise_conv", "stride", 0),
    ("depthwise_conv", "stride", 1.5),
    ("depthwise_conv", "padding", 1),
    ("depthwise_conv", "padding", (1, 1, 1, "1")),
    ("depthwise_conv", "padding", (1, 1, 1)),
    ("depthwise_conv", "padding", (0, 0, 0, -1)),
    ("depthwise_conv", "act", "gelu"),
    ("depthwise_conv", "statistics", True),  # with squeeze
    ("depthwise_conv", "statistics", 1),
    ("dense_conv", "statistics", None),
    ("separable_conv", "statistics", "mean"),
    ("pointwise_conv", "weight", torch.zeros(7, 5, 3, 3)),
    ("pointwise_conv", "shift", torch.zeros(8)),
    ("pointwise_conv", "gate", torch.zeros(2, 7)),
    ("pointwise_conv", "residual", torch.zeros(2, 5, 3, 4)),
    ("pointwise_conv", "x", torch.zeros(2, 5, 0, 4)),
    ("expand_depthwise", "expand_weight", torch.zeros(7, 4, 1, 1)),
    ("expand_depthwise", "expand_scale", None),
    ("expand_depthwise", "dw_weight", torch.zeros(6, 1, 3, 3)),
    ("expand_depthwise", "padding", (-1, 0, 0, 0)),
    ("mbconv", "expand_shift", None),
    ("mbconv", "expand_scale", torch.zeros(6)),
    ("mbconv", "dw_shift", None),
    ("mbconv", "se_reduce_weight", torch.zeros(0, 7, 1, 1)),
    ("mbconv", "se_expand_weight", torch.zeros(7, 3, 1, 1)),
    ("mbconv", "se_expand_bias", torch.zeros(7, dtype=torch.bfloat16)),
    ("mbconv", "weight", torch.zeros(3, 6, 1, 1)),
    ("mbconv", "gate", "softplus"),
    ("mbconv", "se_act", "gelu"),
    ("mbconv", "residual", 1),
    ("mbconv", "stride", 0),
    ("separable_conv", "x", torch.zeros(2, 4, 5, 6)),
    ("separable_conv", "x", []),
    ("separable_conv", "x", [torch.zeros(2, 4, 5, 6)] * 3),
    ("separable_conv", "dw_weight", []),
    ("separable_conv", "dw_weight[0]", [torch.zeros(4, 1, 2, 2)]),
    ("separable_conv", "pw_weight", [torch.zeros(5, 4, 1, 1)] * 2),
    ("separable_conv", "scale", torch.zeros(1)),
    ("separable_conv", "shift", [torch.zeros(5)] * 3),
    ("separable_conv", "shift[0]", [torch.zeros(4)]),
    ("separable_conv", "pre_act", None),
    ("batch_norm_act", "x", torch.zeros(0, 5, 3, 3)),
    ("batch_norm_act", "weight", torch.zeros(4)),
    ("batch_norm_act", "eps", -1.0),
    ("batch_norm_act", "eps", float("nan")),
    ("batch_norm_grad", "grad", torch.zeros(2, 5, 7, 4)),
    ("batch_norm_grad", "grad", torch.zeros(2, 5, 7, 3).bfloat16()),
    ("batch_norm_grad", "variance", torch.zeros(4)),
    ("batch_norm_grad", "averages", torch.zeros(5)),
    ("batch_norm_grad", "averages", torch.zeros(2, 5, dtype=torch.float64)),
    ("batch_norm_grad", "act", "gelu"),
    ("weighted_fusion", "x", []),
    ("weighted_fusion", "x", [MAP] * 4),
    ("weighted_fusion", "weight", None),
    ("weighted_fusion", "weight", torch.ones(3)),
    ("weighted_fusion", "method", "mean"),
    ("weighted_fusion", "resample", ["identity"]),
    ("weighted_fusion", "resample[1]", ["identity", "bicubic"]),
    ("weighted_fusion", "size", (0, 6)),
    ("weighted_fusion", "size", 6),
    ("weighted_fusion", "pool_padding", (0, 3, 0, 0)),
    ("decode_topk", "cls_outputs", []),
    ("decode_topk", "box_outputs", [torch.zeros(2, 12, 3, 4)]),
    ("decode_topk", "box_outputs[1]", [torch.zeros(2, 12, 3, 4), torch.zeros(2, 11, 2, 2)]),
    ("decode_topk", "anchors", torch.zeros(47, 4)),
    ("decode_topk", "anchors", torch.zeros(48, 4, dtype=torch.float16)),
    ("decode_topk", "num_classes", 0),
    ("decode_topk", "cls_outputs[0]", [torch.zeros(2, 10, 3, 4), torch.zeros(2, 9, 2, 2)]),
    ("decode_topk", "k", -1),
    ("decode_topk", "k", 2.0),
    ("decode_topk", "limits", torch.zeros(2)),
    ("decode_topk", "strides", torch.zeros(1, 2)),
    ("decode_topk", "strides", torch.zeros(2, 2, dtype=torch.float16)),
    ("decode_topk", "strides", 8.0),
    ("detection_loss", "cls_targets", []),
    ("detection_loss", "cls_targets[0]", [torch.zeros(2, 3, 4, 2), torch.zeros(2, 2, 1, 2)]),
    ("detection_loss", "num_positives", torch.zeros(3)),
    ("detection_loss", "gamma", -0.5),
    ("detection_loss", "delta", 0),
    ("detection_loss", "label_smoothing", 1.5),
    ("soft_nms", "max_per_class", 0),
    ("soft_nms", "max_per_class", True),
    ("soft_nms", "max_per_class", "all"),
    ("label_anchors", "gt_boxes", torch.zeros(3, 7, 5)),
    ("label_anchors", "gt_classes", torch.zeros(3, 6)),
    ("label_anchors", "anchors", torch.zeros(4)),
    ("label_anchors", "match_threshold", "half"),
]
SPECS = {spec.name: spec for spec in iter_specs()}


@pytest.mark.parametrize(
    ("op", "argument", "value"),
    BAD,
    ids=[f"{op}-{name}-{i}" for i, (op, name, _) in enumerate(BAD)],
)
def test_bad_argument_is_named(op, argument, value):
    spec = SPECS[op]
    inputs = spec.inputs(spec.cases[0], torch.float32)
    inputs[argument.partition("[")[0]] = value
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(effdet_kernels, op)(**inputs)
    message = str(caught.value)
    assert message.startswith(f"{op}: {argument}"), message
    assert "got " in message
    assert "takes " in message


@pytest.mark.parametrize(
    ("mean", "variance", "named"),
    [
        (torch.ones(4), torch.ones(5), "mean"),
        (torch.ones(5), torch.ones(5).bfloat16(), "variance"),
        (torch.ones(5), None, "variance"),
        (None, torch.ones(5), "mean"),
    ],
)
def test_statistics_of_another_shape_or_dtype_or_one_alone_are_refused(mean, variance, named):
    x, vector = torch.zeros(2, 5, 3, 3), torch.ones(5)
    with pytest.raises((TypeError, ValueError), match=rf"batch_norm_act: {named}: got .* takes "):
        effdet_kernels.batch_norm_act(x, vector, vector, eps=1e-3, mean=mean, variance=variance)


def test_statistics_of_no_images_are_refused():
    with pytest.raises(ValueError, match="takes a batch of at least 1 with statistics"):
        effdet_kernels.dense_conv(torch.zeros(0, 3, 4, 4), torch.zeros(5, 3, 3, 3), statistics=True)


def test_a_kernel_larger_than_the_padded_map_is_refused():
    with pytest.raises(
        ValueError, match=r"padding: got a padded map of 4x4, takes at least .* 5x5"
    ):
        effdet_kernels.depthwise_conv(MAP, torch.zeros(3, 1, 5, 5))
