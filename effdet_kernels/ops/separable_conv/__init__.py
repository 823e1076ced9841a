"""The op ``separable_conv``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.separable_conv.op import separable_conv

__all__ = ["separable_conv"]
