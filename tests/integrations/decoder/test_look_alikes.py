"""Modules that look like parts of a decoder and compute something else: the result is their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from littlebit2.architecture.decoder import fuse_modules
from tests.integrations.families import quantized_copy

SIZE = 64


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


class _ClippingNorm(_Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clamp(-50, 50)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class _Mlp(nn.Module):
    def __init__(self, act: str = "silu") -> None:
        super().__init__()
        self.up = nn.Linear(SIZE, 96)
        self.down = nn.Linear(96, SIZE)
        self.act = ACT2FN[act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(hidden_states)))


class _ClippingMlp(_Mlp):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(hidden_states)).clamp(-1000, 1000))


class _ScaledMlp(_Mlp):
    def forward(self, hidden_states: torch.Tensor, factor: float = 1.0, **kwargs: Any) -> torch.Tensor:
        return self.down(self.act(self.up(hidden_states))) * factor


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(SIZE, SIZE)
        self.k_proj = nn.Linear(SIZE, SIZE)
        self.o_proj = nn.Linear(SIZE, SIZE)
        self.skips = True

    def forward(self, hidden_states: torch.Tensor, extra: Any = None) -> tuple[torch.Tensor, Any]:
        query = self.q_proj(hidden_states)
        key = self.k_proj(hidden_states)
        output = self.o_proj(query.sigmoid() * key)
        return output, extra


class _EarlyAttention(_Attention):
    def forward(self, hidden_states: torch.Tensor, extra: Any = None) -> tuple[torch.Tensor, Any]:
        query = self.q_proj(hidden_states)
        key = self.k_proj(hidden_states)
        if self.skips:
            return query, None
        output = self.o_proj(query.sigmoid() * key)
        return output, None


class _Layer(nn.Module):
    def __init__(self, child: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or _Norm()
        self.child = child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        x = self.norm(x)
        x, _ = self.child(x)
        return residual + x


class _OtherResidual(_Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        extra = x * 100
        x = self.norm(x)
        x, residual = self.child(x, extra)
        return residual + x


class _ByName(_Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.child(hidden_states=self.norm(x))
        return x + h


class _WithFactor(_Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        x = self.norm(x)
        x = self.child(x, factor=0.5)
        return residual + x


class _ByPlace(_Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        x = self.norm(x)
        x = self.child(x, 0.5)
        return residual + x


CASES = {
    "clipping activation": (lambda: _Mlp("gelu_10"), 100.0),
    "clipping mlp": (lambda: _ClippingMlp("relu"), 1e4),
    "clipping norm": (lambda: _Layer(_Attention(), _ClippingNorm()), 1e3),
    "another residual": (lambda: _OtherResidual(_Attention()), 1.0),
    "an early return": (lambda: _Layer(_EarlyAttention()), 1.0),
    "input by name": (lambda: _ByName(_Mlp()), 1.0),
    "a factor": (lambda: _WithFactor(_ScaledMlp()), 1.0),
    "a factor by place": (lambda: _ByPlace(_ScaledMlp()), 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_own(name: str, rng: torch.Generator) -> None:
    make, size = CASES[name]
    own = quantized_copy(nn.Sequential(make()))
    fused = copy.deepcopy(own)
    fuse_modules(fused)
    x = torch.randn(2, 3, SIZE, generator=rng) * size
    with torch.inference_mode():
        for _ in range(2):  # packed layers prepack themselves in their first call
            expected, got = own(x), fused(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * size)


def test_layers_replaced_by_wider_ones(rng: torch.Generator) -> None:
    model = quantized_copy(nn.Sequential(_Layer(_Attention())))
    fuse_modules(model)
    for name in ("q_proj", "k_proj", "o_proj"):
        setattr(model[0].child, name, nn.Linear(SIZE, SIZE))
    model.double()
    with torch.inference_mode():
        y = model(torch.randn(1, 2, SIZE, generator=rng, dtype=torch.float64))
    assert y.dtype == torch.float64
