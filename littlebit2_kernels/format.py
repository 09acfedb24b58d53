"""Packed format v1 in Python: constants, sign packing, and the validated containers of a layer.

The normative description is ``docs/format.md``; the constants mirror
``csrc/include/littlebit2/format.h``. Terms: ``M`` tokens, ``K`` in_features, ``N`` out_features,
``R`` rank, ``P`` paths. A layer computes, for every path ``p`` (LittleBit, arXiv 2506.13771, eq. of
the factorized forward; residual paths add up)::

    y[M,N] += out_scale[N] * ((latent_scale[R] * ((x[M,K] * in_scale[K]) @ sign(V)[R,K].T)) @ sign(U)[N,R].T)

and finally adds ``bias[N]``. A *single-stage* path (OneBit-like) has no ``U``; its sign matrix ``V``
is ``[N, K]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

__all__ = [
    "FORMAT_VERSION",
    "MAX_PATHS",
    "NEGATIVE_BIT",
    "PAD_BIT",
    "RANK_MULTIPLE",
    "WORD_BITS",
    "LayerShape",
    "PackedLinear",
    "PackedPath",
    "pack_signs_reference",
    "pitched_words",
    "unpack_signs_reference",
    "words_per_row",
]

FORMAT_VERSION = 1
WORD_BITS = 32
FIRST_BIT = 0
NEGATIVE_BIT = 1
PAD_BIT = 0
RANK_MULTIPLE = 8

#: Largest number of paths of one layer.
MAX_PATHS = 16

#: Largest dimension the format and every kernel accept (fits a signed 32-bit index).
MAX_DIM = 2**31 - 1


def words_per_row(cols: int) -> int:
    """Return how many 32-bit words one row of ``cols`` signs occupies."""
    return -(-cols // WORD_BITS)


def pitched_words(words: torch.Tensor) -> torch.Tensor:
    """Return the same packed rows starting at multiples of 16 bytes, as GPU kernels read them fastest.

    Args:
        words: int32 ``[rows, words]``.

    Returns:
        ``words`` itself where its rows start so, else a view of new memory with zeros between the rows.
    """
    rows, count = words.shape
    if words.stride(0) % 4 == 0 and words.stride(1) == 1 and words.data_ptr() % 16 == 0:
        return words
    room = words.new_zeros(rows, -(-count // 4) * 4)
    view = room[:, :count]
    view.copy_(words)
    return view


def pack_signs_reference(values: torch.Tensor) -> torch.Tensor:
    """Pack the signs of ``values`` along the last dimension, in plain PyTorch.

    The definition that the native packer is tested against; prefer :func:`littlebit2_kernels.pack_signs`.

    Args:
        values: ``[..., cols]``, any real numeric dtype. Negative entries become
            bit 1, everything else (zero, ``-0.0``) bit 0.

    Returns:
        int32 ``[..., ceil(cols / 32)]`` on the device of ``values``.

    Raises:
        TypeError: ``values`` is not a real numeric tensor.
        ValueError: ``values`` has no dimension, or contains NaN.
    """
    check_signs_input(values)
    cols = values.shape[-1]
    per_row = words_per_row(cols)
    bits = torch.nn.functional.pad((values < 0).to(torch.int64), (0, per_row * WORD_BITS - cols))
    bits = bits.reshape(*values.shape[:-1], per_row, WORD_BITS)
    words = (bits << torch.arange(WORD_BITS, device=values.device)).sum(-1)
    # Wrap the unsigned word into int32 without relying on implementation-defined casts.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_signs_reference(
    words: torch.Tensor, cols: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Expand packed words to a dense +-1 tensor, in plain PyTorch.

    Args:
        words: int32 ``[..., ceil(cols / 32)]``.
        cols: number of signs per row.
        dtype: dtype of the result (any signed dtype).

    Returns:
        ``[..., cols]`` of ``dtype`` holding +1 and -1.

    Raises:
        TypeError: ``words`` is not int32, or ``dtype`` cannot hold -1.
        ValueError: the last dimension of ``words`` does not hold ``cols`` signs.
    """
    check_words(words, cols)
    if dtype not in _SIGNED_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, _SIGNED_DTYPES))}, got {dtype}")
    bits = (words.unsqueeze(-1) >> torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)) & 1
    return (1 - 2 * bits.flatten(-2)[..., :cols]).to(dtype)


#: Dtypes that hold -1 and that PyTorch compares and shifts on every device.
_SIGNED_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
)


