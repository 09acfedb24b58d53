"""The header of a safetensors file, checked before any of it is believed."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .jsonfile import parse_object

__all__ = ["DTYPES", "MAX_HEADER_BYTES", "TensorEntry", "read_header"]

#: The safetensors library refuses larger ones too.
MAX_HEADER_BYTES = 100_000_000
_MAX_SIZE = 2**63 - 1

#: Dtypes by their safetensors names; the sub-byte ones have no whole size and are not supported.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """What a file says about one tensor.

    Attributes:
        name: full tensor name.
        file: the file that holds it.
        dtype: element type.
        shape: dimensions.
        begin: where the data begins in a safetensors file; ``None`` in others.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the tensors that a safetensors file announces, in the order of their data, and its metadata.

    Every offset is checked against the size of the file, so that a file which passes holds all of its
    tensors.

    Raises:
        CheckpointError: the file cannot be read or its header is malformed.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: a safetensors file has at least 8 bytes, got {size}")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(
                    f"{path}: the header must fit the file ({size} bytes) and {MAX_HEADER_BYTES} bytes, "
                    f"got length {length}: the file is truncated or not safetensors"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if len(raw) != length:
        raise CheckpointError(f"{path}: the header must have {length} bytes, got {len(raw)}")
    header = parse_object(raw, f"{path}: safetensors header")
    metadata = header.pop("__metadata__", {})
    _check_metadata(path, metadata)
    spans = []
    for name, item in header.items():
        entry, begin, end = _entry(path, name, item)
        spans.append((begin, end, entry))
    spans.sort(key=lambda span: (span[0], span[1]))
    position = 0
    for begin, end, entry in spans:
        if begin != position:
            raise CheckpointError(
                f"{path}: tensor {entry.name}: its data must begin at offset {position}, where that of the "
                f"previous tensor ends, got {begin}"
            )
        position = end
    if 8 + length + position != size:
        raise CheckpointError(
            f"{path}: the file must have {8 + length + position} bytes, as its header says, got {size}"
        )
    return {entry.name: replace(entry, begin=8 + length + begin) for begin, _, entry in spans}, metadata


def _entry(path: Path, name: str, item: Any) -> tuple[TensorEntry, int, int]:
    where = f"{path}: tensor {name}"
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: its header must hold dtype, shape and data_offsets, got {item!r:.200}"
        )
    shape, offsets = item["shape"], item["data_offsets"]
    if not isinstance(item["dtype"], str) or item["dtype"] not in DTYPES:
        raise CheckpointError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {item['dtype']!r:.80}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: shape and data_offsets must be lists of sizes, got {shape!r:.80} and {offsets!r:.80}"
        )
    entry = TensorEntry(name, path, DTYPES[item["dtype"]], tuple(shape))
    if offsets[1] - offsets[0] != entry.nbytes:
        raise CheckpointError(
            f"{where}: {item['dtype']} of shape {shape} has {entry.nbytes} bytes, got data_offsets {offsets}"
        )
    return entry, offsets[0], offsets[1]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value)


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map names to strings, got {metadata!r:.200}")
