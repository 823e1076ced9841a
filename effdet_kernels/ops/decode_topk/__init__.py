from effdet_kernels.ops.decode_topk.op import decode_topk

__all__ = ["decode_topk"]
