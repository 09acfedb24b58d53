"""Double Binary Factorization (DBF): scales and packed sign matrices in turn, spread over several modules.

Of the layer ``q_proj``: ``q_proj.0.w`` ``[K]``, ``q_proj.1.bp`` (signs ``[R, K]``), ``q_proj.2.w`` ``[R]``,
``q_proj.3.bp`` (signs ``[N, R]``) and ``q_proj.4.w`` ``[N]``, applied in this order: our path with
``in_scale``, ``V``, ``latent_scale``, ``U`` and ``out_scale``. In the other variant the sign matrices come
with a scale of their own, ``.0.bp .0.scale .1.w .2.bp .2.scale``: it multiplies the matrix by torch's
broadcasting, so ``[cols]`` and ``[1, cols]`` scale its columns, ``[rows, 1]`` its rows, and one element all.

Signs are flat uint8: rows without padding between them, most significant bit first, a set bit for +1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from littlebit2.checkpoint.specs import LayerSpec
from littlebit2_kernels.format import RANK_MULTIPLE, LayerShape
from littlebit2_kernels.packing import pack_signs

from .examination import Examination, ReadInts
from .layout import Layout, Leaves, Modules, StoredLayer

__all__ = ["DoubleBinary"]

_STEP = re.compile(r"(.+)\.([0-9]+)")
_SIGNS = "bp"
#: The names of the tensors of both variants: in_scale, V, latent_scale, U, out_scale.
_FIVE = ("0.w", "1.bp", "2.w", "3.bp", "4.w")
_THREE = ("0.scale", "0.bp", "1.w", "2.bp", "2.scale")
#: Under which they are in ``StoredLayer.tensors``.
_NAMES = ("v2", "V_packed", "latent_scale", "U_packed", "u1")


class DoubleBinary(Layout):
    """DBF's state dicts; ranks need not be multiples of 8."""

    name = "dbf"

    def claims(self, leaves: Collection[str]) -> bool:
        """See :meth:`.Layout.claims`: no single module is a layer."""
        return False

    def find(self, modules: Modules) -> dict[str, Leaves]:
        """See :meth:`.Layout.find`: steps that belong to one module of which some step holds signs."""
        steps: dict[str, dict[str, Leaves]] = {}
        for module, leaves in modules.items():
            match = _STEP.fullmatch(module)
            if match:
                steps.setdefault(match[1], {})[match[2]] = leaves
        found: dict[str, Leaves] = {}
        for layer, parts in steps.items():
            if any(_SIGNS in leaves for leaves in parts.values()):
                own = modules.get(layer, {})
                found[layer] = {
                    f"{step}.{leaf}": e for step, part in parts.items() for leaf, e in part.items()
                }
                found[layer] = {**found[layer], **own}
        return found

    def examine(
        self, module: str, leaves: Leaves, read_ints: ReadInts, *, strict: bool
    ) -> tuple[StoredLayer | None, list[str]]:
        """See :meth:`.Layout.examine`."""
        seen = Examination(module, leaves)
        names = _THREE if "0.bp" in leaves or "2.bp" in leaves else _FIVE
        first, v, middle, u, last = names
        rank = seen.scale(middle)
        sizes: dict[str, int | None] = {}
        if names is _FIVE:
            sizes = {"in": seen.scale(first), "out": seen.scale(last)}
        else:
            sizes = {"in": _other_side(seen, v, first, rank, 1), "out": _other_side(seen, u, last, rank, 0)}
        for leaf, side in ((v, "in"), (u, "out")):
            _check_signs(seen, leaf, rank, sizes[side])
        bias = seen.scale("bias", sizes["out"], optional=True) is not None
        for leaf in sorted(set(leaves) - seen.used):
            seen.fault(leaf, "is unexpected")
        if seen.faults or rank is None or sizes["in"] is None or sizes["out"] is None:
            return None, seen.faults or [f"layer {module}: its sizes do not follow from its tensors"]
        try:
            shape = LayerShape(sizes["in"], sizes["out"], (-(-rank // RANK_MULTIPLE) * RANK_MULTIPLE,), (0,))
        except ValueError as error:
            return None, [f"layer {module}: {error}"]
        tensors = {ours: leaves[theirs] for ours, theirs in zip(_NAMES, names, strict=True)}
        if bias:
            tensors["bias"] = leaves["bias"]
        return StoredLayer(LayerSpec(module, shape, bias), self, tensors, (), (rank,)), []

    def decode(self, layer: StoredLayer, data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :meth:`.Layout.decode`."""
        tensors = {leaf: data[entry.name] for leaf, entry in layer.tensors.items()}
        (rank,) = layer.stored_ranks
        k, n = layer.spec.shape.in_features, layer.spec.shape.out_features
        state = {
            "V_packed": _words(tensors["V_packed"], rank, k),
            "U_packed": _words(tensors["U_packed"], n, rank),
            "latent_scale": tensors["latent_scale"].float().flatten().clone(),
        }
        if layer.tensors["v2"].name.endswith(".w"):
            state["v2"], state["u1"] = (tensors[leaf].float().flatten().clone() for leaf in ("v2", "u1"))
        else:
            v_rows, state["v2"] = _factors(tensors["v2"], rank, k)
            state["u1"], u_cols = _factors(tensors["u1"], n, rank)
            state["latent_scale"] *= v_rows * u_cols
        if "bias" in tensors:
            state["bias"] = tensors["bias"].float().flatten().clone()
        return state


def _other_side(seen: Examination, signs: str, scale: str, rank: int | None, side: int) -> int | None:
    """The size of a sign matrix beside the rank: ``[R, K]`` with ``side`` 1, ``[N, R]`` with 0.

    From the scale where it scales that side, else from the number of bytes.
    """
    entry, matrix = seen.take(scale), seen.tensors.get(signs)
    if entry is None or matrix is None or rank is None:
        return None
    if entry.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        seen.fault(scale, f"must be float32, float16 or bfloat16, got {entry.dtype}")
    shape = (1,) * (2 - len(entry.shape)) + entry.shape  # as torch broadcasts it
    across = (rank, 1) if side else (1, rank)
    if len(shape) == 2 and shape[1 - side] == 1 and shape[side] > 1:
        return shape[side]
    if shape in {(1, 1), across}:
        return 8 * matrix.numel // rank
    wanted = f"[{rank}, 1], [1, in_features]" if side else f"[out_features, 1], [1, {rank}]"
    seen.fault(scale, f"must have shape {wanted} or one element, got {list(entry.shape)}")
    return None


def _check_signs(seen: Examination, leaf: str, rank: int | None, other: int | None) -> None:
    entry = seen.take(leaf)
    if entry is None or rank is None or other is None:
        return
    expected = -(-rank * other // 8)
    if entry.dtype != torch.uint8 or entry.numel != expected:
        seen.fault(
            leaf,
            f"must hold {expected} uint8, {rank} x {other} signs, got {entry.dtype} of shape "
            f"{list(entry.shape)}",
        )


def _words(packed: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    bits = (packed.flatten()[:, None] >> shifts & 1).flatten()[: rows * cols]
    return pack_signs(bits.reshape(rows, cols).to(torch.int8) * 2 - 1)


def _factors(scale: torch.Tensor, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of a ``[rows, cols]`` matrix as one vector for its rows and one for its columns."""
    scale = scale.float()
    row_scale, col_scale = scale.new_ones(rows), scale.new_ones(cols)
    if scale.numel() == 1:
        row_scale *= scale.reshape(())
    elif scale.dim() == 2 and scale.shape[1] == 1:
        row_scale *= scale[:, 0]
    else:
        col_scale *= scale.flatten()
    return row_scale, col_scale
