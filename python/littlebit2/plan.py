"""What a model will weigh at a number of bits per weight, from its ``config.json`` and headers alone.

What is packed is decided as :func:`.quantize_checkpoint` does: by the model itself, which is built without
values (:mod:`.integrations.trial`). Where transformers is not installed, shapes come from
:mod:`.architecture.shapes`. Weights are read only where the ranks depend on their spectra. Sizes are in
bytes, GB are 1e9 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

from littlebit2_kernels.format import LayerShape

from ._messages import hub_hint
from .architecture.names import CAUSAL_HEAD
from .architecture.parts import Whole
from .architecture.select import (
    DEFAULT_EXCLUDE,
    INT8,
    KEEP,
    check_patterns,
    check_rows,
    is_selected,
    nothing_selected,
)
from .architecture.shapes import DenseShape, Kind, LinearShape, ModelShapes, model_shapes
from .architecture.tensors import LayerSource, select_layers
from .checkpoint import open_dense
from .quantize import QuantConfig
from .quantize.allocate import RankAllocation
from .quantize.budget import at_largest_rank
from .quantize.ranks import check_budget, layer_config, too_small

__all__ = ["LayerPlan", "ModelPlan", "load_config", "plan_model", "shipped_configs"]

#: Embeddings, norms, biases and dense layers, and the dense model it is compared with: fp16 or bf16.
_DENSE_BYTES = 2
_SCALE_BYTES = {"fp16": 2, "fp32": 4}

#: Files that a user may name instead of the configuration beside them.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class LayerPlan:
    """One packed layer.

    Attributes:
        name: module name.
        in_features: K.
        out_features: N.
        ranks: of every path.
        bias: entries of the bias.
        predicted_error: squared relative error to expect, where the ranks come from the spectra.
    """

    name: str
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    bias: int
    predicted_error: float | None = None

    @property
    def shape(self) -> LayerShape:
        """Sizes and structure of the packed layer."""
        return LayerShape(self.in_features, self.out_features, self.ranks)

    @property
    def counted_bpw(self) -> float:
        """Bits per weight as the papers count them."""
        return self.shape.counted_bpw

    @property
    def counted_bytes(self) -> float:
        """The papers' count in bytes of the whole layer."""
        return self.shape.counted_bits / 8

    @property
    def scale_entries(self) -> int:
        """Entries of in, out and latent scales."""
        return self.shape.scale_entries

    @property
    def word_bytes(self) -> int:
        """Bytes of sign words, rows padded to 32 bits."""
        return (self.shape.stored_bits - LayerShape.STORED_SCALE_BITS * self.scale_entries) // 8

    def stored_bytes(self, scales: str = "fp32") -> int:
        """Bytes of words and scales, bias excluded; ``scales`` is ``"fp32"`` (as loaded) or ``"fp16"``."""
        return self.word_bytes + self.scale_entries * _SCALE_BYTES[scales]

    @property
    def at_largest_rank(self) -> bool:
        """Whether every path has rank ``min(K, N)``, rounded up to 8: the most that bits per weight buy."""
        return at_largest_rank(self.in_features, self.out_features, self.ranks)

    @property
    def stored_bpw(self) -> float:
        """Bits per weight that the layer holds in memory, float32 scales, bias excluded."""
        return self.shape.stored_bpw

    def as_dict(self) -> dict[str, Any]:
        """Return the plan of the layer as JSON values."""
        names = (
            "counted_bpw",
            "counted_bytes",
            "word_bytes",
            "scale_entries",
            "stored_bpw",
            "at_largest_rank",
        )
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class ModelPlan:
    """A whole model.

    Attributes:
        shapes: its tensors.
        layers: what is packed, in model order.
        left_dense: linear layers that are not packed: heads, excluded ones, and those too small for the bits.
        reasons: names of matrices that stay dense, by why they do; empty where the model was not built.
        notes: remarks for the user.
        int8: names of modules in int8 rows, by what they are: ``"heads"`` and ``"embeddings"``.
    """

    shapes: ModelShapes
    layers: tuple[LayerPlan, ...]
    left_dense: tuple[LinearShape, ...]
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    int8: Mapping[str, str] = field(default_factory=dict)

    def bytes(self) -> dict[str, float]:
        """Return the parts and the totals.

        Parts: ``linear_fp16`` (the packed layers before), ``signs_and_scales_counted`` (the papers' count),
        ``words``, ``scales_fp16``, ``scales_fp32``, ``embeddings``, ``norms``, ``biases``, ``heads`` and
        ``other_matrices`` (dense linear layers, convolutions and the like), the last five in fp16 but for
        int8 rows. Totals: ``model_fp16`` (the dense model); ``total_counted`` (counted bits and all else);
        ``total_fp16_scales`` and ``total`` (words and scales, float32 as loaded, and all dense tensors);
        ``total_without_embeddings`` (``total`` without embeddings and head).
        """
        linear = sum(layer.in_features * layer.out_features for layer in self.layers)
        scales = sum(layer.scale_entries for layer in self.layers)
        parts = {
            "linear_fp16": float(linear * _DENSE_BYTES),
            "signs_and_scales_counted": sum(layer.counted_bytes for layer in self.layers),
            "words": float(sum(layer.word_bytes for layer in self.layers)),
            "scales_fp16": float(scales * _SCALE_BYTES["fp16"]),
            "scales_fp32": float(scales * _SCALE_BYTES["fp32"]),
            "embeddings": self._dense_bytes("embedding"),
            "norms": self._dense_bytes("norm"),
            "biases": self._dense_bytes("bias") + self._biases(),
            "heads": self._linear_bytes(is_head=True),
            "other_matrices": self._linear_bytes(is_head=False) + self._dense_bytes("other"),
        }
        dense = sum(parts[name] for name in ("embeddings", "norms", "biases", "heads", "other_matrices"))
        packed = parts["words"] + parts["scales_fp32"]
        return {
            **parts,
            "model_fp16": parts["linear_fp16"] + dense + self._saved_by_int8(),
            "total_counted": parts["signs_and_scales_counted"] + dense,
            "total_fp16_scales": parts["words"] + parts["scales_fp16"] + dense,
            "total": packed + dense,
            "total_without_embeddings": packed + dense - parts["embeddings"] - parts["heads"],
        }

    @property
    def counted_bpw(self) -> float:
        """Counted bits per weight over all packed layers."""
        return 8 * sum(layer.counted_bytes for layer in self.layers) / self._weights()

    @property
    def stored_bpw(self) -> float:
        """Stored bits per weight over all packed layers, float32 scales."""
        return 8 * sum(layer.stored_bytes() for layer in self.layers) / self._weights()

    def _weights(self) -> int:
        return sum(layer.in_features * layer.out_features for layer in self.layers)

    def _dense_bytes(self, kind: str) -> float:
        tensors: Sequence[DenseShape] = self.shapes.dense
        return float(sum(self._bytes_of(t.name, t.shape) for t in tensors if t.kind == kind))

    def _linear_bytes(self, *, is_head: bool) -> float:
        chosen = (s for s in self.left_dense if s.is_head == is_head)
        return float(sum(self._bytes_of(f"{s.name}.weight", (s.out_features, s.in_features)) for s in chosen))

    def _bytes_of(self, name: str, shape: Sequence[int]) -> int:
        if name.removesuffix(".weight") in self.int8.values():
            return shape[0] * (shape[1] + _SCALE_BYTES["fp32"])
        return prod(shape) * _DENSE_BYTES

    def _saved_by_int8(self) -> float:
        matrices = {t.name: tuple(t.shape) for t in self.shapes.dense}
        matrices |= {f"{s.name}.weight": (s.out_features, s.in_features) for s in self.left_dense}
        return float(
            sum(prod(shape) * _DENSE_BYTES - self._bytes_of(name, shape) for name, shape in matrices.items())
        )

    def _biases(self) -> float:
        return float(sum(s.out_features for s in self.shapes.linears if s.bias) * _DENSE_BYTES)


