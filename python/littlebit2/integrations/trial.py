"""What becomes of every weight of a dense checkpoint, settled before any work: from headers and config.json.

The model is built without values, and transformers' own conversion says which tensors of the files its
modules come from. So a layer is chosen because it is a linear layer of the model, not because of its name,
and what could not be loaded or run afterwards is not packed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter

from littlebit2.architecture.expansion import expand, expanded
from littlebit2.architecture.experts import LittleBitExperts, is_unknown_experts
from littlebit2.architecture.linears import HEAD, TIED, dense_reasons
from littlebit2.architecture.names import CAUSAL_HEAD
from littlebit2.architecture.parts import ExpertPart, Load, Part, Transposed, Whole
from littlebit2.architecture.select import is_selected, keeps_heads_dense, output_heads
from littlebit2.architecture.shapes import DenseShape, Kind, LinearShape, ModelShapes
from littlebit2.architecture.tensors import FLOATS, LayerSource
from littlebit2.architecture.transposed import TransposedLinear
from littlebit2.checkpoint.formats.names import natural_order

from .names import Destination, FileNames
from .skeleton import skeleton

__all__ = ["Converted", "Trial", "outline", "try_out"]

Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

#: Names listed in one message.
_MOST_NAMES = 10


class Latest:
    """The latest conversion of a trial, which is kept because all experts of a layer come from one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: object = None
        self._load: object = None
        self._made: dict[str, torch.Tensor] = {}

    def of(self, one: Converted, load: Load) -> torch.Tensor:
        """Return the parameter of ``one``; convert unless this was done last, from the same files."""
        with self._lock:
            if self._sources is not one.sources or self._load != load:
                self._made = {}  # not two at a time
                converter = deepcopy(one.converter)
                for file, pattern in one.sources:
                    converter.add_tensor(one.first, file, pattern, load(file))  # type: ignore[arg-type]
                made = converter.convert(one.first, model=one.model, config=one.model.config)
                self._made = {
                    name: value[0] if isinstance(value, list) else value for name, value in made.items()
                }
                self._sources, self._load = one.sources, load
            return self._made[one.parameter]


@dataclass(frozen=True, eq=False)
class Converted:
    """A parameter that transformers makes of tensors of the files, or a part of it.

    Attributes:
        parameter: its name in the model.
        sources: tensors and the patterns of the converter that they match.
        first: name of the first parameter that the converter makes.
        converter: the conversion.
        model: the model without values that it asks for shapes.
        latest: what was converted last.
        part: what is taken of the parameter, of which it stands in the name; ``None`` for all of it.
    """

    parameter: str
    sources: tuple[tuple[str, str], ...]
    first: str
    converter: WeightConverter
    model: Any
    latest: Latest
    part: ExpertPart | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """All tensors that the converter needs."""
        return tuple(name for name, _ in self.sources)

    def read(self, load: Load) -> torch.Tensor:
        """Convert, and return the parameter or its part."""
        whole = self.latest.of(self, load)
        return (
            whole
            if self.part is None
            else self.part.read(lambda _, index=None: whole if index is None else whole[index])
        )


@dataclass
class Trial:
    """What becomes of the weights of a checkpoint.

    Attributes:
        layers: what can be packed, in the order of the files.
        dense: why other matrices stay dense, by the name of the module.
        notes: remarks for the user.
        changes: entries of config.json that the result needs.
        left_out: tensors that the model does not have.
        model: the model without values, its experts fused.
        parts: where the values of its parameters come from, by name.
    """

    layers: list[LayerSource] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    model: Any = None
    parts: dict[str, Part] = field(default_factory=dict)
    #: By group of tensors that go together: the tensors, and what they become in the model.
    groups: list[tuple[tuple[str, ...], dict[str, Part]]] = field(default_factory=list)
    #: Modules of experts by name.
    experts: tuple[str, ...] = ()
    #: Tensors that stay although a packed layer is made of them.
    kept: frozenset[str] = frozenset()

    def rest(self, packed: Sequence[LayerSource]) -> tuple[set[str], dict[str, Part]]:
        """Return which tensors the packed layers replace, and what else must be written in their stead.

        A tensor that several layers are parts of is replaced as a whole: those parts that stay dense are
        written on their own, under the names of the model.

        Args:
            packed: those of :attr:`layers` that are packed in the end.
        """
        modules = {layer.module for layer in packed}
        expanded = {name for name in self.experts if any(m.startswith(f"{name}.") for m in modules)}
        replaced: set[str] = set(self.left_out)
        extra: dict[str, Part] = {}
        for files, products in self.groups:
            owners = {product: product.rpartition(".")[0] for product in products}
            within = {_experts_of(owner) for owner in owners.values()} & expanded
            if not within and not modules & set(owners.values()):
                continue
            replaced.update(files)
            extra.update({name: part for name, part in products.items() if owners[name] not in modules})
        return replaced - self.kept, extra


