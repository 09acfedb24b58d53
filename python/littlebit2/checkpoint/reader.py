"""Reading a checkpoint directory of any known layout: layers from headers, data one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from littlebit2._messages import hub_hint
from littlebit2.architecture.names import (
    CAUSAL_HEAD,
    EMBEDDING_WEIGHTS,
    FUSED,
    MASKED_HEAD,
    TIED_BY_DEFAULT,
)
from littlebit2_kernels.format import PackedLinear

from .checksums import matches
from .errors import CheckpointError
from .files import TensorFiles, contained, open_files
from .formats import (
    INT8_SCALE,
    INT8_WEIGHT,
    LAYOUTS,
    StoredColumns,
    StoredLayer,
    build_columns,
    build_layer,
    find_layers,
    has_packed,
    module_prefix,
    natural_order,
)
from .formats.littlebit import authors_settings
from .headers import TensorEntry
from .jsonfile import read_object
from .settings import QUANT_METHOD, check_layers, check_version, is_ours, summary
from .specs import ColumnsSpec, Int8Spec, LayerSpec, SalientColumns

__all__ = ["Checkpoint", "int8_names", "looks_packed", "open_checkpoint"]


class Checkpoint:
    """An opened checkpoint directory, made by :func:`open_checkpoint`; a context manager.

    Attributes:
        path: the directory.
        format: ``"littlebit2"`` (ours), ``"littlebit"`` (the authors'), ``"littlebit-latent"`` (their
            unpacked float latents), ``"nanoquant"``, ``"dbf"``, ``"onebit"``, ``"dense"``, or ``"other"``:
            packed by another method, which config.json names and transformers may know.
        config: contents of config.json; empty where there is none.
        layers: packed layers by module name, in the order of the model.
        columns: layers that have dense columns beside their packed part, by module name. The packed part is
            in ``layers``, under the name :attr:`.ColumnsSpec.layer`.
        int8: heads and embeddings in int8 rows, by module name.
        dense: every other tensor by full name: its shape and dtype.
        metadata: quantization settings that were found (the authors' ``quant_func``, ``eff_bit``, ...), with
            ``source`` (the file) and, where Phi's fused projection was split, ``split_qkv`` (true).
        problems: remarks that do not keep the checkpoint from being used.
        files: the tensor files, for this package's own use.
        stored: the layers as the files hold them, for this package's own use.
        stored_columns: likewise the columns.
    """

    path: Path
    format: str
    config: dict[str, Any]
    layers: Mapping[str, LayerSpec]
    columns: Mapping[str, ColumnsSpec]
    int8: Mapping[str, Int8Spec]
    dense: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    metadata: dict[str, Any]
    problems: list[str]

    def __init__(self, path: Path, files: TensorFiles) -> None:
        self.path = path
        self.files = files
        self.problems = list(files.problems)
        self.config = self._json("config.json") or {}
        if not self.config:
            self.problems.append("config.json is missing: layers are known from their tensors alone")
        ours = is_ours(self.config, str(path / "config.json"))
        if ours:
            check_version(self.config["quantization_config"], str(path / "config.json"))
        self.stored, self.stored_columns, self.int8 = self._examine(ours)
        self.layers = {name: layer.spec for name, layer in self.stored.items()}
        self.columns = {name: columns.spec for name, columns in self.stored_columns.items()}
        held = {entry.name for layer in self.stored.values() for entry in layer.tensors.values()}
        held.update(name for layer in self.stored.values() for name in layer.extras)
        held.update(
            entry.name for columns in self.stored_columns.values() for entry in columns.entries.values()
        )
        held.update(name for module in self.int8 for name in int8_names(module))
        self.dense = {
            name: (files.entries[name].shape, files.entries[name].dtype)
            for name in sorted(files.entries, key=natural_order)
            if name not in held
        }
        self.format = self._format(ours)
        self.metadata = self._settings(ours)
        if ours:
            where = str(path / "config.json")
            check_layers(self.config["quantization_config"], self.layers, self.columns, self.int8, where)
        self._remark()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the files; tensors that were loaded stay valid."""
        self.files.close()

    def load_layer(self, name: str) -> PackedLinear:
        """Read one packed layer into memory of its own, on the CPU.

        Args:
            name: a key of :attr:`layers`.

        Raises:
            KeyError: there is no such layer.
            CheckpointError: its tensors are malformed.
        """
        _check_name(name, f"a packed layer of {self.path}", self.stored)
        layer = self.stored[name]
        return build_layer(layer, self.files.read(entry.name for entry in layer.tensors.values()))

    def load_columns(self, name: str) -> SalientColumns:
        """Read the dense columns of one layer into memory of their own, on the CPU; int8 ones as float32.

        Args:
            name: a key of :attr:`columns`.

        Raises:
            KeyError: there is no such layer.
            CheckpointError: its tensors are malformed.
        """
        _check_name(name, f"a layer of {self.path} with salient columns", self.stored_columns)
        stored = self.stored_columns[name]
        return build_columns(stored, self.files.read(entry.name for entry in stored.entries.values()))

    def load_int8(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Read one head or embedding into memory of its own, on the CPU.

        Args:
            name: a key of :attr:`int8`.

        Returns:
            int8 ``[rows, columns]`` and float32 ``[rows]``; a row is its int8 values times its scale.

        Raises:
            KeyError: there is no such module.
            CheckpointError: a scale is not finite, or the tensors cannot be read.
        """
        _check_name(name, f"int8 rows of {self.path}", self.int8)
        weight, scale = (self.files.read_own(one) for one in int8_names(name))
        if not bool(torch.isfinite(scale).all()):
            raise CheckpointError(f"{self.path}: {name}: {INT8_SCALE} must be finite, got NaN or infinity")
        return weight, scale

    def load_tensor(self, name: str) -> torch.Tensor:
        """Return one dense tensor, in its stored dtype, memory-mapped.

        The tensor is a view of the whole mapped file: clone it to keep it, to pickle it, or to change it.

        Args:
            name: a key of :attr:`dense`.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: it cannot be read.
        """
        _check_name(name, f"a dense tensor of {self.path}", self.dense)
        return self.files.read([name])[name]

    def read_tensor(self, name: str) -> torch.Tensor:
        """Return one dense tensor, in its stored dtype, in memory of its own.

        Args and errors: as :meth:`load_tensor`.
        """
        _check_name(name, f"a dense tensor of {self.path}", self.dense)
        return self.files.read_own(name)

    def verify(self) -> dict[str, bool | None]:
        """Read every file of weights and compare it with its checksum.

        Returns:
            By file name: whether it is what was written, ``None`` where it holds no checksum.

        Raises:
            CheckpointError: a file cannot be read.
        """
        files = sorted({entry.file for entry in self.files.entries.values()})
        return {file.name: matches(file) if file.suffix == ".safetensors" else None for file in files}

    def tied(self) -> dict[str, str]:
        """Return absent tensors that the config ties to present ones.

        For example ``{"lm_head.weight": "model.embed_tokens.weight"}``.
        """
        config = self.config
        text = config.get("text_config")
        declared = config.get(
            "tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None
        )
        if declared is None:
            declared = config.get("model_type") in TIED_BY_DEFAULT
        matrices = [*self.dense, *(f"{name}.weight" for name in self.int8)]
        embedding = next((name for name in matrices if name.endswith(EMBEDDING_WEIGHTS)), None)
        if declared is not True or embedding is None:
            return {}
        masked = any(name.startswith(f"{MASKED_HEAD.rpartition('.')[0]}.") for name in self.dense)
        head = MASKED_HEAD if masked else CAUSAL_HEAD
        if f"{head}.weight" in matrices or head in self.layers or head in self.columns:
            return {}
        return {f"{head}.weight": embedding}

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.exists() and not path.is_symlink():
            return None
        return read_object(contained(self.path, name))

    def _examine(
        self, ours: bool
    ) -> tuple[dict[str, StoredLayer], dict[str, StoredColumns], dict[str, Int8Spec]]:
        found = find_layers(self.files.entries, self._read_ints, strict=ours)
        faults, unknown = found.faults, found.unknown
        self._other = bool(unknown) and not found.layers and self._other_method() is not None
        if unknown and not self._other:
            known = ", ".join(layout.name for layout in LAYOUTS)
            what = f"expected packed layers of a layout that is read ({known}), got what looks like others"
            faults = [f"{what}: {unknown[0]}", *unknown[1:], *faults]
        if faults:
            raise CheckpointError(f"{self.path}: {summary(faults)}")
        return found.layers, found.columns, found.int8

    def _other_method(self) -> str | None:
        """The ``quant_method`` of a quantization of another kind than those that are read here."""
        quantization = self.config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        return (
            str(method) if method not in (None, QUANT_METHOD, *(layout.name for layout in LAYOUTS)) else None
        )

    def _read_ints(self, entry: TensorEntry) -> list[int]:
        return [int(value) for value in self.files.read([entry.name])[entry.name].flatten()]

    def _format(self, ours: bool) -> str:
        layouts = {layer.layout for layer in self.stored.values()}
        if ours:
            foreign = sorted(layout.name for layout in layouts if not layout.ours)
            if foreign:
                raise CheckpointError(f"{self.path}: expected layers of the littlebit2 format, got {foreign}")
            return "littlebit2"
        # Single-stage layers may stand beside those of any layout.
        kinds = {layout for layout in layouts if layout.two_stage} or layouts
        if len(kinds) > 1:
            raise CheckpointError(
                f"{self.path}: expected layers of one layout, got {sorted(layout.name for layout in kinds)}"
            )
        return kinds.pop().name if kinds else "other" if self._other else "dense"

    def _settings(self, ours: bool) -> dict[str, Any]:
        """Quantization settings beside the tensors, with their file under ``source``."""
        found = authors_settings(self.config, self._json("littlebit_config.json"))
        files = {layer.layout.settings_file for layer in self.stored.values()} if not ours else set()
        for name in sorted(file for file in files if file is not None):
            settings = self._json(name)
            if settings and not found:
                found = {**settings, "source": name}
        return found

    def _remark(self) -> None:
        quantization = self.config.get("quantization_config")
        if quantization is not None and self.format != "littlebit2":
            method = quantization.get("quant_method")
            self.problems.append(f"config.json declares quant_method {method!r:.80}, which is not read")
        if self.format == "littlebit2" and quantization is None:
            self.problems.append("config.json has no quantization_config: ranks are taken from the tensors")
        for name, layer in self.stored.items():
            ranks = layer.spec.shape.ranks
            if ranks is not None and ranks != layer.stored_ranks:
                self.problems.append(
                    f"layer {name}: ranks {list(layer.stored_ranks)} are padded to {list(ranks)} "
                    "with latents of scale zero"
                )
        if str(self.config.get("model_type")).startswith(("phi3", "phi4")) and any(
            name.endswith(f".{FUSED['qkv_proj'][0]}") for name in (*self.layers, *self.columns)
        ):
            self.metadata["split_qkv"] = True
            self.problems.append(
                "the fused qkv_proj of the model is stored as q_proj, k_proj and v_proj, read as such"
            )
        if self.metadata.get("source") and self.format == "dense":
            self.problems.append("quantization settings were found, but no packed layer")


def int8_names(module: str) -> tuple[str, str]:
    """Full names of the rows and the scales of a module in int8."""
    prefix = module_prefix(module)
    return prefix + INT8_WEIGHT, prefix + INT8_SCALE


def _check_name(name: str, what: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise KeyError(f"name must be {what}, got {name!r}; {_some(known)}")


def _some(names: Mapping[str, object]) -> str:
    first = ", ".join(list(names)[:5]) or "none"
    return f"there are {len(names)}: {first}{', ...' if len(names) > 5 else ''}"


def looks_packed(directory: Path) -> bool:
    """Whether tensors in a directory look like packed weights, known or not; false where none can be read."""
    try:
        files = open_files(directory)
    except CheckpointError:
        return False
    found = has_packed(files.entries)
    files.close()
    return found


def open_checkpoint(path: str | Path, *, name: str = "path") -> Checkpoint:
    """Open a checkpoint directory and check everything that its headers and JSON files say.

    Args:
        path: a directory with safetensors files (or those of ``torch.save``) and config.json.
        name: what errors call ``path``: the argument through which it came.

    Raises:
        TypeError: ``path`` is no path.
        FileNotFoundError: there is no such path.
        NotADirectoryError: it is no directory.
        CheckpointError: the checkpoint is malformed, or of a newer format. The message names every tensor
            that is missing, unexpected or of a wrong shape (the first twenty of them).
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a str or a path, got {type(path).__name__}")
    directory = Path(path)
    if not directory.exists():
        raise FileNotFoundError(
            f"{name} must be the directory of a checkpoint, with config.json and weights; "
            f"{directory} does not exist{hub_hint(path)}"
        )
    if not directory.is_dir():
        raise NotADirectoryError(
            f"{name} must be the directory of a checkpoint, got the file {directory}: "
            "give the directory that holds it"
        )
    return Checkpoint(directory, open_files(directory))
