from effdet_kernels.ops.squeeze_excite.op import squeeze_excite

__all__ = ["squeeze_excite"]
