"""Dual-SVID: from two real factors to signs and three scale vectors, and back to a dense weight."""

from __future__ import annotations

import torch

from littlebit2_kernels.format import WORD_BITS, PackedPath
from littlebit2_kernels.packing import pack_signs, unpack_signs

from .numerics import binary_exponent, check_matrix, times_power_of_two

__all__ = ["add_path", "dual_svid", "path_factors", "rank_one", "scale_path"]

#: Latent scales stay within 2**+-this; only a layer beyond it spills magnitude into the other scales.
_LATENT_EXPONENT_LIMIT = 64
_POWER_STEPS = 500
#: Rows, and columns, reconstructed at a time; a multiple of the word size.
_BLOCK_ROWS = 512


def dual_svid(a: torch.Tensor, b: torch.Tensor) -> PackedPath:
    """Binarize the product ``a @ b`` (LittleBit, arXiv 2506.13771, Dual-SVID).

    The signs are kept as they are, with ``sign(0) = +1``. The best rank-1 approximations
    ``|a| ~ s p q^T`` and ``|b| ~ t r w^T`` give ``out_scale`` along ``p``, ``in_scale`` along ``w``, and
    ``latent_scale`` along ``q * r``.

    ``out_scale`` and ``in_scale`` are given a root mean square of 1 and the latent scale carries the
    magnitude, so that ``x * in_scale`` has the range of ``x`` and suits half precision. The scales of
    an all-zero row, column or latent direction are exactly 0.

    Args:
        a: ``[N, R]``, float32 or float64, R a multiple of 8.
        b: ``[R, K]``, like ``a``.

    Returns:
        The path, with float32 scales, on the device of ``a``.

    Raises:
        TypeError: ``a`` or ``b`` is not a real floating-point tensor.
        ValueError: ``a`` and ``b`` do not share R, hold NaN or infinity, R is no multiple of 8, or the
            magnitude does not fit three float32 scales.
    """
    check_matrix("a", a)
    check_matrix("b", b)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"b.size(0) must equal a.size(1) = {a.shape[1]}, got {b.shape[0]}")
    exponent_a, exponent_b = binary_exponent(a), binary_exponent(b)
    out_scale, latent_a = rank_one(times_power_of_two(a, -exponent_a).abs_())
    latent_b, in_scale = rank_one(times_power_of_two(b, -exponent_b).abs_())
    out_rms, in_rms = _rms(out_scale), _rms(in_scale)
    latent_scale = (latent_a * out_rms).double() * (latent_b * in_rms).double()
    path = PackedPath(
        v=pack_signs(b),
        u=pack_signs(a),
        in_scale=(in_scale / _or_one(in_rms)).float(),
        latent_scale=latent_scale.float(),
        out_scale=(out_scale / _or_one(out_rms)).float(),
    )
    return scale_path(path, exponent_a + exponent_b)


def rank_one(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best rank-1 approximation ``outer(left, right)`` of a non-negative matrix.

    Power iteration from the column sums of ``matrix``: the leading singular pair of a non-negative matrix
    is non-negative (Perron-Frobenius), so the start is never orthogonal to it.

    Args:
        matrix: ``[rows, cols]``, non-negative, largest entry around 1 so that squares stay in range.

    Returns:
        ``left`` ``[rows]`` holding the singular value, and ``right`` ``[cols]`` of unit norm (both zero
        for a zero matrix), non-negative.
    """
    tolerance = 4 * torch.finfo(matrix.dtype).eps
    right = _unit(matrix.sum(0))
    for _ in range(_POWER_STEPS):
        following = _unit(matrix.T @ (matrix @ right))
        change = float(torch.linalg.vector_norm(following - right))
        right = following
        if change <= tolerance:
            break
    return matrix @ right, right


def scale_path(path: PackedPath, exponent: int) -> PackedPath:
    """Return ``path`` with its weight multiplied by ``2**exponent``, exactly while in float32's range.

    The latent scale takes the factor up to ``2**+-64``; the rest is shared by the other two scales.

    Raises:
        ValueError: the path has a single stage, or a scale would overflow float32.
    """
    if path.latent_scale is None:
        raise ValueError("path must have two stages to be scaled, got a single-stage path")
    present = binary_exponent(path.latent_scale)
    limit = _LATENT_EXPONENT_LIMIT
    latent = max(-limit, min(limit, present + exponent)) - present
    inward = (exponent - latent) // 2
    return PackedPath(
        v=path.v,
        u=path.u,
        in_scale=times_power_of_two(path.in_scale, inward),
        latent_scale=times_power_of_two(path.latent_scale, latent),
        out_scale=times_power_of_two(path.out_scale, exponent - latent - inward),
    )


def path_factors(path: PackedPath, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dense ``left`` ``[N, R]`` and ``right`` ``[R, K]`` whose product is the weight of ``path``.

    Raises:
        ValueError: the path has a single stage.
    """
    if path.u is None or path.latent_scale is None:
        raise ValueError("path must have two stages, got a single-stage path")
    left = unpack_signs(path.u, path.rank, dtype)
    left.mul_(path.out_scale.to(dtype).unsqueeze(1)).mul_(path.latent_scale.to(dtype))
    right = unpack_signs(path.v, path.in_features, dtype)
    return left, right.mul_(path.in_scale.to(dtype))


def add_path(target: torch.Tensor, path: PackedPath, factor: float = 1) -> None:
    """Add ``factor`` times the weight of ``path`` to ``target`` ``[N, K]`` in place, by blocks.

    Raises:
        ValueError: the path has a single stage.
    """
    if path.u is None or path.latent_scale is None:
        raise ValueError("path must have two stages, got a single-stage path")
    latent = path.latent_scale.to(target.dtype)
    for first in range(0, target.shape[1], _BLOCK_ROWS):
        columns = slice(first, min(first + _BLOCK_ROWS, target.shape[1]))
        words = slice(first // WORD_BITS, -(-columns.stop // WORD_BITS))
        right = unpack_signs(path.v[:, words].contiguous(), columns.stop - first, target.dtype)  # [R, c]
        right.mul_(path.in_scale[columns].to(target.dtype))
        for start in range(0, target.shape[0], _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            left = unpack_signs(path.u[rows], path.rank, target.dtype)
            left.mul_(path.out_scale[rows].to(target.dtype).unsqueeze(1)).mul_(latent)
            target[rows, columns].addmm_(left, right, alpha=factor)
            del left  # before the next one is made
        del right


def _rms(vector: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(vector) / vector.numel() ** 0.5


def _unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / _or_one(torch.linalg.vector_norm(vector))


def _or_one(value: torch.Tensor) -> torch.Tensor:
    return torch.where(value > 0, value, 1)
