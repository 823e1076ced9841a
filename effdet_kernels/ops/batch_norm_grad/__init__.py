from effdet_kernels.ops.batch_norm_grad.op import batch_norm_grad

__all__ = ["batch_norm_grad"]
