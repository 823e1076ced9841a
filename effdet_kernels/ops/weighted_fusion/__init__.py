"""The op ``weighted_fusion``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.weighted_fusion.op import weighted_fusion

__all__ = ["weighted_fusion"]
