"""The choices of the quantizer, validated once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from littlebit2_kernels.format import MAX_PATHS

from .budget import check_positive, check_rank, check_usable, rank_for_bpw
from .methods import Method, Steps, resolve_steps, uses_one_path

__all__ = ["Budget", "QuantConfig", "as_config"]

#: How a model's bits are shared out: the same number per weight everywhere, by the spectra of the layers, or
#: by what the model's output loses.
Budget = Literal["uniform", "spectral", "kl"]

_DEFAULT_BPW = 1.0
_PAPERS_PATHS = 2


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize a layer.

    The size is given by ``bpw`` (and ``paths``), by the share of ``energy`` to keep, or by explicit
    ``ranks``.

    Attributes:
        bpw: counted bits per weight over all paths (:mod:`.budget`); 1.0 where no size is given.
        energy: in (0, 1); instead of ``bpw``: each layer gets the smallest ranks whose sum keeps this share
            of its squared singular values.
        ranks: one positive multiple of 8 per path, replacing ``bpw``; ranks may differ. More than the largest
            ``min(K, N)`` of a model's layers, rounded up to 8, is refused; in smaller layers the surplus
            directions start at zero.
        paths: number of paths of equal rank. Where not given, 1, and 2 for the papers' own methods: a primary
            path and one that quantizes its residual.
        budget: ``"spectral"`` shares the bits of ``bpw`` out over the layers of a model by their spectra
            (:func:`.allocate_ranks`), ``"kl"`` by the KL of the model's output, which needs text
            (:func:`.quantize_blockwise`); ``"uniform"`` gives every layer the same. One layer alone has
            nothing to share: there it changes nothing.
        method: ``"dual-svid"`` (LittleBit, arXiv 2506.13771); ``"joint-itq"``, which rotates the latent space
            before binarizing (LittleBit-2, arXiv 2603.00042); ``"refine"``, which improves that by
            :func:`.refine`; ``"admm"``, a binary factorization (:func:`.admm`), refined; ``"auto"``, that in
            ``budget_seconds`` (:func:`.resolve_steps`).
        budget_seconds: for ``"auto"``: work allowed per layer, counted at 50e9 operations a second.
        itq_iterations: most Joint-ITQ iterations; 0 leaves the random rotation it starts from.
        refine_rounds: most rounds of refinement, for each path.
        admm_iterations: for each path.
        kv_factor: factor on the rank that ``bpw`` gives to key and value projections; not with
            ``budget="kl"``.
        seed: seed of the random rotation and of random signs.
        compute_dtype: ``torch.float32`` or ``torch.float64``; the stored scales are float32 either way.

    Raises:
        TypeError: ``ranks`` is not a sequence of integers.
        ValueError: any other argument out of its range, more than one of ``bpw``, ``energy`` and ``ranks``,
            ``ranks`` with a different ``paths``, or another ``budget`` than ``"uniform"`` without bits to
            share.
    """

    bpw: float | None = None
    ranks: tuple[int, ...] | None = None
    paths: int | None = None
    energy: float | None = None
    budget: Budget = "uniform"
    method: Method = "auto"
    budget_seconds: float = 60.0
    itq_iterations: int = 15
    refine_rounds: int = 12
    admm_iterations: int = 300
    kv_factor: float = 1.0
    seed: int = 0
    compute_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _check_choice("method", self.method, get_args(Method))
        _check_choice("budget", self.budget, get_args(Budget))
        self._resolve_size()
        _check_choice("compute_dtype", self.compute_dtype, (torch.float32, torch.float64))
        check_positive("kv_factor", self.kv_factor)
        if self.budget == "kl" and self.kv_factor != 1:
            raise ValueError(
                "kv_factor must be 1 with budget='kl', which measures what key and value projections need, "
                f"got {self.kv_factor}"
            )
        check_positive("budget_seconds", self.budget_seconds)
        _check_integer("itq_iterations", self.itq_iterations, 0)
        _check_integer("refine_rounds", self.refine_rounds, 1)
        _check_integer("admm_iterations", self.admm_iterations, 1)
        _check_integer("seed", self.seed, 0, 2**63 - 1)

    def _resolve_size(self) -> None:
        if self.ranks is not None:
            self._check_ranks()
            return
        if self.energy is not None:
            check_positive("energy", self.energy)
            if self.energy >= 1:
                raise ValueError(f"energy must be below 1, got {self.energy}")
            if self.bpw is not None:
                raise ValueError(f"bpw must be None where energy is given, got {self.bpw}")
        elif self.bpw is None:
            object.__setattr__(self, "bpw", _DEFAULT_BPW)
        if self.bpw is not None:
            check_positive("bpw", self.bpw)
        elif self.budget != "uniform":
            raise ValueError(f"budget={self.budget!r} needs bpw: there are no bits to share out with energy")
        if self.paths is None:
            object.__setattr__(self, "paths", 1 if uses_one_path(self.method) else _PAPERS_PATHS)
        _check_integer("paths", self.paths, 1, MAX_PATHS)

    def _check_ranks(self) -> None:
        if not isinstance(self.ranks, (tuple, list)):
            raise TypeError(f"ranks must be a sequence of integers, got {type(self.ranks).__name__}")
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if not 1 <= len(self.ranks) <= MAX_PATHS:
            raise ValueError(f"ranks must hold between 1 and {MAX_PATHS} ranks, got {len(self.ranks)}")
        for i, rank in enumerate(self.ranks):
            check_rank(f"ranks[{i}]", rank)
        for name in ("bpw", "energy"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} must be None where ranks are given, got {getattr(self, name)}")
        if self.budget != "uniform":
            raise ValueError(f"budget={self.budget!r} needs bpw: there are no bits to share out with ranks")
        if self.paths not in (None, len(self.ranks)):
            raise ValueError(
                f"paths must be None or the number of ranks, {len(self.ranks)}, got {self.paths}"
            )
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

    def check_usable(self, shapes: Iterable[tuple[int, int, bool]]) -> None:
        """Raise ``ValueError`` if ``bpw`` is more than any layer can use (:func:`.budget.check_usable`).

        Args:
            shapes: K, N and whether it is a key or value projection, of every layer.
        """
        if self.bpw is not None:
            assert self.paths is not None  # set by _resolve_size
            factors = ((k, n, self.kv_factor if is_kv else 1.0) for k, n, is_kv in shapes)
            check_usable(self.bpw, factors, self.paths)

    def steps_for(self, in_features: int, out_features: int, ranks: tuple[int, ...]) -> Steps:
        """Return what is done to every path of a layer, ``method="auto"`` resolved."""
        return resolve_steps(
            self.method,
            (out_features, in_features),
            ranks,
            admm_iterations=self.admm_iterations,
            refine_rounds=self.refine_rounds,
            itq_iterations=self.itq_iterations,
            budget_seconds=self.budget_seconds,
        )


def as_config(config: QuantConfig | float | None) -> QuantConfig:
    """Return a configuration: itself, that of a number of bits per weight, or the default for ``None``.

    Raises:
        TypeError: ``config`` is none of these.
        ValueError: the number is not finite and positive.
    """
    if isinstance(config, QuantConfig):
        return config
    if config is None:
        return QuantConfig()
    if isinstance(config, bool) or not isinstance(config, (int, float)):
        raise TypeError(
            f"config must be a QuantConfig, a number of bits per weight or None, got {type(config).__name__}"
        )
    check_positive("config", config)
    return QuantConfig(bpw=float(config))


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _check_integer(name: str, value: object, least: int, most: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer between {least} and {most}, got {value!r}")
