from effdet_kernels.ops.separable_conv.op import separable_conv

__all__ = ["separable_conv"]
