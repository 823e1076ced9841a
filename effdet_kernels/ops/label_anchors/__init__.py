from effdet_kernels.ops.label_anchors.op import label_anchors

__all__ = ["label_anchors"]
