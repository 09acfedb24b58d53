"""Packed layers of a checkpoint: found in the headers, checked there, and built from the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from littlebit2_kernels.format import (
    MAX_DIM,
    MAX_PATHS,
    RANK_MULTIPLE,
    WORD_BITS,
    PackedLinear,
    words_per_row,
)
from littlebit2_kernels.packing import pack_signs
from littlebit2_kernels.state import packed_from_state, path_suffix

from .errors import CheckpointError
from .headers import TensorEntry
from .naming import EXTRA_PREFIX, is_prepared_leaf, module_prefix, plain_leaf
from .specs import LayerSpec

__all__ = ["StoredLayer", "build_layer", "examine_layer"]

_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PREPARED_FAULT = (
    "is in the order of one of NanoQuant's kernels, which cannot be read: expected U_packed and V_packed, "
    "as NanoQuant saves a model before it prepares it to run"
)
_LATENT_DTYPES = (*_SCALE_DTYPES, torch.float64, torch.int8)


@dataclass(frozen=True)
class StoredLayer:
    """A packed layer as its files hold it.

    Attributes:
        spec: what it is, ranks rounded up to a multiple of 8.
        layout: ``"littlebit2"``, ``"littlebit"``, ``"littlebit-latent"``, ``"nanoquant"`` or ``"onebit"``.
        tensors: the entry of every tensor, by its name of docs/format.md (latents: ``U``, ``V``).
        extras: full names of buffers that carry no weight.
        stored_ranks: ranks in the files; empty for a single-stage layer.
    """

    spec: LayerSpec
    layout: str
    tensors: Mapping[str, TensorEntry]
    extras: tuple[str, ...]
    stored_ranks: tuple[int, ...]


@dataclass
class _Examination:
    """Collects everything that is wrong with one layer, so that one error can name it all."""

    module: str
    tensors: dict[str, TensorEntry]
    faults: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def fault(self, leaf: str, message: str) -> None:
        entry = self.tensors.get(leaf)
        where = f"{entry.file.name}: {entry.name}" if entry else module_prefix(self.module) + leaf
        self.faults.append(f"{where} {message}")

    def take(self, leaf: str, *, optional: bool = False) -> TensorEntry | None:
        entry = self.tensors.get(leaf)
        self.used.add(leaf)
        if entry is None and not optional:
            self.fault(leaf, "is missing")
        return entry

    def scale(self, leaf: str, size: int | None = None, *, optional: bool = False) -> int | None:
        """Length of a scale vector; ``None`` where it is missing or malformed."""
        entry = self.take(leaf, optional=optional)
        if entry is None:
            return None
        if entry.dtype not in _SCALE_DTYPES:
            self.fault(leaf, f"must be float32, float16 or bfloat16, got {entry.dtype}")
        vector = len(entry.shape) == 1 or (len(entry.shape) == 2 and entry.shape[0] == 1)
        expected = "size" if size is None else size
        length = entry.shape[-1] if vector else 0
        if not 1 <= length <= MAX_DIM or (size is not None and length != size):
            self.fault(leaf, f"must have shape [1, {expected}] or [{expected}], got {list(entry.shape)}")
            return None
        return length

    def matrix(
        self, leaf: str, rows: int | None, cols: int | None, dtypes: Iterable[torch.dtype]
    ) -> int | None:
        """Number of rows of a matrix; ``None`` where it is missing or malformed."""
        entry = self.take(leaf)
        if entry is None:
            return None
        allowed = tuple(dtypes)
        if entry.dtype not in allowed:
            self.fault(leaf, f"must be {' or '.join(map(str, allowed))}, got {entry.dtype}")
        shape = list(entry.shape)
        fits = len(shape) == 2 and 1 <= shape[0] <= MAX_DIM
        if not fits or (rows is not None and shape[0] != rows) or (cols is not None and shape[1] != cols):
            expected = ["rows" if rows is None else rows, "columns" if cols is None else cols]
            self.fault(leaf, f"must have shape [{expected[0]}, {expected[1]}], got {shape}")
            return None
        return shape[0]

    def ints(self, leaf: str, count: int, *, optional: bool) -> None:
        entry = self.take(leaf, optional=optional)
        if entry is not None and (entry.dtype != torch.int64 or entry.numel != count):
            self.fault(leaf, f"must hold {count} int64, got {entry.dtype} of shape {list(entry.shape)}")


def examine_layer(
    module: str,
    leaves: Mapping[str, TensorEntry],
    read_ints: Callable[[TensorEntry], list[int]],
    *,
    ours: bool,
) -> tuple[StoredLayer | None, list[str]]:
    """Work out one layer from the headers of its tensors.

    Args:
        module: module path.
        leaves: entries of the module's own tensors, by the last part of their names.
        read_ints: gives the few values of an int64 tensor.
        ours: whether the checkpoint says that it is of this project's format, which is read strictly.

    Returns:
        The layer (``None`` if it has faults) and the faults, one line each.
    """
    extras: list[str] = []
    tensors: dict[str, TensorEntry] = {}
    faults: list[str] = []
    for leaf, entry in leaves.items():
        if leaf.startswith(EXTRA_PREFIX) and entry.numel == 1:
            extras.append(entry.name)
        elif plain_leaf(leaf) in tensors:
            faults.append(f"{entry.name} must not be stored together with {tensors[plain_leaf(leaf)].name}")
        else:
            tensors[plain_leaf(leaf)] = entry
    seen = _Examination(module, tensors, faults)
    latent = "U" in tensors or "V" in tensors
    nanoquant = "scale_pre" in leaves or "scale_post" in leaves
    stored: list[int] = []
    shares: list[int] = []
    features: tuple[int | None, int | None] = (None, None)
    two_stage = latent or any(leaf.startswith("U_packed") for leaf in tensors)
    for path in range(_count_paths(tensors)):
        features, rank = _examine_path(seen, path, features, latent, two_stage, nanoquant, not ours)
        leader = _leader(seen, path, read_ints)
        shares.append(path if leader is None else leader)
        if leader is not None and rank is not None and leader < len(stored) and stored[leader] != rank:
            seen.fault(
                f"latent_scale{path_suffix(path)}", f"must have rank {stored[leader]} like path {leader}"
            )
        stored.append(rank or 0)
    bias = seen.scale("bias", features[1], optional=True) is not None
    for leaf in sorted(set(tensors) - seen.used):
        prepared = is_prepared_leaf(leaf)
        seen.fault(leaf, _PREPARED_FAULT if prepared else "is unexpected")
    in_features, out_features = features
    if seen.faults or in_features is None or out_features is None:
        return None, seen.faults
    if ours:
        for path, rank in enumerate(stored if two_stage else ()):
            if rank % RANK_MULTIPLE:
                seen.fault(
                    f"V_packed{path_suffix(path)}",
                    f"must have a multiple of {RANK_MULTIPLE} rows, got {rank}",
                )
    ranks = tuple(-(-rank // RANK_MULTIPLE) * RANK_MULTIPLE for rank in stored) if two_stage else None
    spec = LayerSpec(module, in_features, out_features, ranks, tuple(shares), bias)
    layout = _layout(tensors, latent, nanoquant, two_stage)
    layer = StoredLayer(spec, layout, tensors, tuple(extras), tuple(stored) if two_stage else ())
    return (None if seen.faults else layer), seen.faults


def build_layer(layer: StoredLayer, data: Mapping[str, torch.Tensor]) -> PackedLinear:
    """Build the packed layer in memory of its own.

    Args:
        layer: from :func:`examine_layer`.
        data: the tensors of ``layer.tensors``, by full name; may be mapped from files.

    Raises:
        CheckpointError: values are malformed: NaN, infinite scales, set pad bits, wrong stored shapes.
    """
    spec = layer.spec
    # Latents are not copied: packing them makes new memory anyway.
    state = {
        leaf: data[entry.name] if leaf[0] in "UV" and "_packed" not in leaf else _own(data[entry.name])
        for leaf, entry in layer.tensors.items()
    }
    prefix = module_prefix(spec.name)
    where = next(iter(layer.tensors.values())).file
    try:
        for path in range(len(spec.shares)):
            _complete_path(state, layer, path)
        packed = packed_from_state({prefix + leaf: tensor for leaf, tensor in state.items()}, prefix)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        # A KeyError's text is the repr of its message.
        raise CheckpointError(
            f"{where}: layer {spec.name}: {error.args[0] if error.args else error}"
        ) from error
    got = (packed.in_features, packed.out_features, packed.shares)
    if got != (spec.in_features, spec.out_features, spec.shares):
        raise CheckpointError(
            f"{where}: layer {spec.name}: expected (in_features, out_features, shares) = "
            f"{(spec.in_features, spec.out_features, spec.shares)}, as its headers said, got {got}"
        )
    return packed


def _count_paths(tensors: Mapping[str, TensorEntry]) -> int:
    """Paths up to the last that has any tensor, so that a missing one in between is a fault."""
    present = [
        path
        for path in range(MAX_PATHS)
        for stem in ("u1", "U_packed", "V_packed", "U", "V", "V_shared")
        if stem + path_suffix(path) in tensors
    ]
    return max(present, default=0) + 1


def _examine_path(
    seen: _Examination,
    path: int,
    features: tuple[int | None, int | None],
    latent: bool,
    two_stage: bool,
    nanoquant: bool,
    lenient: bool,
) -> tuple[tuple[int | None, int | None], int | None]:
    """Check one path's headers; return (K, N), as far as they are known, and its rank."""
    s = path_suffix(path)
    shared = f"V_shared{s}" in seen.tensors
    in_features, out_features = features
    if shared:
        seen.ints(f"V_shared{s}", 1, optional=False)
    else:
        in_features = seen.scale(f"v2{s}", in_features) or in_features
    out_features = seen.scale(f"u1{s}", out_features) or out_features
    known = (in_features, out_features)
    matrix, dtypes = ("", _LATENT_DTYPES) if latent else ("_packed", (torch.int32,))

    def width(cols: int | None) -> int | None:
        return cols if latent or cols is None else words_per_row(cols)

    rank: int | None = None
    if not shared:
        rank = seen.matrix(f"V{matrix}{s}", None if two_stage else out_features, width(in_features), dtypes)
        if not latent:
            seen.ints(f"V_shape{s}", 2, optional=lenient)
    if not two_stage:
        return known, rank
    rank = _latent_rank(seen, s, rank, nanoquant)
    seen.matrix(f"U{matrix}{s}", out_features, width(rank), dtypes)
    if not latent:
        seen.ints(f"U_shape{s}", 2, optional=lenient)
    return known, rank