def _experts_of(child: str) -> str:
    """The experts module of a projection ``<experts>.<i>.<projection>``."""
    return child.rsplit(".", 2)[0]


def try_out(
    config: Mapping[str, Any], tensors: Tensors, *, include: Sequence[str], exclude: Sequence[str]
) -> Trial:
    """Decide for every weight of a dense checkpoint whether it is packed, and if not, why.

    Args:
        config: content of config.json.
        tensors: shape and dtype of every tensor of the files.
        include: patterns of names that may be packed, in the files or in the model.
        exclude: patterns of names that stay dense; heads stay dense if those of heads are among them.

    Raises:
        UnknownModelError: transformers does not know the model type.
        ValueError: the model cannot be built, weights of the model are missing in the files or of another
            shape, or a head cannot be packed although it was asked for.
    """
    heads_dense = keeps_heads_dense(exclude)
    headed = any(CAUSAL_HEAD in name for name in tensors) or bool(config.get("tie_word_embeddings"))
    trial = Trial()
    model = skeleton(config, headed=headed)
    if not heads_dense and _has_tied_head(model):
        trial.changes = {"tie_word_embeddings": False}
        untied = skeleton({**config, **trial.changes}, headed=headed)
        if _has_tied_head(untied):
            raise ValueError(
                f"the head of {type(model).__name__} is always tied to another weight and cannot be packed: "
                "leave out --head packed (exclude heads)"
            )
        trial.notes.append("the head is packed on its own: tie_word_embeddings becomes false")
        embedding = _embedding_of(model)
        model = untied
    else:
        embedding = None
    trying = _Trying(trial, model, tensors, embedding)
    trying.run(include, exclude, heads_dense)
    trial.model, trial.parts = model, trying.parts
    return trial


def outline(
    config: Mapping[str, Any], tensors: Tensors | None, *, include: Sequence[str], exclude: Sequence[str]
) -> tuple[ModelShapes, Trial]:
    """Return the shapes of a model and what becomes of its weights, experts as layers of their own.

    Args:
        config: content of config.json.
        tensors: as for :func:`try_out`; ``None`` where there are no files: layers have the names of modules.
        include: as for :func:`try_out`.
        exclude: likewise.

    Raises:
        UnknownModelError, ValueError: as :func:`try_out`.
    """
    headed = tensors is None or any(CAUSAL_HEAD in name for name in tensors)
    model = skeleton(config, headed=headed or bool(config.get("tie_word_embeddings")))
    if tensors is None:
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
    trial = try_out(config, tensors, include=include, exclude=exclude)
    called = {layer.module: layer.name for layer in trial.layers}
    heads = output_heads(model)
    expand(model)
    linears: list[LinearShape] = []
    dense: list[DenseShape] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name in called or trial.dense.get(name) != TIED):
            shape = (module.in_features, module.out_features, module.bias is not None)
            linears.append(LinearShape(called.get(name, name), *shape, is_head=name in heads))
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and not (isinstance(module, nn.Linear) and leaf == "weight"):
                full = f"{name}.{leaf}".lstrip(".")
                dense.append(DenseShape(full, tuple(parameter.shape), _kind_of(module, parameter)))
            seen.add(id(parameter))
    tied_head = any(trial.dense.get(name) == TIED for name in heads)
    return ModelShapes(str(config["model_type"]), tuple(linears), tuple(dense), tied_head), trial


def _kind_of(module: nn.Module, parameter: nn.Parameter) -> Kind:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if parameter.dim() > 1:
        return "other"
    return "norm" if "norm" in type(module).__name__.lower() else "bias"


def _has_tied_head(model: nn.Module) -> bool:
    reasons = dense_reasons(model)
    return any(reasons.get(name) == TIED for name in output_heads(model))


