"""A whole model: linear modules into trainable ones, and trained ones into packed layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from littlebit2.architecture.places import Places
from littlebit2.architecture.reads import modules_asked_for_dtype
from littlebit2.architecture.transposed import as_linear
from littlebit2.architecture.typed import TypedLinear
from littlebit2_kernels import LittleBitLinear
from littlebit2_kernels.format import PackedLinear

from .latents import MAGNITUDE
from .layer import TrainableLittleBitLinear
from .surrogate import Surrogate

__all__ = [
    "Dense",
    "ParameterKind",
    "make_trainable",
    "pack_model",
    "packed_layers",
    "parameter_kind",
    "select_dense",
    "trainable_layers",
]

#: Which parameters outside the packed layers are trained.
Dense = Literal["all", "norms", "none"]
#: What a parameter is to the optimizer.
ParameterKind = Literal["latent", "scale", "dense"]


def make_trainable(
    model: nn.Module,
    packed: Mapping[str, PackedLinear] | Callable[[str], PackedLinear],
    names: Iterable[str] | None = None,
    *,
    weights: Callable[[str], torch.Tensor] | None = None,
    surrogate: Surrogate = "smooth-sign",
    magnitude: float = MAGNITUDE,
) -> list[str]:
    """Replace linear modules of ``model`` by trainable layers, in place and one at a time.

    Args:
        model: holds ``nn.Linear`` or :class:`LittleBitLinear` modules of the given names. An ``nn.Linear``
            gives its weight to the latents' confidences.
        packed: where each layer starts, by module name; a function is called once a layer.
        names: names of the modules; by default the keys of ``packed``.
        weights: dense weights ``[N, K]`` by module name, for modules that are packed already.
        surrogate: derivative used for the sign in backward.
        magnitude: start value of a latent with confidence 1.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: there are no names, a name is no linear module of the model, or its shape, or that it has
            a bias, differs from the packed layer's; the message names the module. Modules before it stay
            replaced.
    """
    if names is None:
        if not isinstance(packed, Mapping):
            raise ValueError("names must be given where packed is a function, got None")
        names = packed
    done = []
    modules, places = dict(model.named_modules()), Places(model)
    for name in names:
        module = modules.get(name)
        module = None if module is None else as_linear(module)
        start = packed[name] if isinstance(packed, Mapping) else packed(name)
        _check_place(name, module, start)
        weight = module.weight if isinstance(module, nn.Linear) else weights(name) if weights else None
        try:
            layer = TrainableLittleBitLinear(start, weight, surrogate=surrogate, magnitude=magnitude)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {name!r}: {error}") from error
        places.put(name, layer)
        done.append(name)
    if not done:
        raise ValueError("packed must hold at least one layer to train, got none")
    return done


def _check_place(name: str, module: nn.Module | None, packed: PackedLinear) -> None:
    if isinstance(module, TrainableLittleBitLinear):
        raise ValueError(f"layer {name!r} must not be trainable already")
    if not isinstance(module, (nn.Linear, LittleBitLinear)):
        got = "no module" if module is None else f"a {type(module).__name__}"
        raise ValueError(f"layer {name!r}: the model must have a linear module there, got {got}")
    expected = (module.in_features, module.out_features, module.bias is not None)
    got_shape = (packed.in_features, packed.out_features, packed.bias is not None)
    if expected != got_shape:
        raise ValueError(
            f"layer {name!r}: (in_features, out_features, bias) must be {expected}, got {got_shape}"
        )


def trainable_layers(model: nn.Module) -> dict[str, TrainableLittleBitLinear]:
    """Return the trainable layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, TrainableLittleBitLinear)}


def packed_layers(
    model: nn.Module, state: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, PackedLinear]]:
    """Yield name and packed layer of every trainable layer.

    Args:
        model: with trainable layers.
        state: the model's whole ``state_dict``, where its own parameters are sharded.

    Raises:
        KeyError, ValueError: as :meth:`.TrainableLittleBitLinear.packed`; the message names the layer.
    """
    for name, layer in trainable_layers(model).items():
        own = None
        if state is not None:
            prefix = f"{name}."
            own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        try:
            yield name, layer.packed(own)
        except (KeyError, ValueError) as error:
            raise type(error)(f"layer {name!r}: {error.args[0]}") from error


def pack_model(model: nn.Module, **options: Any) -> list[str]:
    """Replace every trainable layer by a :class:`LittleBitLinear`, in place; return their names.

    Args:
        model: with trainable layers.
        **options: of :meth:`LittleBitLinear.from_packed`.
    """
    names, places = [], Places(model)
    asked = modules_asked_for_dtype(model)
    for name, packed in packed_layers(model):
        kind = TypedLinear if name in asked else LittleBitLinear
        places.put(name, kind.from_packed(packed, **options))
        names.append(name)
    return names


def parameter_kind(name: str) -> ParameterKind:
    """Tell from a parameter's name in the model what it is to the optimizer."""
    parts = name.split(".")
    if len(parts) >= 3 and parts[-3] == "paths" and parts[-2].isdigit():
        return "latent" if parts[-1] in ("U", "V") else "scale"
    return "dense"


def select_dense(model: nn.Module, dense: Dense) -> None:
    """Let the parameters outside the packed layers require gradients, or not.

    Args:
        model: with trainable layers, whose own parameters (biases too) always do.
        dense: ``"all"``; ``"norms"``: vectors, such as the weights of norms; or ``"none"``.

    Raises:
        ValueError: ``dense`` is none of these.
    """
    if dense not in get_args(Dense):
        raise ValueError(f"dense must be one of {', '.join(get_args(Dense))}, got {dense!r}")
    own = {id(p) for layer in trainable_layers(model).values() for p in layer.parameters()}
    for parameter in model.parameters():
        chosen = dense == "all" or (dense == "norms" and parameter.dim() == 1)
        parameter.requires_grad_(id(parameter) in own or chosen)