def plan_model(
    source: str | Path | Mapping[str, Any],
    config: QuantConfig,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    head: str = KEEP,
    embedding: str = KEEP,
    allocation: Mapping[str, RankAllocation] | None = None,
) -> ModelPlan:
    """Plan the quantization of a model.

    Args:
        source: as for :func:`load_config`, or the configuration itself. With a directory that holds weights,
            their headers count too, and layers have the names that the result will have.
        config: bits per weight or ranks, paths, ``kv_factor``.
        include: shell-style pattern or patterns of linear layers to pack.
        exclude: likewise, of layers that stay dense; wins.
        head: ``"keep"`` or ``"int8"``, as for :func:`.quantize_checkpoint`.
        embedding: likewise.
        allocation: ranks by layer where they depend on the weights (``budget="spectral"``, ``energy``), from
            :func:`littlebit2.offline.measure_ranks`.

    Raises:
        FileNotFoundError: there is no such file or shipped configuration.
        ValueError: the configuration is of an unknown type or incomplete, no layer is selected, or the budget
            fits none of them or is more than any can use.
    """
    includes, excludes = check_patterns("include", include), check_patterns("exclude", exclude)
    check_rows(head, embedding)
    shapes, chosen, dense_by, notes, model = _outline(source, includes, excludes)
    int8: dict[str, str] = {}
    if (head, embedding) != (KEEP, KEEP):
        if model is None:
            raise ValueError("head and embedding can be int8 only in a model that transformers can build")
        from .architecture.int8 import find_rows  # noqa: PLC0415  # imports the kernels

        rows = find_rows(model, head=head == INT8, embedding=embedding == INT8)
        named = {"heads": rows.head, "embeddings": rows.embedding}
        int8 = {kind: name for kind, name in named.items() if name is not None}
    selected = [shape for shape in shapes.linears if shape.name in chosen]
    if not selected:
        raise ValueError(nothing_selected(includes, excludes))
    small = {
        shape: too_small(shape.name, shape.in_features, shape.out_features, config) for shape in selected
    }
    packed = [shape for shape in selected if small[shape] is None]
    if not packed:
        raise ValueError(small[selected[0]])
    dense = [shape for shape in shapes.linears if small.get(shape, "not selected") is not None]
    check_budget(config, ((shape.name, shape.in_features, shape.out_features) for shape in packed))
    layers = tuple(_plan_layer(shape, config, (allocation or {}).get(shape.name)) for shape in packed)
    reasons: dict[str, list[str]] = {}
    for name, reason in dense_by.items():
        reasons.setdefault(reason, []).append(name)
    if dense_by:
        reasons.setdefault("too small for the budget", []).extend(
            shape.name for shape in selected if small[shape] is not None
        )
    listed = {reason: tuple(names) for reason, names in reasons.items() if names}
    return ModelPlan(shapes, layers, tuple(dense), listed, tuple(notes), int8)


