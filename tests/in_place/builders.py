"""Modules as they occur in models of other libraries."""

from __future__ import annotations

import torch
from torch import nn


class FusedExperts(nn.Module):
    """As in transformers: the experts of a layer in two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 96, 32))
        self.down_proj = nn.Parameter(torch.randn(2, 32, 48))
        self.act_fn = nn.SiLU()

    def forward(
        self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        raise NotImplementedError
