"""What is timed: our backends, and the peers that they are compared with.

A candidate is named ``littlebit2:<backend>:<activation>``, ``littlebit2:portable``, ``dense``, ``low-rank``,
``unpack`` or ``gemlite``. It can be unavailable, with a reason; nothing stands in for it then.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchmarks.problems import Problem, dtype_name
from littlebit2_kernels import LittleBitLinear, littlebit_linear, unpack_signs
from littlebit2_kernels.dispatch import ACTIVATIONS, BACKENDS
from littlebit2_kernels.testing import make_packed

__all__ = ["PEERS", "Built", "Candidate", "parse_candidate"]

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Built:
    """A candidate's weights for one problem.

    Attributes:
        holder: what holds the tensors; copied by ``copy.deepcopy``.
        bind: makes the forward call ``[M, K] -> [M, N]`` of a holder.
        nbytes: bytes that one call reads.
    """

    holder: Any
    bind: Callable[[Any], Forward]
    nbytes: int

    def forwards(self, copies: int) -> list[Forward]:
        """Forward calls of ``copies`` distinct copies, the first of them these weights themselves."""
        holders = [self.holder, *(copy.deepcopy(self.holder) for _ in range(copies - 1))]
        return [self.bind(holder) for holder in holders]


class Candidate(ABC):
    """Something to time, for activations of one dtype.

    Attributes:
        name: as on the command line.
        dtype: of the activations.
        ours: whether it is this project's.
        uses_signs: whether its weights depend on the packed layer; a dense matrix fits any of its shape.
    """

    ours = False
    uses_signs = True

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    @property
    def label(self) -> str:
        """Name and dtype."""
        return f"{self.name} {dtype_name(self.dtype)}"

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``, or ``None``."""
        return None

    def macs(self, problem: Problem) -> int:
        """Multiply-accumulates for one token."""
        return problem.packed_macs

    @abstractmethod
    def planned_bytes(self, problem: Problem) -> int:
        """About how many bytes one copy of the weights will take."""

    @abstractmethod
    def build(self, problem: Problem) -> Built:
        """Make the weights."""


class Portable(Candidate):
    """``littlebit_linear`` on the portable layout."""

    ours = True

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`Candidate`."""
        return _failure(lambda: littlebit_linear(*_probe(self.dtype, device)))

    def planned_bytes(self, problem: Problem) -> int:
        """See :class:`Candidate`."""
        return problem.packed_macs // 8

    def build(self, problem: Problem) -> Built:
        """See :class:`Candidate`."""
        packed = problem.packed
        # Under its own holder, for the copies are rotated and the problem's layer is not to be one of them.
        return Built(copy.deepcopy(packed), lambda p: lambda x: littlebit_linear(x, p), packed.nbytes)


class Module(Candidate):
    """``LittleBitLinear`` with a backend and an activation mode, prepacked on the CPU."""

    ours = True

    def __init__(self, name: str, dtype: torch.dtype, backend: str, activation: str) -> None:
        super().__init__(name, dtype)
        self.backend = backend
        self.activation = activation

    def _module(self, packed: Any) -> LittleBitLinear:
        module = LittleBitLinear.from_packed(packed, backend=self.backend, activation=self.activation)
        return (
            module.prepack_() if packed.device.type == "cpu" and self.backend in ("auto", "cpu") else module
        )

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`Candidate`."""
        x, packed = _probe(self.dtype, device)
        return _failure(lambda: self._module(packed)(x))

    def planned_bytes(self, problem: Problem) -> int:
        """See :class:`Candidate`."""
        return problem.packed_macs // 8

    def build(self, problem: Problem) -> Built:
        """See :class:`Candidate`."""
        module = self._module(copy.deepcopy(problem.packed))
        return Built(module, lambda layer: layer, module.nbytes)


class Dense(Candidate):
    """``F.linear`` with a weight ``[N, K]`` of x's dtype."""

    uses_signs = False

    def macs(self, problem: Problem) -> int:
        """See :class:`Candidate`."""
        return problem.dense_macs

    def planned_bytes(self, problem: Problem) -> int:
        """See :class:`Candidate`."""
        return problem.dense_macs * self.dtype.itemsize

    def build(self, problem: Problem) -> Built:
        """See :class:`Candidate`."""
        size = (problem.shape.out_features, problem.shape.in_features)
        weight = torch.empty(size, dtype=self.dtype, device=problem.device).uniform_(-1, 1)
        return Built(weight, lambda w: lambda x: functional.linear(x, w), weight.nbytes)


class LowRank(Candidate):
    """Two ``F.linear`` with +-1 factors in x's dtype: what unpacking a checkpoint gives, scales left out."""

    def planned_bytes(self, problem: Problem) -> int:
        """See :class:`Candidate`."""
        return problem.packed_macs * self.dtype.itemsize

    def build(self, problem: Problem) -> Built:
        """See :class:`Candidate`; factors are ``[sum R, K]`` and ``[N, sum R]``."""
        factors = unpacked_factors(problem, self.dtype)
        return Built(factors, _two_products, sum(factor.nbytes for factor in factors))


