from effdet_kernels.ops.mbconv.op import mbconv

__all__ = ["mbconv"]
