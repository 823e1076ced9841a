"""The op ``detection_loss``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.detection_loss.op import detection_loss

__all__ = ["detection_loss"]
