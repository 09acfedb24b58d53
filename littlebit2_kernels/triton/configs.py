"""Tuned configurations: measured once per GPU, kept in the user's cache folder, looked up by nearest shape.

``benchmarks/tune_triton.py`` measures and stores them. Without a file, or where it has nothing close, the
defaults of plan.py apply. A file is read at the first call on a GPU, never at import, and never while kernels
run for the first time under capture: nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ..gpu import GpuProperties, gpu_properties
from .plan import DEFAULT_GPU, GemmConfig, GemvConfig, Lookup, StageShape, XnorConfig

__all__ = ["CACHE_VERSION", "cache_path", "for_device", "load_table", "lookup_in", "store_table"]

#: Counted up with every change that makes old measurements meaningless: of kernels, of fields.
CACHE_VERSION = 1

#: Shapes further than this, as the sum of the doublings of each dimension, take the defaults.
_FARTHEST = 3.0

_CONFIGS = {"gemv": GemvConfig, "gemm": GemmConfig, "xnor": XnorConfig}

Table = list[dict[str, Any]]


def for_device(gpu: GpuProperties | torch.device) -> tuple[GpuProperties, Lookup | None]:
    """What to plan by: properties, and of a GPU of this machine what was tuned on it."""
    if isinstance(gpu, GpuProperties):
        return gpu, None
    if gpu.type != "cuda" or not torch.cuda.is_available():
        return DEFAULT_GPU, None
    return _of_gpu(gpu)


@functools.cache
def _of_gpu(device: torch.device) -> tuple[GpuProperties, Lookup | None]:
    table = load_table(torch.cuda.get_device_name(device))
    return gpu_properties(device), functools.partial(lookup_in, table) if table else None


def cache_path(device_name: str) -> Path:
    """Where the configurations of a GPU are kept: ``$XDG_CACHE_HOME/littlebit2/triton-v1/<name>.json``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
    return Path(base) / "littlebit2" / f"triton-v{CACHE_VERSION}" / f"{name}.json"


def load_table(device_name: str) -> Table:
    """Read the stored configurations; none, with one warning, where the file cannot be used."""
    path = cache_path(device_name)
    try:
        text = path.read_text("utf-8")
    except OSError:
        return []
    try:
        table = json.loads(text)
        for entry in table:
            _check_entry(entry)
    except (KeyError, TypeError, ValueError) as error:
        warnings.warn(f"{path} is not used: {error!r}. Remove it, or tune again.", stacklevel=2)
        return []
    return list(table)


def _check_entry(entry: dict[str, Any]) -> None:
    config = _CONFIGS[entry["kernel"].split()[0]]
    expected, got = {field.name for field in fields(config)}, set(entry["config"])
    if expected != got:
        raise ValueError(f"a config of {entry['kernel']} must have {sorted(expected)}, got {sorted(got)}")
    if not all(isinstance(value, int) and value > 0 for value in entry["config"].values()):
        raise ValueError(f"a config must hold positive integers, got {entry['config']}")
    for name in ("rows", "cols", "tokens"):
        if not isinstance(entry[name], int) or entry[name] < 1:
            raise ValueError(f"{name} must be a positive integer, got {entry[name]!r}")
    if not isinstance(entry["last"], bool):
        raise ValueError(f"last must be true or false, got {entry['last']!r}")


def store_table(device_name: str, entries: Iterable[tuple[str, StageShape, int, Any]]) -> Path:
    """Write ``(kernel, stage, tokens, config)`` entries in place of what was there, at once; the path."""
    table = [
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
    for entry in table:
        _check_entry(entry)
    path = cache_path(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write("[\n" + ",\n".join(json.dumps(entry) for entry in table) + "\n]\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def lookup_in(table: Table, kernel: str, shape: StageShape, tokens: int) -> dict[str, Any] | None:
    """The configuration of the nearest entry for ``kernel``, or ``None`` where none is near.

    Distance is the sum over rows, columns and tokens of the doublings between them.
    """

    def distance(entry: dict[str, Any]) -> float:
        pairs = (
            (entry["rows"], shape.most_rows),
            (entry["cols"], max(shape.cols)),
            (entry["tokens"], tokens),
        )
        return sum(abs(math.log2(theirs / ours)) for theirs, ours in pairs)

    candidates = [entry for entry in table if entry["kernel"] == kernel and entry["last"] == shape.last]
    nearest = min(candidates, key=distance, default=None)
    return None if nearest is None or distance(nearest) > _FARTHEST else dict(nearest["config"])