def _latent_rank(seen: _Examination, s: str, rank: int | None, nanoquant: bool) -> int | None:
    pair = [leaf for leaf in (f"v1{s}", f"u2{s}") if leaf in seen.tensors]
    if not pair:
        found = seen.scale(f"latent_scale{s}", rank, optional=nanoquant)
        return rank if rank is not None else found
    if f"latent_scale{s}" in seen.tensors:
        seen.fault(f"latent_scale{s}", f"must not be stored together with {' and '.join(pair)}")
        seen.used.add(f"latent_scale{s}")
    for leaf in (f"v1{s}", f"u2{s}"):
        found = seen.scale(leaf, rank)
        rank = rank if rank is not None else found
    return rank


def _leader(seen: _Examination, path: int, read_ints: Callable[[TensorEntry], list[int]]) -> int | None:
    leaf = f"V_shared{path_suffix(path)}"
    entry = seen.tensors.get(leaf)
    if entry is None or entry.dtype != torch.int64 or entry.numel != 1:
        return None
    (leader,) = read_ints(entry)
    if not 0 <= leader < path or f"V_shared{path_suffix(leader)}" in seen.tensors:
        seen.fault(leaf, f"must name an earlier path that has its own V, got {leader}")
        return None
    return leader


def _layout(tensors: Mapping[str, TensorEntry], latent: bool, nanoquant: bool, two_stage: bool) -> str:
    if nanoquant:
        return "nanoquant"
    if latent:
        return "littlebit-latent"
    if not two_stage:
        return "onebit"
    return "littlebit" if "v1" in tensors else "littlebit2"


