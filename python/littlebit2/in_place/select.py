"""Which modules of a model are packed, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from littlebit2.architecture.linears import HEAD, TIED, dense_reasons
from littlebit2.architecture.select import is_selected, keeps_heads_dense, output_heads, tied_names
from littlebit2.quantize import QuantConfig
from littlebit2.quantize.budget import scales_bpw
from littlebit2.quantize.ranks import affordable

from .report import LeftDense, Reason, count_reasons

__all__ = ["Filter", "Selected", "Selection", "select_modules"]

#: Says of a module and its full name whether it is packed, as torchao's ``filter_fn``.
Filter = Callable[[nn.Module, str], bool]


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
    """The linear modules of a model."""

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
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model must hold its linear modules below its root, got an nn.Linear itself; "
            "littlebit2.quantize_linear quantizes one layer"
        )
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    tied = {} if include_tied else _partners(model, names_of)
    heads = output_heads(model) if keeps_heads_dense(exclude) else set()
    unsupported = _unsupported(model, names_of)
    packed, dense = [], []

    def reason(module: nn.Module, names: list[str]) -> tuple[Reason, str] | None:
        if module in tied:
            return "tied", f"shares its weight with {tied[module]}"
        if heads.intersection(names):
            return "head", "is the model's output head"
        for name in names:
            if not is_selected(name, ("*",), exclude):
                return "pattern", f"{name} matches exclude={list(exclude)}"
        if not any(is_selected(name, include, ()) for name in names):
            return "pattern", f"does not match include={list(include)}"
        if module in unsupported:
            return "kind", unsupported[module]
        assert isinstance(module, nn.Linear)  # all others are in unsupported
        if filter_fn is not None and not filter_fn(module, names[0]):
            return "filter", "filter_fn returned False"
        if not affordable(names[0], module.in_features, module.out_features, config):
            assert config.paths is not None  # set by QuantConfig
            scales = scales_bpw(module.in_features, module.out_features, config.paths)
            return "budget", f"its scales alone take {scales:.3g} bits per weight of bpw={config.bpw:g}"
        return None

    for module, names in names_of.items():
        if not isinstance(module, nn.Linear) and module not in unsupported:
            continue
        found = reason(module, names)
        if found is None:
            assert isinstance(module, nn.Linear)  # reason() gives one for all others
            packed.append(Selected(tuple(names), module))
        else:
            dense.append(LeftDense(names[0], type(module).__name__, _weight_shape(module), *found))
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
        if all(one.reason == "budget" for one in dense):
            seen += f"; {dense[0]}; give more bits per weight, fewer paths or explicit ranks"
    else:
        kinds = sorted({type(module).__name__ for module in names_of})
        seen = f"none, only {', '.join(kinds[:8])}{', ...' if len(kinds) > 8 else ''}"
    return (
        f"model must have an nn.Linear to pack, got {seen} (include={list(include)}, exclude={list(exclude)})"
    )


def _partners(model: nn.Module, names_of: Mapping[nn.Module, Sequence[str]]) -> dict[nn.Module, str]:
    """Return the linear modules whose weight another module holds too, with the name of that tensor."""
    found = {}
    for name in tied_names(model):
        linear = model.get_submodule(name)
        found[linear] = next(
            (
                f"{names[0]}.{key}".lstrip(".")
                for module, names in names_of.items()
                for key, parameter in module.named_parameters(recurse=False)
                if module is not linear and parameter is linear.weight
            ),
            "another module",
        )
    return found


def _unsupported(model: nn.Module, names_of: Mapping[nn.Module, Sequence[str]]) -> dict[nn.Module, str]:
    """Return the modules that hold a linear weight but cannot be replaced, with the reason."""
    reasons = {name: why for name, why in dense_reasons(model).items() if why not in (HEAD, TIED)}
    found: dict[nn.Module, str] = {}
    for module, names in names_of.items():
        if isinstance(module, nn.MultiheadAttention):
            found[module] = "nn.MultiheadAttention has its projections in one parameter"
            found[module.out_proj] = "nn.MultiheadAttention reads its weight"
        elif isinstance(module, nn.TransformerEncoderLayer):
            for part in (module.linear1, module.linear2):
                found[part] = "nn.TransformerEncoderLayer reads its weight"
        elif isinstance(module, nn.Linear):
            reason = next((reasons[name] for name in names if name in reasons), None)
            weight: object = module._parameters.get("weight")
            if isinstance(weight, nn.UninitializedParameter):
                found[module] = "its weight has no size before the model's first call"
            elif not isinstance(weight, nn.Parameter):
                found[module] = "its weight is not a parameter of its own, but computed"
            elif reason is not None:
                found.setdefault(module, reason)
        elif type(module).__name__ == "Conv1D" and len(_weight_shape(module)) == 2:
            found[module] = "Conv1D holds its weight as [K, N]"
    return found


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(
        module, "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight", None
    )
    return () if weight is None or is_lazy(weight) else tuple(weight.shape)
