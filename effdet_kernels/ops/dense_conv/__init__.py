from effdet_kernels.ops.dense_conv.op import dense_conv

__all__ = ["dense_conv"]