def check_signs_input(values: torch.Tensor) -> None:
    """Raise unless ``values`` is a dense numeric tensor with a last dimension and no NaN."""
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"values must be a torch.Tensor, got {type(values).__name__}")
    if values.dtype not in (*_SIGNED_DTYPES, torch.uint8):
        raise TypeError(f"values must have a real numeric dtype, got {values.dtype}")
    if values.layout != torch.strided:
        raise TypeError(f"values must be a dense tensor, got {values.layout}")
    if values.dim() == 0:
        raise ValueError("values must have at least one dimension, got a 0-d tensor")
    if values.is_floating_point() and holds_values(values) and bool(torch.isnan(values).any()):
        raise ValueError("values must not contain NaN: the sign of NaN is undefined")


def check_words(words: torch.Tensor, cols: int) -> None:
    """Raise unless ``words`` is int32 with ``cols`` signs in its last dimension."""
    if not isinstance(words, torch.Tensor):
        raise TypeError(f"words must be a torch.Tensor, got {type(words).__name__}")
    if words.dtype != torch.int32:
        raise TypeError(f"words must be int32, got {words.dtype}")
    if cols < 0:
        raise ValueError(f"cols must be >= 0, got {cols}")
    if words.dim() == 0 or words.shape[-1] != words_per_row(cols):
        raise ValueError(
            f"words.size(-1) must equal ceil({cols} / {WORD_BITS}) = {words_per_row(cols)}, "
            f"got shape {tuple(words.shape)}"
        )


def holds_values(tensor: torch.Tensor) -> bool:
    """Whether element values can be looked at (not on the meta device, not while tracing)."""
    return not (
        tensor.is_meta
        or torch.compiler.is_compiling()
        or isinstance(tensor, torch._subclasses.FakeTensor)
        # Under a fake mode even a real tensor yields fake results.
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    )


def _check_word_matrix(name: str, words: torch.Tensor, rows: int | None, cols: int) -> None:
    if not isinstance(words, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(words).__name__}")
    if words.dtype != torch.int32:
        raise TypeError(f"{name} must be int32 words, got {words.dtype}")
    expected = (rows if rows is not None else "rows", words_per_row(cols))
    if words.dim() != 2 or words.shape[1] != expected[1] or (rows is not None and words.shape[0] != rows):
        raise ValueError(
            f"{name} must have shape [{expected[0]}, {expected[1]}] "
            f"({cols} signs per row in 32-bit words), got {list(words.shape)}"
        )
    if words.shape[1] > 1 and words.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous rows (stride 1), got strides {words.stride()}")
    if words.shape[0] > 1 and words.stride(0) < words.shape[1]:
        raise ValueError(f"{name} must have rows that do not overlap, got strides {words.stride()}")
    tail = cols % WORD_BITS
    if tail and words.shape[0] and holds_values(words):
        # All bits from `tail` up: -(1 << tail) has exactly those set in two's complement.
        dirty = torch.nonzero((words[:, -1] & -(1 << tail)) != 0)
        if dirty.numel():
            raise ValueError(
                f"{name} has non-zero pad bits past column {cols} (first in row {int(dirty[0])}): "
                "the packed tensor is corrupted or was packed with other dimensions"
            )


def _check_scale(name: str, scale: torch.Tensor, size: int | None) -> None:
    # A size of None stands for whatever the scale has: it is what defines the dimension.
    if not isinstance(scale, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(scale).__name__}")
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {scale.dtype}")
    if scale.dim() != 1 and size is None:
        raise ValueError(f"{name} must be one-dimensional, got shape {list(scale.shape)}")
    if tuple(scale.shape) != (size,) and size is not None:
        raise ValueError(f"{name} must have shape [{size}], got {list(scale.shape)}")
    if scale.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {scale.layout}")
    if not scale.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {scale.stride()}")
    if holds_values(scale) and not bool(torch.isfinite(scale).all()):
        bad = int(torch.nonzero(~torch.isfinite(scale))[0])
        raise ValueError(f"{name} must be finite, got {float(scale[bad])} at index {bad}")


