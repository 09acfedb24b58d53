"""The folder of a run that may be killed at any moment and resumed: locked, with its settings in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import RunError, explain_errors, size_text
from .files import TEMPORARY, write_json
from .locks import is_at, lock

__all__ = ["RunDirectory", "check_space", "differences"]

_SETTINGS = "settings.json"
#: Comes first into the folder and goes last, and so marks a folder as a run's.
_LOCK = "littlebit2.lock"


class RunDirectory:
    """A folder that one process works in at a time.

    It is made by :meth:`take`, or was made by it in an earlier process. Any other folder is left alone.

    Args:
        path: the folder.

    Attributes:
        path: as given.
        closed: whether it was held and released: nothing may be written into it any more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed = False
        self._lock: int | None = None

    def take(self) -> None:
        """Make the folder, lock it, and remove temporary files that a killed process left in it.

        Raises:
            RunError: another process works in it, or it holds something and is not the folder of a run.
            OSError: it cannot be made, locked or written.
        """
        with explain_errors(self.path):
            self._lock = self._take()
        self.closed = False
        for leftover in self.path.glob(f"*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)

    def _take(self) -> int:
        file = self.path / _LOCK
        while True:
            self._check_ours()
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # another process removed its folder just now
            try:
                taken = lock(descriptor, file, wait=False)
                # It may have removed the folder after this process opened the lock file: a lock on that
                # file would keep nobody out.
                ours = taken and is_at(descriptor, file)
            except BaseException:
                os.close(descriptor)
                raise
            if ours:
                return descriptor
            os.close(descriptor)
            if not taken:
                raise RunError(
                    f"{self.path} is in use by another process; wait for it, or give another output"
                )

    def _check_ours(self) -> None:
        """Raise unless the folder is absent, empty or a run's: it is going to be cleared and removed."""
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise RunError(f"{self.path} must be the folder of a run, got a file; give another output")
        try:
            present = sorted(entry.name for entry in self.path.iterdir())
        except FileNotFoundError:
            return  # removed just now
        if present and _LOCK not in present:
            listed = ", ".join(present[:3]) + (", ..." if len(present) > 3 else "")
            raise RunError(
                f"{self.path} must be the folder of an earlier run or empty, got a folder with {listed}; "
                "move it away, or give another output"
            )

    def settings(self) -> dict[str, Any] | None:
        """Return the settings of the run in the folder, ``None`` where there is none.

        Raises:
            RunError: they are damaged.
        """
        file = self.path / _SETTINGS
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RunError(
                f"{file} must be JSON, got {error}; start over (--restart), or remove {self.path}"
            ) from error
        if not isinstance(found, dict):
            raise RunError(f"{file} must hold a JSON object, got {type(found).__name__}; remove {self.path}")
        return found

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of the run, JSON values by name."""
        write_json(self.path / _SETTINGS, dict(settings))

    def differing(
        self, settings: Mapping[str, Any], describe: Callable[[str, Any, Any], str] | None = None
    ) -> dict[str, str]:
        """Return, by name, how the settings of the run in the folder differ from ``settings``.

        Args:
            settings: JSON values by name.
            describe: returns the text for a name, the value in the folder and the wanted one.

        Raises:
            RunError: the settings in the folder are damaged.
        """
        return differences(self.settings() or {}, settings, describe or _values)

    def refuse(self, differing: Mapping[str, str]) -> RunError:
        """Return the error for a folder that belongs to a run with other settings."""
        return RunError(
            f"{self.path} holds a run with other settings: {', '.join(differing.values())}; finish it with "
            "those settings, start over (resume=False, --restart), or give another output"
        )

    def begin(
        self,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        describe: Callable[[str, Any, Any], str] | None = None,
    ) -> None:
        """Take the folder, and go on with the run of these settings in it, or start one.

        Args:
            settings: JSON values by name.
            resume: whether to go on; otherwise what is there is removed.
            describe: as for :meth:`differing`.

        Raises:
            RunError: as :meth:`take`, or it belongs to a run with other settings.
            OSError: it cannot be made or written.
        """
        self.take()
        if not resume or self.settings() is None:
            # Without settings it was left by a run that was killed before it wrote them, or by remove().
            self.clear()
            self.write_settings(settings)
        differing = self.differing(settings, describe)
        if differing:
            raise self.refuse(differing)

    def clear(self, *keep: Path) -> None:
        """Remove everything in the folder but ``keep`` and the lock; the settings go first."""
        (self.path / _SETTINGS).unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.name != _LOCK and entry not in keep:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def close(self) -> None:
        """Release the lock."""
        self.closed = True
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Remove the folder, which this process holds, and release the lock.

        Its settings go first, so that a remainder is never resumed from, and the lock goes last, so that the
        remainder is known as ours.
        """
        with contextlib.suppress(OSError):
            self.clear()
            (self.path / _LOCK).unlink()
            self.path.rmdir()
        self.close()

    def remove_remainder(self, settings: Mapping[str, Any]) -> None:
        """Remove what a finished run of these settings has left, because it was killed before it could.

        The folder of another run, finished or not, and a folder of somebody else are left alone.
        """
        if not self.path.exists():
            return
        try:
            self.take()
            if self.settings() is None or not self.differing(settings):
                self.remove()
        except (OSError, RunError):
            pass  # in use, damaged or not ours: what is asked for is there without it
        finally:
            self.close()

    def remove_if_empty(self) -> None:
        """Remove the folder if nothing is left in it."""
        if [path.name for path in self.path.iterdir()] == [_LOCK]:
            self.remove()


def check_space(folder: Path, needed: int) -> None:
    """Raise unless enough space is free on the disk of ``folder``.

    Args:
        folder: an existing directory.
        needed: bytes that are about to be written.

    Raises:
        RunError: less is free; the message has both sizes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder}: needs about {size_text(needed)} free, has {size_text(free)}; "
            "free some and run the same command again"
        )


def differences(
    found: Mapping[str, Any], settings: Mapping[str, Any], describe: Callable[[str, Any, Any], str]
) -> dict[str, str]:
    """Return, by name, how settings that were read from JSON differ from ``settings``.

    Args:
        found: as they were read.
        settings: JSON values by name, tuples among them.
        describe: returns the text for a name, the value that was found and the wanted one.
    """
    wanted = json.loads(json.dumps(dict(settings)))
    return {
        name: describe(name, found.get(name), wanted.get(name))
        for name in {**found, **wanted}
        if found.get(name) != wanted.get(name)
    }


def _values(name: str, found: Any, wanted: Any) -> str:
    return f"{name} = {found!r:.200} there, {wanted!r:.200} here"
