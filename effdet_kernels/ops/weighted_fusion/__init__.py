from effdet_kernels.ops.weighted_fusion.op import weighted_fusion

__all__ = ["weighted_fusion"]
