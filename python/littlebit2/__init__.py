"""LittleBit-2 for users: quantise a model's linear layers to packed sub-1-bit layers."""

from littlebit2_kernels.version import __version__

from .quantize import QuantConfig, analyze_weight, quantize_linears, quantize_weight, rank_for_bpw

__all__ = [
    "QuantConfig",
    "__version__",
    "analyze_weight",
    "quantize_linears",
    "quantize_weight",
    "rank_for_bpw",
]
