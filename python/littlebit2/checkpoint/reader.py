"""Reading a checkpoint directory of any known layout: layers from headers, data one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from littlebit2_kernels.format import PackedLinear

from .specs import LayerSpec

__all__ = ["Checkpoint", "open_checkpoint"]


class Checkpoint:
    """An opened checkpoint directory, made by :func:`open_checkpoint`; a context manager.

    Attributes:
        path: the directory.
        format: ``"littlebit2"`` (ours), ``"littlebit"`` (the authors'), ``"littlebit-latent"`` (their
            unpacked float latents), ``"nanoquant"``, ``"onebit"`` or ``"dense"``.
        config: contents of config.json; empty where there is none.
        layers: packed layers by module name, in the order of the files.
        dense: every other tensor by full name: its shape and dtype.
        metadata: quantization settings that were found: littlebit_config.json, older top-level fields.
        problems: remarks that do not keep the checkpoint from being used.
    """

    path: Path
    format: str
    config: dict[str, Any]
    layers: Mapping[str, LayerSpec]
    dense: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    metadata: dict[str, Any]
    problems: list[str]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the files; tensors that were loaded stay valid."""

    def load_layer(self, name: str) -> PackedLinear:
        """Read one packed layer into memory of its own, on the CPU.

        Args:
            name: a key of :attr:`layers`.

        Raises:
            KeyError: there is no such layer.
            CheckpointError: its tensors are malformed.
        """
        raise NotImplementedError

    def load_tensor(self, name: str) -> torch.Tensor:
        """Return one dense tensor, in its stored dtype, memory-mapped: clone it to keep it for long.

        Args:
            name: a key of :attr:`dense`.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: it cannot be read.
        """
        raise NotImplementedError

    def tied(self) -> dict[str, str]:
        """Return absent tensors that the config ties to present ones, for example
        ``{"lm_head.weight": "model.embed_tokens.weight"}``.
        """
        raise NotImplementedError


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint directory and check everything that its headers and JSON files say.

    Args:
        path: a directory with safetensors files (or pytorch_model.bin) and config.json.

    Raises:
        FileNotFoundError: there is no such directory.
        CheckpointError: the checkpoint is malformed, or of a newer format.
    """
    raise NotImplementedError
