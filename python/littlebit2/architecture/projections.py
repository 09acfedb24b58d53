"""Which layers of a model are computed together: by what its code says, and by the names of layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from littlebit2_kernels import LinearGroup, LittleBitLinear, fuse_linears, unfuse_linears

from .decoder import fuse_modules, unfuse_modules
from .names import PROJECTIONS

__all__ = ["Fusion", "fuse_projections", "unfuse_projections"]


@dataclass(frozen=True)
class Fusion:
    """What :func:`fuse_projections` found.

    Attributes:
        modules: what each recognized module computes in one call, by its name, such as
            ``"q_proj + k_proj + v_proj"``, ``"gate_proj + up_proj > silu > down_proj"`` and
            ``"input_layernorm > self_attn > residual"``.
        groups: layers that share their input by their names, for calls that a recognized module does not do.
    """

    modules: dict[str, tuple[str, ...]]
    groups: tuple[LinearGroup, ...]


def fuse_projections(model: nn.Module, *, on_cpu: bool = False) -> Fusion:
    """Let a model with packed layers compute in few calls, in place.

    ``littlebit2.load`` and ``from_pretrained`` do it by themselves; this is for models whose layers were
    quantized in memory. Recognized are, from the source of the model's classes and from what their modules
    compute: MLPs, projections that share their input, RMS norms before them, and residuals added to their
    outputs. Layers that share their input by their names (:data:`.PROJECTIONS`) are grouped
    (:func:`littlebit2_kernels.fuse_linears`), for CUDA.

    Recognized modules get a subclass of their class. They keep parameters, buffers, children, hooks, names
    and ``state_dict``. The module's own computation runs where a part has a hook or was replaced, in calls
    that need a gradient, under autocast, for tensors of other kinds, and in the first call on a CPU, in which
    layers prepack themselves. Results are those of the modules within rounding. Copies and pickles are not
    fused.

    Args:
        model: any module with :class:`~littlebit2_kernels.LittleBitLinear` layers.
        on_cpu: group layers by their names on the CPU too, where nothing is gained.

    Returns:
        What was found, in the order of the model's modules.
    """
    modules = fuse_modules(model)
    groups = []
    for parent in model.modules():
        for names in PROJECTIONS:
            found = [
                child for name in names if isinstance(child := getattr(parent, name, None), LittleBitLinear)
            ]
            kinds = {(layer.in_features, layer.shape.single_stage) for layer in found}
            if len(found) >= 2 and len(kinds) == 1:
                groups.append(fuse_linears(found, on_cpu=on_cpu))
    return Fusion(modules, tuple(groups))


def unfuse_projections(model: nn.Module) -> None:
    """Undo :func:`fuse_projections`: every module of ``model`` is of its own class again."""
    unfuse_modules(model)
    unfuse_linears([module for module in model.modules() if isinstance(module, LittleBitLinear)])
