"""Which modules of a model are packed, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from littlebit2.architecture.experts import is_unknown_experts
from littlebit2.architecture.linears import EXCLUDED, HEAD, NOT_SELECTED, TIED, choose_linears
from littlebit2.architecture.select import given_patterns, is_selected
from littlebit2.architecture.transposed import TransposedLinear
from littlebit2.quantize import QuantConfig
from littlebit2.quantize.ranks import too_small

from .report import LeftDense, Reason, count_reasons

__all__ = ["Filter", "Selected", "Selection", "select_modules"]

#: Says of a module and its full name whether it is packed, as torchao's ``filter_fn``.
Filter = Callable[[nn.Module, str], bool]

#: Reasons of :func:`.choose_linears` that are not about the kind of the module.
_REASONS: dict[str, Reason] = {
    TIED: "tied",
    HEAD: "head",
    EXCLUDED: "pattern",
    NOT_SELECTED: "pattern",
}


@dataclass(frozen=True)
class Selected:
    """A linear module that is to be packed, with all names that it is registered under."""

    names: tuple[str, ...]
    linear: nn.Linear

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


@dataclass(frozen=True)
class Selection:
    """The linear modules of a model, in the order of ``named_modules``."""

    packed: tuple[Selected, ...]
    dense: tuple[LeftDense, ...]


def select_modules(
    model: nn.Module,
    config: QuantConfig,
    include: Sequence[str],
    exclude: Sequence[str],
    filter_fn: Filter | None,
    *,
    include_tied: bool,
) -> Selection:
    """Sort the linear modules of a model, without changing it.

    Args and errors: as for :func:`littlebit2.quantize_`.
    """
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    chosen, kept = choose_linears(model, include, exclude, include_tied=include_tied)
    packed, dense = [], []

    def reason(module: nn.Module, names: Sequence[str]) -> tuple[Reason, str] | None:
        found = {kept[name]: None for name in names if name in kept}
        # A module with several names is packed if one is included and none is excluded.
        if module not in chosen or EXCLUDED in found:
            first = EXCLUDED if EXCLUDED in found else next(iter(found))
            detail = _shared(module, names_of) if first == TIED else first
            return _REASONS.get(first, "kind"), detail
        assert isinstance(module, nn.Linear)  # as all that are chosen
        if is_lazy(module.weight):
            return "kind", "has no weight before its first call"
        if filter_fn is not None and not filter_fn(module, names[0]):
            return "filter", "filter_fn returned False"
        small = too_small(names[0], module.in_features, module.out_features, config)
        return None if small is None else ("budget", small)

    for module, names in names_of.items():
        if isinstance(module, nn.Linear):
            why = reason(module, names)
            if why is None:
                packed.append(Selected(tuple(names), module))
                continue
        elif (other := _other_kind(module)) is not None:
            excluded = not any(is_selected(name, include, exclude) for name in names)
            why = ("pattern", EXCLUDED) if excluded else ("kind", other)
        else:
            continue
        assert why is not None  # of what stays dense
        kind = type(module.source if isinstance(module, TransposedLinear) else module).__name__
        dense.append(LeftDense(names[0], kind, _weight_shape(module), *why))
    if not packed:
        raise ValueError(_nothing(names_of, dense, include, exclude))
    return Selection(tuple(packed), tuple(dense))


def _nothing(
    names_of: Mapping[nn.Module, object],
    dense: Sequence[LeftDense],
    include: Sequence[str],
    exclude: Sequence[str],
) -> str:
    """Say what was seen where nothing can be packed."""
    if dense:
        seen = f"{len(dense)} linear modules, all left dense: {count_reasons(dense)}"
        if any(one.reason == "budget" for one in dense):
            seen += f"; {next(one.detail for one in dense if one.reason == 'budget')}"
    else:
        kinds = sorted({type(module).__name__ for module in names_of})
        seen = f"none, only {', '.join(kinds[:8])}{', ...' if len(kinds) > 8 else ''}"
    given = given_patterns(include, exclude)
    return f"model must have an nn.Linear to pack, got {seen}{f' ({given})' if given else ''}"


def _shared(linear: nn.Module, names_of: Mapping[nn.Module, Sequence[str]]) -> str:
    """Name the tensor of another module that is the weight of a linear one."""
    for module, names in names_of.items():
        for key, parameter in module.named_parameters(recurse=False):
            if module is not linear and parameter is linear.weight:
                return f"shares its weight with {names[0]}.{key}"
    return TIED


def _other_kind(module: nn.Module) -> str | None:
    """Return why a module that holds a linear weight, but is no ``nn.Linear``, cannot be packed."""
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention has its projections in one parameter"
    if type(module).__name__ == "Conv1D" and len(_weight_shape(module)) == 2:
        return "Conv1D that shares its weight or computes something else than x W + b"
    if is_unknown_experts(module):
        return f"{type(module).__name__} holds experts in a form that is not packed"
    return None


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    weight = getattr(module, name, None)
    return () if weight is None or is_lazy(weight) else tuple(weight.shape)
