"""Quantization settings that stand in JSON beside the tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from littlebit2_kernels.format import FORMAT_VERSION

from .errors import CheckpointError
from .specs import ColumnsSpec, LayerSpec

__all__ = [
    "PACK",
    "QUANT_METHOD",
    "check_layers",
    "check_version",
    "is_ours",
    "quantization_config",
    "summary",
]

QUANT_METHOD = "littlebit2"
PACK = "i32-lsb-neg1"


def quantization_config(
    layers: Any, modules_to_not_convert: Any, columns: Any = (), int8: Any = ()
) -> dict[str, Any]:
    """See :func:`littlebit2.checkpoint.quantization_config`."""
    ranks: dict[str, list[int]] = {}
    single_stage: list[str] = []
    shares: dict[str, list[int]] = {}
    for spec in layers:
        shape = spec.shape
        if shape.ranks is None:
            single_stage.append(spec.name)
        else:
            ranks[spec.name] = list(shape.ranks)
        shared = shape.shares != tuple(range(shape.num_paths))
        if shared or (shape.single_stage and shape.num_paths > 1):
            shares[spec.name] = list(shape.shares)
    salient = {spec.name: spec.count for spec in columns}
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "pack": PACK,
        "ranks": ranks,
        "single_stage": single_stage,
        "shares": shares,
        "modules_to_not_convert": list(modules_to_not_convert),
        **({"salient_columns": salient} if salient else {}),
        **({"int8": list(int8)} if int8 else {}),
    }


def is_ours(config: Mapping[str, Any], where: str) -> bool:
    """Whether config.json declares this project's format.

    Raises:
        CheckpointError: ``quantization_config`` is not an object.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return False
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{where}: quantization_config must be an object, got {quantization!r:.80}")
    return bool(quantization.get("quant_method") == QUANT_METHOD)


def check_version(quantization: Mapping[str, Any], where: str) -> None:
    """Raise unless this reader knows the format version and the packing."""
    version = quantization.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: format_version must be a positive integer, got {version!r:.80}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version must be at most {FORMAT_VERSION}, the newest that this release reads, "
            f"got {version}: install a newer littlebit2-kernels"
        )
    if quantization.get("pack") != PACK:
        raise CheckpointError(f"{where}: pack must be {PACK!r}, got {quantization.get('pack')!r:.80}")


def check_layers(
    quantization: Mapping[str, Any],
    layers: Mapping[str, LayerSpec],
    columns: Mapping[str, ColumnsSpec],
    int8: Collection[str],
    where: str,
) -> None:
    """Raise unless ranks, shares, salient columns and int8 rows of the config are those of the tensors."""
    kinds: dict[str, type] = {
        "ranks": dict,
        "shares": dict,
        "salient_columns": dict,
        "single_stage": list,
        "int8": list,
    }
    given = {key: quantization.get(key, kind()) for key, kind in kinds.items()}
    for key, kind in kinds.items():
        if not isinstance(given[key], kind):
            what = "an object" if kind is dict else "a list"
            raise CheckpointError(f"{where}: {key} must be {what}, got {type(given[key]).__name__}")
    for key in ("single_stage", "int8"):
        if not all(isinstance(name, str) for name in given[key]):
            raise CheckpointError(f"{where}: {key} must hold names, got {given[key]!r:.80}")
    single_stage = given["single_stage"]
    faults = [
        f"int8 rows of {name!r:.200}: expected tensors, as the config says, got none"
        for name in given["int8"]
        if name not in int8
    ]
    faults += [f"int8 rows of {name}: expected in int8" for name in int8 if name not in given["int8"]]
    actual = quantization_config(layers.values(), [], columns.values())
    for key in ("ranks", "shares", "salient_columns"):
        declared, there = given[key], actual.get(key, {})
        for name in [*there, *(name for name in declared if name not in there)]:
            expected, got = declared.get(name), there.get(name)
            if expected != got:
                faults.append(f"{key} of layer {name}: expected {expected}, as the config says, got {got}")
    faults += [
        f"layer {name}: expected in single_stage, because it has no U_packed"
        for name in actual["single_stage"]
        if name not in single_stage
    ]
    faults += [
        f"layer {name!r:.200}: expected a single-stage layer, as the config says, got none"
        for name in single_stage
        if name not in actual["single_stage"]
    ]
    if faults:
        raise CheckpointError(f"{where}: {summary(faults)}")


def summary(faults: list[str], limit: int = 20) -> str:
    """Join fault lines into one message, without drowning the reader."""
    rest = len(faults) - limit
    more = [f"and {rest} more"] if rest > 0 else []
    return "; ".join([*faults[:limit], *more])
