"""Quantize modules that are in memory. Checkpoints on disk are quantized by :mod:`littlebit2.offline`."""

from .quantize import quantize_, quantize_linear
from .report import LeftDense, QuantizationReport

__all__ = ["LeftDense", "QuantizationReport", "quantize_", "quantize_linear"]
