"""The choices of the quantizer, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from littlebit2_kernels.format import MAX_PATHS, PackedLinear

from .budget import check_positive, check_rank, rank_for_bpw
from .joint_itq import PolarMethod
from .quantizer import quantize_weight

__all__ = ["InitMethod", "QuantConfig"]

InitMethod = Literal["joint-itq", "dual-svid"]

_DEFAULT_BPW = 1.0
_DEFAULT_PATHS = 2


@dataclass(frozen=True)
class QuantConfig:
    """How to quantise a layer.

    The size is given either by ``bpw`` (and ``paths``) or by explicit ``ranks``.

    Attributes:
        bpw: counted bits per weight over all paths (:mod:`.budget`); 1.0 where neither ``bpw`` nor
            ``ranks`` is given.
        ranks: one positive multiple of 8 per path, replacing ``bpw``; ranks may differ, and may exceed
            ``min(K, N)``: the surplus directions start at zero and the rotation fills them.
        paths: number of paths of equal rank; 2 where not given, as in the papers: a primary path and
            one that quantises its residual.
        init: ``"joint-itq"`` rotates the latent space before binarising (LittleBit-2, arXiv
            2603.00042); ``"dual-svid"`` does not (LittleBit, arXiv 2506.13771).
        itq_iterations: most Joint-ITQ iterations; 0 leaves the random rotation it starts from.
        polar: how Joint-ITQ solves its orthogonal Procrustes step, see :func:`.joint_itq.polar_factor`.
        kv_factor: factor on the rank that ``bpw`` gives to key and value projections.
        seed: seed of the random rotation.
        compute_dtype: ``torch.float32`` or ``torch.float64``; the stored scales are float32 either way.

    Raises:
        TypeError: ``ranks`` is not a sequence of integers.
        ValueError: any other argument out of its range, or ``ranks`` together with ``bpw`` or a
            different ``paths``.
    """

    bpw: float | None = None
    ranks: tuple[int, ...] | None = None
    paths: int | None = None
    init: InitMethod = "joint-itq"
    itq_iterations: int = 50
    polar: PolarMethod = "auto"
    kv_factor: float = 1.0
    seed: int = 0
    compute_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self._resolve_size()
        _check_choice("init", self.init, get_args(InitMethod))
        _check_choice("polar", self.polar, get_args(PolarMethod))
        _check_choice("compute_dtype", self.compute_dtype, (torch.float32, torch.float64))
        check_positive("kv_factor", self.kv_factor)
        _check_integer("itq_iterations", self.itq_iterations, 0)
        _check_integer("seed", self.seed, 0, 2**63 - 1)

    def _resolve_size(self) -> None:
        if self.ranks is None:
            if self.bpw is None:
                object.__setattr__(self, "bpw", _DEFAULT_BPW)
            if self.paths is None:
                object.__setattr__(self, "paths", _DEFAULT_PATHS)
            check_positive("bpw", self.bpw)  # type: ignore[arg-type]
            _check_integer("paths", self.paths, 1, MAX_PATHS)
            return
        if not isinstance(self.ranks, (tuple, list)):
            raise TypeError(f"ranks must be a sequence of integers, got {type(self.ranks).__name__}")
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if not 1 <= len(self.ranks) <= MAX_PATHS:
            raise ValueError(f"ranks must hold between 1 and {MAX_PATHS} ranks, got {len(self.ranks)}")
        for i, rank in enumerate(self.ranks):
            check_rank(f"ranks[{i}]", rank)
        if self.bpw is not None:
            raise ValueError(f"bpw must be None where ranks are given, got {self.bpw}")
        if self.paths not in (None, len(self.ranks)):
            raise ValueError(f"paths must be None or len(ranks) = {len(self.ranks)}, got {self.paths}")
        object.__setattr__(self, "paths", len(self.ranks))

    def ranks_for(self, in_features: int, out_features: int, *, is_kv: bool = False) -> tuple[int, ...]:
        """Return the rank of every path of a layer: ``ranks``, or what ``bpw`` buys.

        Args:
            in_features: K.
            out_features: N.
            is_kv: whether the layer is a key or value projection, so that ``kv_factor`` applies.

        Raises:
            ValueError: the budget is too small for the layer, see :func:`.budget.rank_for_bpw`.
        """
        if self.ranks is not None:
            return self.ranks
        assert self.bpw is not None and self.paths is not None  # set by _resolve_size
        kv_factor = self.kv_factor if is_kv else 1.0
        rank = rank_for_bpw(in_features, out_features, self.bpw, paths=self.paths, kv_factor=kv_factor)
        return (rank,) * self.paths

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
        """Quantise one layer, without a report: what ``LittleBitLinear.from_linear`` asks of a configuration.

        Arguments and errors: as :func:`.quantizer.quantize_weight`.
        """
        return quantize_weight(weight, bias, config=self).packed


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _check_integer(name: str, value: object, least: int, most: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer between {least} and {most}, got {value!r}")