def _embedding_of(model: Any) -> str | None:
    wanted = model.get_input_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is wanted), None)


class _Trying:
    """One run of :func:`try_out`."""

    def __init__(self, trial: Trial, model: Any, tensors: Tensors, embedding: str | None) -> None:
        self.trial = trial
        self.model = model
        self.tensors = tensors
        self.names = FileNames(model)
        self.embedding = embedding
        self.latest = Latest()
        self.to = self.names.destinations(tensors)
        #: Parameters of the model: where their values come from.
        self.parts: dict[str, Part] = {}
        #: Projections of experts that have a tensor of their own in the files.
        self.own: dict[str, Whole] = {}

    def run(self, include: Sequence[str], exclude: Sequence[str], heads_dense: bool) -> None:
        self._gather()
        self._check_missing()
        with expanded(self.model):
            self._choose(include, exclude, heads_dense)

    def _gather(self) -> None:
        groups: dict[str, list[tuple[str, Destination]]] = {}
        for file, destination in self.to.items():
            groups.setdefault(destination.parameter, []).append((file, destination))
        for parameter, members in groups.items():
            converter = members[0][1].converter
            files = tuple(file for file, _ in members)
            products: dict[str, Part] = {}
            if converter is None:
                products[parameter] = Whole(files[0])
            else:
                sources = tuple((file, str(one.pattern)) for file, one in members)
                for target in _targets(parameter, converter):
                    products[target] = Converted(
                        target, sources, parameter, converter, self.model, self.latest
                    )
            for file, destination in members:
                expert = self.names.expert(destination)
                if expert is not None:
                    self.own[".".join(map(str, expert)) + ".weight"] = Whole(file)
            known = {name: part for name, part in products.items() if name in self.names.parameters}
            self.parts.update(known)
            self.trial.groups.append((files, known))
        self.trial.left_out = tuple(
            file
            for file, destination in self.to.items()
            if not any(name in self.parts for name in self._names_of(destination))
            and not _matches(destination.parameter, self.model._keys_to_ignore_on_load_unexpected)
        )
        if self.trial.left_out:
            listed = _listed(self.trial.left_out)
            self.trial.notes.append(f"{type(self.model).__name__} has no {listed}: left out")

    @staticmethod
    def _names_of(destination: Destination) -> list[str]:
        if destination.converter is None:
            return [destination.parameter]
        return _targets(destination.parameter, destination.converter)

    def _check_missing(self) -> None:
        model = self.model
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        missing = [
            name
            for name in self.names.parameters
            if name not in self.parts
            and name not in tied
            and not _matches(name, model._keys_to_ignore_on_load_missing)
            and not name.endswith(("position_ids", "num_batches_tracked"))
        ]
        if self.embedding is not None:
            head = [f"{name}.weight" for name in output_heads(model)]
            for name in head:
                if name in missing and self.embedding in self.parts:
                    missing.remove(name)
                    self.parts[name] = self.parts[self.embedding]
                    files = self.parts[name].files
                    self.trial.kept = frozenset(files)
                    self.trial.groups.append((files, {name: self.parts[name]}))
        if missing:
            raise ValueError(f"the files lack weights of {type(model).__name__}: {_listed(missing)}")

    def _choose(self, include: Sequence[str], exclude: Sequence[str], heads_dense: bool) -> None:
        trial, model = self.trial, self.model
        reasons = dense_reasons(model)
        modules = dict(model.named_modules())
        trial.experts = tuple(name for name, one in modules.items() if isinstance(one, LittleBitExperts))
        for name in trial.experts:
            self._split(name, modules[name])
        position = {file: index for index, file in enumerate(sorted(self.tensors, key=natural_order))}
        chosen: list[tuple[int, LayerSource]] = []
        for name, module in modules.items():
            if not isinstance(module, nn.Linear):
                self._note_matrix(name, module)
                continue
            weight = self.parts.get(f"{name}.weight")
            if weight is None:
                trial.dense[name] = reasons.get(name, "has no weight of its own in the files")
                continue
            called = name if trial.kept & set(weight.files) else _name_of(weight, name)
            reason = reasons.get(name)
            if reason == HEAD and not heads_dense:
                reason = None
            if reason is None and not _selected({called, name}, include, exclude):
                reason = "not selected" if not _excluded({called, name}, exclude) else "excluded"
            if reason is not None:
                trial.dense[name] = reason
                continue
            self._check_weight(module, weight)
            if isinstance(module, TransposedLinear):
                weight = Transposed(weight)
            layer = LayerSource(
                name=called,
                in_features=module.in_features,
                out_features=module.out_features,
                weight=weight,
                bias=None if module.bias is None else self.parts.get(f"{name}.bias"),
                module=name,
            )
            chosen.append((position[weight.files[0]], layer))
        trial.layers = [layer for _, layer in sorted(chosen, key=lambda pair: pair[0])]

    def _split(self, name: str, experts: LittleBitExperts) -> None:
        """Make the fused tensors of an experts module available projection by projection."""
        layout = experts.layout
        for index in range(layout.experts):
            for projection in layout.projections:
                rows = layout.rows(projection)
                child = f"{name}.{index}.{projection}"
                fused = f"{name}.{layout.parameter(projection)}"
                for end, suffix in ((".weight", ""), (".bias", "_bias")):
                    whole = self.parts.get(fused + suffix)
                    if whole is None:
                        continue
                    file = whole.parameter if isinstance(whole, Converted) else whole.files[0]
                    part = ExpertPart(
                        file,
                        index,
                        (rows.start, rows.stop, rows.step),
                        layout.transposed and end == ".weight",
                    )
                    own = self.own.get(child + end)
                    if own is not None:
                        self.parts[child + end] = own
                    elif isinstance(whole, Converted):
                        self.parts[child + end] = Converted(
                            whole.parameter,
                            whole.sources,
                            whole.first,
                            whole.converter,
                            whole.model,
                            whole.latest,
                            part,
                        )
                    else:
                        self.parts[child + end] = part
        for _, products in self.trial.groups:
            for parameter in list(products):
                owner, _, leaf = parameter.rpartition(".")
                if owner != name:
                    continue
                plain, end = leaf.removesuffix("_bias"), ".bias" if leaf.endswith("_bias") else ".weight"
                children = [p for p in layout.projections if layout.parameter(p) == plain]
                split = {
                    child: self.parts[child]
                    for index in range(layout.experts)
                    for projection in children
                    if (child := f"{name}.{index}.{projection}{end}") in self.parts
                }
                if split:
                    del products[parameter]
                    products.update(split)

    def _note_matrix(self, name: str, module: nn.Module) -> None:
        """Say why matrices of modules that are no linear layers stay dense."""
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or (
                leaf != "weight" and parameter.dim() < 3 and min(parameter.shape) < 64
            ):
                continue
            kind = type(module).__name__
            if isinstance(module, nn.Embedding):
                reason = "embedding"
            elif isinstance(module, nn.modules.conv._ConvNd):
                reason = "convolution"
            elif is_unknown_experts(module):
                reason = f"{kind} holds experts in a form that is not packed"
            elif "Router" in kind or "Gate" in kind or "Gating" in kind:
                reason = "router or gate"
            else:
                reason = f"{kind} is no linear layer"
            self.trial.dense[name if leaf == "weight" else f"{name}.{leaf}".lstrip(".")] = reason

    def _check_weight(self, module: nn.Linear, weight: Part) -> None:
        for file in weight.files:
            shape, dtype = self.tensors[file]
            if dtype not in FLOATS:
                raise ValueError(
                    f"{file} must be float64, float32, float16 or bfloat16, got {dtype}: the model is "
                    "quantized already; start from its dense weights"
                )
            expected = (module.out_features, module.in_features)
            if isinstance(module, TransposedLinear):
                expected = expected[::-1]
            if isinstance(weight, Whole) and shape != expected:
                raise ValueError(
                    f"{file} must have shape {list(expected)}, as config.json says, got {list(shape)}"
                )


def _targets(parameter: str, converter: WeightConverter) -> list[str]:
    first = converter.target_patterns[0]
    return [parameter.replace(first, target) for target in converter.target_patterns]


def _name_of(weight: Part, module: str) -> str:
    if isinstance(weight, Whole) and weight.name.endswith(".weight"):
        return weight.name.removesuffix(".weight")
    return module


def _selected(names: set[str], include: Sequence[str], exclude: Sequence[str]) -> bool:
    return any(is_selected(name, include, ()) for name in names) and not _excluded(names, exclude)


def _excluded(names: set[str], exclude: Sequence[str]) -> bool:
    return any(is_selected(name, exclude, ()) for name in names)


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(list(names)[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
