"""The arithmetic contract of the lookup kernels (csrc/cpu/prepacked/lookup.h, layout.h) once more, in numpy.

Nothing of the layout in memory, of tiles, tasks or vectors is here: only which numbers are rounded, and in
which order floats are added. Results must agree with those of the kernels in every bit.
"""

from __future__ import annotations

import numpy as np
import torch

from littlebit2_kernels import PackedLinear
from littlebit2_kernels.format import unpack_signs_reference

Array = np.ndarray

GROUP = 5
WORD = 15
CHUNK_WORDS = 48
SEGMENTS = 4
LEAST_BOUND = np.float32(2.0**-110)


def segments_of(cols: int) -> list[list[slice]]:
    """Columns of every chunk, by the segment that it belongs to."""
    words = -(-cols // WORD)
    chunks = -(-words // CHUNK_WORDS)
    segments = min(chunks, SEGMENTS)
    chunks = -(-chunks // segments) * segments
    per_chunk = -(-words // chunks)
    chunk_words = per_chunk + per_chunk % 2
    slices = [
        slice(first, min(first + chunk_words * WORD, cols)) for first in range(0, cols, chunk_words * WORD)
    ]
    per_segment = -(-len(slices) // segments)
    return [slices[i : i + per_segment] for i in range(0, len(slices), per_segment)]


def emulate(x: torch.Tensor, packed: PackedLinear, mode: str) -> torch.Tensor:
    """The result of ``littlebit_linear(x, prepack(packed), activation=mode)``, of finite values."""
    if not x.numel():
        return x.new_empty(*x.shape[:-1], packed.out_features)
    tokens = x.float().reshape(-1, packed.in_features).numpy()
    total = np.zeros((len(tokens), packed.out_features), np.float32)
    with np.errstate(over="ignore"):
        for index, path in enumerate(packed.paths):
            z = tokens * path.in_scale.numpy()
            signs = unpack_signs_reference(path.v, path.in_features, torch.int64).numpy()
            factor = np.ones((len(tokens), 1), np.float32)
            if mode == "sign":
                factor = mean_magnitude(z)
            if path.u is not None and path.latent_scale is not None:
                # Segments first, then their sum.
                latent = in_order([in_order(sums) for sums in chunk_sums(mode, z, signs)])
                z = latent * path.latent_scale.numpy()
                signs = unpack_signs_reference(path.u, path.rank, torch.int64).numpy()
                if mode == "sign":
                    factor = mean_magnitude(z) * factor
            # The last matrix knows no segments.
            dots = in_order([chunk for segment in chunk_sums(mode, z, signs) for chunk in segment])
            term = (dots * factor) * path.out_scale.numpy()
            total = term if index == 0 else total + term
    y = torch.from_numpy(total)
    if packed.bias is not None:
        y = y + packed.bias
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.out_features)


def in_order(parts: list[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def chunk_sums(mode: str, z: Array, signs: Array) -> list[list[Array]]:
    """[M, rows] of every chunk."""
    sums = {"exact": exact_sums, "int16": int16_sums, "int8": int8_sums, "sign": sign_counts}[mode]
    return [[sums(z[:, c], signs[:, c]) for c in segment] for segment in segments_of(z.shape[1])]


def pad_to_words(z: Array, signs: Array) -> tuple[Array, Array]:
    """Both to an even number of words: columns of 0 and +1."""
    extra = -z.shape[1] % (2 * WORD)
    return np.pad(z, ((0, 0), (0, extra))), np.pad(signs, ((0, 0), (0, extra)), constant_values=1)


def tables_of(y: Array) -> Array:
    """Signed sums [M, groups, 32] of the groups of 5 columns, added in order."""
    groups = y.reshape(len(y), -1, GROUP)
    tables = np.empty((*groups.shape[:2], 32), np.float32)
    for entry in range(32):
        terms = [-groups[..., j] if entry >> j & 1 else groups[..., j] for j in range(GROUP)]
        tables[..., entry] = in_order(terms)
    return tables


def codes_of(signs: Array) -> Array:
    """Table entry of every row and group [rows, groups]."""
    negative = (signs < 0).reshape(len(signs), -1, GROUP)
    return negative @ (1 << np.arange(GROUP))


def exact_sums(z: Array, signs: Array) -> Array:
    z, signs = pad_to_words(z, signs)
    tables, codes = tables_of(z), codes_of(signs)
    sums = np.zeros((len(z), len(signs)), np.float32)
    for group in range(codes.shape[1]):
        sums = sums + tables[:, group, codes[:, group]]
    return sums


def integer_sums(y: Array, signs: Array, unit: Array) -> Array:
    tables = np.rint(tables_of(y)).astype(np.int64)
    assert np.abs(tables).max(initial=0) <= 32767
    codes = codes_of(signs)
    sums = np.zeros((len(y), len(signs)), np.int64)
    for group in range(0, codes.shape[1], 6):
        window = sum(tables[:, g, codes[:, g]] for g in range(group, group + 6))
        assert np.abs(window).max(initial=0) <= 32767, "a window must fit 16 bits"
        sums += window
    return unit * sums.astype(np.float32)


def int16_sums(z: Array, signs: Array) -> Array:
    z, signs = pad_to_words(z, signs)
    words = np.abs(z).reshape(len(z), -1, 2, WORD)
    lanes = np.zeros((len(z), 16), np.float32)
    lanes[:, :WORD] = (words[:, :, 0] + words[:, :, 1]).max(axis=1, initial=0)
    bound = np.maximum(tree(lanes), LEAST_BOUND)
    limit = np.float32(32760)
    return integer_sums(z * (limit / bound), signs, bound * (np.float32(1) / limit))


def int8_sums(z: Array, signs: Array) -> Array:
    z, signs = pad_to_words(z, signs)
    bound = np.maximum(np.abs(z).max(axis=1, keepdims=True, initial=0), LEAST_BOUND)
    limit = np.float32(127)
    return integer_sums(np.rint(z * (limit / bound)), signs, bound * (np.float32(1) / limit))


def sign_counts(z: Array, signs: Array) -> Array:
    return (np.where(z < 0, -1, 1) @ signs.T).astype(np.float32)


def mean_magnitude(z: Array) -> Array:
    """[M, 1]: 16 lanes and a tree in every chunk, chunks in order."""
    total = np.zeros((len(z), 1), np.float32)
    for chunk in (c for segment in segments_of(z.shape[1]) for c in segment):
        magnitudes = np.abs(z[:, chunk])
        magnitudes = np.pad(magnitudes, ((0, 0), (0, -magnitudes.shape[1] % 16)))
        lanes = np.zeros((len(z), 16), np.float32)
        for first in range(0, magnitudes.shape[1], 16):
            lanes = lanes + magnitudes[:, first : first + 16]
        total = total + tree(lanes)
    return total / np.float32(z.shape[1])


def tree(lanes: Array) -> Array:
    """Sum of 16 lanes [M, 16] -> [M, 1]: l with l + 8, l + 4, l + 2, l + 1."""
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    return lanes
