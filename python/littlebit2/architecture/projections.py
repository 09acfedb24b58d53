"""Which layers of a model share their input, by the names that model libraries give them."""

from __future__ import annotations

from torch import nn

from littlebit2_kernels import LinearGroup, LittleBitLinear, fuse_linears

from .names import PROJECTIONS

__all__ = ["fuse_projections"]


def fuse_projections(model: nn.Module, *, on_cpu: bool = False) -> list[LinearGroup]:
    """Fuse the packed projections of a model that share their input (:data:`.PROJECTIONS`), in place.

    ``littlebit2.load`` and ``from_pretrained`` do it by themselves; this is for models whose layers were
    quantized in memory. Names only suggest: layers that turn out to be called with different inputs, as in
    cross-attention, are computed one by one (:func:`littlebit2_kernels.fuse_linears`).

    Args:
        model: any module with :class:`~littlebit2_kernels.LittleBitLinear` layers.
        on_cpu: fuse on the CPU too, where nothing is gained.

    Returns:
        The groups, in the order of the model's modules; empty if nothing goes together.
    """
    groups = []
    for parent in model.modules():
        for names in PROJECTIONS:
            found = [
                child for name in names if isinstance(child := getattr(parent, name, None), LittleBitLinear)
            ]
            kinds = {(layer.in_features, layer.shape.single_stage) for layer in found}
            if len(found) >= 2 and len(kinds) == 1:
                groups.append(fuse_linears(found, on_cpu=on_cpu))
    return groups
