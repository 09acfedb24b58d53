"""Which linear layers of a model can be packed, and why the others stay dense."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from .names import ROUTERS
from .reads import modules_read_as_tensors
from .select import is_selected, keeps_heads_dense, output_heads, tied_names

__all__ = [
    "EXCLUDED",
    "HEAD",
    "NOT_SELECTED",
    "TIED",
    "choose_linears",
    "dense_reasons",
    "is_plain_linear",
]

#: Reasons that a user can overrule.
HEAD = "output head"
TIED = "tied"
EXCLUDED = "excluded"
NOT_SELECTED = "not selected"

#: Where the plainness of a class is tried; any sizes would do.
_TRIED = (5, 3)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes ``x W^T + b`` when it is called, subclasses of ``nn.Linear`` included.

    What a subclass computes is tried on a small layer of its class.
    """
    # A forward of the instance's own, such as accelerate puts there, computes something else.
    if not isinstance(module, nn.Linear) or "forward" in vars(module):
        return False
    if type(module) is nn.Linear:
        return True
    if type(module).forward is nn.Linear.forward:
        return True
    k, n = _TRIED
    trial = copy.copy(module)
    trial.__dict__ = {**module.__dict__, "in_features": k, "out_features": n}
    generator = torch.Generator(device="cpu").manual_seed(0)
    sample = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    weight = sample(n, k)
    bias = None if module.bias is None else sample(n)
    trial.__dict__["_parameters"] = {
        "weight": nn.Parameter(weight),
        "bias": None if bias is None else nn.Parameter(bias),
    }
    # Large and small inputs too: a class may clamp or saturate.
    x = sample(6, k) * torch.tensor([1e-3, 1e-3, 1.0, 1.0, 1e3, 1e3], device="cpu").unsqueeze(1)
    try:
        with torch.no_grad():
            y = trial(x)
    except Exception:  # whatever foreign code raises, it is no plain layer
        return False
    expected = functional.linear(x, weight, bias)
    return (
        isinstance(y, torch.Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)
    )


def dense_reasons(model: nn.Module) -> dict[str, str]:
    """Return, by name, why linear modules of ``model`` stay dense; those that can be packed are not in it.

    Args:
        model: with or without values, its experts expanded where they are to be packed.
    """
    heads, tied = output_heads(model), tied_names(model)
    read = modules_read_as_tensors(model)
    attention = tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    )
    routers = tuple(
        f"{name}." for name, module in model.named_modules() if name and _is_router(type(module).__name__)
    )
    reasons: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear):
            continue
        if name in tied:
            reasons[name] = TIED
        elif name in heads:
            reasons[name] = HEAD
        elif attention and name.startswith(attention):
            reasons[name] = "part of nn.MultiheadAttention, which reads its weight"
        elif name in read:
            reasons[name] = f"the model's code reads its weight ({read[name]})"
        elif name.rpartition(".")[2].lower() in ROUTERS or name.startswith(routers):
            reasons[name] = "router or gate"
        elif not is_plain_linear(module):
            reasons[name] = f"{type(module).__name__} computes something else than a linear layer"
    return reasons


def _is_router(kind: str) -> bool:
    """Whether a class, to judge by its name, chooses the experts of a token."""
    return "Router" in kind or kind.endswith("TopKGating")


def choose_linears(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], *, include_tied: bool = False
) -> tuple[dict[nn.Linear, list[str]], dict[str, str]]:
    """Return the linear modules of ``model`` to pack, with all their names, and why the others stay dense.

    Args:
        model: its experts expanded (:func:`.expand_experts`) where they are to be packed.
        include: patterns of names.
        exclude: likewise; wins. If the patterns of heads are among them, heads of other names stay dense too.
        include_tied: whether modules may be chosen that share their weight.
    """
    overruled = {*(() if keeps_heads_dense(exclude) else (HEAD,)), *((TIED,) if include_tied else ())}
    reasons = {name: reason for name, reason in dense_reasons(model).items() if reason not in overruled}
    chosen: dict[nn.Linear, list[str]] = {}
    dense: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear):
            continue
        if name in reasons:
            dense[name] = reasons[name]
        elif is_selected(name, include, exclude):
            chosen.setdefault(module, []).append(name)
        else:
            dense[name] = NOT_SELECTED if is_selected(name, ("*",), exclude) else EXCLUDED
    return chosen, dense
