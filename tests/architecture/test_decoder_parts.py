"""What is recognized as a norm, an activation or an MLP, which functions are rewritten, and what is not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from littlebit2.architecture.decoder import fuse_modules
from littlebit2.architecture.decoder.parts import activation_of, mlp_of, norm_of
from littlebit2.architecture.decoder.source import forward_of, function_tree, self_reads
from littlebit2_kernels import LittleBitLinear
from littlebit2_kernels.testing import make_packed


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self._scaled(x.float()) * self.weight.float()).type_as(x)


class _Gemma(_Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self._scaled(x.float()) * (1.0 + self.weight.float())).type_as(x)


class _Promoting(_Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self._scaled(x.float()).to(x.dtype)


class _Centered(_Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._scaled(x - x.mean(-1, keepdim=True)) * self.weight


class _Biased(_Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))


class _Branching(_Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._scaled(x) * self.weight if self.training else x


class _Doubling(_Norm):
    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._scaled(x) * self.weight * self.scale


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (_Norm, (0.0, True)),
        (_Gemma, (1.0, True)),
        (_Promoting, (0.0, False)),
        (nn.LayerNorm, None),
        (_Centered, None),
        (_Biased, None),
        (_Branching, None),
        (_Doubling, None),
    ],
)
def test_norms(kind: Any, found: tuple[float, bool] | None) -> None:
    norm = norm_of(kind(8) if kind is nn.LayerNorm else kind())
    assert (norm and (norm.offset, norm.keeps_dtype)) == found


class _Act(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class _OtherAct(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (nn.SiLU(), "silu"),
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.functional.silu, "silu"),
        (_Act(), "silu"),
        (_OtherAct(), None),
        (nn.PReLU(), None),
        (nn.Tanh(), None),
        (torch.tanh, None),
        (None, None),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),  # no addresses: processes must agree
)
def test_activations(activation: Any, function: str | None) -> None:
    parent = nn.Module()
    parent.act = activation
    found = activation_of(parent, "act")
    assert (found and found.function) == function
    if found is not None:
        assert found.is_still(parent)
        parent.act = nn.Tanh()
        assert not found.is_still(parent)


def _linear(inputs: int, outputs: int, rng: torch.Generator) -> LittleBitLinear:
    return LittleBitLinear.from_packed(make_packed(inputs, outputs, [16], bias=True, generator=rng))


class _Gated(nn.Module):
    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        # Named against the order, and all of one size: only what they do tells them apart.
        self.a, self.b, self.c = (_linear(32, 32, rng) for _ in range(3))
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.b(x) * self.act(self.c(x)))


class _NotGated(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.b(x) + self.act(self.c(x)))


class _WithMore(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.b(x) * self.act(self.c(x))) + x


class _Conditional(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 4:
            return x
        return self.a(self.b(x) * self.act(self.c(x)))


def test_mlps(rng: torch.Generator) -> None:
    found = mlp_of(_Gated(rng))
    assert found is not None
    assert found.layers == ("c", "b", "a")
    for kind in (_NotGated, _WithMore, _Conditional):
        assert mlp_of(kind(rng)) is None


class _Attention(nn.Module):
    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        self.q, self.k, self.o = (_linear(32, 32, rng) for _ in range(3))

    def forward(self, x: torch.Tensor, scale: float = 2.0, *, shift: float = 1.0) -> Any:
        shape = x.shape
        y = self.q(x) * scale
        y = y + self.k(x).view(shape) + shift
        y = self.o(y)
        return y, None


class _SometimesOther(_Attention):
    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> Any:
        return self.o(self.q(x) + self.k(x if other is None else other)), None


class _UsesInput(_Attention):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.o(self.q(x) + self.k(x))
        return y + x, None


class _Closed(_Attention):
    def forward(self, x: torch.Tensor) -> Any:
        assert super().train
        return self.o(self.q(x) + self.k(x)), None


@pytest.mark.parametrize(
    ("kind", "projections", "output"),
    [
        (_Attention, ("q", "k"), "o"),
        (_SometimesOther, (), "o"),
        (_UsesInput, None, None),
        (_Closed, None, None),
    ],
)
def test_attentions(
    kind: Any, projections: tuple[str, ...] | None, output: str | None, rng: torch.Generator
) -> None:
    module = kind(rng)
    x = torch.randn(3, 32, generator=rng)
    with torch.no_grad():
        module(x)  # prepacks
        own = module(x)[0]
        found = fuse_modules(module)
        assert bool(found) == (projections is not None)
        assert torch.equal(module(x)[0], own)
        if projections is not None:
            how = type(module)._littlebit2_attention
            assert (how.projections, how.output) == (projections, output)
            residual = torch.randn(3, 32, generator=rng)
            torch.testing.assert_close(module(x, littlebit2_residual=residual)[0], own + residual)
    if kind is _Attention:
        assert inspect.signature(module.forward).parameters["scale"].default == 2.0
        assert inspect.signature(module.forward).parameters["shift"].default == 1.0
        with torch.no_grad():
            torch.testing.assert_close(module(x, 3.0, shift=0.0), kind.forward(module, x, 3.0, shift=0.0))


class _Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_functions_that_are_not_read() -> None:
    assert forward_of(_Decorated) is None
    assert self_reads(_Decorated) is None
    assert self_reads(_Norm) == {"weight", "eps"}
    namespace: dict[str, Any] = {}
    exec("def forward(self, x):\n    return x", namespace)
    assert function_tree(namespace["forward"]) is None  # no source


def test_lines_are_those_of_the_file(rng: torch.Generator) -> None:
    """A traceback through a rewritten function leads to the file of the class."""
    module = _Attention(rng)
    fuse_modules(module)
    own, made = _Attention.forward.__code__, type(module).forward.__code__
    assert made.co_filename == own.co_filename
    lines = {line for _, _, line in made.co_lines() if line is not None}
    assert lines <= {line for _, _, line in own.co_lines() if line is not None}
