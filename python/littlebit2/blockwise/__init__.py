"""A whole model, block by block: quantize each block on what the quantized ones before it give, and tune it.

See :func:`.run.quantize_blockwise`.
"""

from .report import BLOCKWISE_NAME, BlockwiseReport
from .run import quantize_blockwise
from .settings import BlockwiseSettings

__all__ = ["BLOCKWISE_NAME", "BlockwiseReport", "BlockwiseSettings", "quantize_blockwise"]
