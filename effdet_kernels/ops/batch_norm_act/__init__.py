from effdet_kernels.ops.batch_norm_act.op import batch_norm_act

__all__ = ["batch_norm_act"]
