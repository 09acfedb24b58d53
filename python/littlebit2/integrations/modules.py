"""Where the packed layers of a checkpoint go in a transformers model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from littlebit2.architecture.names import FUSED
from littlebit2.architecture.salient import SalientLinear
from littlebit2.checkpoint import CheckpointError, ColumnsSpec, LayerSpec
from littlebit2_kernels import LittleBitLinear

__all__ = [
    "FusedLinear",
    "PendingLinear",
    "Placement",
    "columns_of",
    "find_places",
    "fused_parents",
    "initialized",
    "layers_of",
    "spec_of",
    "variants",
]


class FusedLinear(nn.Module):
    """Several linear modules on one input, their outputs side by side: takes a fused projection's place.

    The parts are siblings of this module, registered with the same parent under the names that the
    checkpoint gives them; this module holds no tensors.

    Args:
        parent: the module that holds the parts.
        names: names of the parts, in the order of the fused outputs.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        # In a tuple, a module is not registered: its tensors must not appear twice in the state dict.
        self._parent = (parent,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to ``[..., N_1 + N_2 + ...]``."""
        # The parts that are there now: any of them may have been replaced, by an adapter for instance.
        (parent,) = self._parent
        return torch.cat([parent._modules[name](x) for name in self.names], dim=-1)  # type: ignore[misc]

    def extra_repr(self) -> str:
        """Names of the parts."""
        return ", ".join(self.names)


class PendingLinear(nn.Module):
    """Holds the place of a packed layer that is read after everything else; has no tensors to load.

    Code that initializes a family's modules reads attributes of linear children: ``weight`` and ``bias`` are
    there, without values, and marked as initialized, which transformers' initializers respect.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.in_features = spec.shape.in_features
        self.out_features = spec.shape.out_features
        # Plain attributes: registered tensors would be expected in the files.
        self.__dict__["weight"] = initialized(spec.shape.out_features, spec.shape.in_features)
        self.__dict__["bias"] = initialized(spec.shape.out_features) if spec.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raise: the layer was never loaded."""
        raise RuntimeError(f"layer {self.spec.name} was not loaded from its checkpoint")


@dataclass(frozen=True)
class Placement:
    """One packed layer and where it goes.

    Attributes:
        spec: the layer, under its name in the checkpoint.
        module: its name in the model.
        fused: name of the fused module whose part it is, or ``None``.
        columns: name of the layer in the checkpoint whose packed part it is, beside salient columns.
    """

    spec: LayerSpec
    module: str
    fused: str | None = None
    columns: str | None = None


def initialized(*shape: int) -> torch.Tensor:
    """Return a tensor without values that transformers' initializers leave alone."""
    tensor = torch.empty(shape, device="meta")
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def layers_of(model: nn.Module) -> dict[str, LittleBitLinear]:
    """Return the packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LittleBitLinear)}


def columns_of(model: nn.Module) -> dict[str, ColumnsSpec]:
    """Describe the salient columns of a model as checkpoints do, by name."""
    return {
        name: ColumnsSpec(name, module.out_features, len(module.salient_idx))
        for name, module in model.named_modules()
        if isinstance(module, SalientLinear)
    }


def spec_of(name: str, layer: LittleBitLinear) -> LayerSpec:
    """Describe a module as checkpoints do."""
    return LayerSpec(name, layer.shape, layer.bias is not None)


def find_places(
    model: nn.Module,
    layers: Mapping[str, LayerSpec],
    prefix: str = "",
    names: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Placement]:
    """Find the ``nn.Linear`` of ``model`` that each layer of a checkpoint replaces.

    Args:
        model: as built from its config, dense, with its experts expanded.
        layers: packed layers of the checkpoint by name.
        prefix: name of the base model inside a model with a head (``base_model_prefix``); checkpoints of
            one load into the other, as they do in transformers.
        names: modules of layers that are called otherwise in the model, from
            :meth:`.FileNames.modules`.
        columns: layers with salient columns, by the name of their packed part.

    Raises:
        CheckpointError: layers have no counterpart, or one of another shape; the message names them all.
    """
    modules = dict(model.named_modules())
    places: list[Placement] = []
    problems: list[str] = []
    parts: dict[str, list[Placement]] = {}
    for spec in layers.values():
        whole = (columns or {}).get(spec.name)
        looked = spec.name if whole is None else whole
        name = (names or {}).get(looked) or _in_model(looked, modules, prefix)
        target = modules.get(name)
        if isinstance(target, nn.Linear):
            places.append(Placement(spec, name, columns=whole))
            problems += _disagreement(spec, target)
            continue
        fused = _fused_of(name, modules)
        if fused is None:
            kind = "no module" if target is None else f"a {type(target).__name__}"
            problems.append(f"{spec.name}: the model has {kind} there, expected an nn.Linear")
            continue
        places.append(Placement(spec, name, fused, whole))
        parts.setdefault(fused, []).append(places[-1])
    problems += _claimed_twice(places)
    for fused, members in parts.items():
        problems += _fused_disagreement(fused, members, modules[fused])
    if problems:
        raise CheckpointError(
            f"{len(problems)} packed layers do not fit {type(model).__name__}: " + "; ".join(problems)
        )
    return places


def fused_parents(places: Iterable[Placement]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return, by name of each fused module, the name of its parent and the names of its parts."""
    found = {}
    for place in places:
        if place.fused is not None:
            parent, _, leaf = place.fused.rpartition(".")
            found[place.fused] = (parent, FUSED[leaf])
    return found


def variants(name: str, prefix: str) -> Iterator[str]:
    """Yield a name as it is, and with the prefix of the base model, if any, taken away and added."""
    yield name
    if prefix:
        yield name.removeprefix(f"{prefix}.")
        yield f"{prefix}.{name}"


def _in_model(name: str, modules: Mapping[str, nn.Module], prefix: str) -> str:
    for candidate in variants(name, prefix):
        if candidate in modules or _fused_of(candidate, modules) is not None:
            return candidate
    return name


def _fused_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    parent, _, leaf = name.rpartition(".")
    for fused, names in FUSED.items():
        full = f"{parent}.{fused}" if parent else fused
        if leaf in names and isinstance(modules.get(full), nn.Linear):
            return full
    return None


def _claimed_twice(places: Iterable[Placement]) -> list[str]:
    claims: dict[str, list[str]] = {}
    for place in places:
        claims.setdefault(place.module, []).append(place.spec.name)
    return [
        f"{module}: expected one layer of the checkpoint there, got {', '.join(names)}"
        for module, names in claims.items()
        if len(names) > 1
    ]


def _disagreement(spec: LayerSpec, linear: nn.Linear) -> list[str]:
    expected = (linear.in_features, linear.out_features, linear.bias is not None)
    got = (spec.shape.in_features, spec.shape.out_features, spec.bias)
    if expected == got:
        return []
    return [f"{spec.name}: (in_features, out_features, bias) must be {expected}, got {got}"]


def _fused_disagreement(fused: str, members: list[Placement], linear: nn.Module) -> list[str]:
    assert isinstance(linear, nn.Linear)
    names = FUSED[fused.rpartition(".")[2]]
    by_leaf = {place.module.rpartition(".")[2]: place.spec for place in members}
    missing = [name for name in names if name not in by_leaf]
    if missing:
        return [f"{fused}: the checkpoint lacks its parts {', '.join(missing)}"]
    specs = [by_leaf[name] for name in names]
    problems = [
        f"{spec.name}: (in_features, bias) must be {(linear.in_features, linear.bias is not None)}, "
        f"got {(spec.shape.in_features, spec.bias)}"
        for spec in specs
        if (spec.shape.in_features, spec.bias) != (linear.in_features, linear.bias is not None)
    ]
    total = sum(spec.shape.out_features for spec in specs)
    if total != linear.out_features:
        problems.append(
            f"{fused}: out_features of {', '.join(names)} must add up to {linear.out_features}, got {total}"
        )
    return problems
