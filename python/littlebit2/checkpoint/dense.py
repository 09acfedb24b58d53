"""Dense checkpoints as sources of quantization; weights in mxfp4 are dequantized where they are read.

In mxfp4 (Open Compute Project, microscaling formats 1.0, 2023) 32 entries of a row share a power of two. A
matrix of experts is a pair of tensors, as gpt-oss is published: ``NAME_blocks [E, N, K / 32, 16]`` uint8, two
entries in a byte, the low four bits first, and ``NAME_scales [E, N, K / 32]`` uint8, exponents plus 127. The
model's parameter ``NAME`` is ``[E, K, N]``. All values are exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .reader import Checkpoint, open_checkpoint

__all__ = ["DenseCheckpoint", "dequantize_mxfp4", "open_dense"]

Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

_MXFP4 = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
#: Values of four bits: sign, two bits of exponent, one of mantissa.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BLOCK_BYTES = 16
_BIAS = 127

#: How the weights of models that other methods quantized are had dense, by their ``quant_method``.
_DEQUANTIZE = {"fp8": "FineGrainedFP8Config(dequantize=True)"}


class DenseCheckpoint:
    """What is read of a dense checkpoint; made by :func:`open_dense`; a context manager.

    Attributes:
        path: the directory.
        config: contents of config.json, without a quantization that is undone here.
        stored: shape and dtype of every tensor of the files.
        dense: the same with one bfloat16 tensor for each pair in mxfp4.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path: Path = checkpoint.path
        self.config: dict[str, Any] = dict(checkpoint.config)
        self.stored: Tensors = checkpoint.dense
        self._pairs: dict[str, tuple[str, str]] = {}
        if _method(checkpoint) == _MXFP4:
            del self.config["quantization_config"]
            self._pairs = _pairs(checkpoint)
        self.dense: Tensors = self._unpacked() if self._pairs else self.stored

    def __enter__(self) -> DenseCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the files; tensors that were loaded stay valid."""
        self._checkpoint.close()

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors, sorted."""
        return sorted({entry.file for entry in self._checkpoint.files.entries.values()})

    def load_tensor(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return one tensor, memory-mapped where the files hold it as it is.

        Args:
            name: a key of :attr:`dense`.
            index: returns ``tensor[index]`` alone; only this part is dequantized.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: it cannot be read.
        """
        pair = self._pairs.get(name)
        if pair is None:
            tensor = self._checkpoint.load_tensor(name)
            return tensor if index is None else tensor[index]
        blocks, scales = (self._checkpoint.load_tensor(one) for one in pair)
        if index is not None:
            blocks, scales = blocks[index], scales[index]
        return dequantize_mxfp4(blocks, scales)

    def read_tensor(self, name: str) -> torch.Tensor:
        """Return one tensor in memory of its own; ``name`` is a key of :attr:`dense`."""
        return self.load_tensor(name) if name in self._pairs else self._checkpoint.read_tensor(name)

    def _unpacked(self) -> Tensors:
        names = {blocks: name for name, (blocks, _) in self._pairs.items()}
        dropped = {scales for _, scales in self._pairs.values()}
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for file, (shape, dtype) in self.stored.items():
            if file in names:
                experts, rows, groups, _ = shape
                found[names[file]] = ((experts, groups * 2 * _BLOCK_BYTES, rows), torch.bfloat16)
            elif file not in dropped:
                found[file] = (shape, dtype)
        return found


def open_dense(path: str | Path, *, name: str = "path") -> DenseCheckpoint:
    """Open a dense checkpoint, or one whose experts are in mxfp4; arguments as of :func:`open_checkpoint`.

    Raises:
        CheckpointError, FileNotFoundError, NotADirectoryError, TypeError: as :func:`open_checkpoint`.
        ValueError: it is quantized in another way, or has no config.json.
    """
    checkpoint = open_checkpoint(path, name=name)
    try:
        _check(checkpoint)
        return DenseCheckpoint(checkpoint)
    except ValueError:
        checkpoint.close()
        raise


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the matrices of a pair in bfloat16, with the bits of transformers' own dequantization.

    Args:
        blocks: ``[..., N, G, 16]`` uint8.
        scales: ``[..., N, G]`` uint8.

    Returns:
        ``[..., 32 G, N]``, contiguous.
    """
    values = torch.tensor(_VALUES, dtype=torch.bfloat16)
    entries = torch.stack((values[(blocks & 15).int()], values[(blocks >> 4).int()]), -1).flatten(-2)
    powers = scales.int().sub_(_BIAS).unsqueeze(-1)
    matrix = torch.ldexp(entries, powers).to(torch.bfloat16).flatten(-2)
    return matrix.transpose(-1, -2).contiguous()


def _method(checkpoint: Checkpoint) -> str | None:
    quantization = checkpoint.config.get("quantization_config")
    return str(quantization.get("quant_method")) if isinstance(quantization, dict) else None


def _check(checkpoint: Checkpoint) -> None:
    method = _method(checkpoint)
    if method != _MXFP4 and (
        checkpoint.format != "dense" or checkpoint.config.get("quantization_config") is not None
    ):
        how = _DEQUANTIZE.get(str(method))
        hint = (
            f" by {method}; save its dense weights first: transformers' from_pretrained(..., "
            f"quantization_config={how}) and save_pretrained"
            if how
            else ""
        )
        raise ValueError(
            f"{checkpoint.path}: must be a dense checkpoint, got one that is quantized already{hint}"
        )
    if not checkpoint.config:
        raise ValueError(
            f"{checkpoint.path}: config.json is missing; without it nothing could load the result"
        )


def _pairs(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """Return blocks and scales by the name of what they stand for."""
    pairs: dict[str, tuple[str, str]] = {}
    for blocks, (shape, dtype) in checkpoint.dense.items():
        if not blocks.endswith(_BLOCKS) or dtype != torch.uint8:
            continue
        name = blocks.removesuffix(_BLOCKS)
        scales = name + _SCALES
        expected = (shape[:-1], torch.uint8)
        if len(shape) != 4 or shape[-1] != _BLOCK_BYTES or checkpoint.dense.get(scales) != expected:
            raise CheckpointError(
                f"{checkpoint.path}: mxfp4 needs {blocks} [E, N, G, {_BLOCK_BYTES}] and {scales} [E, N, G], "
                f"both uint8, got {list(shape)} and {checkpoint.dense.get(scales)}"
            )
        pairs[name] = (blocks, scales)
    return pairs
