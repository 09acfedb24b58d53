"""Tuned configurations: measured once per GPU, kept in the user's cache folder, looked up by nearest shape.

``python -m benchmarks tune-triton`` measures and stores them. Without a file, or where it has nothing close,
the defaults of plan.py apply. A file is read at the first call on a GPU, never at import, and never while
kernels run for the first time under capture: nothing is tuned at run time.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ..gpu import GpuProperties, gpu_properties
from .plan import DEFAULT_GPU, DecodeConfig, GemmConfig, GemvConfig, Lookup, StageShape, XnorConfig

__all__ = ["CACHE_VERSION", "Tuned", "cache_path", "for_device", "load_table", "lookup_in", "store_table"]

#: Counted up with every change that makes old measurements meaningless: of kernels, of fields.
CACHE_VERSION = 2

#: Shapes further than this, as the sum of the doublings of each dimension, take the defaults.
_FARTHEST = {"decode": 1.0, "gemv": 3.0, "gemm": 3.0, "xnor": 3.0}

_CONFIGS = {"decode": DecodeConfig, "gemv": GemvConfig, "gemm": GemmConfig, "xnor": XnorConfig}

#: What kernels can be compiled with: least and most of a field, a power of two but for the last one.
_RANGES = {
    "launches": (1, 2),
    "block_rows": (16, 1024),
    "block_words": (4, 32),
    "block_tokens": (16, 256),
    "splits": (1, 64),
    "num_warps": (1, 16),
    "unroll": (1, 16),
    "num_stages": (1, 8),
}

#: Numbers of tokens beyond which nothing changes any more, as an exponent of two.
_MOST_TOKENS_LOG2 = 14

Table = list[dict[str, Any]]


def for_device(gpu: GpuProperties | torch.device) -> tuple[GpuProperties, Lookup | None]:
    """What to plan by: properties, and of a GPU of this machine what was tuned on it."""
    if isinstance(gpu, GpuProperties):
        return gpu, None
    return (DEFAULT_GPU, None) if gpu.type != "cuda" else _of_gpu(gpu)


@functools.cache
def _of_gpu(device: torch.device) -> tuple[GpuProperties, Lookup | None]:
    if not torch.cuda.is_available():
        return DEFAULT_GPU, None
    table = load_table(torch.cuda.get_device_name(device))
    return gpu_properties(device), Tuned(table) if table else None


def cache_path(device_name: str) -> Path:
    """Where the configurations of a GPU are kept: ``$XDG_CACHE_HOME/littlebit2/triton-v2/<name>.json``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
    return Path(base) / "littlebit2" / f"triton-v{CACHE_VERSION}" / f"{name}.json"


def _triton_version() -> str:
    return str(importlib.import_module("triton").__version__)


def load_table(device_name: str) -> Table:
    """Read the stored configurations; none, with one warning, where there is a file that cannot be used.

    What another version of Triton was tuned to is not used: its compiler is another one.
    """
    path = cache_path(device_name)
    try:
        stored = json.loads(path.read_text("utf-8"))
        if not isinstance(stored, dict) or not isinstance(stored.get("entries"), list):
            raise ValueError('it must hold an object with a list of "entries"')
        if stored.get("triton") != _triton_version():
            raise ValueError(
                f"it was tuned with triton {stored.get('triton')!r}, this is {_triton_version()}"
            )
        for entry in stored["entries"]:
            _check_entry(entry)
    except FileNotFoundError:
        return []
    except (OSError, RecursionError, ValueError) as error:
        warnings.warn(f"{path} is not used: {error}. Remove it, or tune again.", stacklevel=2)
        return []
    return list(stored["entries"])


