from effdet_kernels.ops.soft_nms.op import soft_nms

__all__ = ["soft_nms"]
