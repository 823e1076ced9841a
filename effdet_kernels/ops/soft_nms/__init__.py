"""The op ``soft_nms``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.soft_nms.op import soft_nms

__all__ = ["soft_nms"]