def _check_entry(entry: Any) -> None:
    """Raise ValueError unless ``entry`` is one that kernels can be compiled and launched with."""
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise ValueError(f'an entry must be an object with a "config", got {entry!r}')
    kind = _CONFIGS.get(_family(str(entry.get("kernel"))))
    if kind is None:
        raise ValueError(f"kernel must begin with one of {', '.join(_CONFIGS)}, got {entry.get('kernel')!r}")
    expected, got = {field.name for field in fields(kind)}, set(entry["config"])
    if expected != got:
        raise ValueError(f"a config of {entry['kernel']} must have {sorted(expected)}, got {sorted(got)}")
    for name, value in entry["config"].items():
        least, most = _RANGES[name]
        whole = type(value) is int and least <= value <= most
        if not whole or (name != "num_stages" and value & (value - 1)):
            power = "" if name == "num_stages" else "a power of two "
            raise ValueError(f"{name} must be {power}from {least} to {most}, got {value!r}")
    for name in ("rows", "cols", "tokens"):
        if type(entry.get(name)) is not int or entry[name] < 1:
            raise ValueError(f"{name} must be a positive integer, got {entry.get(name)!r}")
    if not isinstance(entry.get("last"), bool):
        raise ValueError(f"last must be true or false, got {entry.get('last')!r}")
    if entry["last"] and entry["config"].get("splits", 1) != 1:
        raise ValueError(f"splits of a last stage must be 1, got {entry['config']['splits']}")


def store_table(device_name: str, entries: Iterable[tuple[str, StageShape, int, Any]]) -> Path:
    """Add ``(kernel, stage, tokens, config)`` entries to what is stored, in place of those of the same keys.

    The file is replaced at once, and writers wait for each other: readers find all of it, and no entry of
    another writer is lost.

    Returns:
        The path of the file.

    Raises:
        ValueError: an entry is none that kernels can be compiled with; nothing is written then.
        OSError: the file cannot be written.
    """
    added = [
        {
            "kernel": kernel,
            "last": shape.last,
            "rows": shape.most_rows,
            "cols": max(shape.cols),
            "tokens": tokens,
            "config": asdict(config),
        }
        for kernel, shape, tokens, config in entries
    ]
    for entry in added:
        _check_entry(entry)
    path = cache_path(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        table = {_key(entry): entry for entry in [*load_table(device_name), *added]}
        lines = ",\n".join(json.dumps(entry) for entry in table.values())
        text = f'{{"triton": {json.dumps(_triton_version())}, "entries": [\n{lines}\n]}}\n'
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("kernel", "last", "rows", "cols", "tokens"))


def _family(kernel: str) -> str:
    return kernel.partition(" ")[0]


def lookup_in(table: Table, kernel: str, shape: StageShape, tokens: int) -> dict[str, Any] | None:
    """The configuration of the nearest entry for ``kernel``, or ``None`` where none is near.

    Distance is the sum over rows, columns and tokens of the doublings between them. ``tokens``, rounded up to
    a power of two for it, may be a symbol of ``torch.compile``: it is compared only with the numbers at which
    the answer changes, of which there are few.
    """
    return _at(_steps(table, kernel, shape), tokens)


_Steps = list[tuple[int, "dict[str, Any] | None"]]


def _steps(table: Table, kernel: str, shape: StageShape) -> _Steps:
    """Answers by number of tokens: ``(most tokens that it is for, answer)``, rising; the last is for more."""
    candidates = [entry for entry in table if entry["kernel"] == kernel and entry["last"] == shape.last]

    def doublings(theirs: int, ours: int) -> float:
        return abs(math.log2(theirs / ours))

    def nearest(tokens: int) -> dict[str, Any] | None:
        found, least = None, _FARTHEST[_family(kernel)]
        for entry in candidates:
            distance = doublings(entry["rows"], shape.most_rows) + doublings(entry["cols"], max(shape.cols))
            distance += doublings(entry["tokens"], tokens)
            if distance < least or (found is None and distance == least):
                found, least = entry, distance
        return None if found is None else found["config"]

    steps: _Steps = []
    for exponent in range(_MOST_TOKENS_LOG2 + 1):
        answer = nearest(2**exponent)
        if steps and steps[-1][1] == answer:
            steps.pop()
        steps.append((2**exponent, answer))
    return steps


def _at(steps: _Steps, tokens: int) -> dict[str, Any] | None:
    for most, answer in steps[:-1]:
        if tokens <= most:
            return answer
    return steps[-1][1]


class Tuned:
    """A table to plan by: what each kernel and stage shape gets, found once."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._found: dict[tuple[str, StageShape], _Steps] = {}

    def __call__(self, kernel: str, shape: StageShape, tokens: int) -> dict[str, Any] | None:
        """As :func:`lookup_in`."""
        key = kernel, shape
        if key not in self._found:
            self._found[key] = _steps(self._table, kernel, shape)
        return _at(self._found[key], tokens)
