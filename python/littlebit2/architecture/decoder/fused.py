"""Modules of a decoder that compute in few calls: their class becomes a subclass with another ``forward``.

A module keeps its parameters, buffers, children and hooks; what a call finds decides how it is computed.
There is nothing to keep in step: a child that was replaced, or has a hook, is called by itself.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import nn

from littlebit2_kernels import LittleBitLinear, RMSNorm
from littlebit2_kernels.fused.checks import is_called_plainly
from littlebit2_kernels.fused.modules import linears_together, mlp_together
from littlebit2_kernels.ops.operands import ACTIVATION_DTYPES

from .parts import Mlp, Norm, activation_of, mlp_of, norm_of
from .rewrite import (
    NORM,
    Attention,
    Chain,
    Children,
    Site,
    Taker,
    compiled,
    rewrite_attention,
    rewrite_layer,
)
from .rotary import rotated, rotation_of
from .source import forward_of, function_tree
from .step import STEP

__all__ = ["fuse_modules", "unfuse_modules"]

#: A norm to be computed within a call: the module, and what it computes.
_GivenNorm = tuple[nn.Module, Norm]


class _Fused:
    """Base of the classes that are made here."""

    #: The class that the module had.
    _littlebit2_own: ClassVar[type[Any]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of the class that a file can name. What makes the object is another function,
        # for pickle wants the usual one to make an object of the same class.
        reduced: Any = super().__reduce_ex__(protocol)
        _, arguments, *rest = reduced
        own = tuple(self._littlebit2_own if one is type(self) else one for one in arguments)
        return object.__new__, own, *rest


class _FusedMlp(_Fused):
    _littlebit2_mlp: ClassVar[Mlp]
    #: What the class's own ``forward`` calls its input.
    _littlebit2_parameter: ClassVar[str]

    def forward(
        self: Any,
        *inputs: Any,
        littlebit2_norm: _GivenNorm | None = None,
        littlebit2_residual: torch.Tensor | None = None,
        **named: Any,
    ) -> torch.Tensor:
        if len(inputs) == 1 and not named:
            x = inputs[0]
        elif not inputs and len(named) == 1 and self._littlebit2_parameter in named:
            x = named[self._littlebit2_parameter]
        else:  # an error, which the class raises
            result: torch.Tensor = self._littlebit2_own.forward(self, *inputs, **named)
            return result
        how: Mlp = self._littlebit2_mlp
        y = _mlp(self, how, x, littlebit2_norm, littlebit2_residual)
        if y is not None:
            return y
        y = self._littlebit2_own.forward(self, x if littlebit2_norm is None else littlebit2_norm[0](x))
        return y if littlebit2_residual is None else littlebit2_residual + y


class _FusedAttention(_Fused):
    _littlebit2_attention: ClassVar[Attention]

    def _littlebit2_project(self: Any, x: torch.Tensor, norm: _GivenNorm | None) -> list[torch.Tensor]:
        """Apply the projections to ``x``, or to what the norm makes of it."""
        children = self._modules
        layers = [children[name] for name in self._littlebit2_attention.projections]
        inside = None if norm is None else _rms_norm(norm, x)
        if inside is not None:
            together = linears_together(layers, x, norm=inside)
            if together is not None:
                return together
        if norm is not None:
            x = norm[0](x)
        together = linears_together(layers, x) if len(layers) > 1 else None
        return [layer(x) for layer in layers] if together is None else together

    def _littlebit2_rotate(
        self: Any,
        index: int,
        function: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rotate queries and keys, or ``None`` if ``function`` has to, or is not what it was."""
        how = self._littlebit2_attention.rotations[index]
        return rotated(how, query, key, cos, sin) if function is how.function else None

    def _littlebit2_attend(
        self: Any,
        function: Any,
        interface: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: Any,
        place: Any,
        mask: Any,
        /,
        **settings: Any,
    ) -> Any:
        """Rotate, write into the cache and attend in one call, if ``interface`` does such; else ``None``."""
        step = getattr(interface, STEP, None)
        if step is None or cache is None:
            return None
        for how in self._littlebit2_attention.rotations:
            if how.function is function:
                return step(how, query, key, value, cos, sin, cache, place, mask, **settings)
        return None

    def _littlebit2_output(self: Any, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Apply the layer that makes the output, and add the residual."""
        output = self._modules[self._littlebit2_attention.output]
        if residual is None:
            return output(x)
        together = linears_together([output], x, residual=residual)
        return residual + output(x) if together is None else together[0]


class _FusedLayer(_Fused):
    _littlebit2_sites: ClassVar[tuple[Site | Chain, ...]]

    def _littlebit2_more(self: Any, index: int) -> dict[str, Any] | None:
        """What the child of a site is to do besides, or ``None`` if the layer does it as it always did."""
        site: Site = self._littlebit2_sites[index]
        children = self._modules
        child = children.get(site.child)
        if type(child) is not site.kind or not _is_plain(child) or not self._littlebit2_drops_nothing(site):
            return None
        if torch.jit.is_tracing():  # which names what modules do
            return None
        if site.norm is None:
            return {}
        norm = children.get(site.norm_name)
        if type(norm) is not site.norm.kind or not _is_plain(norm):
            return None
        return {NORM: (norm, site.norm)}

    def _littlebit2_chain(
        self: Any, index: int, x: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The output of a chain, and its sum with a residual; ``None`` if its modules have to be called."""
        chain: Chain = self._littlebit2_sites[index]
        if not self._littlebit2_drops_nothing(chain):
            return None
        return _mlp(self, chain, x, None, residual)

    def _littlebit2_drops_nothing(self: Any, site: Site | Chain) -> bool:
        for name in site.dropouts:
            dropout = self._modules.get(name)
            if type(dropout) is not nn.Dropout or not _is_plain(dropout):
                return False
            if dropout.training and dropout.p > 0:
                return False
        return not self.training or all(getattr(self, rate) == 0 for rate in site.rates)


def fuse_modules(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Let MLPs, attentions and decoder layers with packed layers compute in few calls, in place.

    Returns:
        For each module that changed, by name, what it does in one call: ``"q_proj + k_proj + v_proj"`` for
        projections, the name of the function for a rotation of queries and keys,
        ``"gate_proj > silu > up_proj > down_proj"``-like for an MLP, ``"norm > mlp > residual"`` for what a
        layer passes on to a child.
    """
    found: dict[str, tuple[str, ...]] = {}
    modules = list(model.named_modules())
    # Children come after their parents, and a layer is made of what its children can do.
    for name, module in reversed(modules):
        if isinstance(module, _Fused):
            found[name] = _described(type(module))
        elif "forward" not in vars(module) and not isinstance(module, LittleBitLinear):
            kind = _fused_class(module)
            if kind is not None:
                module.__class__ = kind
                found[name] = _described(kind)
    return {name: found[name] for name, _ in modules if name in found}


def unfuse_modules(model: nn.Module) -> None:
    """Undo :func:`fuse_modules`."""
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = module._littlebit2_own


def _fused_class(module: nn.Module) -> type[Any] | None:
    own: Any = type(module)
    children = module._modules.values()
    packed = sum(type(child) is LittleBitLinear for child in children)
    if packed:
        mlp = mlp_of(module)
        if mlp is not None:
            return _mlp_class(own, mlp)
        return _attention_class(own, _linears(module)) or _layer_of(module)
    return _layer_of(module) if any(isinstance(child, _Fused) for child in children) else None


def _layer_of(module: nn.Module) -> type[Any] | None:
    own: Any = type(module)
    children = list(module.named_children())
    norms = ((name, norm_of(child)) for name, child in children)
    takers = ((name, _taker_of(type(child))) for name, child in children)
    activations = (activation_of(module, name) for name, child in children if not child._modules)
    roles = Children(
        tuple((name, norm) for name, norm in norms if norm is not None),
        tuple((name, taker) for name, taker in takers if taker is not None),
        _linears(module),
        tuple(activation for activation in activations if activation is not None),
        tuple(name for name, child in children if type(child) is nn.Dropout),
    )
    return _layer_class(own, roles)


def _linears(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, child in module.named_children() if type(child) is LittleBitLinear)


def _taker_of(kind: type[Any]) -> Taker | None:
    if issubclass(kind, _FusedMlp):
        return Taker(kind, kind._littlebit2_parameter, norm=True, residual=True)
    if issubclass(kind, _FusedAttention):
        how = kind._littlebit2_attention
        return Taker(kind, how.parameter, norm=bool(how.projections), residual=how.output is not None)
    return None


def _input_of(own: type[Any]) -> str:
    """What the ``forward`` of an MLP's class calls its input."""
    forward = forward_of(own)
    tree = None if forward is None else function_tree(forward)
    assert tree is not None  # it was read to find the MLP
    name: str = tree.args.args[1].arg
    return name


@functools.lru_cache(maxsize=256)
def _mlp_class(own: type[Any], mlp: Mlp) -> type[Any]:
    return _subclass(own, _FusedMlp, _littlebit2_mlp=mlp, _littlebit2_parameter=_input_of(own))


@functools.lru_cache(maxsize=256)
def _attention_class(own: type[Any], linears: tuple[str, ...]) -> type[Any] | None:
    forward = forward_of(own)
    tree = None if forward is None else function_tree(forward)
    if forward is None or tree is None:
        return None
    found = rewrite_attention(tree, linears, lambda name: rotation_of(forward.__globals__.get(name)))
    if found is None:
        return None
    return _subclass(
        own, _FusedAttention, forward=compiled(found[0], forward), _littlebit2_attention=found[1]
    )


@functools.lru_cache(maxsize=256)
def _layer_class(own: type[Any], children: Children) -> type[Any] | None:
    forward = forward_of(own)
    tree = None if forward is None else function_tree(forward)
    if forward is None or tree is None:
        return None
    found = rewrite_layer(tree, children)
    if found is None:
        return None
    return _subclass(own, _FusedLayer, forward=compiled(found[0], forward), _littlebit2_sites=found[1])


def _subclass(own: type[Any], base: type[_Fused], **members: Any) -> type[Any]:
    """A class that looks like ``own`` to people, and is a subclass of it to code."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (base, own), {**names, "_littlebit2_own": own, **members})


def _described(kind: type[Any]) -> tuple[str, ...]:
    if issubclass(kind, _FusedMlp):
        how = kind._littlebit2_mlp
        return (" > ".join((" + ".join(how.layers[:-1]), how.activation.function, how.layers[-1])),)
    if issubclass(kind, _FusedAttention):
        together = kind._littlebit2_attention
        functions = (rotation.function.__name__ for rotation in together.rotations)
        return tuple(part for part in (" + ".join(together.projections), *functions) if part)
    return tuple(str(site) for site in kind._littlebit2_sites)


def _is_plain(module: nn.Module) -> bool:
    return is_called_plainly(module) and not nn.modules.module._has_any_global_hook()


def _rms_norm(norm: _GivenNorm, x: Any) -> RMSNorm | None:
    """The norm as the kernels take it, or ``None`` if its result has another dtype than ``x``."""
    module, how = norm
    weight = module._parameters["weight"]
    if weight is None or not isinstance(x, torch.Tensor):
        return None
    dtype = weight.dtype
    if dtype not in ACTIVATION_DTYPES or (x.dtype is not dtype and not how.keeps_dtype):
        return None
    return RMSNorm.known(weight, getattr(module, how.eps), how.offset)


def _mlp(
    module: nn.Module,
    how: Mlp | Chain,
    x: torch.Tensor,
    norm: _GivenNorm | None,
    residual: torch.Tensor | None,
) -> torch.Tensor | None:
    """An MLP of the children of ``module`` in one call, or ``None`` if they have to be called."""
    if not how.activation.is_still(module):
        return None
    inside = None if norm is None else _rms_norm(norm, x)
    if norm is not None and inside is None:
        return None
    modules = [module._modules.get(name) for name in how.layers]
    return mlp_together(modules, x, how.activation.function, norm=inside, residual=residual)
