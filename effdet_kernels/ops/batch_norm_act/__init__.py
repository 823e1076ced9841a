"""The op ``batch_norm_act``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.batch_norm_act.op import batch_norm_act

__all__ = ["batch_norm_act"]
