"""Tensor names of the layouts in the wild, brought to those of docs/format.md."""

from __future__ import annotations

import re
from collections.abc import Iterable

from littlebit2_kernels.state import path_suffix

__all__ = [
    "EXTRA_PREFIX",
    "is_packed_module",
    "is_prepared_leaf",
    "module_prefix",
    "natural_order",
    "plain_leaf",
    "split_name",
    "upstream_leaf",
]

#: Buffers of the authors' code (``_eff_bit_actual``, ...) begin so; they carry no weight.
EXTRA_PREFIX = "_"

#: The authors put the path between matrix and kind (``U_R_packed``), docs/format.md at the end.
_UPSTREAM_MATRIX = re.compile(r"([UV])(_R\d*)_(packed|shape)")
_NANOQUANT = {"scale_pre": "v2", "scale_post": "u1", "scale_mid": "latent_scale"}
_SIGN_LEAVES = re.compile(r"[UV]_packed(_R\d*)?|[UV]_R\d*_packed|V_shared(_R\d*)?")
_LATENT_SCALES = {"u1", "v2", "scale_pre", "scale_post"}
#: Sign matrices of NanoQuant in the order of one of its kernels, such as ``U_int8``.
_PREPARED = re.compile(r"[UV]_(?!packed|shape|R)\w+")


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor name into module path and leaf; the path is empty at the root."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which ``layers.2`` comes before ``layers.10``."""
    return [
        (len(part.lstrip("0")) if index % 2 else 0, part)
        for index, part in enumerate(re.split(r"([0-9]+)", name))
    ]


def module_prefix(module: str) -> str:
    """What the names of a module's tensors begin with."""
    return f"{module}." if module else ""


def is_packed_module(leaves: Iterable[str]) -> bool:
    """Whether the leaves of a module are those of a packed layer, readable or not, or of its latents."""
    names = set(leaves)
    if any(_SIGN_LEAVES.fullmatch(leaf) for leaf in names):
        return True
    if names & _NANOQUANT.keys() or any(map(is_prepared_leaf, names)):
        return True
    return {"U", "V"} <= names and bool(names & _LATENT_SCALES)


def is_prepared_leaf(leaf: str) -> bool:
    """Whether a leaf is a sign matrix in the order of some kernel, and so not to be read."""
    return _PREPARED.fullmatch(leaf) is not None


def plain_leaf(leaf: str) -> str:
    """Return the name of docs/format.md for a leaf of any known layout."""
    match = _UPSTREAM_MATRIX.fullmatch(leaf)
    if match:
        matrix, suffix, kind = match.groups()
        return f"{matrix}_{kind}{suffix}"
    return _NANOQUANT.get(leaf, leaf)


def upstream_leaf(matrix: str, path: int, kind: str) -> str:
    """Return the authors' name of a sign matrix, for example ``U_R_packed``.

    Args:
        matrix: ``"U"`` or ``"V"``.
        path: index of the path.
        kind: ``"packed"`` or ``"shape"``.
    """
    return f"{matrix}{path_suffix(path)}_{kind}"
