from effdet_kernels.ops.detection_loss.op import detection_loss

__all__ = ["detection_loss"]
