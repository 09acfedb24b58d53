"""Where the tensors of a file go in a model: transformers' own conversion, asked instead of repeated.

Files keep the names that a family had when its first checkpoints were published; transformers renames,
splits, merges and stacks their tensors while it loads them (``transformers.core_model_loading``). Packed
layers do not go through that: they are brought to the module that the dense weight of the same name would
have reached.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from littlebit2.architecture.experts import ExpertsLayout, LittleBitExperts, experts_layout

from .modules import variants

__all__ = [
    "ConvertedAlready",
    "Destination",
    "FileNames",
    "HiddenTensors",
    "published_names",
    "published_state",
]

#: What hidden tensors are called while transformers loads; no pattern of a family matches it.
_HIDDEN = "littlebit2-packed"


@dataclass(frozen=True)
class Destination:
    """Where one tensor of a file goes.

    Attributes:
        parameter: full name of the model's parameter or buffer; the first one where a tensor is split.
        known: whether the model has it.
        converter: what makes the parameter from this tensor and others, ``None`` if it only gets a name.
        pattern: which of the converter's sources the tensor is.
        position: the number that the file's name has for the pattern's ``*``, such as the index of an expert;
            without one, the place among the tensors of the same parameter and pattern.
    """

    parameter: str
    known: bool
    converter: WeightConverter | None = None
    pattern: str | None = None
    position: int = 0

    @property
    def module(self) -> str | None:
        """Name of the module whose ``weight`` the tensor is, unchanged; ``None`` for anything else."""
        if not self.known or self.converter is not None or not self.parameter.endswith(".weight"):
            return None
        return self.parameter.removesuffix(".weight")


class FileNames:
    """Maps names of tensors in files to names in a model.

    Args:
        model: as it is built from its configuration, before any module is replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix: str = model.base_model_prefix
        self.parameters: dict[str, Any] = dict(model.state_dict())
        self.layouts: dict[str, ExpertsLayout] = {
            name: layout
            for name, module in model.named_modules()
            if not isinstance(module, LittleBitExperts) and (layout := experts_layout(module)) is not None
        }
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {
            pattern: converter for converter in self._converters for pattern in converter.source_patterns
        }

    def destinations(self, keys: Iterable[str]) -> dict[str, Destination]:
        """Return where each tensor of a file goes.

        Args:
            keys: all tensors of the checkpoint: some conversions depend on what else there is.
        """
        found: dict[str, Destination] = {}
        seen: Counter[tuple[str, str]] = Counter()
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = self._rename(key)
            if name not in self.parameters and key in self.parameters:
                name, pattern = key, None
            if pattern is None:
                found[key] = Destination(name, name in self.parameters)
                continue
            position = _number_in(key, pattern)
            if position is None:
                position = seen[name, pattern]
            found[key] = Destination(
                name, name in self.parameters, self._by_pattern[pattern], pattern, position
            )
            seen[name, pattern] += 1
        return found

    def _rename(self, key: str) -> tuple[str, str | None]:
        return rename_source_key(key, self._renamings, self._converters, self._prefix, self.parameters)

    def expert(self, destination: Destination) -> tuple[str, int, str] | None:
        """Return experts module, index and projection of a file with one tensor per expert and projection.

        ``None`` for tensors of anything else, and where the conversion does more than stack them.
        """
        converter = destination.converter
        owner, _, parameter = destination.parameter.rpartition(".")
        layout = self.layouts.get(owner)
        if converter is None or layout is None or layout.transposed or layout.interleaved:
            return None
        if not isinstance(converter.operations[0], MergeModulelist) or converter.operations[0].dim != 0:
            return None
        rest = converter.operations[1:]
        sources = converter.source_patterns
        if parameter == layout.first and layout.gated:
            joined = len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1
            if not joined or len(sources) != 2:
                return None
            projection = ("gate_proj", "up_proj")[sources.index(str(destination.pattern))]
        elif parameter in layout.projections and not rest and len(sources) == 1:
            projection = parameter
        else:
            return None
        return owner, destination.position, projection

    def modules(self, layers: Iterable[str], dense: Iterable[str], model: nn.Module) -> dict[str, str]:
        """Return the module of ``model`` that each packed layer of a file replaces, where there is one.

        Args:
            layers: names of the packed layers in the file.
            dense: names of its other tensors.
            model: with its experts expanded.
        """
        names = list(layers)
        modules = dict(model.named_modules())
        to = self.destinations([*dense, *(f"{name}.weight" for name in names)])
        renamed: dict[str, str] = {}
        for name in names:
            destination = to[f"{name}.weight"]
            expert = self.expert(destination)
            module = ".".join(map(str, expert)) if expert else destination.module
            if module is not None and module in modules:
                renamed[name] = module
        taken = Counter(renamed.values())
        found: dict[str, str] = {}
        for name in names:
            module = renamed.get(name)
            if module is None or taken[module] > 1:
                # Not a name of published files but of the module itself, as save_pretrained writes them.
                module = next((one for one in variants(name, self._prefix) if one in modules), module)
            if module is not None:
                found[name] = module
        return found


def _number_in(key: str, pattern: str) -> int | None:
    """The number in ``key`` for the one ``*`` of a pattern such as ``experts.*.w1.weight``."""
    before, star, after = pattern.replace("\\.", ".").partition("*")
    if not star:
        return None
    found = re.search(rf"{re.escape(before)}(\d+){re.escape(after)}", key)
    return int(found[1]) if found else None


def published_names(model: PreTrainedModel) -> dict[str, str]:
    """Return what files call the tensors of a model without values, where they have a tensor of their own.

    Args:
        model: as it is built from its configuration, before any module is replaced.
    """
    own = dict(model.state_dict())
    names = {id(tensor): name for name, tensor in own.items()}
    found = revert_weight_conversion(model, own)
    return {names[id(tensor)]: name for name, tensor in found.items() if id(tensor) in names}


class ConvertedAlready(list[Any]):
    """The conversions of a model whose tensors have their published names already; keeps the real ones."""

    def __init__(self, conversions: list[Any] | None) -> None:
        super().__init__()
        self.conversions = conversions


def published_state(model: Any, dense: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return dense tensors of a model as its published files hold them: renamed, split and merged.

    Args:
        model: whose ``_weight_conversions`` may be :class:`ConvertedAlready`.
        dense: by name in the model, without tied ones.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if not isinstance(conversions, ConvertedAlready):
        return revert_weight_conversion(model, dense)
    model._weight_conversions = conversions.conversions
    try:
        return revert_weight_conversion(model, dense)
    finally:
        model._weight_conversions = conversions


class HiddenTensors(WeightRenaming):
    """Takes tensors out of transformers' sight: it finds them unexpected, under one name that is ignored.

    Args:
        names: of the tensors in the files.
    """

    #: Pattern for ``_keys_to_ignore_on_load_unexpected``.
    ignored = _HIDDEN

    __slots__ = ("names",)

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        super().__init__(source_patterns=_HIDDEN, target_patterns=_HIDDEN)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the one name for hidden tensors, and every other key as it is."""
        return (_HIDDEN if source_key in self.names else source_key), None
