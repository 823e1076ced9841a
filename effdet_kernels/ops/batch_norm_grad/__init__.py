"""The op ``batch_norm_grad``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.batch_norm_grad.op import batch_norm_grad

__all__ = ["batch_norm_grad"]
