"""The op ``pointwise_conv``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.pointwise_conv.op import pointwise_conv

__all__ = ["pointwise_conv"]
