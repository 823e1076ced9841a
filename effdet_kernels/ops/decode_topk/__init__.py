"""The op ``decode_topk``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.decode_topk.op import decode_topk

__all__ = ["decode_topk"]