def check_dim(name: str, size: int, multiple: int = 1) -> None:
    """Raise unless ``size`` is an integer in the range of a dimension and a multiple of ``multiple``."""
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {size!r}")
    if not 1 <= size <= MAX_DIM or size % multiple:
        of = f" and a multiple of {multiple}" if multiple > 1 else ""
        raise ValueError(f"{name} must be between 1 and {MAX_DIM}{of}, got {size}")


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer without its tensors: what planning, reports and file headers need to know.

    Attributes:
        in_features: K.
        out_features: N.
        ranks: rank R of every path, a multiple of 8, or ``None`` for a single-stage (OneBit-like) layer.
        shares: for each path, the path whose first stage (``V`` and ``in_scale``) it uses: itself, or an
            earlier path of equal rank. Held as a tuple; empty means that no path shares.

    Raises:
        TypeError: a size is not an integer, or ``ranks`` or ``shares`` is not a sequence.
        ValueError: a size is out of range, there are no or too many paths, or ``shares`` is inconsistent.
    """

    in_features: int
    out_features: int
    ranks: tuple[int, ...] | None
    shares: tuple[int, ...] = ()

    #: Bits that the papers count for one entry of a scale vector (LittleBit, arXiv 2506.13771).
    COUNTED_SCALE_BITS: ClassVar[int] = 16
    #: Bits of one entry of a scale vector in the packed format.
    STORED_SCALE_BITS: ClassVar[int] = 32

    def __post_init__(self) -> None:
        check_dim("in_features", self.in_features)
        check_dim("out_features", self.out_features)
        for name, values in (("ranks", self.ranks), ("shares", self.shares)):
            if values is None and name == "ranks":
                continue
            if isinstance(values, str) or not isinstance(values, Sequence):
                or_none = " or None" if name == "ranks" else ""
                raise TypeError(
                    f"{name} must be a sequence of integers{or_none}, got {type(values).__name__}"
                )
            object.__setattr__(self, name, tuple(values))
        for p, rank in enumerate(self.ranks or ()):
            check_dim(f"ranks[{p}]", rank, RANK_MULTIPLE)
        if not self.shares:
            object.__setattr__(self, "shares", tuple(range(1 if self.ranks is None else len(self.ranks))))
        if self.ranks is not None and len(self.shares) != len(self.ranks):
            raise ValueError(
                f"shares must name one path per rank ({len(self.ranks)}), got {len(self.shares)}"
            )
        if not 1 <= len(self.shares) <= MAX_PATHS:
            raise ValueError(f"a layer must have between 1 and {MAX_PATHS} paths, got {len(self.shares)}")
        self._check_shares()

    def _check_shares(self) -> None:
        rows = self.rows
        for p, source in enumerate(self.shares):
            if isinstance(source, bool) or not isinstance(source, int):
                raise TypeError(f"shares[{p}] must be an integer, got {source!r}")
            if not 0 <= source <= p or self.shares[source] != source or rows[source] != rows[p]:
                raise ValueError(
                    f"shares[{p}] must name path {p} itself or an earlier unshared path of rank {rows[p]}, "
                    f"got {source}"
                )

    @property
    def single_stage(self) -> bool:
        """Whether the layer has no second sign matrix (OneBit-like)."""
        return self.ranks is None

    @property
    def num_paths(self) -> int:
        """P."""
        return len(self.shares)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the first sign matrix of every path: R, or N in a single-stage layer."""
        return (self.out_features,) * self.num_paths if self.ranks is None else self.ranks

    @property
    def own_rows(self) -> tuple[int, ...]:
        """:attr:`rows` of the paths that compute a first stage of their own."""
        return tuple(rows for p, rows in enumerate(self.rows) if self.shares[p] == p)

    @property
    def factor_elements(self) -> int:
        """Elements of the dense factors: each path has its own; a single-stage layer has one dense matrix."""
        sizes = self.in_features + self.out_features
        return self.in_features * self.out_features if self.ranks is None else sum(self.ranks) * sizes

    @property
    def macs(self) -> int:
        """Sign-accumulate operations for one token, all stages and paths."""
        return self.in_features * sum(self.own_rows) + self.out_features * sum(self.ranks or ())

    @property
    def counted_bits(self) -> int:
        """Bits by the papers' count: one per sign, 16 per entry of a scale vector, shared tensors once."""
        return self.macs + self.COUNTED_SCALE_BITS * self.scale_entries

    @property
    def stored_bits(self) -> int:
        """Bits of the portable tensors without the bias: sign rows padded to words, float32 scales."""
        words = sum(self.own_rows) * words_per_row(self.in_features)
        words += self.out_features * sum(map(words_per_row, self.ranks or ()))
        return WORD_BITS * words + self.STORED_SCALE_BITS * self.scale_entries

    @property
    def counted_bpw(self) -> float:
        """:attr:`counted_bits` per weight of the dense layer."""
        return self.counted_bits / (self.in_features * self.out_features)

    @property
    def stored_bpw(self) -> float:
        """:attr:`stored_bits` per weight of the dense layer."""
        return self.stored_bits / (self.in_features * self.out_features)

    @property
    def scale_entries(self) -> int:
        """Entries of all scale vectors, shared ones once."""
        latents = sum(self.ranks or ())
        return len(self.own_rows) * self.in_features + self.num_paths * self.out_features + latents

    def __str__(self) -> str:
        sizes = f"K={self.in_features}, N={self.out_features}"
        kind = "single stage" if self.ranks is None else f"ranks={list(self.ranks)}"
        shared = self.shares != tuple(range(self.num_paths))
        return f"{sizes}, {kind}" + (f", shares={list(self.shares)}" if shared else "")


