"""The op ``label_anchors``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.label_anchors.op import label_anchors

__all__ = ["label_anchors"]
