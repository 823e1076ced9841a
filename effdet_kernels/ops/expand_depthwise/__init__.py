from effdet_kernels.ops.expand_depthwise.op import expand_depthwise

__all__ = ["expand_depthwise"]
