from effdet_kernels.ops.pointwise_conv.op import pointwise_conv

__all__ = ["pointwise_conv"]
