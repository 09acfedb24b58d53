"""What a small module computes: an RMS norm, an activation function, or an MLP.

Names are not enough, and source alone says little of helper functions. A class is taken for one of these if
its source is straight-line code that reads nothing but the parts it should (:func:`.source.self_reads`), and
if a twin of the module with other values gives what the formula gives.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from littlebit2_kernels import LittleBitLinear
from littlebit2_kernels.fused.checks import is_called_plainly

from ..places import MODULE_STATE
from .source import self_reads

__all__ = ["Activation", "Mlp", "Norm", "activation_of", "mlp_of", "norm_of"]

_EPSILONS = ("variance_epsilon", "eps", "epsilon")

#: The activation functions of :func:`littlebit2_kernels.mlp`.
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
}
#: Modules of torch that need no reading.
_BUILT_IN = (nn.SiLU, nn.GELU, nn.ReLU)
#: What ``nn.GELU`` calls its two functions.
_GELUS = {"gelu": "none", "gelu_tanh": "tanh"}


@dataclass(frozen=True)
class Norm:
    """How a class of modules normalizes: ``x / rms(x) * (weight + offset)``.

    Attributes:
        kind: the class.
        eps: name of the attribute that holds epsilon.
        offset: added to the weight.
        keeps_dtype: whether the result has the dtype of x whatever that of the weight is.
    """

    kind: type[Any]
    eps: str
    offset: float
    keeps_dtype: bool


#: Sizes at which what is computed is looked at too: code that clips differs there.
_FAR = (1e2, 1e4, 6e4)


@dataclass(frozen=True)
class Activation:
    """What a child or an attribute is as an activation.

    Attributes:
        name: of the child or attribute.
        kind: its class.
        function: which of the functions of :func:`littlebit2_kernels.mlp` it is.
    """

    name: str
    kind: type[Any]
    function: str

    def is_still(self, parent: nn.Module) -> bool:
        """Whether the activation of ``parent`` is what it was, and has no hook."""
        # Every step asks, and modules look for attributes that are children last.
        state = parent.__dict__
        found: Any = (
            state.get(self.name) or state["_modules"].get(self.name) or getattr(parent, self.name, None)
        )
        if type(found) is not self.kind:
            return False
        if not isinstance(found, nn.Module):
            return bool(found == _FUNCTIONS[self.function])
        if isinstance(found, nn.GELU) and found.approximate != _GELUS[self.function]:
            return False
        return is_called_plainly(found)


@dataclass(frozen=True)
class Mlp:
    """How a class of modules is an MLP.

    Attributes:
        layers: names of its linear layers, in the order of :func:`littlebit2_kernels.mlp`.
        activation: the function between them.
    """

    layers: tuple[str, ...]
    activation: Activation


@torch.inference_mode(False)
@torch.no_grad()
def norm_of(module: nn.Module) -> Norm | None:
    """Return how ``module`` is an RMS norm with a weight, or ``None`` if it is none."""
    if set(module._parameters) != {"weight"} or module._buffers or module._modules:
        return None
    eps = [name for name in _EPSILONS if isinstance(vars(module).get(name), float)]
    weight = module._parameters["weight"]
    if len(eps) != 1 or weight is None or weight.dim() != 1:
        return None
    kind: Any = type(module)
    return _norm_of_class(kind, eps[0])


@functools.lru_cache(maxsize=256)
def _norm_of_class(kind: type[Any], eps: str) -> Norm | None:
    reads = self_reads(kind)
    if reads is None or not reads <= {"weight", eps}:
        return None
    generator = torch.Generator("cpu").manual_seed(1)
    weight = torch.randn(8, generator=generator, device="cpu")
    x = torch.randn(2, 3, 8, generator=generator, device="cpu")
    twin = _empty(kind)
    twin.weight = nn.Parameter(weight, requires_grad=False)
    # Large beside the mean of squares, so that where it is added shows.
    setattr(twin, eps, 0.5)
    xs = [x, *(x * size for size in _FAR)]
    results = [_result(twin, one) for one in xs]
    normalized = [one * torch.rsqrt(one.pow(2).mean(-1, keepdim=True) + 0.5) for one in xs]
    fits = (
        offset
        for offset in (0.0, 1.0)
        if all(_close(y, n * (weight + offset), 1e-5) for y, n in zip(results, normalized, strict=True))
    )
    offset = next(fits, None)
    if offset is None:
        return None
    half = _result(twin, x.to(torch.bfloat16))
    return Norm(kind, eps, offset, half is not None and half.dtype == torch.bfloat16)


@torch.inference_mode(False)
@torch.no_grad()
def activation_of(parent: nn.Module, name: str) -> Activation | None:
    """Return what the child or attribute ``name`` is as an activation, or ``None`` if it is no known one."""
    found: Any = getattr(parent, name, None)
    if isinstance(found, nn.Module):
        if found._parameters or found._buffers or found._modules:
            return None
        if type(found) not in _BUILT_IN and self_reads(type(found)) is None:
            return None
    elif found not in _FUNCTIONS.values():
        return None
    x = torch.linspace(-8, 8, 65, dtype=torch.float64, device="cpu")
    # Some clip: transformers' "gelu_10" at 10.
    far = torch.tensor(
        [0.0, *(sign * size for size in _FAR for sign in (-1, 1))], dtype=x.dtype, device="cpu"
    )
    near_y, far_y = _result(found, x), _result(found, far)
    for function, formula in _FUNCTIONS.items():
        if _close(near_y, formula(x), 1e-7) and _close(far_y, formula(far), 1e-7):
            return Activation(name, type(found), function)
    return None


@torch.inference_mode(False)
@torch.no_grad()
def mlp_of(module: nn.Module) -> Mlp | None:
    """Return how ``module`` is an MLP of packed layers, or ``None`` if it is none."""
    layers = tuple(name for name, child in module.named_children() if type(child) is LittleBitLinear)
    reads = self_reads(type(module)) if len(layers) in (2, 3) else None
    others = (reads or frozenset()) - set(layers)
    if len(others) != 1:
        return None
    activation = activation_of(module, next(iter(others)))
    kind: Any = type(module)
    order = None if activation is None else _order_of(kind, layers, activation)
    return None if activation is None or order is None else Mlp(order, activation)


@functools.lru_cache(maxsize=256)
def _order_of(kind: type[Any], layers: tuple[str, ...], activation: Activation) -> tuple[str, ...] | None:
    """The linear layers in the order of ``mlp``, or ``None`` if the class computes something else."""
    act = _FUNCTIONS[activation.function]
    x = torch.randn(
        2, 3, 4, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(1), device="cpu"
    )
    xs = [x, *(x * size for size in _FAR)]
    for order in itertools.permutations(layers):
        for wide in (6, 12) if len(layers) == 2 else (6,):
            stands = [_Stand(4, wide, seed) for seed in range(len(layers) - 1)] + [_Stand(6, 4, 9)]
            twin = _empty(kind)
            for name, stand in zip(order, stands, strict=True):
                setattr(twin, name, stand)
            twin.__dict__[activation.name] = act
            if all(_close(_result(twin, one), _mlp_by_stands(stands, act, one), 1e-9) for one in xs):
                return order
    return None


def _mlp_by_stands(stands: Sequence[_Stand], act: Any, x: torch.Tensor) -> torch.Tensor:
    first = [stand(x) for stand in stands[:-1]]
    if first[0].shape[-1] == 2 * stands[-1].matrix.shape[-1]:
        first = list(first[0].chunk(2, dim=-1))
    hidden = act(first[0]) if len(first) == 1 else act(first[0]) * first[1]
    result: torch.Tensor = stands[-1](hidden)
    return result


class _Stand(nn.Module):
    """A small linear layer."""

    def __init__(self, inputs: int, outputs: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        self.matrix = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator, device="cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        return x @ self.matrix.T + self.matrix[:, 0]


def _empty(kind: type[Any]) -> Any:
    """A module of the class with nothing in it."""
    twin: nn.Module = object.__new__(kind)
    nn.Module.__init__(twin)
    assert set(vars(twin)) == MODULE_STATE
    return twin.eval()


def _result(function: Any, x: torch.Tensor) -> torch.Tensor | None:
    """``function(x)``, or ``None`` if that fails, as code that expects another module does."""
    try:
        y = function(x.clone())
    except Exception:
        return None
    return y if isinstance(y, torch.Tensor) else None


def _close(got: torch.Tensor | None, wanted: torch.Tensor, tolerance: float) -> bool:
    return (
        got is not None
        and got.shape == wanted.shape
        and torch.allclose(got.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance)
    )
