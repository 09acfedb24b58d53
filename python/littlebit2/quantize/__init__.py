"""The quantizer: from dense weights to packed sub-1-bit layers. See docs/quantization.md."""

from .budget import counted_bpw, planned_stored_bpw, rank_for_bpw, smallest_bpw, stored_bpw
from .config import QuantConfig
from .dual_svid import dual_svid
from .joint_itq import LatentRotation, joint_itq, polar_factor
from .model import DEFAULT_EXCLUDE, check_patterns, is_selected, layer_config, quantize_linears
from .partial_svd import is_partial
from .quantizer import LayerReport, PathReport, QuantizedLayer, quantize_loaded, quantize_weight
from .spectrum import Coherence, SpectralReport, StageReport, analyze_weight, energy_share, latent_coherence
from .svd import TruncatedFactors, truncated_factors

__all__ = [
    "DEFAULT_EXCLUDE",
    "Coherence",
    "LatentRotation",
    "LayerReport",
    "PathReport",
    "QuantConfig",
    "QuantizedLayer",
    "SpectralReport",
    "StageReport",
    "TruncatedFactors",
    "analyze_weight",
    "check_patterns",
    "counted_bpw",
    "dual_svid",
    "energy_share",
    "is_partial",
    "is_selected",
    "joint_itq",
    "latent_coherence",
    "layer_config",
    "planned_stored_bpw",
    "polar_factor",
    "quantize_linears",
    "quantize_loaded",
    "quantize_weight",
    "rank_for_bpw",
    "smallest_bpw",
    "stored_bpw",
    "truncated_factors",
]
