"""The op ``mbconv``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.mbconv.op import mbconv

__all__ = ["mbconv"]
