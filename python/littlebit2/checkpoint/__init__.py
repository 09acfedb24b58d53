"""Checkpoints on disk: read every known layout, write ours and the authors'. See docs/checkpoints.md."""

from .convert import convert, export_upstream
from .dense import DenseCheckpoint, open_dense
from .describe import describe
from .errors import CheckpointError
from .reader import Checkpoint, looks_packed, open_checkpoint
from .side_files import SideFiles, find_side_files
from .specs import ColumnsSpec, Int8Spec, LayerSpec, SalientColumns
from .writer import CheckpointWriter, quantization_config

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "ColumnsSpec",
    "DenseCheckpoint",
    "Int8Spec",
    "LayerSpec",
    "SalientColumns",
    "SideFiles",
    "convert",
    "describe",
    "export_upstream",
    "find_side_files",
    "looks_packed",
    "open_checkpoint",
    "open_dense",
    "quantization_config",
]
