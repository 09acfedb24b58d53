"""Checkpoints on disk: read every known layout, write ours and the authors'. See docs/checkpoints.md."""

from .convert import convert, export_upstream
from .describe import describe
from .errors import CheckpointError
from .reader import Checkpoint, looks_packed, open_checkpoint
from .side_files import SideFiles, find_side_files
from .specs import LayerSpec
from .writer import CheckpointWriter, quantization_config

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "LayerSpec",
    "SideFiles",
    "convert",
    "describe",
    "export_upstream",
    "find_side_files",
    "looks_packed",
    "open_checkpoint",
    "quantization_config",
]