class Unpack(Candidate):
    """Packed signs expanded to +-1 in every call, by a table of bytes, then two ``F.linear``; no scales."""

    def planned_bytes(self, problem: Problem) -> int:
        """See :class:`Candidate`."""
        return problem.packed_macs // 8

    def build(self, problem: Problem) -> Built:
        """See :class:`Candidate`; bytes of the factors of all paths together, and the table ``[256, 8]``."""
        paths = problem.packed.paths
        v = torch.cat([_sign_bytes(path.v, path.in_features) for path in paths])
        u = torch.cat([_sign_bytes(path.u, path.rank) for path in paths if path.u is not None], dim=1)
        bits = torch.arange(256, device=v.device)[:, None] >> torch.arange(8, device=v.device) & 1
        table = (1 - 2 * bits).to(self.dtype)
        return Built([v, u, table], _expand_and_multiply, v.nbytes + u.nbytes)


class GemLite(Candidate):
    """GemLite's weight-only kernels with 1-bit weights, one call per stage, scales left out.

    GemLite wants dimensions that are multiples of 128, so the latents of all paths together are padded up to
    one; the padding holds arbitrary signs, as only time is measured.
    """

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`Candidate`."""
        if device.type != "cuda":
            return f"gemlite runs on CUDA tensors, not on {device.type}"
        if self.dtype == torch.float32:
            return "gemlite takes 16-bit activations, not float32"
        bits = torch.zeros(128, 128, dtype=torch.uint8)
        x = torch.ones(1, 128, dtype=self.dtype, device=device)
        return _failure(lambda: _gemlite_layer(bits, self.dtype, device)(x))

    def planned_bytes(self, problem: Problem) -> int:
        """See :class:`Candidate`."""
        return problem.packed_macs // 8

    def build(self, problem: Problem) -> Built:
        """See :class:`Candidate`."""
        latent = -(-problem.latent_features // 128) * 128
        shapes = ((latent, problem.shape.in_features), (problem.shape.out_features, latent))
        stages = [
            _gemlite_layer(torch.randint(0, 2, shape, dtype=torch.uint8), self.dtype, problem.device)
            for shape in shapes
        ]
        return Built(
            stages,
            lambda pair: lambda x: pair[1](pair[0](x)),
            sum(rows * cols // 8 for rows, cols in shapes),
        )


def unpacked_factors(problem: Problem, dtype: torch.dtype) -> list[torch.Tensor]:
    """The problem's signs as +-1: ``[sum R, K]`` and ``[N, sum R]``."""
    paths = problem.packed.paths
    v = torch.cat([unpack_signs(path.v, path.in_features, dtype) for path in paths])
    u = torch.cat([unpack_signs(path.u, path.rank, dtype) for path in paths if path.u is not None], dim=1)
    return [v, u]


def _sign_bytes(words: torch.Tensor, cols: int) -> torch.Tensor:
    """Bytes of eight signs each, the first in the lowest bit; words are little-endian on every platform."""
    return words.contiguous().view(torch.uint8)[:, : -(-cols // 8)]


def _expand_and_multiply(holder: list[torch.Tensor]) -> Forward:
    v, u, table = holder

    def expand(signs: torch.Tensor) -> torch.Tensor:
        return functional.embedding(signs.int(), table).flatten(1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, expand(v)[:, : x.shape[-1]]), expand(u))

    return forward


def _two_products(factors: list[torch.Tensor]) -> Forward:
    v, u = factors
    return lambda x: functional.linear(functional.linear(x, v), u)


def _gemlite_layer(bits: torch.Tensor, dtype: torch.dtype, device: torch.device) -> Any:
    """A GemLite layer of uint8 bits ``[rows, cols]`` that stand for (bit - 0.5) * 2."""
    import importlib

    helper = importlib.import_module("gemlite.helper")
    rows, cols = bits.shape
    scales = torch.full((rows, 1), 2.0, dtype=dtype)
    zeros = torch.full((rows, 1), 0.5, dtype=dtype)
    return helper.A16Wn(device=str(device)).from_weights(
        W_q=bits.to(device), scales=scales, zeros=zeros, W_nbits=1, group_size=cols
    )


def _probe(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, Any]:
    """One token and a small layer that any backend should take."""
    packed = make_packed(256, 256, [64], generator=torch.Generator().manual_seed(0))
    return torch.ones(1, 256, dtype=dtype, device=device), packed.to(device)


def _failure(attempt: Callable[[], object]) -> str | None:
    """The message of what ``attempt`` raises, on one line, or ``None``."""
    try:
        with torch.inference_mode():
            attempt()
    except Exception as error:
        # Whatever is wrong with it, a candidate that does not run is reported and the others are measured.
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


#: Names of the peers.
PEERS: dict[str, type[Candidate]] = {
    "dense": Dense,
    "low-rank": LowRank,
    "unpack": Unpack,
    "gemlite": GemLite,
}


def parse_candidate(name: str, dtype: torch.dtype) -> Candidate:
    """Make the candidate of a name for activations of ``dtype``.

    Raises:
        ValueError: no candidate has that name.
    """
    if name in PEERS:
        return PEERS[name](name, dtype)
    if name == "littlebit2:portable":
        return Portable(name, dtype)
    parts = name.split(":")
    if len(parts) == 3 and parts[0] == "littlebit2" and parts[1] in BACKENDS and parts[2] in ACTIVATIONS:
        return Module(name, dtype, parts[1], parts[2])
    raise ValueError(
        f"candidate must be one of {', '.join(PEERS)}, littlebit2:portable, or "
        f"littlebit2:BACKEND:ACTIVATION with a backend of {', '.join(BACKENDS)} and an activation of "
        f"{', '.join(ACTIVATIONS)}; got {name!r}"
    )
