"""Writing a checkpoint of this project: streamed into shards, and all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from littlebit2_kernels.format import PackedLinear

from .specs import LayerSpec

__all__ = ["CheckpointWriter", "quantization_config"]


def quantization_config(layers: Iterable[LayerSpec], modules_to_not_convert: Sequence[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` entry of config.json.

    Keys: ``quant_method`` (``"littlebit2"``), ``format_version``, ``pack`` (``"i32-lsb-neg1"``), ``ranks``
    (two-stage layers: ``{name: [R, ...]}``), ``single_stage`` (list of the names of single-stage layers),
    ``shares`` (``{name: [leader, ...]}``, only for layers where some path shares a first stage and for
    single-stage layers of several paths) and ``modules_to_not_convert`` (list).
    """
    raise NotImplementedError


class CheckpointWriter:
    """Writes a littlebit2 checkpoint; a context manager.

    Everything goes to a temporary sibling of ``out``, which :meth:`finish` renames to ``out``. Leaving the
    ``with`` block by an exception, or without :meth:`finish`, removes it: ``out`` never holds a part.

    Args:
        out: directory to make; must not exist (or be empty) unless ``overwrite``.
        config: contents of config.json; its ``quantization_config`` is replaced, except that a
            ``modules_to_not_convert`` in it is kept.
        max_shard_bytes: size at which a new shard is begun.
        overwrite: replace an existing checkpoint directory, at the end.

    Raises:
        FileExistsError: ``out`` exists and may not be replaced.
    """

    def __init__(
        self,
        out: str | Path,
        config: dict[str, Any],
        *,
        max_shard_bytes: int = 5 * 2**30,
        overwrite: bool = False,
    ) -> None:
        raise NotImplementedError

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError

    def add_layer(self, name: str, packed: PackedLinear) -> None:
        """Write a packed layer under module path ``name``."""
        raise NotImplementedError

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Write a dense tensor under its full name."""
        raise NotImplementedError

    def copy_extra_files(self, source: str | Path) -> None:
        """Copy tokenizer and generation files (no weights, no config.json) from another checkpoint."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write index and config.json and move everything into place."""
        raise NotImplementedError
