"""Hand-written kernels for EfficientDet: functional ops, forward and backward, with a reference for each."""

from effdet_kernels._dispatch import BackendError, use_backend
from effdet_kernels.ops.soft_nms import soft_nms

__all__ = ["BackendError", "soft_nms", "use_backend"]
