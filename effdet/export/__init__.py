"""Detection outside of this package: as ONNX, as a program of `torch.export`, checked against the model."""

from .checks import Check, ExportError
from .files import ExportReport, check_onnx, check_pt2, export_onnx, export_pt2, metadata
from .program import ExportOptions, export_program

__all__ = [
    "Check",
    "ExportError",
    "ExportOptions",
    "ExportReport",
    "check_onnx",
    "check_pt2",
    "export_onnx",
    "export_program",
    "export_pt2",
    "metadata",
]
