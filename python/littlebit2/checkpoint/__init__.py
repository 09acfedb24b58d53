"""Checkpoints on disk: read every known layout, write ours and the authors'. See docs/checkpoints.md."""

from .describe import describe
from .errors import CheckpointError
from .reader import Checkpoint, open_checkpoint
from .specs import LayerSpec
from .upstream import convert, export_upstream
from .writer import CheckpointWriter, quantization_config

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "LayerSpec",
    "convert",
    "describe",
    "export_upstream",
    "open_checkpoint",
    "quantization_config",
]
