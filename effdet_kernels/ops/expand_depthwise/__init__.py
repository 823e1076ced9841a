"""The op ``expand_depthwise``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.expand_depthwise.op import expand_depthwise

__all__ = ["expand_depthwise"]
