"""Dense matrices in int8 rows: ``weight_int8 [N, K]`` and ``weight_scale [N]`` in place of ``weight``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from littlebit2.checkpoint.headers import TensorEntry
from littlebit2.checkpoint.specs import Int8Spec

from .layout import Leaves
from .names import module_prefix

__all__ = ["INT8_SCALE", "INT8_WEIGHT", "check_int8", "take_int8"]

INT8_WEIGHT, INT8_SCALE = "weight_int8", "weight_scale"


def take_int8(modules: Mapping[str, dict[str, TensorEntry]]) -> dict[str, dict[str, TensorEntry]]:
    """Take the tensors of int8 rows out of ``modules``; return them by module path and leaf."""
    return {
        module: {leaf: leaves.pop(leaf) for leaf in (INT8_WEIGHT, INT8_SCALE) if leaf in leaves}
        for module, leaves in modules.items()
        if INT8_WEIGHT in leaves
    }


def check_int8(found: Mapping[str, Leaves]) -> tuple[dict[str, Int8Spec], list[str]]:
    """Check the headers of int8 rows.

    Args:
        found: from :func:`take_int8`.

    Returns:
        What they are, by module path, and faults, one line each.
    """
    specs: dict[str, Int8Spec] = {}
    faults: list[str] = []
    for name, leaves in found.items():
        weight, scale = leaves[INT8_WEIGHT], leaves.get(INT8_SCALE)
        wrong = []
        if weight.dtype != torch.int8 or len(weight.shape) != 2 or not weight.numel:
            wrong.append(
                f"{weight.file.name}: {weight.name} must be int8 [rows, columns], got {weight.dtype} "
                f"of shape {list(weight.shape)}"
            )
        elif scale is None:
            wrong.append(f"{module_prefix(name)}{INT8_SCALE} is missing")
        elif scale.dtype != torch.float32 or tuple(scale.shape) != weight.shape[:1]:
            wrong.append(
                f"{scale.file.name}: {scale.name} must be float32 [{weight.shape[0]}], got {scale.dtype} of "
                f"shape {list(scale.shape)}"
            )
        faults += wrong
        if not wrong:
            specs[name] = Int8Spec(name, *weight.shape)
    return specs, faults
