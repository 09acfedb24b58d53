"""The quantizer: from dense weights to packed sub-1-bit layers. See docs/quantization.md."""

from .allocate import (
    LayerSpectrum,
    RankAllocation,
    allocate_ranks,
    layer_spectrum,
    predicted_error,
    ranks_for_energy,
)
from .batching import batch_key, batch_size, in_batches
from .budget import (
    at_largest_rank,
    counted_bpw,
    largest_bpw,
    largest_rank,
    planned_stored_bpw,
    rank_for_bpw,
    smallest_bpw,
    stored_bpw,
)
from .config import QuantConfig
from .device import check_device, check_dtype
from .importance import (
    Importance,
    collect_importance,
    importance_tensors,
    load_importance,
    save_importance,
)
from .memory import working_bytes
from .methods import Steps
from .model import (
    check_budget,
    layer_config,
    needs_spectra,
    quantize_linears,
    settle_ranks,
    spectrum_of,
)
from .quantizer import (
    DenseLayer,
    LayerReport,
    PathReport,
    QuantizedLayer,
    quantize_together,
    quantize_weight,
)
from .solvers.admm import admm
from .solvers.binary_path import BinaryPath
from .solvers.dual_svid import dual_svid
from .solvers.joint_itq import LatentRotation, joint_itq
from .solvers.partial_svd import is_partial
from .solvers.polar import polar_factor
from .solvers.refine import refine
from .solvers.svd import TruncatedFactors, truncated_factors
from .spectrum import Coherence, SpectralReport, StageReport, analyze_weight, energy_share, latent_coherence

__all__ = [
    "BinaryPath",
    "Coherence",
    "DenseLayer",
    "Importance",
    "LatentRotation",
    "LayerReport",
    "LayerSpectrum",
    "PathReport",
    "QuantConfig",
    "QuantizedLayer",
    "RankAllocation",
    "SpectralReport",
    "StageReport",
    "Steps",
    "TruncatedFactors",
    "admm",
    "allocate_ranks",
    "analyze_weight",
    "at_largest_rank",
    "batch_key",
    "batch_size",
    "check_budget",
    "check_device",
    "check_dtype",
    "collect_importance",
    "counted_bpw",
    "dual_svid",
    "energy_share",
    "importance_tensors",
    "in_batches",
    "is_partial",
    "joint_itq",
    "largest_bpw",
    "largest_rank",
    "latent_coherence",
    "layer_config",
    "layer_spectrum",
    "load_importance",
    "needs_spectra",
    "planned_stored_bpw",
    "polar_factor",
    "predicted_error",
    "quantize_linears",
    "quantize_together",
    "quantize_weight",
    "rank_for_bpw",
    "ranks_for_energy",
    "refine",
    "save_importance",
    "settle_ranks",
    "smallest_bpw",
    "spectrum_of",
    "stored_bpw",
    "truncated_factors",
    "working_bytes",
]