_Outline = tuple[ModelShapes, set[str], Mapping[str, str], Sequence[str], Any]


def _outline(
    source: str | Path | Mapping[str, Any], include: tuple[str, ...], exclude: tuple[str, ...]
) -> _Outline:
    """Return shapes, layers to pack, why other matrices stay dense, remarks, and the model or ``None``."""
    config = source if isinstance(source, Mapping) else load_config(source)
    tensors = None
    if not isinstance(source, Mapping) and _has_weights(Path(source)):
        with open_dense(source) as checkpoint:
            config, tensors = checkpoint.config, checkpoint.dense
    try:
        from .integrations.skeleton import UnknownModelError  # noqa: PLC0415  # needs transformers
        from .integrations.trial import outline  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        notes = ["transformers is not installed: layers are chosen by the names of their tensors alone"]
        return _outline_by_names(model_shapes(config), include, exclude, notes)
    try:
        shapes, trial = outline(config, tensors, include=include, exclude=exclude)
    except UnknownModelError as error:
        if tensors is None:
            raise ValueError(f"{error}; give the directory of the model, with its weights") from error
        notes = [f"{error}; layers are chosen by the names of their tensors alone"]
        sources = select_layers(tensors, config, include=include, exclude=exclude)
        return _shapes_of_files(config, tensors, sources), {one.name for one in sources}, {}, notes, None
    return shapes, {layer.name for layer in trial.layers}, trial.dense, trial.notes, trial.model


def _has_weights(path: Path) -> bool:
    return path.is_dir() and any(file.suffix in _WEIGHT_SUFFIXES for file in path.iterdir())


def _outline_by_names(
    shapes: ModelShapes, include: tuple[str, ...], exclude: tuple[str, ...], notes: list[str]
) -> _Outline:
    chosen = {
        shape.name
        for shape in shapes.linears
        if is_selected(shape.name, include, exclude) and (not shape.is_head or shape.name == CAUSAL_HEAD)
    }
    return shapes, chosen, {}, notes, None


def _shapes_of_files(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], Any]], layers: list[LayerSource]
) -> ModelShapes:
    linears = [
        LinearShape(one.name, one.in_features, one.out_features, one.bias is not None) for one in layers
    ]
    owned = {part.name for one in layers for part in (one.weight, one.bias) if isinstance(part, Whole)}
    dense = []
    for name, (shape, _) in tensors.items():
        kind: Kind = "embedding" if "embed" in name else "norm" if len(shape) < 2 else "other"
        if name not in owned:
            dense.append(DenseShape(name, tuple(shape), kind))
    return ModelShapes(str(config.get("model_type")), tuple(linears), tuple(dense), tied_head=False)


def _plan_layer(shape: LinearShape, config: QuantConfig, allocation: RankAllocation | None) -> LayerPlan:
    k, n = shape.in_features, shape.out_features
    ranks = layer_config(shape.name, k, n, config, allocation).ranks
    assert ranks is not None  # layer_config settles them
    return LayerPlan(
        name=shape.name,
        in_features=k,
        out_features=n,
        ranks=ranks,
        bias=n if shape.bias else 0,
        predicted_error=None if allocation is None else allocation.predicted_error,
    )


def shipped_configs() -> tuple[str, ...]:
    """Return the names of the configurations that come with the package."""
    folder = resources.files(__package__) / "configs"
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def load_config(source: str | Path) -> dict[str, Any]:
    """Read a model's configuration.

    Args:
        source: a name of :func:`shipped_configs` (in any case), a ``config.json``, or a directory with one.

    Raises:
        FileNotFoundError: it is none of these.
        ValueError: the file holds weights, or no JSON object.
    """
    path = Path(source)
    name = str(source).lower()
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists() and name in shipped_configs():
        path = Path(str(resources.files(__package__) / "configs" / f"{name}.json"))
    if not path.is_file():
        raise FileNotFoundError(
            f"{source}: expected a config.json, a directory with one, or one of "
            f"{', '.join(shipped_configs())}{hub_hint(source)}"
        )
    if path.suffix in _WEIGHT_SUFFIXES:
        raise ValueError(f"{path}: must be a config.json or a directory with one, got a file of weights")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(config).__name__}")
    return config
