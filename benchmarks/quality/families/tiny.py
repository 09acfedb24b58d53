"""Tiny configurations of every model type: whatever sizes a configuration has, shrunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .sizes import IN_STAGES, OVERRIDES, SIZES, by_rule, is_layer_count, is_stage_list

__all__ = ["tiny_configs"]

#: Fields that a configuration writes but that are no sizes.
_SKIPPED = frozenset(
    {
        "model_type",
        "transformers_version",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "per_layer_config",
    }
)
#: A backbone in the place of those of other packages.
_RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 24, 32, 48],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
#: Most layers of a stack with layers of several kinds.
_MOST_LAYERS = 4


def tiny_configs(model_type: str) -> Iterator[tuple[Any, bool]]:
    """Yield configurations of ``model_type`` with small sizes, parts included, from most to least shrunk.

    With each comes whether it is a last resort, of which only the number of layers is small.

    Raises:
        Exception: none is accepted; what the library said of the first.
    """
    kind = CONFIG_MAPPING[model_type]
    first: Exception | None = None
    accepted = 0
    seen = []
    for way in _WAYS:
        try:
            fields = _overridden(way.fields(kind()), OVERRIDES.get(model_type, {}))
            if fields in seen:
                continue
            seen.append(fields)
            config = kind(**deepcopy(fields))
        except Exception as error:  # whatever its checks raise
            first = first or error
            continue
        accepted += 1
        yield config, not way.dims
    if not accepted and first is not None:
        raise first


def _overridden(fields: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for path, value in overrides.items():
        *parts, name = path.split(".")
        where = fields
        for part in parts:
            where = where.setdefault(part, {})
        where[name] = value
    return fields


@dataclass(frozen=True)
class _Shrinking:
    """One way to shrink a configuration.

    Attributes:
        rules: whether fields that the table of sizes lacks follow the rules for names.
        lists: whether lists with an entry for each layer are cut; else they are left for the library to make.
        dims: whether all sizes are shrunk, or only how many layers, experts and tokens there are.
        fill: whether sizes that a configuration leaves open are filled in.
    """

    rules: bool = True
    lists: bool = True
    dims: bool = True
    fill: bool = False

    def fields(self, config: Any) -> dict[str, Any]:
        """Return the fields that differ from those of ``config``, those of its parts included."""
        values = {
            name: value for name, value in vars(config).items() if name[0] != "_" and name not in _SKIPPED
        }
        layers = _layer_lists(config, values)
        stages = {len(value) for name, value in values.items() if is_stage_list(name, value)}
        chosen = _chosen_layers(list(layers.values())) if self.lists else []
        fields: dict[str, Any] = {}
        for name, value in values.items():
            if getattr(value, "model_type", None) == "timm_backbone":
                fields.update(_RESNET)  # needs a package
            elif isinstance(value, transformers.PreTrainedConfig):
                fields[name] = {**self.fields(value), "model_type": value.model_type}
            elif name == "rope_parameters" and isinstance(value, dict):
                fields[name] = self._rope(value, _head_dim(values))
            elif isinstance(value, (list, tuple)) and name in layers:
                if self.lists:
                    fields[name] = [value[index] for index in chosen]
            else:
                small = self._small(name, value, stages)
                if small is not value:
                    fields[name] = small
        fields.update(_asked_for(config, values, fields))
        ungrouped = values.get("num_attention_heads") == values.get("num_key_value_heads")
        if ungrouped and fields.get("num_attention_heads"):
            fields["num_key_value_heads"] = fields["num_attention_heads"]
        if chosen:
            fields.update({name: len(chosen) for name in fields if name in _counts(config)})
        return fields

    def _small(self, name: str, value: Any, stages: set[int]) -> Any:
        in_stages = name in IN_STAGES or (is_layer_count(name) and isinstance(value, int) and value in stages)
        if stages and in_stages and self.rules and self.dims:
            # Every stage halves the picture: patches stay, and stages are not layers.
            return IN_STAGES.get(name, value)
        if value is None and (name in ("pad_token_id", "prediction_length") or self.fill):
            return SIZES.get(name)
        if isinstance(value, bool) or value is None:
            return value
        if not self.dims and not (
            is_layer_count(name) or "vocab" in name or "expert" in name or name.endswith("_token_id")
        ):
            return value
        if isinstance(value, int) and name in SIZES:
            return SIZES[name]
        return by_rule(name, value) if self.rules else value

    def _rope(self, value: dict[str, Any], head_dim: float | None) -> dict[str, Any]:
        """Shrink the sections of a multimodal rotary embedding with the heads; say a base where none is."""
        if any(isinstance(one, dict) for one in value.values()):
            return {
                name: self._rope(one, head_dim) if isinstance(one, dict) else one
                for name, one in value.items()
            }
        rope = dict(value)
        if rope.get("rope_theta", 0) is None:
            rope["rope_theta"] = 10000.0
        sections = rope.get("mrope_section")
        if sections and head_dim and self.dims:
            scale = SIZES["head_dim"] / head_dim
            small = [max(1, round(one * scale)) for one in sections[1:]]
            rope["mrope_section"] = [max(1, round(sum(sections) * scale) - sum(small)), *small]
        elif self.fill and self.dims:
            half = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1)) // 2
            rope["mrope_section"] = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        return rope


def _head_dim(values: dict[str, Any]) -> float | None:
    """Size of a head before it is shrunk."""
    size, hidden, heads = (values.get(n) for n in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(size, int):
        return size
    return hidden / heads if isinstance(hidden, int) and isinstance(heads, int) else None


def _asked_for(config: Any, values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Fields that keep the layers of a backbone whose outputs are asked for."""
    indices = list(getattr(config, "_out_indices", None) or ())
    kept: dict[str, Any] = {"out_indices": list(indices)} if indices else {}
    for name, value in values.items():
        if name.endswith("out_indices") and isinstance(value, (list, tuple)):
            indices += value
    for name in [one for one in fields if indices and one in _counts(config)]:
        kept[name] = min(values[name], max(fields[name], 1 + max(map(abs, indices))))
    return kept


def _counts(config: Any) -> set[str]:
    """Names of the field that says how many layers a configuration has."""
    other = (getattr(config, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers")
    return {other, "num_hidden_layers"}


def _layer_lists(config: Any, values: dict[str, Any]) -> dict[str, Sequence[Any]]:
    """Fields that have one entry for each layer."""
    counts = {values[name] for name in _counts(config) if isinstance(values.get(name), int)}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (list, tuple))
        and len(value) in counts
        and len(value) > 1
        and not is_stage_list(name, value)
    }


def _chosen_layers(lists: Sequence[Sequence[Any]]) -> list[int]:
    """Return which layers to keep, so that there is one of each kind; at least two."""
    if not lists:
        return []
    kinds: set[tuple[int, str]] = set()
    chosen: list[int] = []
    for index in range(len(lists[0])):
        new = {(which, str(one[index])) for which, one in enumerate(lists)} - kinds
        if new and len(chosen) < _MOST_LAYERS:
            kinds |= new
            chosen.append(index)
    return sorted({*chosen, *([len(lists[0]) - 1] if len(chosen) < 2 else [])})


#: Ways to shrink, most likely to give a small model that runs first.
_WAYS = (
    _Shrinking(),
    _Shrinking(lists=False),
    _Shrinking(fill=True),
    _Shrinking(rules=False),
    _Shrinking(rules=False, lists=False),
    _Shrinking(rules=False, fill=True),
    _Shrinking(rules=False, lists=False, fill=True),
    _Shrinking(dims=False),
    _Shrinking(dims=False, lists=False),
)
