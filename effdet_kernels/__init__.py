"""Hand-written kernels for EfficientDet: functional ops, forward and backward, with a reference for each."""

from effdet_kernels._dispatch import BackendError, use_backend
from effdet_kernels.ops.batch_norm_act import batch_norm_act
from effdet_kernels.ops.batch_norm_grad import batch_norm_grad
from effdet_kernels.ops.decode_topk import decode_topk
from effdet_kernels.ops.dense_conv import dense_conv
from effdet_kernels.ops.depthwise_conv import depthwise_conv
from effdet_kernels.ops.detection_loss import detection_loss
from effdet_kernels.ops.expand_depthwise import expand_depthwise
from effdet_kernels.ops.label_anchors import label_anchors
from effdet_kernels.ops.mbconv import mbconv
from effdet_kernels.ops.pointwise_conv import pointwise_conv
from effdet_kernels.ops.separable_conv import separable_conv
from effdet_kernels.ops.soft_nms import soft_nms
from effdet_kernels.ops.squeeze_excite import squeeze_excite
from effdet_kernels.ops.weighted_fusion import weighted_fusion

__all__ = [
    "BackendError",
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
    "use_backend",
    "weighted_fusion",
]
