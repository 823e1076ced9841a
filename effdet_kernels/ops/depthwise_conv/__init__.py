"""The op ``depthwise_conv``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.depthwise_conv.op import depthwise_conv

__all__ = ["depthwise_conv"]
