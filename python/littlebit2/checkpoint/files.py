"""Which files of a directory hold its tensors, and reading those tensors one at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch

from .errors import CheckpointError
from .headers import DTYPES, TensorEntry, read_header
from .jsonfile import read_object

__all__ = ["TensorFiles", "contained", "open_files"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class TensorFiles:
    """All tensors of a checkpoint directory.

    Attributes:
        entries: what is known of every tensor, by name, in the order of the files.
        problems: remarks about the files.
    """

    def __init__(self, entries: dict[str, TensorEntry], problems: list[str]) -> None:
        self.entries = entries
        self.problems = problems

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return tensors by name, memory-mapped.

        Every file is opened once per call and kept mapped only by the tensors that it gave: pages that were
        read for one layer do not stay with the process.

        Raises:
            CheckpointError: a file cannot be read, or is not what it was when its header was checked.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        found: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            with _reading(file), safetensors.safe_open(file, framework="pt", device="cpu") as handle:
                for name in wanted:
                    found[name] = handle.get_tensor(name)
        for name, tensor in found.items():
            self._check(name, tensor)
        return found

    def read_own(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own; no page of its file stays with the process.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        entry = self.entries[name]
        if entry.begin is None:
            return self.read([name])[name].clone()
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with _reading(entry.file), entry.file.open("rb") as file:
            file.seek(entry.begin)
            if (
                entry.nbytes
                and file.readinto(tensor.flatten().view(torch.uint8).numpy().data) != entry.nbytes
            ):
                raise CheckpointError(f"{entry.file}: tensor {name}: the file ended early")
        return tensor

    def close(self) -> None:
        """Release what is held open."""

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        entry = self.entries[name]
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"{entry.file}: tensor {name}: expected {entry.dtype} of shape {list(entry.shape)}, as its "
                f"header said, got {tensor.dtype} of shape {list(tensor.shape)}: the file was "
                "changed while it was open"
            )


class PickledFiles(TensorFiles):
    """Tensors of ``torch.save`` files, loaded without running what a pickle may ask for, and mapped."""

    def __init__(self, files: list[Path], problems: list[str]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for name, tensor in _unpickled(file).items():
                if name in entries:
                    raise _duplicate(name, entries[name].file, file)
                entries[name] = TensorEntry(name, file, tensor.dtype, tuple(tensor.shape))
                self._tensors[name] = tensor
        super().__init__(entries, problems)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self._tensors[name] for name in names}

    def close(self) -> None:
        self._tensors.clear()


def open_files(directory: Path) -> TensorFiles:
    """Find the tensor files of a checkpoint directory and check their headers and index.

    Raises:
        CheckpointError: there are none, or something about them is malformed.
    """
    try:
        present = sorted(item.name for item in directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error}") from error
    problems: list[str] = []
    loose = [name for name in present if name.endswith(".safetensors")]
    if SINGLE in present:
        if INDEX in present:
            problems.append(f"{INDEX} is ignored, because {SINGLE} is there too")
        files = _from_headers([contained(directory, SINGLE)])
    elif INDEX in present:
        files = _from_index(directory, INDEX, problems)
    elif len(loose) == 1:
        files = _from_headers([contained(directory, loose[0])])
    elif loose:
        raise CheckpointError(
            f"{directory}: {INDEX} is missing: expected it to say which of {', '.join(loose)} belong together"
        )
    elif PICKLE in present:
        return PickledFiles([contained(directory, PICKLE)], problems)
    elif PICKLE_INDEX in present:
        weight_map = _weight_map(directory, PICKLE_INDEX)
        pickled = PickledFiles(_shards(directory, PICKLE_INDEX, weight_map), problems)
        _check_index(directory / PICKLE_INDEX, weight_map, pickled.entries, problems)
        return pickled
    else:
        raise CheckpointError(
            f"{directory}: expected one of {SINGLE}, {INDEX}, {PICKLE}, {PICKLE_INDEX}, "
            f"got {', '.join(present) or 'an empty directory'}"
        )
    problems += [f"{name} is ignored, because safetensors are there" for name in present if name == PICKLE]
    return TensorFiles(files, problems)


def contained(directory: Path, name: str) -> Path:
    """Return the path of a file of the checkpoint that a name inside it gives.

    Symbolic links may lead to other files of the directory, and to the ``blobs`` of the download cache of
    which the directory is a snapshot; nowhere else.

    Raises:
        CheckpointError: the name is no plain file name, or the file is missing or lies elsewhere.
    """
    _check_plain(directory, name)
    path = directory / name
    try:
        real = path.resolve(strict=True)
        roots = [directory.resolve(strict=True)]
        if directory.absolute().parent.name == "snapshots":
            roots.append((directory.absolute().parent.parent / "blobs").resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: the file is missing or its link is broken: {error}") from error
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{path}: must lie inside {directory}, got a link to {real}")
    if not real.is_file():
        raise CheckpointError(f"{path}: must be a regular file")
    return path


def _check_plain(where: Path, name: str) -> None:
    if not name or name in (".", "..") or any(mark in name for mark in ("/", "\\", "\0", ":")):
        raise CheckpointError(f"{where}: a file of the checkpoint must be a plain name, got {name!r:.200}")


def _from_headers(files: list[Path]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise _duplicate(name, entries[name].file, file)
            entries[name] = entry
    return entries


def _from_index(directory: Path, index: str, problems: list[str]) -> dict[str, TensorEntry]:
    weight_map = _weight_map(directory, index)
    entries = _from_headers(_shards(directory, index, weight_map))
    _check_index(directory / index, weight_map, entries, problems)
    return entries


def _weight_map(directory: Path, index: str) -> dict[str, str]:
    weight_map = read_object(contained(directory, index)).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{directory / index}: weight_map must map tensor names to file names, got {weight_map!r:.200}"
        )
    return weight_map


def _shards(directory: Path, index: str, weight_map: dict[str, str]) -> list[Path]:
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_plain(directory / index, name)
    missing = [name for name in names if not os.path.lexists(directory / name)]
    if missing:
        raise CheckpointError(f"{directory / index}: shards are missing: {', '.join(missing)}")
    return [contained(directory, name) for name in names]


def _check_index(
    index: Path, weight_map: dict[str, str], entries: dict[str, TensorEntry], problems: list[str]
) -> None:
    """Every tensor must be in the file that the index names; tensors it does not name are dropped."""
    for name, file in weight_map.items():
        entry = entries.get(name)
        if entry is None or entry.file.name != file:
            got = "it is in no shard" if entry is None else f"it is in {entry.file.name}"
            raise CheckpointError(f"{index}: tensor {name} must be in {file}, as weight_map says, but {got}")
    for name in [name for name in entries if name not in weight_map]:
        problems.append(f"tensor {name} of {entries[name].file.name} is ignored: the index does not name it")
        del entries[name]


def _duplicate(name: str, first: Path, second: Path) -> CheckpointError:
    return CheckpointError(f"{second}: tensor {name} must be in one shard, but {first.name} holds it too")


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a damaged pickle raises is not specified
        raise CheckpointError(
            f"{file}: cannot be loaded as tensors alone (weights_only, memory-mapped): {str(error)[:500]}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: must hold a dict of tensors, got {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not _plain(tensor):
            raise CheckpointError(
                f"{file}: must hold dense tensors by name, got {type(tensor).__name__} under {name!r:.80}"
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def _plain(tensor: torch.Tensor) -> bool:
    """Whether the file holds every element: strides of zero could announce more than there is memory."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in DTYPES.values()
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.dtype.itemsize
    )
