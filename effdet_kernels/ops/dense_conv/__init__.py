"""The op ``dense_conv``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.dense_conv.op import dense_conv

__all__ = ["dense_conv"]