def _complete_path(state: dict[str, torch.Tensor], layer: StoredLayer, path: int) -> None:
    """Bring one path's tensors to the portable form, in place: packed, own memory, rank a multiple of 8."""
    s = path_suffix(path)
    spec = layer.spec
    for matrix in ("U", "V"):
        if f"{matrix}{s}" in state:
            state[f"{matrix}_packed{s}"] = pack_signs(state.pop(f"{matrix}{s}"))
    rows = spec.out_features if spec.ranks is None else layer.stored_ranks[path]
    if f"V_packed{s}" in state:
        state.setdefault(f"V_shape{s}", torch.tensor([rows, spec.in_features]))
    if spec.ranks is None:
        return
    state.setdefault(f"U_shape{s}", torch.tensor([spec.out_features, rows]))
    if f"v1{s}" not in state:
        state.setdefault(f"latent_scale{s}", torch.ones(rows))
    missing = spec.ranks[path] - rows
    if missing:
        _pad_rank(state, s, missing, rows)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _pad_rank(state: dict[str, torch.Tensor], s: str, missing: int, rows: int) -> None:
    """Append latents of scale zero; the stored shapes are checked before they are changed."""
    for leaf, index in ((f"V_shape{s}", 0), (f"U_shape{s}", 1)):
        if leaf in state:
            shape = state[leaf].flatten().clone()
            if int(shape[index]) != rows:
                raise ValueError(f"{leaf} must hold rank {rows}, got {shape.tolist()}")
            shape[index] += missing
            state[leaf] = shape
    tail = rows % WORD_BITS
    if bool((state[f"U_packed{s}"][:, -1] & -(1 << tail)).any()):
        raise ValueError(f"U_packed{s} has non-zero pad bits past column {rows}")
    if f"V_packed{s}" in state:
        state[f"V_packed{s}"] = torch.nn.functional.pad(state[f"V_packed{s}"], (0, 0, 0, missing))
    for leaf in (f"latent_scale{s}", f"v1{s}", f"u2{s}"):
        if leaf in state:
            state[leaf] = torch.nn.functional.pad(state[leaf].flatten(), (0, missing))
