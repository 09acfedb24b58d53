"""Linear layers that hold their weight transposed: ``Conv1D`` of transformers, as in GPT-2.

Such a module computes ``x W + b`` with ``W [K, N]``. :func:`expand_transposed` puts a
:class:`TransposedLinear` in its place, an ``nn.Linear`` on a view of ``W^T``: whatever quantizes, calibrates
or loads linear layers sees no difference. Modules are recognized by the name of their class, which several
libraries share, and by what they compute.
"""

from __future__ import annotations

import copy
from collections.abc import Container

import torch
from torch import nn

from .places import Places
from .select import shared_parameters

__all__ = ["TransposedLinear", "as_linear", "collapse_transposed", "expand_transposed", "is_transposed"]

_CLASS = "Conv1D"
#: Where the computation of a class is tried; any sizes would do.
_TRIED = (5, 3)


class TransposedLinear(nn.Linear):
    """An ``nn.Linear`` that shares its tensors with a module that holds them transposed.

    Args:
        source: the module; :func:`is_transposed` holds.
    """

    source: nn.Module

    def __init__(self, source: nn.Module) -> None:
        nn.Module.__init__(self)
        weight, bias = _tensors(source)
        assert weight is not None
        self.in_features, self.out_features = weight.shape
        self.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
        self.register_parameter("bias", bias)
        self.train(source.training)
        # Not a child: its tensors would be listed twice.
        self.__dict__["source"] = source


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` is a ``Conv1D`` that computes ``x W + b`` with ``W [K, N]``."""
    weight, bias = _tensors(module)
    if type(module).__name__ != _CLASS or weight is None or weight.dim() != 2:
        return False
    if bias is not None and bias.shape != weight.shape[1:]:
        return False
    k, n = _TRIED
    # On the CPU even where models are built on the meta device, which has no values.
    values = torch.arange(1.0, 1 + k * n + n + 2 * k, device="cpu").mul(1.7).sin()
    w, b, x = (
        part.view(shape)
        for part, shape in zip(values.split([k * n, n, 2 * k]), [(k, n), (n,), (2, k)], strict=True)
    )
    trial = copy.copy(module)
    trial.__dict__ = {**module.__dict__, "nx": k, "nf": n}
    trial.__dict__["_parameters"] = {
        "weight": nn.Parameter(w),
        "bias": None if bias is None else nn.Parameter(b),
    }
    try:
        with torch.no_grad():
            y = trial(x)
    except Exception:  # whatever foreign code raises, it is no linear layer
        return False
    expected = x @ w + (0 if bias is None else b)
    return (
        isinstance(y, torch.Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)
    )


def as_linear(module: nn.Module) -> nn.Module:
    """Return ``module``, or the ``nn.Linear`` that stands for it if it holds its weight transposed."""
    return TransposedLinear(module) if is_transposed(module) else module


def expand_transposed(model: nn.Module) -> None:
    """Replace modules that hold their weight transposed by :class:`TransposedLinear`, in place.

    No weight is copied. A module that shares its weight with another one is left as it is.
    """
    shared, places = shared_parameters(model), Places(model)
    views: dict[nn.Module, TransposedLinear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or not is_transposed(module) or id(module.weight) in shared:
            continue
        if module not in views:
            views[module] = TransposedLinear(module)
        places.put(name, views[module])


def collapse_transposed(model: nn.Module, keep: Container[str] = ()) -> None:
    """Undo :func:`expand_transposed` for what was not replaced since, except for the names in ``keep``."""
    places = Places(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, TransposedLinear) and name not in keep:
            places.put(name, module.source)


def _tensors(module: nn.Module) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    return module._parameters.get("weight"), module._parameters.get("bias")
