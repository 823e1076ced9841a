"""The op ``squeeze_excite``: ``op.py`` is to be read first, README.md has its mathematics."""

from effdet_kernels.ops.squeeze_excite.op import squeeze_excite

__all__ = ["squeeze_excite"]
