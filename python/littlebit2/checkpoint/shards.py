"""Tensors written to safetensors shards as they come: memory holds one tensor, never a shard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from littlebit2.disk import explain_errors, write_json

from .checksums import CHECKSUM, combined, line_of
from .headers import DTYPES

__all__ = ["ShardedTensors"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Copied at a time where the kernel cannot copy between files by itself.
_CHUNK = 2**22


@dataclass(frozen=True)
class _Spooled:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    digest: str


class ShardedTensors:
    """Writes named tensors into a directory, in shards, and their index.

    A shard's data is first written to a spool file in the order of arrival; when the shard is full its
    header is known, and the data is copied behind it, widest dtype first, which keeps every tensor aligned.

    Args:
        directory: where to write.
        max_shard_bytes: size at which a new shard is begun; a single group of tensors may exceed it.
        metadata: ``__metadata__`` of every file, beside its checksum.
    """

    def __init__(self, directory: Path, max_shard_bytes: int, metadata: Mapping[str, str]) -> None:
        self._directory = directory
        self._limit = max_shard_bytes
        self._metadata = dict(metadata)
        self._shards: list[tuple[Path, list[_Spooled]]] = []
        self._names: set[str] = set()
        self._spooled: list[_Spooled] = []
        self._spool: BinaryIO | None = None
        self._position = 0

    @property
    def names(self) -> set[str]:
        """Names of all tensors added so far."""
        return self._names

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors that shall lie in one shard.

        Raises:
            TypeError: a value is no tensor, or of a dtype that safetensors cannot hold.
            ValueError: a name is unusable or was added before, or a tensor has no data.
        """
        for name, tensor in tensors.items():
            self._check(name, tensor)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._spooled and self._position + size > self._limit:
            self._close_shard()
        with explain_errors(self._directory, size):
            for name, tensor in tensors.items():
                self._write(name, tensor)

    def finish(self) -> None:
        """Write the last shard, give all their final names, and write the index if there are several.

        Raises:
            ValueError: no tensor was added.
        """
        if self._spooled:
            self._close_shard()
        if not self._shards:
            raise ValueError("a checkpoint must hold at least one tensor, got none")
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        total = 0
        for number, (path, spooled) in enumerate(self._shards, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            os.rename(path, self._directory / final)
            weight_map.update((item.name, final) for item in spooled)
            total += sum(item.nbytes for item in spooled)
        if count > 1:
            ordered = dict(sorted(weight_map.items()))
            index = {"metadata": {"total_size": total}, "weight_map": ordered}
            write_json(self._directory / "model.safetensors.index.json", index)

    def close(self) -> None:
        """Close the files; what was not finished is of no use."""
        if self._spool is not None:
            spool, self._spool = self._spool, None
            # On a full disk it fails once more to write what is of no use.
            with contextlib.suppress(OSError):
                spool.close()

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise ValueError(f"name must be a tensor name, got {name!r}")
        if name in self._names:
            raise ValueError(f"name must be new, got {name}, which was added before")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor that safetensors can hold, got {tensor.dtype}")
        if tensor.is_meta:
            raise ValueError(f"{name} must hold values, got a tensor on the meta device")

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        if self._spool is None:
            self._spool = (self._directory / "spool").open("w+b")
            self._position = 0
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data
        self._spool.write(data)
        digest = hashlib.sha256(data).hexdigest()
        shape = tuple(tensor.shape)
        self._spooled.append(_Spooled(name, tensor.dtype, shape, self._position, len(data), digest))
        self._position += len(data)
        self._names.add(name)

    def _close_shard(self) -> None:
        assert self._spool is not None
        with explain_errors(self._directory, self._position):
            self._spool.flush()
        ordered = sorted(self._spooled, key=lambda item: (-item.dtype.itemsize, item.name))
        checksum = combined(line_of(item.name, item.dtype, item.shape, item.digest) for item in ordered)
        header: dict[str, object] = {"__metadata__": {**self._metadata, CHECKSUM: checksum}}
        position = 0
        for item in ordered:
            header[item.name] = {
                "dtype": _NAMES[item.dtype],
                "shape": list(item.shape),
                "data_offsets": [position, position + item.nbytes],
            }
            position += item.nbytes
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        path = self._directory / f"shard-{len(self._shards)}"
        with explain_errors(path, len(text) + position), path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.flush()
            for item in ordered:
                _copy(self._spool.fileno(), item.begin, file.fileno(), item.nbytes)
        self.close()
        (self._directory / "spool").unlink()
        self._shards.append((path, self._spooled))
        self._spooled = []


def _copy(source: int, begin: int, target: int, count: int) -> None:
    """Append ``count`` bytes of one file to another."""
    while count:
        try:
            copied = os.copy_file_range(source, target, min(count, 2**30), begin)
        except OSError:
            copied = os.write(target, os.pread(source, min(count, _CHUNK), begin))
        if not copied:
            raise OSError("the spool file ended early")
        begin += copied
        count -= copied
