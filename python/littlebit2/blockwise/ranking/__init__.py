"""Ranks of the layers of blocks by what the model's output loses when one of them alone is quantized."""

from .settle import RanksByKl, ranks_by_kl

__all__ = ["RanksByKl", "ranks_by_kl"]
