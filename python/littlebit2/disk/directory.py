"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

from .errors import explain_errors
from .files import sync, sync_tree
from .locks import is_at, lock

__all__ = ["StagedDirectory", "check_apart", "check_replaceable", "move_into_place"]

#: Weights of a whole model, by the names that transformers and this package give them.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|model_state\.pt")
#: What belongs to a checkpoint, is written anew with it, and would be wrong beside another one.
_OF_CHECKPOINTS = re.compile(
    rf"{_WEIGHTS.pattern}|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|(generation_|preprocessor_|processor_|image_processor_|video_preprocessor_|littlebit_|nanoquant_)?config\.json"
    r"|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.(jinja|json)"
    r"|(quantization_report|blockwise_report|finetune)\.json|latents/latents-\d+\.safetensors"
)


class StagedDirectory:
    """A temporary sibling of a directory to be, renamed to it by :meth:`publish`; a context manager.

    A process that is killed leaves its sibling behind, hidden and unlocked; the next writer of the same
    directory removes it. A sibling that another live process writes is locked and left alone.

    Args:
        out: the directory to be.
        overwrite: whether a checkpoint that is there may be replaced.
        replaces: as for :func:`check_replaceable`; files that :attr:`path` holds in the end may always go.

    Attributes:
        path: where to write until then.

    Raises:
        FileExistsError: ``out`` exists and may not be replaced, or is no checkpoint.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False, replaces: Collection[str] = ()) -> None:
        self.out = Path(os.path.abspath(out))
        self.overwrite = overwrite
        check_replaceable(self.out, overwrite=overwrite, replaces=replaces)
        with explain_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        self._lock: int | None
        with explain_errors(self.out):
            self.path, self._lock = self._make()

    def __enter__(self) -> StagedDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def publish(self) -> None:
        """Bring everything to the disk and move it to ``out``.

        Raises:
            FileExistsError: ``out`` has come into being since, and may not be replaced.
            RuntimeError: it was published or discarded before.
        """
        self.check_open()
        with explain_errors(self.out):
            sync_tree(self.path)
        move_into_place(self.path, self.out, overwrite=self.overwrite)
        self._release()

    def check_open(self) -> None:
        """Raise ``RuntimeError`` if the directory was published or discarded."""
        if self._lock is None:
            raise RuntimeError(f"{self.out} was already finished or discarded")

    def discard(self) -> None:
        """Remove what was written, unless it was published."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _stem(self) -> str:
        return f".{self.out.name}.partial-"

    def _make(self) -> tuple[Path, int]:
        while True:
            path = self.out.parent / (self._stem() + secrets.token_hex(4))
            path.mkdir()
            try:
                descriptor = self._locked(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    path.rmdir()
                raise
            if descriptor is not None:
                return path, descriptor

    def _locked(self, path: Path) -> int | None:
        """Lock a new directory; ``None`` where another writer has taken it, unlocked, for a dead one's."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        try:
            if lock(descriptor, path, wait=True) and is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _remove_stale(self) -> None:
        for path in self.out.parent.glob(f"{_escaped(self._stem())}*"):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if lock(descriptor, path, wait=False):
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(descriptor)


def move_into_place(path: Path, out: Path, *, overwrite: bool) -> None:
    """Rename a finished directory, which is on disk, to ``out``.

    A checkpoint that is there is set aside in a hidden sibling (``.NAME.old-...``) and removed once the new
    one is in place. A kill between these two renames leaves it there.

    Args:
        path: the directory, on the file system of ``out``.
        out: its new name.
        overwrite: whether ``out`` may be a checkpoint.

    Raises:
        FileExistsError: ``out`` may not be replaced.
        OSError: it cannot be renamed.
    """
    check_replaceable(out, overwrite=overwrite, replaces=_files(path))
    with explain_errors(out):
        old: Path | None = None
        if out.exists() and any(out.iterdir()):
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) / out.name
        try:
            if old is not None:
                os.rename(out, old)
            os.rename(path, out)
        except BaseException:  # an interrupt too
            if old is not None:
                done = not path.exists()
                if old.exists() and not out.exists():
                    os.rename(old, out)
                if done or not old.exists():  # else another process has put something at out meanwhile
                    shutil.rmtree(old.parent, ignore_errors=True)
            raise
        sync(out.parent)
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)


def check_apart(*outputs: Path, **sources: Path) -> None:
    """Raise ``ValueError`` if a result would lie in a source, or take the place of a folder that holds it.

    Args:
        outputs: what is going to be written, replaced or removed.
        sources: what is read, by the name of the argument.
    """
    for name, source in sources.items():
        outside = source.resolve()
        for output in outputs:
            inside = output.resolve()
            if inside == outside or inside in outside.parents or outside in inside.parents:
                raise ValueError(
                    f"out must lie apart from the model, and its work folder too, got {name}={source}, where "
                    f"{output} is to be written"
                )


def check_replaceable(out: Path, *, overwrite: bool, replaces: Collection[str] = ()) -> None:
    """Raise ``FileExistsError`` unless ``out`` may be put in place: nothing is there, or an empty directory.

    With ``overwrite`` also a directory that holds a checkpoint and nothing else: configuration, weights and
    their index, tokenizer and processor files, the reports of this package, and files that the new one has
    too. Whatever a user has beside them is not ours to delete, nor does it belong into another checkpoint:
    the message names it, and nothing is touched.

    Args:
        out: the directory to be.
        overwrite: whether it may be a checkpoint.
        replaces: further files that may go, relative to ``out``, with ``/`` between folders.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise FileExistsError(f"out must be a new directory, got {out}, which is no directory")
    present = list(out.iterdir())
    if not present:
        return
    if not overwrite:
        raise FileExistsError(
            f"out must be a new or empty directory, got {out}; "
            "overwrite=True (--overwrite) replaces a checkpoint"
        )
    names = [item.name for item in present if item.is_file()]
    if "config.json" not in names or not any(_WEIGHTS.fullmatch(name) for name in names):
        raise FileExistsError(f"out must be a checkpoint to be overwritten, got {out}, which is none")
    others = sorted(name for name in _files(out) - set(replaces) if not _OF_CHECKPOINTS.fullmatch(name))
    if others:
        listed = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise FileExistsError(
            f"out must be a checkpoint and nothing else to be overwritten, got {out}, which also holds "
            f"{listed}: move or remove it first"
        )


def _files(directory: Path) -> set[str]:
    """Files, links and empty folders inside a directory and its folders."""
    return {item.relative_to(directory).as_posix() for item in _leaves(directory) if item != directory}


def _leaves(folder: Path) -> Iterator[Path]:
    present = [] if folder.is_symlink() else list(folder.iterdir())
    if not present:
        yield folder
    for item in present:
        if item.is_dir():
            yield from _leaves(item)
        else:
            yield item


def _escaped(stem: str) -> str:
    return "".join(f"[{mark}]" if mark in "*?[" else mark for mark in stem)
