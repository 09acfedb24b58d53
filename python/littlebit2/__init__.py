"""LittleBit-2 for users: quantize models to packed sub-1-bit layers, read and write checkpoints, run them.

Names are imported on first use, so that ``littlebit2 --help`` does not wait for torch.
"""

from ._lazy import import_on_use

# What typing has under this name; importing typing takes longer than all of this package.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from littlebit2_kernels.version import __version__

    from .architecture.projections import fuse_projections, unfuse_projections
    from .blockwise import BlockwiseReport, BlockwiseSettings, quantize_blockwise
    from .in_place import QuantizationReport, quantize_, quantize_linear
    from .integrations.generation import generate, generate_batch
    from .integrations.loading import load
    from .integrations.synthesis import synthesize
    from .integrations.transformers import register
    from .offline import quantize_checkpoint
    from .own_text import write_text
    from .quantize import (
        Importance,
        QuantConfig,
        analyze_weight,
        collect_importance,
        quantize_weight,
        rank_for_bpw,
    )
    from .train.recipe import Recipe, evaluate_model, finetune

__all__ = [
    "BlockwiseReport",
    "BlockwiseSettings",
    "Importance",
    "QuantConfig",
    "QuantizationReport",
    "Recipe",
    "__version__",
    "analyze_weight",
    "collect_importance",
    "evaluate_model",
    "finetune",
    "fuse_projections",
    "generate",
    "generate_batch",
    "load",
    "quantize_",
    "quantize_blockwise",
    "quantize_checkpoint",
    "quantize_linear",
    "quantize_weight",
    "rank_for_bpw",
    "register",
    "synthesize",
    "unfuse_projections",
    "write_text",
]

#: The module that defines each public name.
_HOMES = {
    "BlockwiseReport": ".blockwise",
    "BlockwiseSettings": ".blockwise",
    "Importance": ".quantize",
    "QuantConfig": ".quantize",
    "QuantizationReport": ".in_place",
    "Recipe": ".train.recipe",
    "__version__": "littlebit2_kernels.version",
    "analyze_weight": ".quantize",
    "collect_importance": ".quantize",
    "evaluate_model": ".train.recipe",
    "finetune": ".train.recipe",
    "fuse_projections": ".architecture.projections",
    "generate": ".integrations.generation",
    "generate_batch": ".integrations.generation",
    "load": ".integrations.loading",
    "quantize_": ".in_place",
    "quantize_blockwise": ".blockwise",
    "quantize_checkpoint": ".offline",
    "quantize_linear": ".in_place",
    "quantize_weight": ".quantize",
    "rank_for_bpw": ".quantize",
    "register": ".integrations.transformers",
    "synthesize": ".integrations.synthesis",
    "unfuse_projections": ".architecture.projections",
    "write_text": ".own_text",
}


__getattr__, __dir__ = import_on_use(globals(), _HOMES)
