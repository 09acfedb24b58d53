"""Writing a checkpoint of this project: streamed into shards, and all or nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from littlebit2.architecture.names import CAUSAL_HEAD
from littlebit2.disk import StagedDirectory, write_json
from littlebit2_kernels.format import FORMAT_VERSION, PackedLinear
from littlebit2_kernels.int8.rounding import quantize_rows
from littlebit2_kernels.state import packed_to_state

from . import settings
from .formats import INT8_SCALE, INT8_WEIGHT, SALIENT_IDX, SALIENT_WEIGHT, module_prefix, split_name
from .shards import ShardedTensors
from .side_files import SideFiles, copy_side_files
from .specs import ColumnsSpec, LayerSpec, SalientColumns, packed_part

__all__ = ["MAX_SHARD_BYTES", "CheckpointWriter", "quantization_config"]

MAX_SHARD_BYTES = 5 * 2**30


def quantization_config(
    layers: Iterable[LayerSpec],
    modules_to_not_convert: Sequence[str],
    columns: Iterable[ColumnsSpec] = (),
    int8: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the ``quantization_config`` entry of config.json.

    Keys: ``quant_method`` (``"littlebit2"``), ``format_version``, ``pack`` (``"i32-lsb-neg1"``), ``ranks``
    (two-stage layers: ``{name: [R, ...]}``), ``single_stage`` (list of the names of single-stage layers),
    ``shares`` (``{name: [leader, ...]}``, only for layers where some path shares a first stage and for
    single-stage layers of several paths), ``modules_to_not_convert`` (list) and, only where there are such,
    ``salient_columns`` (``{name: S}``, layers with salient columns) and ``int8`` (list of the names of heads
    and embeddings in int8 rows).
    """
    return settings.quantization_config(layers, modules_to_not_convert, columns, list(int8))


class CheckpointWriter:
    """Writes a littlebit2 checkpoint; a context manager.

    Everything goes to a temporary sibling of ``out``, which :meth:`finish` renames to ``out``. Leaving the
    ``with`` block by an exception, or without :meth:`finish`, removes it: ``out`` never holds a part. The
    same calls give the same bytes.

    Args:
        out: directory to make; must not exist (or be empty) unless ``overwrite``.
        config: contents of config.json; its ``quantization_config`` is replaced, except that a
            ``modules_to_not_convert`` in it is kept.
        int8: full names of dense matrices that are rounded to int8 rows when they are added.
        max_shard_bytes: size at which a new shard is begun.
        overwrite: replace an existing checkpoint directory, at the end.
        replaces: further files of an existing checkpoint that may go, see
            :func:`littlebit2.disk.check_replaceable`; those that the new one has too always may.

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
        int8: Collection[str] = (),
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
        replaces: Collection[str] = (),
    ) -> None:
        if not isinstance(config, dict):
            raise TypeError(f"config must be a dict, got {type(config).__name__}")
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
        self._config = dict(config)
        self._layers: list[LayerSpec] = []
        self._columns: list[ColumnsSpec] = []
        self._to_int8 = frozenset(int8)
        self._int8: list[str] = []
        self._matrices: list[str] = []
        self._staged = StagedDirectory(out, overwrite=overwrite, replaces=replaces)
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
        self._layers.append(LayerSpec(name, packed.shape, packed.bias is not None))

    def add_columns(self, name: str, columns: SalientColumns) -> None:
        """Write the dense columns of a layer whose packed part was added as :attr:`.ColumnsSpec.layer`.

        Args:
            name: module path of the whole layer.
            columns: nothing of them is kept.

        Raises:
            ValueError: the packed part was not added, or does not fit.
        """
        part = next((spec for spec in self._layers if spec.name == packed_part(name)), None)
        if part is None:
            raise ValueError(
                f"name must be a layer whose packed part {packed_part(name)} was added, got {name!r}"
            )
        expected = (part.shape.out_features, columns.index.numel())
        if tuple(columns.weight.shape) != expected:
            raise ValueError(
                f"columns of {name}: weight must have shape {list(expected)}, "
                f"got {list(columns.weight.shape)}"
            )
        prefix = module_prefix(name)
        self._tensors.add({prefix + SALIENT_IDX: columns.index, prefix + SALIENT_WEIGHT: columns.weight})
        self._columns.append(ColumnsSpec(name, *expected))

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Write a dense tensor under its full name, in its dtype or, if it was named so, as int8 rows.

        Raises:
            TypeError: it is no dense tensor, or of a dtype that safetensors cannot hold.
            ValueError: ``name`` was added before, the tensor is on the meta device, or one that is to be
                rounded holds values that are not finite.
        """
        if name in self._to_int8:
            try:
                return self.add_int8(split_name(name)[0], *quantize_rows(tensor))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
        self._tensors.add({name: tensor})
        module, leaf = split_name(name)
        if leaf == "weight" and tensor.dim() == 2:
            self._matrices.append(module)

    def add_int8(self, name: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Write a head or an embedding in int8 rows.

        Args:
            name: its module path.
            weight: int8 ``[rows, columns]``.
            scale: float32 ``[rows]``.

        Raises:
            ValueError: ``name`` was added before.
        """
        prefix = module_prefix(name)
        self._tensors.add({prefix + INT8_WEIGHT: weight, prefix + INT8_SCALE: scale})
        self._int8.append(name)

    def copy_side_files(self, source: str | Path) -> SideFiles:
        """Copy what lies beside the weights of a model, see :func:`.find_side_files`.

        Returns:
            What was copied, and what was not and why.

        Raises:
            CheckpointError: a file leads out of ``source``.
            OSError: a file cannot be written; the message names it and the sizes.
        """
        return copy_side_files(Path(source), self._staged.path)

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
            dense = self._dense_modules() if dense is None else dense
            self._config["quantization_config"] = quantization_config(
                self._layers, [one for one in dense if one not in self._int8], self._columns, self._int8
            )
        write_json(self._staged.path / "config.json", self._config)
        self._staged.publish()

    def _dense_modules(self) -> list[str]:
        """Modules with a dense matrix; a tied head has none of its own, yet must stay as it is."""
        layers = {*(layer.name for layer in self._layers), *(columns.name for columns in self._columns)}
        tied = self._config.get("tie_word_embeddings") is True and CAUSAL_HEAD not in layers
        head = [CAUSAL_HEAD] if tied and CAUSAL_HEAD not in self._matrices else []
        return [*self._matrices, *head]
