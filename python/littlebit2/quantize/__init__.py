"""The quantizer: from dense weights to packed sub-1-bit layers. See docs/quantization.md.

Whole modules and models are quantized by :func:`littlebit2.quantize_`, checkpoints on disk by
:func:`littlebit2.quantize_checkpoint`.
"""

from .budget import rank_for_bpw
from .config import QuantConfig
from .importance import Importance, collect_importance, load_importance, save_importance
from .quantizer import LayerReport, PathReport, QuantizedLayer, quantize_weight
from .spectrum import SpectralReport, analyze_weight

__all__ = [
    "Importance",
    "LayerReport",
    "PathReport",
    "QuantConfig",
    "QuantizedLayer",
    "SpectralReport",
    "analyze_weight",
    "collect_importance",
    "load_importance",
    "quantize_weight",
    "rank_for_bpw",
    "save_importance",
]
