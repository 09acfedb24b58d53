"""Which files of a directory hold its tensors, and reading those tensors one at a time."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .headers import TensorEntry, read_header
from .jsonfile import read_object
from .pickles import read_pickle

__all__ = ["TensorFiles", "contained", "is_weight_file", "open_files"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
#: What the hub mixin of NanoQuant writes where safetensors is not installed.
MIXIN_PICKLE = "model_state.pt"

#: Files that transformers finds by itself.
_STANDARD = (SINGLE, INDEX, PICKLE, PICKLE_INDEX)
#: Also with a variant: ``model.safetensors.index.fp16.json``.
_INDEX_NAME = re.compile(r".+\.safetensors\.index(\.[^.]+)?\.json")
_PICKLE_NAME = re.compile(r".+\.(bin|pt|pth)")
#: State of a training run, and adapters: no model's weights.
_NO_MODEL = re.compile(
    r"training_args\.bin|(optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)"
    r"|adapter_model(\..+)?\.(safetensors|bin)"
)
_WEIGHT_NAME = re.compile(
    r".+\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ggml|ot|tflite|npz|pdparams|pb|mlmodel)"
    r"(\.index(\..+)?\.json)?|.+\.index\.json"
)
#: What torch.compile puts into the names of a module's tensors.
_COMPILED = "_orig_mod."


class TensorFiles:
    """All tensors of a checkpoint directory.

    Attributes:
        entries: what is known of every tensor, by name, in the order of the files.
        problems: remarks about the files.
        metadata: ``__metadata__`` of the safetensors files, by file name.
        standard: whether transformers finds these files by itself, and these names in them.
        renamed: whether tensors have other names here than in the files.
    """

    def __init__(self, entries: dict[str, TensorEntry], problems: list[str]) -> None:
        self.entries = entries
        self.problems = problems
        self.metadata: dict[str, Mapping[str, str]] = {}
        self.standard = True
        self.renamed = False
        self._stamps = {file: _stamp(file) for file in {entry.file for entry in entries.values()}}

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return tensors by name, memory-mapped.

        Every file is mapped once per call and kept mapped only by the tensors that it gave: pages that were
        read for one layer do not stay with the process. The time depends on what is read, not on how much
        else is in the file.

        Raises:
            CheckpointError: a file cannot be read, or is not what it was when its header was checked.
        """
        mapped: dict[Path, Any] = {}  # storages, by file
        found: dict[str, torch.Tensor] = {}
        for name in names:
            entry = self.entries[name]
            if entry.file not in mapped:
                self._check_unchanged(entry.file)
                with _reading(entry.file):
                    size = self._stamps[entry.file][1]
                    mapped[entry.file] = torch.UntypedStorage.from_file(str(entry.file), False, size)
            found[name] = _view(mapped[entry.file], entry)
        return found

    def read_own(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own; no page of its file stays with the process.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        entry = self.entries[name]
        if entry.begin is None:
            return self.read([name])[name].clone()
        self._check_unchanged(entry.file)
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

    def _check_unchanged(self, file: Path) -> None:
        if _stamp(file) != self._stamps[file]:
            raise CheckpointError(f"{file}: cannot be read: the file was changed while it was open")


class PickledFiles(TensorFiles):
    """Tensors of ``torch.save`` files, loaded without running what a pickle may ask for, and mapped."""

    def __init__(self, files: list[Path], problems: list[str]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for name, tensor in read_pickle(file).items():
                if name in entries:
                    raise _duplicate(name, entries[name].file, file)
                entries[name] = TensorEntry(name, file, tensor.dtype, tuple(tensor.shape))
                self._tensors[name] = tensor
        super().__init__(entries, problems)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self._tensors[name] for name in names}

    def rename(self, name: str, plain: str) -> None:
        """Give a tensor another name."""
        self._tensors[plain] = self._tensors.pop(name)

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
    chosen = _choose(directory, present, problems)
    files: TensorFiles
    if _PICKLE_NAME.fullmatch(chosen):
        files = PickledFiles([contained(directory, chosen)], problems)
    elif chosen == PICKLE_INDEX:
        weight_map = _weight_map(directory, chosen)
        files = PickledFiles(_shards(directory, chosen, weight_map), problems)
        _check_index(directory / chosen, weight_map, files.entries, problems)
    elif chosen.endswith(".json"):
        metadata: dict[str, Mapping[str, str]] = {}
        files = TensorFiles(_from_index(directory, chosen, problems, metadata), problems)
        files.metadata = metadata
    else:
        entries, metadata = _from_headers([contained(directory, chosen)])
        files = TensorFiles(entries, problems)
        files.metadata = metadata
    files.standard = chosen in _STANDARD
    _undo_compiled(files)
    return files


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights, in whatever format, or is the index of such files."""
    return _WEIGHT_NAME.fullmatch(name) is not None


def _choose(directory: Path, present: list[str], problems: list[str]) -> str:
    """The name of the file, or of the index, that the tensors are taken from."""
    candidates = [name for name in present if not _NO_MODEL.fullmatch(name)]
    indices = [name for name in candidates if _INDEX_NAME.fullmatch(name)]
    loose = [name for name in candidates if name.endswith(".safetensors")]
    pickles = [name for name in candidates if _PICKLE_NAME.fullmatch(name)]
    if SINGLE in present:
        if INDEX in present:
            problems.append(f"{INDEX} is ignored, because {SINGLE} is there too")
        chosen = SINGLE
    elif INDEX in present:
        chosen = INDEX
    elif indices:
        chosen = _only(directory, indices, "the index")
    elif len(loose) == 1:
        chosen = loose[0]
    elif loose:
        raise CheckpointError(
            f"{directory}: {INDEX} is missing: expected it to say which of {', '.join(loose)} belong together"
        )
    elif PICKLE in present or PICKLE_INDEX in present:
        return PICKLE if PICKLE in present else PICKLE_INDEX
    elif MIXIN_PICKLE in present:
        return MIXIN_PICKLE
    elif pickles:
        return _only(directory, pickles, "the file of weights")
    else:
        raise CheckpointError(
            f"{directory}: expected one of {SINGLE}, {INDEX}, {PICKLE}, {PICKLE_INDEX}, {MIXIN_PICKLE}, or a "
            f"single other *.safetensors or *.pt, got {', '.join(present) or 'an empty directory'}"
        )
    problems += [f"{name} is ignored, because safetensors are there" for name in pickles]
    return chosen


def _only(directory: Path, names: list[str], what: str) -> str:
    if len(names) > 1:
        raise CheckpointError(f"{directory}: expected one file to be {what}, got {', '.join(names)}")
    return names[0]


def _undo_compiled(files: TensorFiles) -> None:
    """Take what torch.compile put into names out of them, in place."""
    if not any(_COMPILED in name for name in files.entries):
        return
    entries: dict[str, TensorEntry] = {}
    for name, entry in files.entries.items():
        plain = name.replace(_COMPILED, "")
        if plain in entries:
            raise CheckpointError(f"{entry.file}: tensor {name}: {plain} is there too")
        entries[plain] = replace(entry, name=plain)
        if isinstance(files, PickledFiles):
            files.rename(name, plain)
    files.entries = entries
    files.standard, files.renamed = False, True


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
        roots = [directory.resolve(strict=True), *_blobs(directory)]
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: the file is missing or its link is broken: {error}") from error
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{path}: must lie inside {directory}, got a link to {real}")
    if not real.is_file():
        raise CheckpointError(f"{path}: must be a regular file")
    return path


def _blobs(directory: Path) -> Iterator[Path]:
    """Folders of a download cache whose files a snapshot, or a folder in one, links to.

    The path may itself lead through links and ``..``: where it ends decides, and how it was written.
    """
    for path in (directory.resolve(strict=True), directory.absolute()):
        for parent in path.parents:
            if parent.name == "snapshots":
                yield (parent.parent / "blobs").resolve()
                break


def _check_plain(where: Path, name: str) -> None:
    if not name or name in (".", "..") or any(mark in name for mark in ("/", "\\", "\0", ":")):
        raise CheckpointError(f"{where}: a file of the checkpoint must be a plain name, got {name!r:.200}")


def _from_headers(files: list[Path]) -> tuple[dict[str, TensorEntry], dict[str, Mapping[str, str]]]:
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    for file in files:
        found, metadata[file.name] = read_header(file)
        for name, entry in found.items():
            if name in entries:
                raise _duplicate(name, entries[name].file, file)
            entries[name] = entry
    return entries, metadata


def _from_index(
    directory: Path, index: str, problems: list[str], metadata: dict[str, Mapping[str, str]]
) -> dict[str, TensorEntry]:
    weight_map = _weight_map(directory, index)
    entries, found = _from_headers(_shards(directory, index, weight_map))
    metadata.update(found)
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
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def _stamp(file: Path) -> tuple[int, int, int]:
    """What changes when a file does: the file itself, its size, its time."""
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _view(storage: Any, entry: TensorEntry) -> torch.Tensor:
    assert entry.begin is not None
    if entry.begin % entry.dtype.itemsize == 0:
        tensor = torch.empty(0, dtype=entry.dtype, device="cpu")
        return tensor.set_(storage, entry.begin // entry.dtype.itemsize, entry.shape, _strides(entry.shape))
    # A header that is not padded leaves tensors unaligned: only a copy has the right address.
    raw = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, entry.begin, (entry.nbytes,), (1,))
    return raw.clone().view(entry.dtype).reshape(entry.shape)