@dataclass(frozen=True, eq=False)
class PackedPath:
    """One path of a layer: packed signs and float32 scales, checked on construction.

    Attributes:
        v: int32 ``[R, ceil(K/32)]``, signs of the input factor. Rows may be pitched
            (``stride(0) > size(1)``). For a single-stage path: ``[N, ceil(K/32)]``.
        in_scale: float32 ``[K]`` (the papers' ``g``, checkpoint name ``v2``).
        out_scale: float32 ``[N]`` (the papers' ``h``, checkpoint name ``u1``).
        u: int32 ``[N, ceil(R/32)]``, signs of the output factor; ``None`` for a single-stage path.
        latent_scale: float32 ``[R]`` (the papers' ``l`` = ``v1 * u2``); ``None`` for a single-stage path.

    Two paths share their first stage by holding the *same* ``v`` and ``in_scale`` tensors.

    Raises:
        TypeError: a field is not a tensor or has the wrong dtype.
        ValueError: shapes disagree, devices differ, ``R`` is not a multiple of 8, a scale is not
            finite, pad bits are set, or only one of ``u`` and ``latent_scale`` is given.
    """

    v: torch.Tensor
    in_scale: torch.Tensor
    out_scale: torch.Tensor
    u: torch.Tensor | None = None
    latent_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.u is None) != (self.latent_scale is None):
            missing, given = ("u", "latent_scale") if self.u is None else ("latent_scale", "u")
            raise ValueError(f"{missing} must be given together with {given}, got None")
        _check_scale("in_scale", self.in_scale, None)
        _check_scale("out_scale", self.out_scale, None)
        check_dim("in_features (in_scale.numel())", self.in_features)
        check_dim("out_features (out_scale.numel())", self.out_features)
        if self.u is None:
            _check_word_matrix("v", self.v, self.out_features, self.in_features)
        else:
            _check_word_matrix("v", self.v, None, self.in_features)
            check_dim("rank (v.size(0))", self.rank, RANK_MULTIPLE)
            _check_word_matrix("u", self.u, self.out_features, self.rank)
            _check_scale("latent_scale", self.latent_scale, self.rank)  # type: ignore[arg-type]
        for name, tensor in self.tensors().items():
            if tensor.device != self.v.device:
                raise ValueError(f"{name} must be on {self.v.device} like v, got {tensor.device}")

    @property
    def in_features(self) -> int:
        """K."""
        return self.in_scale.shape[0]

    @property
    def out_features(self) -> int:
        """N."""
        return self.out_scale.shape[0]

    @property
    def rank(self) -> int:
        """R; for a single-stage path N, the rows of its only sign matrix."""
        return self.v.shape[0]

    @property
    def single_stage(self) -> bool:
        """Whether the path has no ``u`` (OneBit-like)."""
        return self.u is None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are present, by field name."""
        named = {
            "v": self.v,
            "in_scale": self.in_scale,
            "u": self.u,
            "latent_scale": self.latent_scale,
            "out_scale": self.out_scale,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def shares_first_stage(self, other: PackedPath) -> bool:
        """Whether both paths hold the same ``v`` and ``in_scale`` tensors."""
        return self.v is other.v and self.in_scale is other.in_scale


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A whole layer: the sum of its paths plus an optional bias, checked on construction.

    Attributes:
        paths: one or more :class:`PackedPath` with equal K and N; ranks may differ. Held as a tuple.
        bias: float32 ``[N]`` or ``None``.
        shape: sizes and structure; paths that hold the same ``v`` and ``in_scale`` share them.

    Raises:
        TypeError: an element of ``paths`` is not a :class:`PackedPath`.
        ValueError: no path, paths that disagree in K, N, device or number of stages, or a bad bias.
    """

    paths: Sequence[PackedPath]
    bias: torch.Tensor | None = None
    shape: LayerShape = field(init=False, repr=False)
    _operands: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.paths, PackedPath) or not isinstance(self.paths, Sequence):
            raise TypeError(f"paths must be a sequence of PackedPath, got {type(self.paths).__name__}")
        object.__setattr__(self, "paths", tuple(self.paths))
        if not 1 <= len(self.paths) <= MAX_PATHS:
            raise ValueError(f"paths must hold between 1 and {MAX_PATHS} PackedPath, got {len(self.paths)}")
        first = self.paths[0]
        for i, path in enumerate(self.paths):
            if not isinstance(path, PackedPath):
                raise TypeError(f"paths[{i}] must be a PackedPath, got {type(path).__name__}")
            for what in ("in_features", "out_features", "single_stage"):
                if getattr(path, what) != getattr(first, what):
                    raise ValueError(
                        f"paths[{i}].{what} must equal paths[0].{what} = {getattr(first, what)}, "
                        f"got {getattr(path, what)}"
                    )
            if path.v.device != first.v.device:
                raise ValueError(f"paths[{i}] must be on {first.v.device} like paths[0], got {path.v.device}")
        shares = [
            next(i for i, other in enumerate(self.paths) if path.shares_first_stage(other))
            for path in self.paths
        ]
        ranks = None if first.single_stage else tuple(path.rank for path in self.paths)
        shape = LayerShape(first.in_features, first.out_features, ranks, tuple(shares))
        object.__setattr__(self, "shape", shape)
        if self.bias is not None:
            _check_scale("bias", self.bias, self.out_features)
            if self.bias.device != self.device:
                raise ValueError(f"bias must be on {self.device} like paths[0], got {self.bias.device}")
        two_stage = not self.single_stage
        object.__setattr__(
            self,
            "_operands",
            (
                [p.v for p in self.paths],
                [p.u for p in self.paths] if two_stage else None,
                [p.in_scale for p in self.paths],
                [p.latent_scale for p in self.paths] if two_stage else None,
                [p.out_scale for p in self.paths],
            ),
        )

    @property
    def in_features(self) -> int:
        """K."""
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.shape.out_features

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """Rank of every path, or ``None`` for a single-stage layer."""
        return self.shape.ranks

    @property
    def shares(self) -> tuple[int, ...]:
        """For each path, the path whose first stage it uses: itself unless it shares one."""
        return self.shape.shares

    @property
    def single_stage(self) -> bool:
        """Whether the layer has no second sign matrix (OneBit-like)."""
        return self.shape.single_stage

    @property
    def device(self) -> torch.device:
        """Device that holds every tensor of the layer."""
        return self.paths[0].v.device

    @property
    def operands(self) -> tuple[Any, ...]:
        """The ``(v, u, in_scale, latent_scale, out_scale)`` lists that ``littlebit2::linear`` takes.

        One tensor per path; ``u`` and ``latent_scale`` are ``None`` for a single-stage layer.
        """
        return self._operands

    def unique_tensors(self) -> list[torch.Tensor]:
        """Every tensor of the layer once, shared ones not repeated."""
        seen: dict[int, torch.Tensor] = {}
        for path in self.paths:
            for tensor in path.tensors().values():
                seen.setdefault(id(tensor), tensor)
        if self.bias is not None:
            seen.setdefault(id(self.bias), self.bias)
        return list(seen.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: words with their padding (but not a row pitch), float32 scales, bias."""
        return sum(t.numel() * t.element_size() for t in self.unique_tensors())

    def to(self, device: torch.device | str) -> PackedLinear:
        """Return the layer with every tensor on ``device``; shared tensors stay shared."""
        moved: dict[int, torch.Tensor] = {}

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device)
            return moved[id(tensor)]

        paths = tuple(
            PackedPath(
                v=move(p.v),  # type: ignore[arg-type]
                in_scale=move(p.in_scale),  # type: ignore[arg-type]
                out_scale=move(p.out_scale),  # type: ignore[arg-type]
                u=move(p.u),
                latent_scale=move(p.latent_scale),
            )
            for p in self.paths
        )
        return PackedLinear(paths, move(self.bias))
