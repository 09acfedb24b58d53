"""Writing a checkpoint of this project: streamed into shards, and all or nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from littlebit2.disk import StagedDirectory, explain_errors, write_json
from littlebit2_kernels.format import FORMAT_VERSION, PackedLinear
from littlebit2_kernels.state import packed_to_state

from . import settings
from .files import contained
from .naming import module_prefix, split_name
from .shards import ShardedTensors
from .specs import LayerSpec

__all__ = ["MAX_SHARD_BYTES", "CheckpointWriter", "copy_extra_files", "quantization_config"]

MAX_SHARD_BYTES = 5 * 2**30

#: Files beside the weights that a model needs to be used.
_EXTRA_FILES = re.compile(
    r"tokenizer.*|generation_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|chat_template.*|(spiece|sentencepiece\.bpe)\.model|(pre)?processor_config\.json"
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".py")


def quantization_config(layers: Iterable[LayerSpec], modules_to_not_convert: Sequence[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` entry of config.json.

    Keys: ``quant_method`` (``"littlebit2"``), ``format_version``, ``pack`` (``"i32-lsb-neg1"``), ``ranks``
    (two-stage layers: ``{name: [R, ...]}``), ``single_stage`` (list of the names of single-stage layers),
    ``shares`` (``{name: [leader, ...]}``, only for layers where some path shares a first stage and for
    single-stage layers of several paths) and ``modules_to_not_convert`` (list).
    """
    return settings.quantization_config(layers, modules_to_not_convert)


class CheckpointWriter:
    """Writes a littlebit2 checkpoint; a context manager.

    Everything goes to a temporary sibling of ``out``, which :meth:`finish` renames to ``out``. Leaving the
    ``with`` block by an exception, or without :meth:`finish`, removes it: ``out`` never holds a part. The
    same calls give the same bytes.

    Args:
        out: directory to make; must not exist (or be empty) unless ``overwrite``.
        config: contents of config.json; its ``quantization_config`` is replaced, except that a
            ``modules_to_not_convert`` in it is kept.
        max_shard_bytes: size at which a new shard is begun.
        overwrite: replace an existing checkpoint directory, at the end.

    Raises:
        FileExistsError: ``out`` exists and may not be replaced.
        TypeError: ``config`` is not a dict.
        ValueError: ``max_shard_bytes`` is not positive.
    """

    def __init__(
        self,
        out: str | Path,
        config: dict[str, Any],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        if not isinstance(config, dict):
            raise TypeError(f"config must be a dict, got {type(config).__name__}")
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
        self._config = dict(config)
        self._layers: list[LayerSpec] = []
        self._matrices: list[str] = []
        self._staged = StagedDirectory(out, overwrite=overwrite)
        self._tensors = ShardedTensors(
            self._staged.path,
            max_shard_bytes,
            {"format": "pt", "quant_method": settings.QUANT_METHOD, "format_version": str(FORMAT_VERSION)},
        )

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors.close()
        self._staged.discard()

    def add_layer(self, name: str, packed: PackedLinear) -> None:
        """Write a packed layer.

        Args:
            name: its module path.
            packed: the layer; nothing of it is kept.

        Raises:
            TypeError: ``packed`` is not a :class:`PackedLinear`.
            ValueError: ``name`` is empty or was added before.
        """
        if not isinstance(packed, PackedLinear):
            raise TypeError(f"packed must be a PackedLinear, got {type(packed).__name__}")
        if not name:
            raise ValueError("name must be a module path, got an empty one")
        self._tensors.add(
            {module_prefix(name) + leaf: tensor for leaf, tensor in packed_to_state(packed).items()}
        )
        self._layers.append(
            LayerSpec(
                name,
                packed.in_features,
                packed.out_features,
                None if packed.single_stage else packed.ranks,
                packed.leaders,
                packed.bias is not None,
            )
        )

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Write a dense tensor under its full name, in its dtype.

        Raises:
            TypeError: it is no dense tensor, or of a dtype that safetensors cannot hold.
            ValueError: ``name`` was added before, or the tensor is on the meta device.
        """
        self._tensors.add({name: tensor})
        module, leaf = split_name(name)
        if leaf == "weight" and tensor.dim() == 2:
            self._matrices.append(module)

    def copy_extra_files(self, source: str | Path) -> None:
        """Copy tokenizer, chat template and generation files (no weights, no config.json, no code).

        Raises:
            CheckpointError: a file leads out of ``source``.
        """
        copy_extra_files(Path(source), self._staged.path)

    def finish(self) -> None:
        """Write shards, index and config.json, and move everything into place.

        Raises:
            FileExistsError: ``out`` has come into being since.
            ValueError: nothing was added.
            RuntimeError: the writer was finished or discarded before.
        """
        self._staged.check_open()
        self._tensors.finish()
        if self._layers:
            given = self._config.get("quantization_config")
            dense = given.get("modules_to_not_convert") if isinstance(given, dict) else None
            self._config["quantization_config"] = quantization_config(
                self._layers, self._dense_modules() if dense is None else dense
            )
        write_json(self._staged.path / "config.json", self._config)
        self._staged.publish()

    def _dense_modules(self) -> list[str]:
        """Modules with a dense matrix; a tied head has none of its own, yet must stay as it is."""
        layers = {layer.name for layer in self._layers}
        tied = self._config.get("tie_word_embeddings") is True and "lm_head" not in layers
        head = ["lm_head"] if tied and "lm_head" not in self._matrices else []
        return [*self._matrices, *head]


def copy_extra_files(source: Path, target: Path) -> None:
    """See :meth:`CheckpointWriter.copy_extra_files`."""
    for path in sorted(source.iterdir()):
        if _EXTRA_FILES.fullmatch(path.name) and not path.name.endswith(_WEIGHT_SUFFIXES) and path.is_file():
            with explain_errors(target / path.name, path.stat().st_size):
                shutil.copyfile(contained(source, path.name), target / path.name)
