"""A whole model, streamed: quantize a checkpoint layer by layer, resumably and in parallel.

See :func:`.pipeline.quantize_checkpoint`. Transformers is not needed: names and shapes decide.
"""

from .conversion import convert_checkpoint
from .jobs import importance_digest
from .pipeline import REPORT_NAME, quantize_checkpoint
from .ranks import measure_ranks
from .report import RunReport

__all__ = [
    "REPORT_NAME",
    "RunReport",
    "convert_checkpoint",
    "importance_digest",
    "measure_ranks",
    "quantize_checkpoint",
]
