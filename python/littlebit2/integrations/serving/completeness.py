"""Checks a checkpoint directory before a server loads it: servers do not ask whether everything was there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from transformers.utils.hub import cached_file

from littlebit2.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from littlebit2.integrations.names import FileNames
from littlebit2.integrations.skeleton import UnknownModelError, skeleton

__all__ = ["Completeness", "check_directory"]

#: Names listed in one message.
_MOST_NAMES = 20

_checked: dict[Path, tuple[int, ...]] = {}


class Completeness:
    """Checks the files of a served model once: a directory at once, a name on the Hub after the download."""

    def __init__(self) -> None:
        self._pending: tuple[str, str | None] | None = None

    def expect(self, model: str, revision: str | None = None) -> None:
        """Say which model is served.

        Args:
            model: a directory, or a name on the Hugging Face Hub, whose files the server has yet to download.
            revision: of the model on the Hub.

        Raises:
            CheckpointError: as :func:`check_directory`, for a directory.
        """
        if Path(model).is_dir():
            check_directory(Path(model))
        else:
            self._pending = model, revision

    def check(self, cache: str | None = None) -> None:
        """Check a model of the Hub, whose files were loaded by now; further calls do nothing.

        Args:
            cache: the folder that the server downloads to, by default that of the Hub's client.

        Raises:
            CheckpointError: as :func:`check_directory`, or the files are not where the server downloads to.
        """
        if self._pending is None:
            return
        model, revision = self._pending
        try:
            found = cached_file(
                model, "config.json", revision=revision, cache_dir=cache, local_files_only=True
            )
        except OSError as error:
            raise CheckpointError(
                f"{model}: whether all tensors are there cannot be checked, because its files were not "
                f"found in the Hub's cache ({error}): serve a local directory"
            ) from error
        if found is None:  # not with the settings above
            raise RuntimeError(f"{model}: transformers returned no path of config.json")
        check_directory(Path(found).parent)
        self._pending = None


def check_directory(path: Path) -> None:
    """Compare the headers of a checkpoint with config.json and with the model of transformers.

    Packed layers are checked by :func:`littlebit2.checkpoint.open_checkpoint`. Of dense tensors, those that
    transformers' model of this type has must be there; a type that it does not have is left to the server.

    Raises:
        CheckpointError: a tensor is missing, unexpected or mis-shaped; the message names it.
    """
    state = tuple(sorted(file.stat().st_mtime_ns for file in path.iterdir()))
    if _checked.get(path) == state:
        return
    with open_checkpoint(path) as checkpoint:
        if checkpoint.format != "littlebit2":
            raise CheckpointError(
                f"{path}: the layout must be littlebit2, got {checkpoint.format}: convert it first "
                "(littlebit2 convert)"
            )
        missing = _missing(checkpoint)
    if missing:
        rest = len(missing) - _MOST_NAMES
        more = f" and {rest} more" if rest > 0 else ""
        raise CheckpointError(f"{path}: missing tensors: {', '.join(missing[:_MOST_NAMES])}{more}")
    _checked[path] = state


def _missing(checkpoint: Checkpoint) -> list[str]:
    try:
        model = skeleton(checkpoint.config)
    except UnknownModelError:
        return []
    weights = [f"{name}.weight" for name in (*checkpoint.layers, *checkpoint.int8)]
    biases = [f"{name}.bias" for name, spec in checkpoint.layers.items() if spec.bias]
    keys = [*checkpoint.dense, *checkpoint.tied(), *weights, *biases]
    found = {destination.parameter for destination in FileNames(model).destinations(keys).values()}
    # Experts are packed one by one, and are parameters of one module in the model.
    above = {name for layer in checkpoint.layers for name in _ancestors(layer)}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [
        name
        for name in model.state_dict()
        if name not in found
        and name.rpartition(".")[0] not in above
        and not any(pattern.search(name) for pattern in optional)
    ]


def _ancestors(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name
